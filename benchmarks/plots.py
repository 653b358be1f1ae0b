"""Plots of the CPU results: how many times faster ours is, by prefix length. A plot's file holds a digest of what it shows."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tables import DIRECTIONS, case_of, environment_line, operator_rows, over

RIVALS = {"best": "over the best rival", "peft": "over PEFT's way"}


def series(results: dict[str, Any], direction: str) -> dict[str, Any] | None:
    """What one plot shows: for each dtype and rival, lines of [prefix length, ratio]; None without rows."""
    rows = operator_rows(results, direction)
    lines: dict[str, dict[str, dict[str, list]]] = {}
    for row in rows:
        case = case_of(row)
        size = f"{case.batch} rows, cache {case.kv_len}" if case.decode else f"length {case.q_len}"
        label = f"{case.heads}/{case.kv_heads} heads, {size}"
        for rival, ratio in (("best", row.get("ratio")), ("peft", over(row, "peft"))):
            if ratio is not None:
                panel = lines.setdefault(case.dtype, {}).setdefault(rival, {})
                panel.setdefault(label, []).append([case.prefix_len, round(ratio, 3)])
    if not lines:
        return None
    return {"title": DIRECTIONS[direction], "environment": environment_line(results["environment"]), "lines": lines}


def digest(shown: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


def is_current(path: Path, shown: dict[str, Any]) -> bool:
    """Whether the file is a plot of exactly this."""
    return path.exists() and digest(shown).encode() in path.read_bytes()


def draw(path: Path, shown: dict[str, Any]) -> None:
    """Writes the PNG: a column of panels for each dtype, a row for each rival."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    from prefix_tuning.files import replacing

    dtypes = list(shown["lines"])
    figure = Figure(figsize=(5.2 * len(dtypes), 7.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(RIVALS), len(dtypes), squeeze=False, sharex=True, sharey="row")
    for column, dtype in enumerate(dtypes):
        for row, (rival, name) in enumerate(RIVALS.items()):
            axes, lines = panels[row][column], shown["lines"][dtype].get(rival, {})
            for label, points in lines.items():
                axes.plot(*zip(*sorted(points), strict=True), "o-", markersize=4, linewidth=1.3, label=label)
            lengths = sorted({length for points in lines.values() for length, _ in points})
            axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
            axes.set(xscale="log", yscale="log", title=f"{dtype}, {name}", ylabel="times faster" if column == 0 else None)
            axes.xaxis.set(major_locator=FixedLocator(lengths), minor_locator=NullLocator())
            axes.yaxis.set(major_locator=LogLocator(subs=(1, 1.5, 2, 3, 5, 7)), minor_locator=NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda length, _: f"{length:.0f}"))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}x"))
            axes.grid(alpha=0.3)
    for axes in panels[-1]:
        axes.set_xlabel("prefix length P")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.suptitle(f"{shown['title']}: above the dashed line ours is faster\n{shown['environment']}", fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Description": digest(shown)})
