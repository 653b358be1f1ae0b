"""Every stage of run_gpu.sh without a GPU, on tiny shapes; crashes, hangs and restarts of its workers."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

import gpu_jobs
import gpu_tests
import measure
import run_gpu

ROOT = Path(__file__).resolve().parents[2]
ROWS = {
    "tests": ("compute-sanitizer memcheck", "compute-sanitizer racecheck", "counts"),
    "op": ("ceilings", "forward B3 S8 H4/2 D16 P5 bfloat16", "forward+backward packed 3×7 H4/2 D16 P5 bfloat16"),
    "decode": ("ceilings", "decode B3 S12 H4/2 D16 P8 bfloat16", "decode B1 S12 H4/2 D16 P0 bfloat16"),
    "e2e": ("train tiny B2 P4", "generate tiny B2 P4"),
}


def start(*arguments):
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [ROOT / "benchmarks" / "run_gpu.sh", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment, timeout=120)


@pytest.mark.parametrize("stage", ROWS)
def test_dry_run_of_a_stage(stage, tmp_path):
    done = start("--dry-run", str(tmp_path / "results"), stage)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "results" / f"{stage}.json").read_text())
    rows = {row["key"]: row for row in found["rows"]}
    assert rows.keys() >= set(ROWS[stage])
    assert found["environment"]["torch"] and found["environment"]["source"]
    assert {file.name for file in (tmp_path / "results").iterdir()} == {f"{stage}.json", "workers.log"}
    if stage == "tests":
        assert rows["counts"]["passed"] >= 5 and rows["counts"]["failed"] == 0
        assert f"{rows['counts']['passed']} passed, 0 failed" in done.stdout
    else:
        assert all(row["complete"] and "failed" not in row for row in rows.values())
        ways = [way for row in rows.values() for way in row.get("ways", {}).values()]
        assert ways and all("median" in way or "not_available" in way for way in ways)
        assert all(key in done.stdout for key in rows)


@pytest.mark.parametrize("arguments", [(), ("a", "b", "c"), ("a", "wrong"), ("--wrong", "a")])
def test_wrong_arguments(arguments, tmp_path):
    done = start(*arguments)
    assert done.returncode == 2 and "usage" in done.stderr


FAKE_WORKER = """#!/bin/bash
# run_gpu.py RESULTS STAGE --progress FILE
cat > "{folder}/without.$(ls "{folder}" | grep -c without)"
{body}
"""


@pytest.fixture
def supervised(tmp_path, monkeypatch):
    """supervise() with a shell script in the worker's place; gives (results, what each worker was told to leave out)."""

    def run(body, stage="op", seconds=20):
        folder, worker = tmp_path / "told", tmp_path / "worker"
        folder.mkdir()
        worker.write_text(FAKE_WORKER.format(folder=folder, body=body))
        worker.chmod(0o755)
        monkeypatch.setattr(run_gpu.sys, "executable", str(worker))
        args = argparse.Namespace(results=tmp_path, stage=stage, dry_run=True, only=[""])
        run_gpu.supervise(args, ENVIRONMENT, time.monotonic() + seconds)
        told = [json.loads(file.read_text()) for file in sorted(folder.iterdir())]
        assert all(each["environment"] == ENVIRONMENT for each in told)
        return run_gpu.open_results(args, ENVIRONMENT), [each["without"] for each in told]

    return run


ENVIRONMENT = {"source": "abc"}
JOBS = [job for job in gpu_jobs.jobs("op", dry_run=True) if job.what]


def test_a_crash_costs_one_row_and_twice_the_same_way_that_way(supervised):
    first, second = JOBS[0].key, JOBS[1].key
    results, told = supervised(f"""
        n=$(ls "$(dirname "$0")/told" | wc -l)
        [ $n = 1 ] && {{ printf '@{first}\\n+peft\\n+triton\\n' > "$5"; kill -SEGV $$; }}
        [ $n = 2 ] && {{ printf '@{second}\\n+triton\\n' > "$5"; exit 134; }}
        exit 0""")
    assert results.rows[first]["ways"]["triton"] == {"failed": "the worker ended with status -11"}
    assert results.rows[second]["ways"]["triton"] == {"failed": "the worker ended with status 134"}
    assert not results.done(first) and not results.done(second)  # their other ways are still to come
    assert told == [[], [], ["triton"]]


def test_a_job_that_takes_too_long_is_recorded(supervised):
    key = JOBS[0].key
    results, told = supervised(f"""
        n=$(ls "$(dirname "$0")/told" | wc -l)
        [ $n = 1 ] && {{ printf '@{key}\\n' > "$5"; kill -{signal.SIGALRM.value} $$; }}
        exit 0""")
    assert results.rows[key]["failed"] == "it took too long" and len(told) == 2


def test_what_a_lost_device_leaves_goes_to_a_new_worker(supervised):
    results, told = supervised(f"""
        n=$(ls "$(dirname "$0")/told" | wc -l)
        [ $n -le 2 ] && {{ printf '@{JOBS[0].key}\\n' > "$5"; exit {gpu_tests.LOST_DEVICE}; }}
        exit 0""")
    assert len(told) == 3 and results.rows == {}


def test_the_time_of_a_stage_ends_it(supervised):
    begin = time.monotonic()
    results, told = supervised("exec sleep 30", seconds=1)
    assert time.monotonic() - begin < 10 and len(told) == 1 and results.rows == {}


def test_a_worker_that_cannot_begin_is_reported(supervised, capsys):
    _, told = supervised("echo ModuleNotFoundError: no torch >&2; exit 1")
    assert len(told) == 1 and "before its first job: ModuleNotFoundError: no torch" in capsys.readouterr().out


def test_done_jobs_are_left_out_and_failing_ones_keep_their_reason(tmp_path, monkeypatch):
    args = argparse.Namespace(results=tmp_path, stage="op", dry_run=True, progress=tmp_path / "progress", only=[""])
    run_gpu.open_results(args, ENVIRONMENT).put({"key": JOBS[0].key, "complete": True})
    ran = []

    def run_job(job, results, without, begin):
        ran.append(job.name)
        if job is not None and job.what is None:
            raise RuntimeError("CUDA error: boom")
        results.put({"key": job.key, "complete": True})

    monkeypatch.setattr(run_gpu, "run_job", run_job)
    monkeypatch.setattr(run_gpu.json, "load", lambda stream: {"without": [], "environment": ENVIRONMENT})
    assert run_gpu.work(args) == 0
    expected = [job.name for job in gpu_jobs.jobs("op", dry_run=True) if job.name != JOBS[0].name]
    assert ran == expected and (tmp_path / "progress").read_text().splitlines() == [f"@{name}" for name in expected]
    results = run_gpu.open_results(args, ENVIRONMENT)
    assert results.rows["ceilings"]["failed"] == "RuntimeError: CUDA error: boom" and results.done("ceilings")


def test_rows_of_an_earlier_commit_are_kept(tmp_path):
    args = argparse.Namespace(results=tmp_path / "new", stage="op", dry_run=True, fill=tmp_path)
    earlier = ENVIRONMENT | {"commit": "abc", "source": "other"}
    known = measure.Results(tmp_path / "op.json", earlier)
    for row in ({"key": "a", "complete": True}, {"key": "b"}, {"key": "c", "complete": True, "failed": "no"},
                {"key": "d", "complete": True, "commit": "older"},
                {"key": "e", "complete": True, "outcome": "failed"}):  # fmt: skip
        known.put(row)
    for environment, kept in ((ENVIRONMENT | {"device": "another"}, {}), (ENVIRONMENT, {"a": "abc", "d": "older"})):
        run_gpu.fill(args, environment)
        results = run_gpu.open_results(args, environment)
        assert {key: row["commit"] for key, row in results.rows.items()} == kept
    results.put({"key": "b", "complete": True})
    run_gpu.fill(args, ENVIRONMENT)
    assert "commit" not in run_gpu.open_results(args, ENVIRONMENT).rows["b"]


def test_only_some_rows_in_the_order_asked_for():
    every = gpu_jobs.jobs("e2e", dry_run=False)
    found = run_gpu.wanted(every, ["generate SmolLM2-135M B64 P512", "train GPT-2 medium B8"])
    assert [job.key for job in found] == [
        "generate SmolLM2-135M B64 P512",
        *(f"train GPT-2 medium B8 P{n}" for n in (200, 16, 2048)),
    ]
    assert run_gpu.wanted(every, [""]) == every


@pytest.mark.parametrize(("stage", "text"), [("tests", "generate"), ("e2e", "no such row")])
def test_only_rows_that_there_are(stage, text, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_gpu.main([str(tmp_path), stage, "--dry-run", "--only", text])
    assert f"--only: no row of the stage {stage} has {text} in its key" in capsys.readouterr().err


def test_a_row_goes_on_with_the_ways_it_does_not_have(tmp_path, monkeypatch):
    """After a crash, or the end of a stage's time, nothing is tried twice."""
    asked = []

    def measure_on_gpu(case, wanted, put, tried):
        asked.extend(name for name in ("peft", "concat", "flex", "triton", "cuda") if wanted(name))
        assert tried == {"peft": {}, "triton": {"failed": "it took too long"}}
        put({"key": case.key, "ways": tried})

    monkeypatch.setattr(gpu_jobs, "measure_on_gpu", measure_on_gpu)
    monkeypatch.setattr(gpu_jobs.torch.cuda, "is_available", lambda: True)
    results = measure.Results(tmp_path / "op.json", ENVIRONMENT)
    results.put({"key": JOBS[0].key, "ways": {"peft": {}, "triton": {"failed": "it took too long"}}, "commit": "earlier"})
    begun = []
    gpu_jobs.run_job(JOBS[0], results, ["cuda"], begun.append)
    assert asked == begun == ["concat"] and results.rows[JOBS[0].key]["commit"] == "earlier"


def test_flex_attention_is_compiled_after_everything_else():
    jobs = gpu_jobs.jobs("op", dry_run=False)
    compiled = [job.compiled for job in jobs]
    assert compiled == sorted(compiled) and sum(compiled) == gpu_jobs.COMPILED_CASES
    results = argparse.Namespace(rows={jobs[-1].key: {"ways": {"peft": {}}}}, done=lambda key: True)
    assert not jobs[-1].done(results)
    results.rows[jobs[-1].key]["ways"]["flex"] = {}
    assert jobs[-1].done(results)


OUTCOMES = """
import os, pytest
@pytest.fixture
def broken():
    raise OSError("no fixture")
def test_right(): pass
def test_wrong(): assert 1 + 1 == 3, "sum"
def test_left_out(): pytest.skip("no device")
def test_no_set_up(broken): pass
@pytest.fixture
def untidy():
    yield
    raise OSError("no tidying")
def test_untidy(untidy): pass
def test_wrong_and_untidy(untidy): assert False, "first"
def test_crash(): os.environ.get("CALM") or os._exit(9)
"""
LATER = """
def test_later(): open("again", "a").write("x")
"""
RUN_TESTS = """
import sys
import gpu_tests, measure
gpu_tests.DRY_SELECTION = ["--rootdir", sys.argv[1], sys.argv[1] + "/test_some.py"]
results = measure.Results(sys.argv[1] + "/tests.json", {})
begin = lambda name: open(sys.argv[1] + "/begun", "a").write(name.split("::")[-1] + "\\n")
gpu_tests.run_tests(results, begin, dry_run=True)
"""


def test_outcomes_of_tests_are_kept_as_they_come(tmp_path, monkeypatch):
    (tmp_path / "test_some.py").write_text(OUTCOMES)
    path = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT), str(ROOT / "python")])
    monkeypatch.setenv("PYTHONPATH", path)
    command = [sys.executable, "-c", RUN_TESTS, str(tmp_path)]
    assert subprocess.run(command, capture_output=True, cwd=tmp_path).returncode == 9
    rows = {row["key"].split("::")[-1]: row for row in json.loads((tmp_path / "tests.json").read_text())["rows"]}
    found = {name: row["outcome"] for name, row in rows.items()}
    assert found == {
        "test_right": "passed", "test_wrong": "failed", "test_left_out": "skipped", "test_no_set_up": "failed",
        "test_untidy": "failed", "test_wrong_and_untidy": "failed",
    }  # fmt: skip
    assert "no tidying" in str(rows["test_untidy"]["lines"]) and "first" in str(rows["test_wrong_and_untidy"]["lines"])
    assert rows["test_wrong"]["lines"][0] == "AssertionError: sum" and "no fixture" in str(rows["test_no_set_up"]["lines"])
    monkeypatch.setenv("CALM", "1")
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["key"]: row for row in json.loads((tmp_path / "tests.json").read_text())["rows"]}
    assert rows["counts"] == {"key": "counts", "passed": 2, "failed": 4, "skipped": 1}
    begun = (tmp_path / "begun").read_text().split()
    assert len(begun) == 8 and begun[-1] == "test_crash"  # alone in the second run


PARALLEL = """
import sys
import gpu_tests, measure
gpu_tests.SELECTION = ["--rootdir", sys.argv[1], sys.argv[1] + "/test_some.py"]
gpu_tests.os.cpu_count = lambda: 3
results = measure.Results(sys.argv[1] + "/tests.json", {})
gpu_tests.run_tests(results, lambda name: None, dry_run=False)
"""


def test_tests_in_parallel_outlive_a_crash(tmp_path, monkeypatch):
    for name in ("xdist", "pytest_timeout"):
        pytest.importorskip(name)
    (tmp_path / "test_some.py").write_text(OUTCOMES)
    path = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT), str(ROOT / "python")])
    monkeypatch.setenv("PYTHONPATH", path)
    done = subprocess.run([sys.executable, "-c", PARALLEL, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["key"].split("::")[-1]: row for row in json.loads((tmp_path / "tests.json").read_text())["rows"]}
    assert rows["counts"] == {"key": "counts", "passed": 1, "failed": 5, "skipped": 1}
    assert "crashed" in str(rows["test_crash"]["lines"]) and "no tidying" in str(rows["test_untidy"]["lines"])
    (tmp_path / "test_some.py").write_text(OUTCOMES + LATER)  # what has a row is not run again
    done = subprocess.run([sys.executable, "-c", PARALLEL, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path)
    assert "1 passed" in done.stdout and "failed" not in done.stdout, done.stdout + done.stderr
    assert (tmp_path / "again").read_text() == "x"


def test_sanitizer_says_why_it_did_not_run(monkeypatch):
    monkeypatch.setattr(gpu_tests.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_tests.shutil, "which", lambda name: None)
    assert gpu_tests.sanitize("memcheck", 100)["lines"] == ["compute-sanitizer is not installed"]
    monkeypatch.setattr(gpu_tests.shutil, "which", lambda name: "/bin/true")
    assert gpu_tests.sanitize("memcheck", 3)["lines"] == ["3 s are left"]


@pytest.mark.parametrize("tool", gpu_tests.SANITIZER_TOOLS)
@pytest.mark.parametrize("status, outcome", [(0, "passed"), (9, "failed")])
def test_sanitizer(monkeypatch, tmp_path, status, outcome, tool):
    program = tmp_path / "compute-sanitizer"
    program.write_text(f'#!/bin/sh\nprintf noise\necho "========= $2: {status} errors"\nexit {status}\n')
    program.chmod(0o755)
    monkeypatch.setattr(gpu_tests.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_tests.shutil, "which", lambda name: str(program))
    row = gpu_tests.sanitize(tool, 100)
    assert row["outcome"] == outcome and row["lines"] == [f"========= {tool}: {status} errors"]
    assert row["key"] == f"compute-sanitizer {tool}"


def test_a_long_log_keeps_its_end(tmp_path):
    log = tmp_path / "workers.log"
    log.write_bytes(b"a" * run_gpu.LOG_BYTES + b"end")
    run_gpu.shorten(log)
    assert log.stat().st_size == run_gpu.LOG_BYTES and log.read_bytes().endswith(b"end")


def test_stages_have_the_limits_of_the_script():
    script = (ROOT / "benchmarks" / "run_gpu.sh").read_text()
    assert "tests | op) echo 300 ;; *) echo 240" in script
    assert run_gpu.STAGES == {"tests": 300, "op": 300, "decode": 240, "e2e": 240}
    assert measure.ROOT == ROOT


def test_what_compiles_longest_comes_first_in_parallel(monkeypatch, tmp_path):
    assert all((ROOT / "tests" / "prefix_kernels" / name).exists() for name in gpu_tests.FIRST)
    names = ("a.py", gpu_tests.FIRST[0], "b.py", gpu_tests.FIRST[1], "c.py")
    items = [mock.Mock(path=Path(name), nodeid=name) for name in names]
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    gpu_tests.pytest_collection_modifyitems(alone := items.copy())
    assert alone == items
    (tmp_path / "done").write_text("c.py\nd.py")
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    monkeypatch.setenv(gpu_tests.DONE, str(tmp_path / "done"))
    gpu_tests.pytest_collection_modifyitems(items)
    assert items == [alone[1], alone[3], alone[0], alone[2]]


def test_gpu_tests_take_the_files_in_turn():
    results = mock.Mock(rows={"a::3": {}})
    items = [mock.Mock(path=path, nodeid=f"{path}::{index}") for path, count in (("a", 20), ("b", 3)) for index in range(count)]
    recorder = gpu_tests.Recorder(results, begin=lambda nodeid: None)
    recorder.pytest_collection_modifyitems(mock.Mock(), items)
    assert sorted(item.path for item in items[:6]) == ["a", "a", "a", "b", "b", "b"]
    assert len(items) == 22 and "a::3" not in {item.nodeid for item in items}
    assert [item.nodeid for item in items if item.path == "a"] != sorted(item.nodeid for item in items if item.path == "a")
