"""What can be said of the CUDA C++ kernels by compiling them: their code for every GPU, and how a call is cut into items."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from prefix_kernels import select
from prefix_kernels.backends import cuda
from support.building import ROOT, cuda_compiler, cxx_compiler

RESULTS = ROOT / "benchmarks" / "results"
TABLE = Path(__file__).with_name("cuda_code.json")


@pytest.mark.skipif(cuda_compiler() is None, reason="needs nvcc, and none is found")
def test_every_kernel_compiles_and_spills_nothing():
    """Three quarters of a minute: 84 kernels. tools/compile_cuda.py --write writes the table anew."""
    run = subprocess.run((sys.executable, "tools/compile_cuda.py", str(TABLE)), cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "84 kernels, 0 problems" in run.stdout, f"{run.stdout}\n{run.stderr}"


def test_measured_is_what_was_measured():
    """It comes after the backends that were measured as long as it was not; then the order is to be looked at again."""
    rows = [row for file in RESULTS.glob("*/*.json") for row in json.loads(file.read_text()).get("rows", [])]
    measured = [row["key"] for row in rows if "median" in row.get("ways", {}).get("cuda", {})]
    assert select.REASONS["cuda"].startswith("measured") == bool(measured), measured
    assert measured or select.BACKENDS.index("cuda") > max(map(select.BACKENDS.index, ("triton", "sdpa")))


def test_the_backend_knows_the_schedule():
    sources = "".join((ROOT / "csrc" / "cuda" / name).read_text() for name in ("tile_sizes.h", "schedule.h"))
    assert f"FEW_QUERIES = {cuda.FEW_QUERIES};" in sources
    assert f"READ_AGAIN = {cuda.READ_AGAIN // 2**20} << 20;" in sources
    assert f"CACHED = {cuda.CACHED // 2**20} << 20;" in sources
    assert "serves_few(int64_t dim) { return dim == 64 || dim == 128; }" in sources
    assert "> CACHED || z.batch * token * (2 * z.prefix_len - own_columns(z)) > 2 * READ_AGAIN;" in sources


@pytest.mark.skipif(cxx_compiler() is None, reason="needs a C++ compiler, and none is found")
def test_schedule(tmp_path):
    """schedule_check.cpp says what holds."""
    source = ROOT / "tests" / "support" / "emulator" / "schedule_check.cpp"
    command = (cxx_compiler(), "-std=c++17", "-O1", f"-I{ROOT / 'csrc'}", "-o", tmp_path / "check", source)
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    run = subprocess.run([tmp_path / "check"], capture_output=True, text=True)
    assert run.returncode == 0 and int(run.stdout.split()[0]) > 10_000, f"{run.stdout}\n{run.stderr}"
