"""Code that may hang or crash a device, tried in a process of its own, once for all of pytest-xdist's workers."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Trial(NamedTuple):
    returncode: int
    stderr: str


def trial_of(code: str, folder: Path, seconds: float) -> Trial:
    """What became of running `code`. folder: one that all workers see; the first of them runs it, the others wait."""
    name = hashlib.sha256(code.encode()).hexdigest()[:16]
    begun, ended = folder / f"{name}.begun", folder / f"{name}.json"
    try:
        begun.touch(exist_ok=False)
    except FileExistsError:
        deadline = time.monotonic() + seconds + 5
        while not ended.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        return Trial(*json.loads(ended.read_text())) if ended.exists() else Trial(1, "the worker that tried it did not end")
    try:
        run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=seconds)
        trial = Trial(run.returncode, run.stderr)
    except subprocess.TimeoutExpired:
        trial = Trial(1, f"it took more than {seconds} s")
    written = ended.with_suffix(".new")
    written.write_text(json.dumps(trial))
    os.replace(written, ended)
    return trial


def shared_folder(tmp_path_factory) -> Path:
    """Of all workers of this session."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
