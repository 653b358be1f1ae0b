"""Results as Markdown: one function for each section of docs/benchmarks.md, and the README's tables of CPU and GPU speed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from cases import Case

GOALS = {"forward": 1.3, "forward+backward": 1.2}  # geometric means over all points against the best rival
DIRECTIONS = {"forward": "Forward", "forward+backward": "Forward and the five gradients", "decode": "Decoding"}
DECODE_GOALS = "decoding with 32 rows and 128 or more positions: 2.0x in float32, 5.0x in bfloat16"

Row = dict[str, Any]


def load(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def case_of(row: Row) -> Case:
    seqlens = row["case"]["seqlens"]
    return Case(**{**row["case"], "seqlens": None if seqlens is None else tuple(seqlens)})


def median(row: Row, way: str) -> float | None:
    return row["ways"].get(way, {}).get("median")


def ours(row: Row) -> float | None:
    return median(row, row["chosen"])


def over(row: Row, way: str, own: str | None = None) -> float | None:
    """How many times faster ours is than another way; own: of several of ours another than the one that is chosen."""
    times = median(row, way), ours(row) if own is None else median(row, own)
    return None if None in times else times[0] / times[1]


def geometric_mean(numbers: Iterable[float]) -> float:
    logs = [math.log(number) for number in numbers]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def ratio_text(ratio: float | None) -> str:
    return "failed" if ratio is None else f"{ratio:.2f}x"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def environment_line(environment: dict[str, Any]) -> str:
    """What results were measured on, with which versions and which code."""
    commit = (environment["commit"] or "unknown")[:12] + (" with changes" if environment["dirty"] else "")
    device = environment["device"]
    if environment["instructions"]:  # a CPU
        count = environment["threads"]
        device += f" ({environment['instructions']}), {count} thread{'s' if count != 1 else ''}"
    versions = ", ".join(f"{name} {environment[name]}" for name in ("torch", "triton", "transformers") if environment[name])
    code = f"commit {commit}, source {environment['source']}"
    note = f" {environment['note']}" if environment.get("note") else ""
    return f"{device}; {versions}, Python {environment['python']}; {code}, {environment['date']}.{note}"


def operator_rows(results: dict[str, Any], direction: str) -> list[Row]:
    rows = [row for row in results["rows"] if "case" in row and "ways" in row]
    return [row for row in rows if case_of(row).direction == direction]


def grid(rows: list[Row]) -> str:
    """Ratios over the best rival, a column for each prefix length."""
    lengths = sorted({case_of(row).prefix_len for row in rows})
    lines: dict[tuple, dict[int, str]] = {}
    for row in rows:
        case = case_of(row)
        width = f" of {case.head_dim}" if case.head_dim != 64 else ""
        heads = f"{case.heads}/{case.kv_heads}{width}" + (", bias" if case.bias else "")
        place = (case.dtype, f"{case.batch}", f"{case.kv_len}", heads)
        lines.setdefault(place, {})[case.prefix_len] = ratio_text(row.get("ratio"))
    head = ("dtype", "batch", "keys" if case_of(rows[0]).decode else "length", "heads", *(f"P={length}" for length in lengths))
    return table(head, [(*place, *(found.get(length, "") for length in lengths)) for place, found in lines.items()])


def break_even(rows: list[Row]) -> str:
    """From which prefix length on the shared prefix decodes faster than the best cache that holds it in every row."""
    lines: dict[tuple, list[tuple[int, float]]] = {}
    for row in rows:
        case = case_of(row)
        times = [time for name in row.get("ways", {}) if name.startswith("concat") and (time := median(row, name)) is not None]
        if times and case.decode and case.prefix_len and ours(row) is not None:
            place = (case.model, f"{case.heads}/{case.kv_heads}", case.dtype, f"{case.batch}", f"{case.kv_len}")
            lines.setdefault(place, []).append((case.prefix_len, min(times) / ours(row)))
    if not lines:
        return ""
    body = []
    for place, found in lines.items():
        found.sort()
        slower = [length for length, ratio in found if ratio < 1]
        faster = [length for length, _ in found if not slower or length > max(slower)]
        start = f"{faster[0]}" if faster else "–"
        body.append((*place, start + (" (the shortest measured)" if faster and not slower else ""), ratio_text(found[-1][1])))
    head = ("model", "heads", "dtype", "batch", "cache", "faster from P =", "at the longest P")
    return f"Break-even with concatenation:\n\n{table(head, body)}"


def losses(rows: list[Row]) -> str:
    """Every point below 1.0x, then those that miss a higher goal, or a sentence that there is none."""
    below, missed = [], []
    for row in rows:
        ratio, goal = row.get("ratio"), case_of(row).cpu_goal
        if ratio is None or ratio < 1:
            below.append(f"- {_loss(row)}")
        elif ratio < goal:
            missed.append(f"- {_loss(row)}, goal {goal:.1f}x")
    return _below_one(below) + ("\n\nPoints below a higher goal of theirs:\n\n" + "\n".join(missed) if missed else "")


def _below_one(items: list[str]) -> str:
    return "Points below 1.0x:\n\n" + "\n".join(items) if items else "No point is below 1.0x."


def _loss(row: Row) -> str:
    if row.get("ratio") is None:
        return f"{row['key']}: no ratio: {row['ways'].get(row['chosen'], {}).get('failed', 'no rival ran')}"
    rival = row["best_rival"]
    times = f"{ours(row) * 1e3:.3f} ms against {median(row, rival) * 1e3:.3f} ms of {rival}"
    return f"{row['key']}: {row['ratio']:.2f}x, {times}"


def all_points(rows: list[Row]) -> str:
    """Medians in milliseconds of every way that could run."""
    names = list(dict.fromkeys(name for row in rows for name, way in row["ways"].items() if "median" in way))

    def cell(row: Row, name: str) -> str:
        seconds = median(row, name)
        text = "" if seconds is None else f"{seconds * 1e3:.3f}"
        return f"**{text}**" if name == row["chosen"] and text else text

    ends = [(row["best_rival"] or "", ratio_text(row["ratio"])) for row in rows]
    body = [(row["key"], *(cell(row, name) for name in names), *end) for row, end in zip(rows, ends, strict=True)]
    return table(("point (ms, ours bold)", *names, "best rival", "ratio"), body)


def cpu_operator(results: dict[str, Any]) -> str:
    parts = [environment_line(results["environment"])]
    for direction, title in DIRECTIONS.items():
        rows = operator_rows(results, direction)
        if not rows:
            continue
        ratios = [row["ratio"] for row in rows if row["ratio"]]
        goal = f"goal {GOALS[direction]:.1f}x" if direction in GOALS else f"goals: {DECODE_GOALS}"
        mean = f"Geometric mean over the best rival, {len(ratios)} of {len(rows)} points: {geometric_mean(ratios):.2f}x"
        goals = f"({goal}; 1.0x at every point)"
        parts += [f"### {title}", f"{mean} {goals}; over `peft` {_mean_over(rows, 'peft')}.", grid(rows), losses(rows)]
        parts += filter(None, [break_even(rows)])
        parts += ["<details><summary>All points</summary>", all_points(rows), "</details>"]
    return "\n\n".join(parts)


def _mean_over(rows: list[Row], way: str) -> str:
    ratios = [over(row, way) for row in rows]
    return f"{geometric_mean(ratio for ratio in ratios if ratio is not None):.2f}x"


def whole_models(results: dict[str, Any]) -> str:
    """Training steps and generation: times, and ours over PEFT."""
    rows = [row for row in results["rows"] if "ways" in row]
    names = list(dict.fromkeys(name for row in rows for name in row["ways"]))

    def cell(row: Row, name: str) -> str:
        way = row["ways"].get(name, {})
        if "median" not in way:
            return way.get("not_available") or way.get("failed") or ""
        text = f"{way['median']:.3f} s" if way["median"] >= 0.1 else f"{way['median'] * 1e3:.1f} ms"
        if row["run"]["what"] == "generate":
            text = f"{row['tokens'] / way['median']:.1f} tokens/s"
        peak = way.get("peak_bytes")
        return text + (f", {peak / 2**30:.1f} GiB" if peak is not None else "")

    body = []
    for row in rows:
        cells = [cell(row, name) for name in names]
        body.append((row["key"], row["dtype"], row["backend"], *cells, ratio_text(over(row, "peft"))))
    head = ("run", "dtype", "backend", *names, "selected over peft")
    others = [name for name in names if name != "selected"]
    slower = [f"- {row['key']}: {over(row, n):.2f}x of {n}" for row in rows for n in others if (over(row, n) or 1) < 1]
    failed = [f"- {row['key']}: {row['failed']}" for row in results["rows"] if "failed" in row]
    lost = "`selected` is slower here:\n\n" + "\n".join(slower) if slower else "`selected` is nowhere slower."
    parts = [environment_line(results["environment"]), table(head, body), lost, *_trainer_steps(rows), *_profiles(rows)]
    return "\n\n".join([*parts, *(["Failed:\n\n" + "\n".join(failed)] if failed else [])])


def gpu_operator(results: dict[str, Any]) -> str:
    """All points of an operator stage with what they reach of the device's measured ceilings."""
    top = next((row for row in results["rows"] if row["key"] == "ceilings" and "failed" not in row), None)
    begun = [row for row in results["rows"] if "case" in row]
    rows = [row for row in begun if row.get("complete") or "failed" in row]
    parts = [environment_line(results["environment"])]
    if len(rows) < len(begun):
        parts.append(f"Not finished when time was over: {', '.join(row['key'] for row in begun if row not in rows)}.")
    if top is not None:
        flops, copy = top["matmul_flops_per_second"] / 1e12, top["copy_bytes_per_second"] / 1e12
        parts.append(f"Measured ceilings: {flops:.0f} TFLOP/s (matrix product), {copy:.2f} TB/s (copy, read and written).")
    head = ("point", "ours, µs", "TFLOP/s", "of the ceilings: FLOP, bytes", "MiB above inputs: ours, peft", "best rival, µs")
    below = [f"- {row['key']}: {ratio_text(row.get('ratio'))}" for row in rows if (row.get("ratio") or 0) < 1]
    lines = table((*head, "ratio"), [_gpu_line(row, top) for row in rows])
    return "\n\n".join(filter(None, [*parts, lines, _below_one(below), break_even(rows)]))


def _gpu_line(row: Row, top: Row | None) -> Sequence[str]:
    seconds = ours(row) if "ways" in row else None
    if seconds is None:
        reason = row.get("failed") or row["ways"].get(row["chosen"], {}).get("failed", "")
        return row["key"], reason, "", "", "", "", "failed"
    shares = []
    if top is not None:
        shares.append(row["flops"] / seconds / top["matmul_flops_per_second"])
        if row["bytes"]:
            shares.append(row["bytes"] / seconds / top["copy_bytes_per_second"])
    rival, peaks = row["best_rival"], [row["ways"].get(name, {}).get("peak_bytes") for name in (row["chosen"], "peft")]
    return (
        row["key"],
        f"{row['chosen']} {seconds * 1e6:.0f}",
        f"{row['flops'] / seconds / 1e12:.0f}",
        ", ".join(f"{share:.0%}" for share in shares),
        ", ".join("–" if peak is None else f"{peak / 2**20:.0f}" for peak in peaks),
        f"{rival} {median(row, rival) * 1e6:.0f}" if rival else "",
        ratio_text(row["ratio"]),
    )


def gpu_tests(results: dict[str, Any]) -> str:
    rows = {row["key"]: row for row in results["rows"]}
    counts = rows.get("counts", {})
    text = f"{counts.get('passed', 0)} passed, {counts.get('failed', 0)} failed, {counts.get('skipped', 0)} skipped."
    failed = [f"- {key}: {' '.join(row.get('lines', []))[:200]}" for key, row in rows.items() if row.get("outcome") == "failed"]
    checks = [(key, row) for key, row in rows.items() if key.startswith("compute-sanitizer ")]
    checked = "\n".join(f"- {key}: {row['outcome']}. {' '.join(row['lines'][-1:])}" for key, row in checks)
    return "\n\n".join(filter(None, [environment_line(results["environment"]), text, "\n".join(failed), checked]))


def _in_trainer(row: Row) -> tuple[float, float] | None:
    """Seconds of a step as Trainer takes it: ours and PEFT's."""
    seconds = [row.get("in_trainer", {}).get(name, {}).get("median") for name in ("selected", "peft")]
    return None if None in seconds else (seconds[0], seconds[1])


def _trainer_steps(rows: Sequence[Row]) -> list[str]:
    found = [(row["key"], both) for row in rows if (both := _in_trainer(row))]
    body = [(key, f"{own * 1e3:.1f}", f"{peft * 1e3:.1f}", ratio_text(peft / own)) for key, (own, peft) in found]
    about = "A step in ms as Trainer takes it, with all that it does between two steps:"
    return [about, table(("run", "PrefixTrainer", "Trainer around PEFT's model", "over peft"), body)] if body else []


def _profiles(rows: Sequence[Row]) -> list[str]:
    """What the device's time in a step goes to, where it was looked at."""
    profiled = [(row, name, way) for row in rows for name, way in row["ways"].items() if "profile" in way]
    if not profiled:
        return []
    kinds = [kind for kind in profiled[0][2]["profile"] if kind != "kernels"]
    body = []
    for row, name, way in profiled:
        seconds = [way["profile"][kind] for kind in kinds]
        shown = [f"{each * 1e3:.2f}" for each in (*seconds, way["median"] - sum(seconds))]
        body.append((f"{row['key']}, {name}", *shown, str(way["profile"]["kernels"])))
    return ["Device time of a step in ms, and what of its whole time is left:", table(("run", *kinds, "idle", "kernels"), body)]


def readme_cpu(operator: dict[str, Any], whole: dict[str, Any] | None) -> str:
    """The README's table of CPU speed: geometric means and the worst point of each kind."""

    def heads_of(dim: int, rows: int | None = None) -> Callable[[Case], bool]:
        return lambda case: case.head_dim == dim and rows in (None, case.batch)

    kinds = [
        ("forward", "forward", heads_of(64)), ("forward and gradients", "forward+backward", heads_of(64)),
        ("decoding, 1 row", "decode", heads_of(64, 1)), ("decoding, 8 rows", "decode", heads_of(64, 8)),
        ("decoding, 32 rows", "decode", heads_of(64, 32)), ("heads of 100, forward", "forward", heads_of(100)),
        ("heads of 100, forward and gradients", "forward+backward", heads_of(100)),
        ("heads of 100, decoding", "decode", heads_of(100)),
    ]  # fmt: skip
    lines = []
    for title, direction, belongs in kinds:
        for dtype in ("float32", "bfloat16", "float16"):
            found = [(row, case_of(row)) for row in operator_rows(operator, direction) if row["ratio"]]
            rows = [row for row, case in found if case.dtype == dtype and belongs(case)]
            if rows:
                lines.append(_mean_and_worst(f"{title}, {dtype}", rows, lambda row: f"P={case_of(row).prefix_len}"))
    for row in whole["rows"] if whole else []:
        if (ratio := over(row, "peft")) is not None:
            threads = whole["environment"]["threads"]
            lines.append((f"whole model: {row['key']}, {row['dtype']}, {threads} threads", f"{ratio:.2f}x", "", ""))
    head = ("speed on a CPU, geometric means", "over PEFT's way", "over the best rival", "worst point")
    named = _commits({"attention": operator, "whole models": whole})
    return f"{table(head, lines)}\n\n{environment_line(operator['environment'])}{named}"


def _mean_and_worst(title: str, rows: list[Row], name: Callable[[Row], str]) -> Sequence[str]:
    worst, mean = min(rows, key=lambda row: row["ratio"]), geometric_mean(row["ratio"] for row in rows)
    place = f"{worst['ratio']:.2f}x ({name(worst)}, over {worst['best_rival']})"
    return f"{title}, {len(rows)} points", _mean_over(rows, "peft"), f"{mean:.2f}x", place


def _commits(parts: dict[str, dict[str, Any] | None]) -> str:
    """Which part of a table is of which commit, where they differ."""
    of = {name: results["environment"]["commit"][:12] for name, results in parts.items() if results}
    return f" Of commits: {', '.join(f'{name} {commit}' for name, commit in of.items())}." if len(set(of.values())) > 1 else ""


def readme_gpu(operator: dict[str, Any], decode: dict[str, Any] | None, whole: dict[str, Any] | None) -> str:
    """The README's tables of GPU speed: geometric means and the worst point of each kind of call; whole models."""
    kinds: list[tuple[str, dict[str, Any] | None, Callable[[Case], bool]]] = [
        ("forward", operator, lambda case: not case.backward),
        ("forward and gradients", operator, lambda case: case.backward),
        ("decoding, prefix of 512 and more", decode, lambda case: case.prefix_len >= 512),
        ("decoding, prefix of 0 and 16", decode, lambda case: case.prefix_len < 512),
    ]
    lines = []
    for title, results, belongs in kinds:
        found = [row for row in (results or {"rows": []})["rows"] if row.get("complete") and row.get("ratio")]
        rows = [row for row in found if belongs(case_of(row))]
        if rows:
            lines.append(_mean_and_worst(title, rows, lambda row: row["key"]))
    head = ("speed on a GPU, geometric means", "over PEFT's way", "over the best rival", "worst point")
    named = _commits({"attention in training": operator, "decoding": decode, "whole models": whole})
    parts = [table(head, lines), *([_whole_by_prefix(whole)] if whole else [])]
    return "\n\n".join([*parts, f"{environment_line(operator['environment'])}{named}"])


def _whole_by_prefix(whole: dict[str, Any]) -> str:
    """A line for each way of ours through each model at a size of a batch, a column for each prefix length."""
    shown = {
        "selected": "", "padded": ", `padding_free=False`", "accelerated": ", `accelerate_peft`",
        "kept graphs": ", `keep_graphs`",
    }  # fmt: skip
    batches = {"train": (8, 64), "generate": (64,)}
    lines: dict[str, dict[int, str]] = {}
    for row in whole["rows"]:
        run = row.get("run")
        for way, addition in shown.items():
            if run and run["batch"] in batches[run["what"]] and (ratio := over(row, "peft", way)) is not None:
                does = "a training step" if run["what"] == "train" else f"{run['new_tokens']} new tokens"
                name = f"{does}, {run['model']['name']}, {run['batch']} rows{addition}"
                text = f"{median(row, way) * 1e3:.{0 if run['what'] == 'generate' else 1}f} ms, {ratio:.1f}x"
                lines.setdefault(name, {})[run["prefix_len"]] = text
        if run and run["batch"] in batches[run["what"]] and (both := _in_trainer(row)):
            name = f"a training step in `Trainer`, {run['model']['name']}, {run['batch']} rows"
            lines.setdefault(name, {})[run["prefix_len"]] = f"{both[0] * 1e3:.1f} ms, {both[1] / both[0]:.1f}x"
    lengths = sorted({length for found in lines.values() for length in found})
    body = [(name, *(found.get(length, "") for length in lengths)) for name, found in lines.items()]
    return table(("whole models on a GPU: time, over PEFT", *(f"P={length}" for length in lengths)), body)
