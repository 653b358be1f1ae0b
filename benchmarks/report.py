"""Committed results into documents: python benchmarks/report.py [--check].

    README.md              between its markers: <!-- results: demo --> … <!-- end -->, and with cpu, gpu, families and encoders
    docs/benchmarks.md     whole
    benchmarks/results/{cpu, any GPU}/{forward,forward_backward,decode}.png, {any GPU}/whole.png

From benchmarks/results: demo/metrics.json, which `make demo` writes to runs/demo; cpu/prefix_attention*.json and
cpu/whole*.json, which `make bench` writes; {any GPU}/{tests,op,decode,e2e}.json, which run_gpu.sh writes. The families come
from tests/prefix_tuning: family_support.json and encoder_support.json, which its tests write, and peft_support.json. What has
no results has no section. --check writes nothing and fails where a document says something else than the results.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import family_table
import plots
import tables

ROOT = Path(__file__).resolve().parents[1]
README, BENCHMARKS = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "benchmarks" / "results"
OPERATOR, WHOLE, GPU = "prefix_attention", "whole", "nvidia-h200"
GPU_STAGES = {
    "tests": ("Tests", tables.gpu_tests), "op": ("Attention in training shapes", tables.gpu_operator),
    "decode": ("Decoding", tables.gpu_operator), "e2e": ("Whole models", tables.whole_models),
}  # fmt: skip
PLOTS = {"forward": "forward", "forward+backward": "forward_backward", "decode": "decode"}
GPU_PLOTS = {"op": ("forward", "forward_backward"), "decode": ("decode",), "e2e": (WHOLE,)}

METHOD = """# Benchmarks

Made by `python benchmarks/report.py` from the files in `benchmarks/results`; edits are overwritten.

    make bench                                           the CPU tables; nothing else should run meanwhile
    pytest benchmarks/bench_prefix_attention.py          the same points by pytest-benchmark
    benchmarks/run_gpu.sh RESULTS_DIR                    everything on a machine with a GPU: tests, op, decode, e2e

- A point is checked against float64 before it is timed: output and, in the backward pass, all five gradients, on the first two
  rows of the batch. What is wrong is not timed.
- CPU: ours and every rival run in one process, in turn, over input sets that together exceed twice the last-level cache. Times
  are medians; 20th and 80th percentiles are in the files. A ratio is the best rival's median over ours.
- GPU: device time by events around replays of a CUDA graph, input sets over twice the L2. Whole models: wall clock, in turn.
- `peft` is PEFT's path (expand the prefix, concatenate, dense mask, repeat kv heads); `concat…` are the stronger forms of
  concatenation that stay legal; `sdpa` composes torch's stock kernels without concatenation and is this project's own fallback,
  on a GPU also a rival. `benchmarks/rivals.py` says what is legal where.
- In decoding a rival's cache holds the prefix already, expanded for every row; filling it is not timed.
- Losses are listed below each table."""


def demo_table(metrics: dict) -> str:
    rows = [
        ("BLEU (lower case, all references)", f"{metrics['bleu_before']:.1f}", f"{metrics['bleu_after']:.1f}"),
        ("slots left out of the text", f"{metrics['slot_error_before']:.1%}", f"{metrics['slot_error_after']:.1%}"),
    ]
    settings, versions = metrics["settings"], metrics["versions"]
    head = (f"{metrics['evaluated']} meaning representations of E2E's dev set", "no prefix", "with the trained prefix")
    return (
        f"{tables.table(head, rows)}\n\n"
        f"{metrics['trainable_parameters']:,} trained parameters ({metrics['trainable_share']:.2%}), {metrics['steps']} "
        f"steps of {settings['batch_size']} references, {metrics['seconds_per_step']:.1f} s a step and "
        f"{metrics['seconds'] / 60:.1f} minutes in all on {metrics['device']} ({metrics['threads']} threads, float32, "
        f"backend `{metrics['backend']}`, torch {versions['torch']}, transformers {versions['transformers']}). The human "
        f"references themselves leave out {metrics['slot_error_references']:.1%} of the slots (the typical, median one of "
        f"each meaning representation) or {metrics['slot_error_references_mean']:.1%} (mean over all of them)."
    )


def cpu_results(name: str) -> list[dict[str, Any]]:
    """The results files of that name, the one without an addition to its name first."""
    return [tables.load(path) for path in sorted((RESULTS / "cpu").glob(f"{name}*.json"), key=lambda path: path.stem)]


def cpu_table() -> str | None:
    operator, whole = cpu_results(OPERATOR), cpu_results(WHOLE)
    if not operator:
        return None
    link = "All points, losses and what they were measured with: [docs/benchmarks.md](docs/benchmarks.md)."
    return f"{tables.readme_cpu(operator[0], whole[0] if whole else None)} {link}"


def gpu_table() -> str | None:
    """Of the GPU that README speaks of."""
    operator, decode, whole = (tables.load(RESULTS / GPU / f"{stage}.json") for stage in ("op", "decode", "e2e"))
    if operator is None:
        return None
    link = "All points and losses: [docs/benchmarks.md](docs/benchmarks.md)."
    return f"{tables.readme_gpu(operator, decode, whole)} {link}"


def render(readme: str) -> str:
    """The README with the text between its markers made anew."""
    blocks = {
        "demo": demo_table(tables.load(RESULTS / "demo" / "metrics.json")), "cpu": cpu_table(), "gpu": gpu_table(),
        "families": family_table.family_table(), "encoders": family_table.encoder_tables(),
    }  # fmt: skip
    for name, content in blocks.items():
        block = f"<!-- results: {name} -->\n" + (f"{content}\n" if content else "") + "<!-- end -->"
        pattern = rf"<!-- results: {name} -->\n(?:(?!<!-- results).)*?<!-- end -->"
        readme, found = re.subn(pattern, lambda _, block=block: block, readme, flags=re.DOTALL)
        if found != 1:
            raise ValueError(f"{README}: expected one block <!-- results: {name} --> … <!-- end -->, found {found}")
    return readme


def benchmarks_page() -> str:
    """docs/benchmarks.md"""
    parts, drawn = [METHOD], pictures()

    def shown(folder: Path, names: Iterable[str]) -> list[str]:
        there = [name for name in names if folder / f"{name}.png" in drawn]
        return [f"![Speed: {name}](../benchmarks/results/{folder.name}/{name}.png)" for name in there]

    for index, results in enumerate(cpu_results(OPERATOR)):
        plotted = shown(RESULTS / "cpu", PLOTS.values()) if index == 0 else []
        parts += [f"## Attention on a CPU{_instructions_and_threads(results)}", *plotted, tables.cpu_operator(results)]
    for results in cpu_results(WHOLE):
        parts += [f"## Whole models on a CPU{_instructions_and_threads(results)}", tables.whole_models(results)]
    for folder in gpu_folders():
        for stage, (title, section) in GPU_STAGES.items():
            results = tables.load(folder / f"{stage}.json")
            if results is not None:
                heading = f"## {title} on {results['environment']['device']}"
                parts += [heading, *shown(folder, GPU_PLOTS.get(stage, ())), section(results)]
    return "\n\n".join(parts) + "\n"


def _instructions_and_threads(results: dict[str, Any]) -> str:
    instructions, count = (results["environment"][name] for name in ("instructions", "threads"))
    return f" ({instructions}), {count} thread{'s' if count != 1 else ''}"


def pictures() -> dict[Path, dict[str, Any]]:
    """The plots that the results give, and what each shows."""
    operators = {RESULTS / "cpu": cpu_results(OPERATOR)[:1]}
    found: dict[Path, dict[str, Any] | None] = {}
    for folder in gpu_folders():
        results = {stage: tables.load(folder / f"{stage}.json") for stage in ("op", "decode", "e2e")}
        operators[folder] = [results[stage] for stage in ("op", "decode") if results[stage]]
        if results["e2e"]:
            found[folder / f"{WHOLE}.png"] = plots.bars(results["e2e"])
    for folder, given in operators.items():
        for each in given:
            drawn = ((name, plots.series(each, direction)) for direction, name in PLOTS.items())
            found |= {folder / f"{name}.png": shown for name, shown in drawn if shown is not None}  # each has some directions
    return {path: shown for path, shown in found.items() if shown is not None}


def gpu_folders() -> list[Path]:
    """Of results."""
    return sorted(path for path in RESULTS.iterdir() if path.is_dir() and path.name not in ("demo", "cpu"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a document is not up to date")
    check = parser.parse_args(argv).check
    texts = {README: render(README.read_text(encoding="utf-8")), BENCHMARKS: benchmarks_page()}
    stale = [path for path, text in texts.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    stale += [path for path, shown in pictures().items() if not plots.is_current(path, shown)]
    if check:
        names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
        print(f"run python benchmarks/report.py: {names} not up to date" if stale else "all documents are up to date")
        return int(bool(stale))
    for path in stale:
        if path in texts:
            path.write_text(texts[path], encoding="utf-8")
        else:
            plots.draw(path, pictures()[path])
    return 0


if __name__ == "__main__":
    sys.exit(main())
