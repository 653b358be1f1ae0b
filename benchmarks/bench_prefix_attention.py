"""Attention over a shared prefix on the CPU, point by point: the chosen backend against its rivals, timed in turn.

    pytest benchmarks/bench_prefix_attention.py            pytest-benchmark's table; ratio and best rival in extra_info
    python benchmarks/bench_prefix_attention.py            writes benchmarks/results/cpu/prefix_attention.json row by row

A point is checked against float64 before it is timed. One that misses its goal is called a LOSS, as a warning or in its line.
PREFIX_KERNELS_BACKEND or --backend names another backend than the one that would be chosen.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import measure
from attention_row import finish, measure_on_cpu, prepare
from cases import Case, cpu_cases

OUTPUT = Path(__file__).parent / "results" / "cpu" / "prefix_attention.json"
ROUNDS = 10  # of pytest-benchmark


@pytest.mark.parametrize("case", cpu_cases(), ids=lambda case: case.key)
def test_prefix_attention(benchmark, case: Case):
    """Each round times one sample of every rival, then, as the benchmark's own number, one of the chosen backend."""
    prepared = prepare(case, "cpu")
    chosen = prepared.row["chosen"]
    if chosen not in prepared.calls:
        pytest.fail(f"{chosen}: {prepared.row['ways'][chosen]}")
    comparison = measure.Comparison(prepared.calls, len(prepared.sets))

    def time_rivals() -> None:
        for name in prepared.calls:
            if name != chosen:
                comparison.sample(name)

    benchmark.group = case.direction
    benchmark.pedantic(comparison.sample, (chosen,), setup=time_rivals, rounds=ROUNDS)
    timings = comparison.timings()
    row = finish(prepared.row, timings)
    benchmark.extra_info |= {name: row[name] for name in ("chosen", "best_rival", "ratio", "state")}
    benchmark.extra_info |= {"calls_per_round": timings[chosen]["calls"], "threads": torch.get_num_threads()}
    benchmark.extra_info["median_seconds"] = {name: timing["median"] for name, timing in timings.items()}
    if is_loss(case, row):
        warnings.warn(line(case, row), stacklevel=1)


def is_loss(case: Case, row: dict[str, Any]) -> bool:
    return row.get("ratio") is None or row["ratio"] < case.cpu_goal


def line(case: Case, row: dict[str, Any]) -> str:
    """A row in one line."""
    ways, chosen, rival = row["ways"], row["chosen"], row["best_rival"]
    if "median" not in ways[chosen]:
        return f"{case.key}: LOSS: {chosen} {ways[chosen]}"
    if rival is None:
        return f"{case.key}: LOSS: no rival could run"
    text = f"{case.key}: {chosen} {ways[chosen]['median'] * 1e3:.3f} ms, {rival} {ways[rival]['median'] * 1e3:.3f} ms"
    return f"{text}, {row['ratio']:.2f}x" + (f" LOSS, goal {case.cpu_goal:.1f}x" if is_loss(case, row) else "")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--output", type=Path, default=OUTPUT, help="results file, whose rows of this code are kept; default: in results/cpu"
    )
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="TEXT", help="rows whose key has one of these in it; default: all"
    )
    parser.add_argument("--seconds-per-row", type=float, default=5.0, help="of timing; default: 5")
    parser.add_argument("--rounds", type=int, default=7, help="of every way at least, however long they take; default: 7")
    parser.add_argument("--threads", type=int, help="of torch; default: torch's own")
    parser.add_argument("--backend", help="ours; default: what is chosen for each point")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    cases = [case for case in cpu_cases() if any(text in case.key for text in args.only)]
    if not cases:
        parser.error(f"--only: no row has {' or '.join(args.only)} in its key")
    results = measure.Results(args.output, measure.environment("cpu"))
    failed = False
    for case in cases:
        if not results.done(case.key):
            results.put(measure_on_cpu(case, args.seconds_per_row, args.rounds, args.backend))
        print(line(case, results.rows[case.key]), flush=True)
        failed |= results.rows[case.key].get("ratio") is None
    print(f"written to {args.output}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
