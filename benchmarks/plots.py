"""Plots of the results: lines of how many times faster ours is, by prefix length; bars of whole models' times.

A plot's file holds a digest of what it shows.
"""

from __future__ import annotations

import hashlib
import json
import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tables import DIRECTIONS, case_of, environment_line, median, operator_rows, over

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from cases import Case

RIVALS = {"best": "over the best rival", "peft": "over PEFT's way"}
WAYS = {  # of whole models: name, colour
    "peft": ("PEFT", "0.65"), "accelerated": ("accelerate_peft", "tab:orange"),
    "selected": ("PrefixTrainer, generate", "tab:blue"), "kept graphs": ("generate in keep_graphs", "tab:cyan"),
}  # fmt: skip
DOES = {"train": "A training step", "generate": "New tokens"}
BARS_IN_A_ROW = 3  # panels
SMALLEST = 8  # prefix length from which the axis is logarithmic, where there is one of 0
LEAST_POINTS = 3  # of a panel
HEADING = 150  # characters in a line of it


def series(results: dict[str, Any], direction: str) -> dict[str, Any] | None:
    """What one plot of lines shows: for each panel and rival, lines of [prefix length, ratio]; None without rows.

    Panels are dtypes on a CPU, of heads of 64; on a GPU, where all but a few points are bfloat16, kinds of heads.
    """
    panel_and_label = _of_cpu if results["environment"]["instructions"] else _of_gpu
    lines: dict[str, dict[str, dict[str, list]]] = {}
    for row in operator_rows(results, direction):
        case = case_of(row)
        found = panel_and_label(case)
        for rival, ratio in (("best", row.get("ratio")), ("peft", over(row, "peft"))):
            if ratio is not None and found is not None:
                panel = lines.setdefault(found[0], {}).setdefault(rival, {})
                panel.setdefault(found[1], []).append([case.prefix_len, round(ratio, 3)])
    lines = {name: panel for name, panel in lines.items() if sum(map(len, panel.get("best", {}).values())) >= LEAST_POINTS}
    if not lines:
        return None
    return {"title": DIRECTIONS[direction], "environment": environment_line(results["environment"]), "lines": lines}


def _of_cpu(case: Case) -> tuple[str, str] | None:
    if case.dtype == "float16" or case.head_dim != 64:
        return None
    size = f"{case.batch} rows, cache {case.kv_len}" if case.decode else f"length {case.q_len}"
    return case.dtype, f"{case.heads}/{case.kv_heads} heads, {size}"


def _of_gpu(case: Case) -> tuple[str, str] | None:
    if case.dtype != "bfloat16":
        return None
    rows = f"{case.batch} row{'s' if case.batch > 1 else ''}"
    size = f"{rows}, cache {case.kv_len}" if case.decode else f"{rows}, length {case.q_len}"
    heads = f"{case.heads}/{case.kv_heads} heads of {case.head_dim}" + (", a bias" if case.bias else "")
    return heads, "packed rows" if case.seqlens else size


def bars(results: dict[str, Any]) -> dict[str, Any] | None:
    """What the plot of whole models shows: for each panel and group of bars, milliseconds of each way; None without rows."""
    panels: dict[str, dict[str, dict[str, float]]] = {}
    for row in sorted(results["rows"], key=_size):
        run = row.get("run")
        if run and over(row, "peft", "selected") is not None:
            group = panels.setdefault(f"{DOES[run['what']]}: {run['model']['name']}", {})
            times = {way: median(row, way) for way in WAYS}
            name = f"P={run['prefix_len']}\n{run['batch']} rows"
            group[name] = {way: round(seconds * 1e3, 2) for way, seconds in times.items() if seconds is not None}
    if not panels:
        return None
    measured_on = environment_line(results["environment"] | {"note": None})
    return {"title": "Milliseconds, less is better", "environment": measured_on, "bars": panels}


def _size(row: dict[str, Any]) -> tuple[bool, int, int]:
    """Training first, small ones first."""
    run = row.get("run", {})
    return run.get("what") == "generate", run.get("batch", 0), run.get("prefix_len", 0)


def digest(shown: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


def is_current(path: Path, shown: dict[str, Any]) -> bool:
    """Whether the file is a plot of exactly this."""
    return path.exists() and digest(shown).encode() in path.read_bytes()


def draw(path: Path, shown: dict[str, Any]) -> None:
    """Writes the PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from prefix_tuning.files import replacing

    kind: Callable[[Figure, dict], None] = _draw_lines if "lines" in shown else _draw_bars
    figure = Figure(dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    kind(figure, shown)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Description": digest(shown)})


def _draw_lines(figure: Figure, shown: dict[str, Any]) -> None:
    """A column for each panel, a row for each rival; a line has the same colour in all of them."""
    from matplotlib import colormaps

    columns = list(shown["lines"])
    figure.set_size_inches(max(5.2 * len(columns), 8), 7.2)
    panels = figure.subplots(len(RIVALS), len(columns), squeeze=False, sharex=True, sharey="row")
    labels = list(dict.fromkeys(label for panel in shown["lines"].values() for lines in panel.values() for label in lines))
    colours = colormaps["tab10" if len(labels) <= 10 else "tab20"].colors
    handles, lengths = {}, set()
    for column, name in enumerate(columns):
        for row, (rival, against) in enumerate(RIVALS.items()):
            axes, lines = panels[row][column], shown["lines"][name].get(rival, {})
            for label, points in lines.items():
                colour = colours[labels.index(label) % len(colours)]
                x, y = zip(*sorted(points), strict=True)
                (handles[label],) = axes.plot(x, y, "o-", markersize=4, linewidth=1.3, color=colour)
                lengths.update(x)
            axes.set(title=f"{name}, {against}", ylabel="times faster" if column == 0 else None)
    for axes in panels.flatten():
        _scale(axes, sorted(lengths))
    for axes in panels[-1]:
        axes.set_xlabel("prefix length P")
    place = {"loc": "outside lower center", "ncols": 4, "frameon": False, "fontsize": 8}
    figure.legend([handles[label] for label in labels], labels, **place)
    _head(figure, f"{shown['title']}: above the dashed line ours is faster", shown)


def _scale(axes: Axes, lengths: list[int]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set(yscale="log")
    if 0 in lengths:
        axes.set_xscale("symlog", linthresh=SMALLEST)
        axes.set_xlim(-SMALLEST / 2, 1.5 * lengths[-1])
    else:
        axes.set_xscale("log")
    axes.xaxis.set(major_locator=FixedLocator(lengths), minor_locator=NullLocator())
    axes.yaxis.set(major_locator=LogLocator(subs=(1, 1.5, 2, 3, 5, 7)), minor_locator=NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda length, _: f"{length:.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}x"))
    axes.grid(alpha=0.3)


def _draw_bars(figure: Figure, shown: dict[str, Any]) -> None:
    """A panel for each model and what it does."""
    across = min(len(shown["bars"]), BARS_IN_A_ROW)
    down = math.ceil(len(shown["bars"]) / across)
    figure.set_size_inches(3.8 * across, 3.0 * down + 0.6)
    panels = figure.subplots(down, across, squeeze=False).flatten()
    handles = {}
    for axes, (title, groups) in zip(panels, shown["bars"].items(), strict=False):
        there = [way for way in WAYS if any(way in times for times in groups.values())]
        width = 0.8 / len(there)
        for number, way in enumerate(there):
            places = [place + (number + 0.5) * width - 0.4 for place, times in enumerate(groups.values()) if way in times]
            heights = [times[way] for times in groups.values() if way in times]
            name, colour = WAYS[way]
            handles[name] = axes.bar(places, heights, width, color=colour)
            axes.bar_label(handles[name], [f"{each:.{0 if each >= 100 else 1}f}" for each in heights], fontsize=6)
        axes.set_xticks(range(len(groups)), groups, fontsize=7)
        axes.set_title(title, fontsize=9)
        axes.tick_params(axis="y", labelsize=7)
    for axes in panels[len(shown["bars"]) :]:
        axes.set_axis_off()
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    _head(figure, shown["title"], shown)


def _head(figure: Figure, title: str, shown: dict[str, Any]) -> None:
    figure.suptitle(f"{title}\n{textwrap.fill(shown['environment'], HEADING)}", fontsize=8)
