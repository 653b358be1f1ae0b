"""Results into documents: every number is the results', losses are named, and what has no results has no section."""

import dataclasses
import json
import random
import shutil
from pathlib import Path

import pytest

import measure
import plots
import report
import tables
from attention_row import finish
from cases import Case, cpu_cases, gpu_decode_cases, gpu_op_cases

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "commit": "0123456789abcdef", "dirty": False, "source": "feedfeedfeed", "date": "2026-01-02", "python": "3.11.0",
    "torch": "2.13.0", "triton": None, "transformers": "5.24.0", "device": "Some CPU, 2 cores", "instructions": "AVX2",
    "cache_bytes": 1, "threads": 2,
}  # fmt: skip
GPU = ENVIRONMENT | {"device": "Some GPU", "instructions": None, "triton": "3.9.0"}


def row(case, seconds, chosen):
    ways = {name: {"ours": name == chosen or name == "sdpa", "errors": {}} for name in seconds}
    made = {"key": case.key, "case": dataclasses.asdict(case), "flops": case.flops(), "bytes": case.bytes_moved(), "ways": ways}
    made |= {"device": "cuda" if "llama" in case.key.lower() else "cpu", "chosen": chosen}
    return finish(made, {n: {"median": s, "peak_bytes": 2**20} for n, s in seconds.items()})


def write(path, environment, rows):
    results = measure.Results(path, environment)
    for each in rows[:-1]:
        results.put(each, write=False)
    results.put(rows[-1])


def operator_rows(cases, chosen, draw):
    def seconds():
        return {"peft": 4e-3, "concat": draw.uniform(2e-3, 3e-3), "sdpa": 3.1e-3, chosen: 2e-3 / draw.uniform(0.9, 2)}

    return [row(case, seconds(), chosen) for case in cases]


def whole_row(key, what, seconds, **more):
    ways = {name: {"median": s, "ours": name != "peft"} | more for name, s in seconds.items()}
    run = {"what": what, "model": {"name": "M"}, "batch": 8, "prefix_len": 16}
    row = {"key": key, "run": run, "dtype": "float32", "chosen": "selected", "backend": "cpu"}
    return row | {"tokens": 256, "ways": ways}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of the documents with results of nothing but the demo."""
    results = tmp_path / "benchmarks" / "results"
    (results / "demo").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "benchmarks" / "results" / "demo" / "metrics.json", results / "demo")
    text = (ROOT / "README.md").read_text()
    (tmp_path / "README.md").write_text(text)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", results)
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    monkeypatch.setattr(report, "BENCHMARKS", tmp_path / "docs" / "benchmarks.md")
    return tmp_path


@pytest.fixture
def measured(project):
    """The same with results of every kind; one point is below 1.0x, one below a higher goal, one failed."""
    draw, results = random.Random(0), project / "benchmarks" / "results"
    rows = operator_rows(cpu_cases(), "cpu", draw)
    rows[3] = row(cpu_cases()[3], {"peft": 4e-3, "concat": 1.5e-3, "sdpa": 3e-3, "cpu": 2e-3}, "cpu")
    decode = next(i for i, case in enumerate(cpu_cases()) if case.cpu_goal == 5)
    rows[decode] = row(cpu_cases()[decode], {"peft": 12e-3, "concat": 9e-3, "cpu": 2e-3}, "cpu")
    rows[5]["ways"]["cpu"] = {"ours": True, "failed": "wrong: relative error 0.5"}
    rows[5]["ratio"] = None
    write(results / "cpu" / "prefix_attention.json", ENVIRONMENT, rows)
    whole = [whole_row("train M B4 P16", "train", {"selected": 2.0, "sdpa": 2.2, "peft": 3.0}),
             whole_row("generate M B8 P512", "generate", {"selected": 4.0, "sdpa": 3.0, "peft": 8.0})]  # fmt: skip
    write(results / "cpu" / "whole.json", ENVIRONMENT, whole)
    ceilings = {"key": "ceilings", "copy_bytes_per_second": 3e12, "matmul_flops_per_second": 7.5e14}
    failed = {"key": "forward failed", "case": rows[0]["case"], "failed": "it took too long"}
    write(results / "gpu" / "op.json", GPU, [ceilings, *operator_rows(gpu_op_cases(), "triton", draw), failed])
    write(results / "gpu" / "decode.json", GPU, [ceilings, *operator_rows(gpu_decode_cases()[:4], "triton", draw)])
    lost = {"key": "train L", "failed": "RuntimeError: out of memory"}
    train = whole_row("train M", "train", {"selected": 1.0, "peft": 2.0}, peak_bytes=2**31)
    train["ways"]["peft"]["profile"] = {"attention": 0.5, "products": 0.25, "rest": 0.125, "kernels": 7}
    write(results / "gpu" / "e2e.json", GPU, [train, lost])
    tests = [{"key": "test_a", "outcome": "failed", "lines": ["assert 1 == 2"]}, {"key": "test_b", "outcome": "passed"},
             {"key": "compute-sanitizer memcheck", "outcome": "passed", "lines": ["ERROR SUMMARY: 0 errors"]},
             {"key": "counts", "passed": 1, "failed": 1, "skipped": 4}]  # fmt: skip
    write(results / "gpu" / "tests.json", GPU, tests)
    assert report.main([]) == 0
    return project


def test_the_committed_documents_are_up_to_date():
    assert report.main(["--check"]) == 0


def test_without_results_there_are_no_sections(project):
    assert report.main(["--check"]) == 1  # docs/benchmarks.md is missing
    assert not (project / "docs" / "benchmarks.md").exists()
    assert report.main([]) == 0 and report.main(["--check"]) == 0
    page = (project / "docs" / "benchmarks.md").read_text()
    assert page.startswith("# Benchmarks") and "\n## " not in page
    assert "<!-- results: cpu -->\n<!-- end -->" in (project / "README.md").read_text()
    assert not list(project.rglob("*.png"))


def test_sections_and_numbers(measured):
    page = (measured / "docs" / "benchmarks.md").read_text()
    titles = [line for line in page.splitlines() if line.startswith("## ")]
    assert titles == [
        "## Attention on a CPU (AVX2), 2 threads", "## Whole models on a CPU (AVX2), 2 threads", "## Tests on Some GPU",
        "## Attention in training shapes on Some GPU", "## Decoding on Some GPU", "## Whole models on Some GPU",
    ]  # fmt: skip
    assert "Some CPU, 2 cores (AVX2), 2 threads; torch 2.13.0, transformers 5.24.0, Python 3.11.0; commit 0123456789ab" in page
    rows = json.loads((measured / "benchmarks/results/cpu/prefix_attention.json").read_text())["rows"]
    forward = [r["ratio"] for r in rows if r["key"].startswith("forward B") and r["ratio"]]
    assert len(forward) == 37
    mean = tables.geometric_mean(forward)
    assert f"Geometric mean over the best rival, 37 of 38 points: {mean:.2f}x (goal 1.3x; 1.0x at every point)" in page
    for each in rows:
        assert f"| {each['key']} |" in page
    assert "| train M B4 P16 | float32 | cpu | 2.000 s | 2.200 s | 3.000 s | 1.50x |" in page
    assert "| generate M B8 P512 | float32 | cpu | 64.0 tokens/s | 85.3 tokens/s | 32.0 tokens/s | 2.00x |" in page
    assert "1 passed, 1 failed, 4 skipped." in page and "- test_a: assert 1 == 2" in page
    assert "- compute-sanitizer memcheck: passed. ERROR SUMMARY: 0 errors" in page
    assert "750 TFLOP/s (matrix product), 3.00 TB/s" in page
    assert "| train M, peft | 500.00 | 250.00 | 125.00 | 1125.00 | 7 |" in page
    assert "2.0 GiB" in page and "- train L: RuntimeError: out of memory" in page


def test_losses_are_named(measured):
    page = (measured / "docs" / "benchmarks.md").read_text()
    rows = json.loads((measured / "benchmarks/results/cpu/prefix_attention.json").read_text())["rows"]
    assert f"- {rows[3]['key']}: 0.75x, 2.000 ms against 1.500 ms of concat\n" in page
    assert f"- {rows[5]['key']}: no ratio: wrong: relative error 0.5" in page
    decode = next(case for case in cpu_cases() if case.cpu_goal == 5)
    assert f"- {decode.key}: 4.50x, 2.000 ms against 9.000 ms of concat, goal 5.0x" in page
    assert "- generate M B8 P512: 0.75x of sdpa" in page
    below = [row for row in rows if row["ratio"] is None or row["ratio"] < 1]
    assert all(f"- {row['key']}: " in page for row in below)
    assert "- forward failed: failed" in page


def test_break_even(measured):
    def line(prefix_len, concat, own, sdpa=1e-3):
        ways = {"concat": concat, "concat_flash": 2 * concat, "sdpa": sdpa, "cpu": own}
        return row(Case("M", 8, 12, 4, 64, 1, 128, prefix_len, "float32"), ways, "cpu")

    rows = [line(512, 4e-3, 1e-3), line(16, 1e-3, 2e-3), line(128, 3e-3, 2e-3), line(0, 1e-3, 2e-3)]
    start = "| M | 12/4 | float32 | 8 | 128 |"
    assert f"{start} 128 | 4.00x |" in tables.break_even(rows)
    assert f"{start} 128 (the shortest measured) | 4.00x |" in tables.break_even([rows[0], rows[2]])
    assert f"{start} – | 0.50x |" in tables.break_even(rows[1:2]) and tables.break_even(rows[3:]) == ""
    assert tables.break_even(rows) != "" and "Break-even with concatenation" in (measured / "docs/benchmarks.md").read_text()


def test_gpu_rows_say_what_they_reach(measured):
    page = (measured / "docs" / "benchmarks.md").read_text()
    first = json.loads((measured / "benchmarks/results/gpu/op.json").read_text())["rows"][1]
    seconds = first["ways"]["triton"]["median"]
    line = next(line for line in page.splitlines() if line.startswith(f"| {first['key']} |"))
    assert f"triton {seconds * 1e6:.0f}" in line and f"{first['flops'] / seconds / 1e12:.0f} |" in line
    assert f"{first['flops'] / seconds / 7.5e14:.0%}, {first['bytes'] / seconds / 3e12:.0%}" in line and "| 1, 1 |" in line


def test_readme(measured):
    readme = (measured / "README.md").read_text()
    (block,) = [part.split("<!-- end -->")[0] for part in readme.split("<!-- results: cpu -->")[1:]]
    rows = json.loads((measured / "benchmarks/results/cpu/prefix_attention.json").read_text())["rows"]
    chosen = [r for r in rows if r["key"].startswith("forward B") and "D64" in r["key"] and "float32" in r["key"]]
    worst = min(chosen, key=lambda r: r["ratio"])
    mean = tables.geometric_mean(r["ratio"] for r in chosen)
    over_peft = tables.geometric_mean(4e-3 / r["ways"]["cpu"]["median"] for r in chosen)
    place = f"{worst['ratio']:.2f}x (P={worst['case']['prefix_len']}, over {worst['best_rival']})"
    assert f"| forward, float32, 16 points | {over_peft:.2f}x | {mean:.2f}x | {place} |" in block
    assert "forward, bfloat16, 15 points" in block and "forward, float16, 2 points" in block
    assert "whole model: train M B4 P16, float32, 2 threads | 1.50x" in block
    assert report.render(readme) == readme


def test_whole_models_have_a_column_for_each_prefix_length():
    """A line for each way of ours; what did not run leaves its place empty."""

    def row(what, prefix_len, **times):
        run = {"model": {"name": "M"}, "what": what, "batch": 8 if what == "train" else 64, "prefix_len": prefix_len}
        run |= {"new_tokens": 128}
        return {"run": run, "ways": {name.replace("_", " "): {"median": each} for name, each in times.items()}}

    whole = {"environment": GPU, "rows": [
        row("train", 200, selected=0.5, padded=0.625, accelerated=0.8, without_graphs=3.0, peft=2.0),
        row("train", 16, selected=1.0, peft=0.5) | {"in_trainer": {"selected": {"median": 1.5}, "peft": {"median": 3.0}}},
        row("generate", 16, selected=0.25, kept_graphs=0.2, peft=1.0), row("generate", 512, selected=0.1),
        {"key": "generate O", "failed": "no memory"},
    ]}  # fmt: skip
    lines = tables.readme_gpu({"environment": GPU, "rows": []}, None, whole).splitlines()
    assert [line for line in lines if "P=" in line or "M, " in line] == [
        "| whole models on a GPU: time, over PEFT | P=16 | P=200 |",
        "| a training step, M, 8 rows | 1000.0 ms, 0.5x | 500.0 ms, 4.0x |",
        "| a training step, M, 8 rows, `padding_free=False` |  | 625.0 ms, 3.2x |",
        "| a training step, M, 8 rows, `accelerate_peft` |  | 800.0 ms, 2.5x |",
        "| a training step in `Trainer`, M, 8 rows | 1500.0 ms, 2.0x |  |",
        "| 128 new tokens, M, 64 rows | 250 ms, 4.0x |  |", "| 128 new tokens, M, 64 rows, `keep_graphs` | 200 ms, 5.0x |  |",
    ]  # fmt: skip


def test_check_fails_where_a_document_or_a_plot_differs(measured, capsys):
    assert report.main(["--check"]) == 0
    page = measured / "docs" / "benchmarks.md"
    page.write_text(page.read_text().replace("0.75x", "1.75x"))
    assert report.main(["--check"]) == 1 and "docs/benchmarks.md" in capsys.readouterr().out
    assert report.main([]) == 0 and report.main(["--check"]) == 0
    picture = measured / "benchmarks" / "results" / "cpu" / "decode.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    shown = plots.series(tables.load(measured / "benchmarks/results/cpu/prefix_attention.json"), "decode")
    shown["lines"]["float32"]["best"]["12/12 heads, 8 rows, cache 128"][0][1] += 1
    assert not plots.is_current(picture, shown)
    picture.unlink()
    assert report.main(["--check"]) == 1 and "decode.png" in capsys.readouterr().out


def test_plots_of_a_gpu(measured):
    """Panels are kinds of heads with three points at least, all bfloat16; bars are milliseconds, training before generation."""
    results = measured / "benchmarks" / "results" / "gpu"
    shown = plots.series(tables.load(results / "op.json"), "forward")["lines"]
    assert shown.keys() == {"32/8 heads of 128", "16/16 heads of 64"}
    assert shown["16/16 heads of 64"]["best"].keys() == {"32 rows, length 128", "16 rows, length 512", "packed rows"}
    rows = [whole_row("generate M", "generate", {"selected": 0.5, "kept graphs": 0.25, "peft": 1.0}),
            whole_row("train M", "train", {"selected": 0.1, "accelerated": 0.2, "without graphs": 2.0, "peft": 1.0}),
            whole_row("train N", "train", {"selected": 0.1})]  # fmt: skip
    assert list(plots.bars({"environment": GPU, "rows": rows})["bars"].items()) == [
        ("A training step: M", {"P=16\n8 rows": {"peft": 1000.0, "accelerated": 200.0, "selected": 100.0}}),
        ("New tokens: M", {"P=16\n8 rows": {"peft": 1000.0, "selected": 500.0, "kept graphs": 250.0}}),
    ]
    assert plots.bars({"environment": GPU, "rows": rows[2:]}) is None
    page = (measured / "docs" / "benchmarks.md").read_text()
    for name in ("forward", "forward_backward", "decode", "whole"):
        assert (results / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"](../benchmarks/results/gpu/{name}.png)" in page


def test_plots_show_every_point_of_the_grid(measured):
    results = tables.load(measured / "benchmarks/results/cpu/prefix_attention.json")
    for direction, count in (("forward", 31), ("forward+backward", 32), ("decode", 64)):
        lines = plots.series(results, direction)["lines"]
        assert lines.keys() == {"float32", "bfloat16"}
        points = sum(len(points) for panel in lines.values() for points in panel["best"].values())
        assert points == count


def test_a_readme_without_markers_is_refused(project):
    with pytest.raises(ValueError, match="expected one block <!-- results: cpu -->"):
        report.render((project / "README.md").read_text().replace("<!-- results: cpu -->", ""))


def test_what_is_chosen_was_the_fastest_of_ours_at_every_measured_point():
    """prefix_kernels/select.py prefers by these results; a loss here means that it needs a threshold."""
    results = json.loads((ROOT / "benchmarks" / "results" / "cpu" / "prefix_attention.json").read_text())
    assert len(results["rows"]) == len(cpu_cases())
    for row in results["rows"]:
        own = {name: way["median"] for name, way in row["ways"].items() if way["ours"] and "median" in way}
        assert min(own, key=own.get) == row["chosen"], row["key"]
