"""Timing in turn, result files that survive an interruption, and the numbers that describe a case."""

import json
import math
from unittest import mock

import pytest
import torch

import measure
from cases import E2E_LENGTHS, Case, cpu_cases, gpu_decode_cases, gpu_op_cases, gpu_runs


def test_an_untimed_call_comes_first(monkeypatch):
    """On the set before, which the timed calls do not touch next."""
    seen, clock = [], iter(range(100))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: seen.append("clock") or next(clock))
    comparison = measure.Comparison({"way": seen.append}, sets=4, warm_up=0)
    comparison.sample("way"), comparison.sample("way")
    assert seen == [3, "clock", 0, "clock", 0, "clock", 1, "clock"]


def test_each_way_is_warmed_up_on_every_set_that_often():
    """A training step is recorded when its shape comes for the second time."""
    for often, expected in ((0, []), (1, [0, 1, 0]), (2, [0, 1, 0, 1, 0])):
        seen = []
        measure.Comparison({"way": seen.append}, sets=2, warm_up=often, settles=False)
        assert seen == expected


def test_ways_are_timed_in_turn_over_all_input_sets():
    seen = []
    ways = {name: (lambda index, name=name: seen.append((name, index))) for name in ("rival", "ours")}
    comparison = measure.Comparison(ways, sets=3, settles=False)
    comparison._calls = {"rival": 2, "ours": 1}
    seen.clear()
    comparison.run(seconds=0, rounds=4)
    names = [name for name, _ in seen]
    assert names == ["rival", "rival", "ours", "ours", "rival", "rival"] * 2
    for name in ways:
        numbers = [index for other, index in seen if other == name]
        assert all(b == (a + 1) % 3 for a, b in zip(numbers, numbers[1:], strict=False))
    assert comparison.timings()["rival"].keys() == {"median", "p20", "p80", "samples", "calls"}
    assert comparison.timings()["ours"]["samples"] == 4


def test_short_calls_are_repeated_within_a_sample():
    comparison = measure.Comparison({"short": lambda index: None})
    assert comparison.timings  # nothing was sampled yet
    assert comparison._calls["short"] == 1000


@pytest.mark.parametrize("captured", [True, False])
def test_device_time_of_graph_replays_or_of_a_queue(monkeypatch, captured):
    """The CUDA calls replaced: the numbers are those of events around everything, by input set."""
    cuda = mock.MagicMock()
    cuda.Event.return_value.elapsed_time.return_value = 6.0  # ms for 3 sets
    if not captured:
        cuda.graph.side_effect = RuntimeError("not capturable")
    monkeypatch.setattr(measure.torch, "cuda", cuda)
    called = []
    timing = measure.device_timing(called.append, sets=3)
    assert timing["median"] == timing["p20"] == 0.002 and timing["calls"] == 3
    assert called[:3] == [0, 1, 2] and len(called) % 3 == 0
    if captured:
        assert timing["mode"] == "graph" and len(called) == 6 and cuda.CUDAGraph().replay.call_count == timing["samples"] + 2
    else:
        assert timing["mode"] == "queue: RuntimeError: not capturable" and len(called) == 3 * (timing["samples"] + 3)
        cuda.set_stream.assert_called_once()


def test_ceilings():
    assert all(number > 1e7 for number in measure.ceilings("cpu").values())


def test_summary():
    timing = measure.summary([5.0, 1.0, 2.0, 3.0, 4.0, 100.0], calls=7)
    assert timing == {"median": 3.5, "p20": 2.0, "p80": 5.0, "samples": 6, "calls": 7}


def test_errors_show_nan():
    expected = torch.ones(4, dtype=torch.float64)
    assert measure.errors(torch.ones(4) * 1.5, expected) == [0.5, 0.5, 0.5]
    assert all(math.isnan(number) for number in measure.errors(torch.tensor([1.0, 1.0, 1.0, math.nan]), expected))


def test_sets_exceed_the_cache_twice(monkeypatch):
    monkeypatch.setattr(measure, "last_level_cache", lambda device: 1000)
    assert measure.sets_needed(150, "cpu") == (14, "cold")
    assert measure.sets_needed(5000, "cpu") == (1, "cold")
    assert measure.sets_needed(1, "cpu") == (measure.MAX_SETS, "warm")


ENVIRONMENT = {name: "x" for name in measure.SAME_RESULTS} | {"commit": "abc"}


def test_results_are_on_disk_after_each_row_and_are_kept(tmp_path):
    path = tmp_path / "new" / "results.json"
    results = measure.Results(path, ENVIRONMENT)
    results.put({"key": "a", "complete": True, "ratio": 1.5})
    assert [row["key"] for row in json.loads(path.read_text())["rows"]] == ["a"]
    results.put({"key": "b", "complete": False})
    again = measure.Results(path, ENVIRONMENT | {"commit": "later, the same source"})
    assert again.done("a") and not again.done("b") and not again.done("c")
    again.put({"key": "b", "complete": True})
    found = json.loads(path.read_text())
    assert [row["key"] for row in found["rows"]] == ["a", "b"] and found["environment"]["commit"] == "abc"
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


@pytest.mark.parametrize("changed", measure.SAME_RESULTS)
def test_rows_of_other_code_versions_or_machines_are_measured_again(tmp_path, changed):
    measure.Results(tmp_path / "r.json", ENVIRONMENT).put({"key": "a", "complete": True})
    assert not measure.Results(tmp_path / "r.json", ENVIRONMENT | {changed: "y"}).done("a")


def test_fingerprint_changes_with_the_code(tmp_path):
    folder = tmp_path / "prefix_kernels" / "backends"
    folder.mkdir(parents=True)
    (folder / "a.py").write_text("1")
    before = measure.source_fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("words")
    assert measure.source_fingerprint(tmp_path) == before
    (folder / "a.py").write_text("2")
    assert measure.source_fingerprint(tmp_path) != before


def test_environment():
    found = measure.environment("cpu")
    assert found["torch"] == torch.__version__ and found["threads"] == torch.get_num_threads()
    assert len(found["source"]) == 12 and found["cache_bytes"] > 0 and found["device"]


def test_first_line():
    assert measure.first_line(RuntimeError("\nCUDA error: boom\nmore")) == "RuntimeError: CUDA error: boom"


@pytest.mark.parametrize("grid", [cpu_cases, gpu_op_cases, gpu_decode_cases, gpu_runs])
def test_keys_are_unique(grid):
    keys = [case.key for case in grid()]
    assert len(set(keys)) == len(keys)


def test_flops_and_bytes():
    case = Case("", 8, 32, 8, 128, 512, 512, 2048)
    forward = 4 * 8 * 32 * 128 * (512 * 2048 + 512 * 513 // 2)
    assert case.flops() == forward
    assert Case(**{**vars(case), "backward": True}).flops() == int(3.5 * forward)
    assert case.bytes_moved() == 8 * 512 * 32 * (4 * 128 + 4) + 4 * 8 * 512 * 8 * 128 + 4 * 2048 * 8 * 128
    packed = next(case for case in gpu_op_cases() if case.seqlens)
    visible = sum(n * packed.prefix_len + n * (n + 1) // 2 for n in E2E_LENGTHS)
    assert packed.flops() == 4 * packed.heads * packed.head_dim * visible
    tokens = sum(E2E_LENGTHS)
    assert packed.bytes_moved() == tokens * 16 * (4 * 64 + 4) + 4 * tokens * 16 * 64 + 4 * packed.prefix_len * 16 * 64
