"""The operator's benchmark: its two entry points measure the same rows, and losses are named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import bench_prefix_attention
from cases import Case

ROOT = Path(__file__).resolve().parents[2]
KEY = "decode B8 S128 H12/4 D64 P16 float32"


def test_with_pytest_benchmark(tmp_path):
    one = f"benchmarks/bench_prefix_attention.py::test_prefix_attention[{KEY}]"
    command = [sys.executable, "-m", "pytest", one, "-q", "-p", "no:cacheprovider", f"--benchmark-json={tmp_path / 'out.json'}"]
    # in a test process of pytest-xdist, pytest-benchmark would take this run for one too, and measure nothing
    alone = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=alone)
    assert done.returncode == 0, done.stdout + done.stderr
    (benchmark,) = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    extra = benchmark["extra_info"]
    assert KEY in benchmark["name"] and benchmark["stats"]["rounds"] == bench_prefix_attention.ROUNDS
    assert {"peft", "concat", "sdpa"} <= extra["median_seconds"].keys()
    own = benchmark["stats"]["median"] / extra["calls_per_round"]  # with a call that is not timed in each round
    assert 0.25 < extra["median_seconds"][extra["chosen"]] / own < 2
    ratio = extra["median_seconds"][extra["best_rival"]] / extra["median_seconds"][extra["chosen"]]
    assert extra["ratio"] == pytest.approx(ratio, rel=1e-3)


def test_as_a_command(tmp_path, capsys, monkeypatch):
    output = tmp_path / "results.json"
    arguments = ["--output", str(output), "--only", KEY, "--seconds-per-row", "0", "--rounds", "2", "--backend", "sdpa"]
    assert bench_prefix_attention.main(arguments) == 0
    found = json.loads(output.read_text())
    assert [row["key"] for row in found["rows"]] == [KEY] and found["rows"][0]["chosen"] == "sdpa"
    assert found["rows"][0]["best_rival"] in ("concat", "peft")
    assert f"{KEY}: sdpa" in capsys.readouterr().out
    monkeypatch.setattr(bench_prefix_attention, "measure_on_cpu", lambda *arguments: pytest.fail("measured again"))
    assert bench_prefix_attention.main(arguments) == 0


def test_an_unknown_row_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench_prefix_attention.main(["--only", "P17"])
    assert "no row has P17 in its key" in capsys.readouterr().err


def test_an_unknown_backend_is_refused(tmp_path):
    with pytest.raises(ValueError, match="backend: expected one of"):
        bench_prefix_attention.main(["--output", str(tmp_path / "r.json"), "--only", KEY, "--backend", "fast"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ratio, batch, ending", [
    (0.98, 8, "0.98x LOSS, goal 1.0x"), (1.5, 8, "1.50x"), (1.5, 32, "1.50x LOSS, goal 2.0x"), (2.5, 32, "2.50x"),
])  # fmt: skip
def test_a_row_that_misses_its_goal_is_a_loss(ratio, batch, ending):
    case = Case("", batch, 12, 4, 64, 1, 128, 512, "float32")
    row = {"chosen": "cpu", "best_rival": "concat", "ratio": ratio}
    row["ways"] = {"cpu": {"median": 1e-3}, "concat": {"median": ratio * 1e-3}}
    assert bench_prefix_attention.line(case, row).endswith(ending)


def test_a_backend_that_is_wrong_is_a_loss():
    case = Case("", 8, 12, 4, 64, 1, 128, 512, "float32")
    row = {"chosen": "cpu", "best_rival": "concat", "ratio": None, "ways": {"cpu": {"failed": "wrong: 1"}}}
    assert "LOSS" in bench_prefix_attention.line(case, row) and bench_prefix_attention.is_loss(case, row)
