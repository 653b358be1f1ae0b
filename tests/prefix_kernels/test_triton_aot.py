"""Every row of the Triton tile table compiles and spills nothing: those that changed since they were proven, and a sample."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VERDICTS = Path(__file__).with_name("aot_verdicts.json")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, which is not installed")
def test_tile_rows():
    """`make aot` proves all of them and writes the file of verdicts; this takes its word for what did not change."""
    command = (sys.executable, "tools/compile_kernels.py", "--proven", str(VERDICTS))
    run = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if run.returncode != 0:
        pytest.fail(f"{run.stdout}\n{run.stderr}", pytrace=False)
    assert run.stdout.splitlines()[-1].split(" with ")[0] in [f"{n} of {n} rows pass" for n in range(3, 8)]
