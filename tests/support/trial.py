"""Code that may hang or crash a device, tried in processes of its own, once for all of pytest-xdist's workers."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Trial(NamedTuple):
    returncode: int
    stderr: str


def trial_of(codes: Sequence[str], folder: Path, seconds: float) -> Trial:
    """What became of running each of `codes`: the first that failed, else success. seconds: for each of them.

    folder: one that all workers see. Each code is run by the first of them that comes to it, so that several run at a time.
    """
    places = [folder / hashlib.sha256(code.encode()).hexdigest()[:16] for code in codes]
    deadline = time.monotonic() + seconds * len(places)
    for code, place in zip(codes, places, strict=True):
        _run_unless_begun(code, place, seconds)
    trials = [_ended(place, deadline) for place in places]
    return next((trial for trial in trials if trial.returncode != 0), Trial(0, ""))


def _ended(place: Path, deadline: float) -> Trial:
    ended = place.with_suffix(".json")
    while not ended.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return Trial(*json.loads(ended.read_text())) if ended.exists() else Trial(1, "the worker that tried it did not end")


def _run_unless_begun(code: str, place: Path, seconds: float) -> None:
    try:
        place.with_suffix(".begun").touch(exist_ok=False)
    except FileExistsError:
        return
    try:
        run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=seconds)
        trial = Trial(run.returncode, run.stderr)
    except subprocess.TimeoutExpired:
        trial = Trial(1, f"it took more than {seconds} s")
    written = place.with_suffix(".new")
    written.write_text(json.dumps(trial))
    os.replace(written, place.with_suffix(".json"))


def shared_folder(tmp_path_factory) -> Path:
    """Of all workers of this session."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
