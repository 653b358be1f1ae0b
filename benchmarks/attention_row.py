"""One row of the operator benchmarks: a case's inputs, the check of every way against float64, then its time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import measure
from cases import Case
from rivals import STOCK_BACKENDS, InputSet, Way, explain, make_inputs, options, public_function, row_and_column, ways

CHECKED = 2  # rows of the batch, or packed sequences, that are compared; no other row gives gradients in the check
LIMITS = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 3e-2}  # of ‖actual − expected‖ / ‖expected‖
GRADIENTS = ("dq", "dk", "dv", "dprefix_k", "dprefix_v")
DEVICE_MEMORY_SHARE = 0.6  # what input sets and expanded caches may take of a GPU


@dataclass
class Prepared:
    """A row before it is timed: its input sets, and the ways that are right as calls on a set's number."""

    row: dict[str, Any]
    sets: list[InputSet]
    calls: dict[str, Callable[[int], Any]]


def prepare(case: Case, device: str, backend: str | None = None, only: Sequence[str] | None = None) -> Prepared:
    """Inputs, and every way that may run and is right. backend: ours, instead of the one that is chosen for such a call.

    ValueError for a backend that does not exist or refuses the case.
    """
    generator = torch.Generator(device).manual_seed(0)
    sets = [make_inputs(case, device, generator)]
    wanted, state = measure.sets_needed(sets[0].bytes(), device)
    sets += [make_inputs(case, device, generator) for _ in range(wanted - 1)]
    said = explain(sets[0], backend)
    chosen = next((name for name, answer in said.items() if answer == "chosen"), None)
    if chosen is None:
        raise ValueError(f"backend: expected one that serves {case.key}, got {backend!r}: {said}")
    row = {
        "key": case.key, "case": asdict(case), "flops": case.flops(), "bytes": case.bytes_moved(), "sets": len(sets),
        "state": state, "device": device, "chosen": chosen, "ways": {}, "complete": False,
    }  # fmt: skip
    prepared = Prepared(row, sets, {})
    expected = reference(sets[0])
    for way in ways(sets[0], only):
        _add(prepared, way, expected)
    return prepared


def measure_on_cpu(case: Case, seconds: float, rounds: int, backend: str | None = None) -> dict[str, Any]:
    """The whole row: all ways in turn in this process."""
    prepared = prepare(case, "cpu", backend)
    comparison = measure.Comparison(prepared.calls, len(prepared.sets))
    comparison.run(seconds, rounds)
    return finish(prepared.row, comparison.timings())


def measure_on_gpu(
    case: Case, wanted: Callable[[str], bool], put: Callable[[dict], None], tried: dict[str, dict[str, Any]]
) -> None:
    """One way after another; `put` gets the row after each.

    wanted: asked for each way by name just before it is tried. tried: ways that the row has already.
    """
    caches = 2 * case.batch * case.kv_heads * (case.prefix_len + 2 * case.kv_len) * case.head_dim * case.torch_dtype.itemsize
    if case.decode and caches > DEVICE_MEMORY_SHARE * torch.cuda.get_device_properties(0).total_memory:
        return put({"key": case.key, "case": asdict(case), "failed": f"caches of {caches >> 30} GiB", "complete": True})
    prepared = prepare(case, "cuda", only=())
    row, expected = prepared.row, reference(prepared.sets[0])
    row["ways"] |= tried
    for way in ways(prepared.sets[0]):
        if not wanted(way.name):
            continue
        _add(prepared, way, expected)
        call = prepared.calls.get(way.name)
        if call is not None:
            try:
                _, peak = measure.with_peak(lambda call=call: call(0))
                finish(row, {way.name: measure.device_timing(call, len(prepared.sets)) | {"peak_bytes": peak}})
            except Exception as error:
                row["ways"][way.name]["failed"] = measure.first_line(error)
        put(row | {"complete": False})
        measure.settle()
    put(finish(row, {}))


def reference(inputs: InputSet) -> list[Tensor]:
    """out, and where there is a backward pass the five gradients, of the first CHECKED rows in float64."""
    case = inputs.case
    rows = slice(0, CHECKED)
    if case.seqlens is not None:
        case = Case(**{**vars(case), "seqlens": case.seqlens[:CHECKED]})
        rows = slice(0, sum(case.seqlens))
    leaves = [t.detach()[rows].double() for t in inputs.leaves[:3]] + [t.detach().double() for t in inputs.leaves[3:]]
    leaves = [leaf.requires_grad_(case.backward) for leaf in leaves]
    out = public_function(case)(*leaves, **options(case, inputs.device), backend="reference")
    if not case.backward:
        return [out]
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs.grad_out[rows].double())]


def finish(row: dict[str, Any], timings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Puts timings into the row, and which rival is the best one by its median and how many times faster ours is.

    On the CPU rivals are the ways that concatenate; on a GPU torch's kernels composed by our `sdpa` backend are one too.
    """
    for name, timing in timings.items():
        row["ways"][name] |= timing
    medians = {name: way["median"] for name, way in row["ways"].items() if "median" in way}
    chosen = row["chosen"]
    stock = STOCK_BACKENDS if row["device"] != "cpu" else ()
    rivals = {n: t for n, t in medians.items() if n != chosen and (not row["ways"][n]["ours"] or n in stock)}
    row["best_rival"] = min(rivals, key=rivals.get, default=None)
    row["ratio"] = round(rivals[row["best_rival"]] / medians[chosen], 4) if rivals and chosen in medians else None
    row["complete"] = True
    return row


def _add(prepared: Prepared, way: Way, expected: list[Tensor]) -> None:
    """Checks a way. What cannot run, fails or is wrong gets its reason into the row and no call."""
    found: dict[str, Any] = {"ours": way.ours}
    prepared.row["ways"][way.name] = found
    sets = prepared.sets
    reason = way.why_not(sets[0])
    if reason is not None:
        found["not_available"] = reason
        return
    if way.pads and sets[0].case.seqlens is not None:
        sets = [inputs.padded() for inputs in sets]
    try:
        attend = way.prepare(sets[0].case, sets[0].device)
        found["errors"] = _errors(attend, sets[0], prepared.sets[0].case, expected)
    except Exception as error:
        found["failed"] = measure.first_line(error)
        return
    worst = [numbers[2] for numbers in found["errors"].values()]
    if not all(error <= LIMITS[sets[0].case.dtype] for error in worst):  # NaN is not
        found["failed"] = f"wrong: relative error {max(worst)}"
        return
    backward = sets[0].case.backward

    def call(index: int) -> Any:
        inputs = sets[index]
        if backward:
            return torch.autograd.grad(attend(inputs), inputs.leaves, inputs.grad_out)
        with torch.no_grad():
            return attend(inputs)

    prepared.calls[way.name] = call


def _errors(
    attend: Callable[[InputSet], Tensor], inputs: InputSet, case: Case, expected: list[Tensor]
) -> dict[str, list[float]]:
    """The errors of out and gradients on the checked rows; `inputs` may be the case's packed sequences as padded rows."""
    padded = case.seqlens is not None and inputs.case.seqlens is None
    place = row_and_column(case, inputs.device) if padded else None

    def checked(tensor: Tensor) -> Tensor:
        tokens = tensor.transpose(1, 2)[place] if padded else tensor
        return tokens[: len(expected[0])]

    if not case.backward:
        with torch.no_grad():
            return {"out": measure.errors(checked(attend(inputs)), expected[0])}
    first = CHECKED if case.seqlens is None or padded else len(expected[0])
    grad_out = inputs.grad_out.clone()
    grad_out[first:] = 0
    out = attend(inputs)
    grads = torch.autograd.grad(out, inputs.leaves, grad_out)
    actual = [*(checked(tensor) for tensor in (out, *grads[:3])), *grads[3:]]
    return {n: measure.errors(a, e) for n, a, e in zip(("out", *GRADIENTS), actual, expected, strict=True)}
