"""The stage `tests` of run_gpu.py: pytest's outcomes as they come, and the CUDA memory checker over a few of the tests.

Most of the time goes into compiling kernels, so with pytest-xdist the tests run on all processor cores. This module is then a
plug-in of every test process too.
"""

from __future__ import annotations

import importlib.util
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import measure

SELECTION = ["-m", "gpu", "tests/prefix_tuning", "tests/prefix_kernels", "tests/benchmarks"]
FIRST = ("test_triton_hopper_backward.py", "test_triton_hopper.py")  # their kernels take longest to compile
DRY_SELECTION = ["tests/prefix_kernels/test_problem.py"]
SECONDS_A_TEST = 150  # the first one of a file may wait for all of its kernels to be compiled
MOST_PROCESSES = 15  # each with a CUDA context of its own
SANITIZER = "compute-sanitizer"
SANITIZER_TOOLS = ("memcheck", "racecheck")  # addresses out of bounds; shared memory read and written without a barrier
# Without torch's kernels: racecheck reports hazards in cuDNN's and in the memory-efficient one.
SANITIZED = ["-m", "gpu", "-k", "plain or mqa", "tests/prefix_kernels", "--ignore", "tests/prefix_kernels/test_stock_cuda.py"]
SANITIZER_SECONDS = 40  # left at least, or it is not started
LOST_DEVICE = 3  # a worker's exit status
LINES = 5
DONE = "GPU_TESTS_DONE"  # environment variable: a file of the tests that have a row, for the test processes of pytest-xdist


class Recorder:
    """pytest plug-in: a row for each test, on disk within a second; tests that have a row already are left out.

    The files take turns, each in a shuffled order (always the same one): a stage that is cut off has seen something of all.
    parallel: the tests run in other processes, which choose their order, watch the time and restart themselves.
    """

    def __init__(self, results: measure.Results, begin: Callable[[str], None], parallel: bool = False):
        self.results, self.begin, self.parallel, self._written = results, begin, parallel, 0.0

    def pytest_collection_modifyitems(self, config: Any, items: list) -> None:
        done = [item for item in items if item.nodeid in self.results.rows]
        config.hook.pytest_deselected(items=done)
        left = [item for item in items if item.nodeid not in self.results.rows]
        random.Random(0).shuffle(left)
        seen: Counter = Counter()
        turns = []
        for item in left:
            seen[item.path] += 1
            turns.append(seen[item.path])
        items[:] = [item for _, item in sorted(zip(turns, left, strict=True), key=lambda pair: pair[0])]

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._put(outcome_row(report.nodeid, "failed", report.longreprtext))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.begin(nodeid)
        if not self.parallel:
            signal.alarm(SECONDS_A_TEST)  # no handler: the signal ends this process, wherever it hangs

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or not report.passed:
            before = self.results.rows.get(report.nodeid)
            if before is None or before["outcome"] == "passed":  # a teardown that fails counts, after one that failed does not
                self._put(outcome_row(report.nodeid, report.outcome, report.longreprtext))

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        signal.alarm(0)
        if self.results.rows.get(nodeid, {}).get("outcome") == "failed" and not self.parallel:
            end_if_device_is_lost()

    def pytest_sessionfinish(self) -> None:
        self._put(counts(self.results))

    def _put(self, row: dict[str, Any]) -> None:
        late = time.monotonic() - self._written > 1
        self.results.put(row, write=late or row.get("outcome") != "passed")
        self._written = time.monotonic() if late else self._written


def end_if_device_is_lost() -> None:
    """Every later test of this process would fail with it."""
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except Exception:
            os._exit(LOST_DEVICE)


def pytest_collection_modifyitems(items: list) -> None:
    """In a test process of pytest-xdist, which is given tests in their order; all of them must find the same ones."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        done = set(Path(os.environ[DONE]).read_text(encoding="utf-8").splitlines())
        items[:] = sorted((i for i in items if i.nodeid not in done), key=lambda item: item.path.name not in FIRST)


def pytest_runtest_logreport(report: Any) -> None:
    """In a test process of pytest-xdist, which starts another one for the tests that are left."""
    if report.failed and "PYTEST_XDIST_WORKER" in os.environ:
        end_if_device_is_lost()


def outcome_row(nodeid: str, outcome: str, text: str) -> dict[str, Any]:
    """A test's row; of what went wrong the last lines that pytest marks as the error, else the first lines there are."""
    row = {"key": nodeid, "outcome": outcome, "complete": True}
    if outcome != "passed":
        lines = [line for line in text.splitlines() if line.strip()]
        said = [line[1:].strip() for line in lines if re.match(r"E\s", line)]
        row["lines"] = [line[:300] for line in (said or lines)[:LINES]]
    return row


def counts(results: measure.Results) -> dict[str, Any]:
    """How many tests passed, failed and were skipped; the sanitizer's tools are not among them."""
    others = {sanitizer_row(tool) for tool in SANITIZER_TOOLS}
    found = Counter(row["outcome"] for key, row in results.rows.items() if "outcome" in row and key not in others)
    return {"key": "counts", **{name: found[name] for name in ("passed", "failed", "skipped")}}


def run_tests(results: measure.Results, begin: Callable[[str], None], dry_run: bool) -> int:
    """Runs what has no row yet; pytest's exit status."""
    import pytest

    arguments = ["-q", "-p", "no:cacheprovider", *(DRY_SELECTION if dry_run else SELECTION)]
    processes = min((os.cpu_count() or 1) - 1, MOST_PROCESSES)
    parallel = processes > 1 and not dry_run and all(importlib.util.find_spec(name) for name in ("xdist", "pytest_timeout"))
    with tempfile.TemporaryDirectory() as folder:
        if parallel:
            (Path(folder) / "done").write_text("\n".join(results.rows), encoding="utf-8")
            os.environ |= {"OMP_NUM_THREADS": "1", DONE: f"{folder}/done"}
            arguments += ["-p", __name__, "-n", str(processes), "--maxschedchunk=1"]
            arguments += [f"--timeout={SECONDS_A_TEST}", "--timeout-method=thread"]
        return int(pytest.main(arguments, plugins=[Recorder(results, begin, parallel)]))


def sanitizer_row(tool: str) -> str:
    """The key of a tool's row."""
    return f"{SANITIZER} {tool}"


def sanitize(tool: str, seconds: float) -> dict[str, Any]:
    """The row of one of SANITIZER_TOOLS: passed, failed with its last lines, or skipped with the reason."""
    key, program = sanitizer_row(tool), shutil.which(SANITIZER) or shutil.which(f"/usr/local/cuda/bin/{SANITIZER}")
    reason = None
    if not torch.cuda.is_available():
        reason = "no CUDA device"
    elif program is None:
        reason = f"{SANITIZER} is not installed"
    elif seconds < SANITIZER_SECONDS:
        reason = f"{seconds:.0f} s are left"
    if reason is not None:
        return {"key": key, "outcome": "skipped", "lines": [reason]}
    command = [program, "--tool", tool, "--error-exitcode", "9", "--print-limit", "5", sys.executable, "-m", "pytest", "-q",
               "-x", "-p", "no:cacheprovider", *SANITIZED]  # fmt: skip
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else one allocation hides many
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, env=environment, cwd=Path(__file__).resolve().parents[1]
        )
    except subprocess.TimeoutExpired:
        return {"key": key, "outcome": "skipped", "lines": [f"not finished within {seconds:.0f} s"]}
    said = re.compile(r"(?<!=)={9} +\S.*|\d+ (passed|failed|error).*")  # the tool's lines may follow pytest's dots in a line
    lines = [found.group() for line in done.stdout.splitlines() if (found := said.search(line))]
    return {"key": key, "outcome": "failed" if done.returncode else "passed", "complete": True, "lines": lines[-16:]}
