"""Writes committed results into the README, between its markers: python benchmarks/report.py [--check].

    <!-- results: demo -->    from benchmarks/results/demo/metrics.json, which `make demo` writes to runs/demo

--check writes nothing and fails where the README says something else than the results.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"


def demo_table(metrics: dict) -> str:
    rows = [
        ("BLEU (lower case, all references)", f"{metrics['bleu_before']:.1f}", f"{metrics['bleu_after']:.1f}"),
        ("slots left out of the text", f"{metrics['slot_error_before']:.1%}", f"{metrics['slot_error_after']:.1%}"),
    ]
    settings, versions = metrics["settings"], metrics["versions"]
    return "\n".join(
        [
            f"| {metrics['evaluated']} meaning representations of E2E's dev set | no prefix | with the trained prefix |",
            "|---|---|---|",
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
            f"{metrics['trainable_parameters']:,} trained parameters ({metrics['trainable_share']:.2%}), {metrics['steps']} "
            f"steps of {settings['batch_size']} references, {metrics['seconds_per_step']:.1f} s a step and "
            f"{metrics['seconds'] / 60:.1f} minutes in all on {metrics['device']} ({metrics['threads']} threads, float32, "
            f"backend `{metrics['backend']}`, torch {versions['torch']}, transformers {versions['transformers']}). The human "
            f"references themselves leave out {metrics['slot_error_references']:.1%} of the slots (the typical, median one of "
            f"each meaning representation) or {metrics['slot_error_references_mean']:.1%} (mean over all of them).",
        ]
    )


def render(readme: str) -> str:
    """The README with the text between its markers made anew."""
    metrics = json.loads((RESULTS / "demo" / "metrics.json").read_text(encoding="utf-8"))
    block = f"<!-- results: demo -->\n{demo_table(metrics)}\n<!-- end -->"
    new, found = re.subn(r"<!-- results: demo -->\n.*?<!-- end -->", lambda _: block, readme, flags=re.DOTALL)
    if found != 1:
        raise ValueError(f"{README}: expected one block <!-- results: demo --> … <!-- end -->, found {found}")
    return new


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the README is not up to date")
    check = parser.parse_args(argv).check
    old = README.read_text(encoding="utf-8")
    new = render(old)
    if check:
        print("README is up to date" if new == old else "README differs from the results: run python benchmarks/report.py")
        return int(new != old)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
