"""Times the Triton kernels with many tile sizes on this GPU: python benchmarks/tune_tiles.py RESULTS_DIR [--rows D256]

Candidates are compiled by all processor cores first; then one process times them in turn over the shapes below, each only if
its numbers agree with those of the tile table. RESULTS_DIR/tiles.json gets a row for each kernel and shape: device seconds of
every candidate, best first. A row of tile_sizes.py that is measured says so with such a file in benchmarks/results.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import torch

import measure
from cases import Case, gpu_op_cases
from prefix_kernels.backends.triton import backward_kernels, forward_kernel, hopper, hopper_forward, tile_sizes
from prefix_kernels.problem import AttentionInputs
from rivals import attention_inputs, make_inputs

_CASES = {case.key.removeprefix("forward "): case for case in gpu_op_cases() if not case.backward}
SHAPES = {name: _CASES[name] for name in (  # time may be over before the last
    "B8 S512 H32/8 D128 P512 bfloat16", "B32 S128 H16/16 D64 P200 bfloat16", "B32 S128 H16/16 D64 P10 bfloat16",
    "B64 S96 H9/3 D64 P16 bfloat16", "B4 S2048 H32/8 D128 P512 bfloat16", "B16 S512 H16/16 D64 P200 bfloat16",
    "B8 S1024 H8/4 D256 P512 bfloat16", "B8 S512 H32/8 D128 P2048 bfloat16", "B8 S512 H32/8 D128 P32 bfloat16",
    "B8 S512 H12/12 D64 P200 bfloat16 bias", "B8 S512 H12/12 D64 P16 bfloat16 bias",
)}  # fmt: skip
WANTED = {
    "dq": (True, False, False, False, False), "dkeys": (False, True, True, False, False),
    "dprefix": (False, False, False, True, True),
}  # fmt: skip
KERNELS = (*WANTED, "forward")
BIASED = "biased "  # before a kernel's name: of calls with a bias
ON_HOPPER = {kernel: f"hopper_{kernel}" for kernel in WANTED} | {"forward": "hopper"}
LIMIT = 2e-2  # ‖difference‖ / ‖table's result‖ of two right candidates in bfloat16

Candidate = tuple[str, int, int, int, int, int]  # kernel, head_dim, BLOCK_M, BLOCK_N, warps, stages


def name_of(candidate: Candidate) -> str:
    return "{}x{} w{} s{}".format(*candidate[2:])


def own_candidates() -> list[Candidate]:
    """The table's."""
    found = []
    for name, dim in itertools.product((*KERNELS, *(BIASED + kernel for kernel in KERNELS)), (64, 128, 256)):
        tile = tile_of(name, dim)
        found.append((name, dim, tile.BLOCK_M, tile.BLOCK_N, tile.num_warps, tile.num_stages))
    return found


def tile_of(name: str, dim: int) -> tile_sizes.Tile:
    return tile_sizes.find(name.removeprefix(BIASED), torch.device("cuda"), torch.bfloat16, dim, name.startswith(BIASED))


def candidates() -> list[Candidate]:
    """The table's own, then 64 rows of a product for four warps, which is what wgmma takes, with all else varied."""
    found = own_candidates()
    for dim, stages, (rows, warps), columns in itertools.product(
        (128, 64, 256), (2, 3, 1), ((64, 4), (128, 8), (128, 4)), (64, 32, 128)
    ):
        if rows == 128 and warps == 4 and dim > 64:
            continue  # accumulators of more than 128 registers a thread
        if columns * dim <= 128 * 128 and stages * columns * dim <= 3 * 64 * 128:
            found += [(kernel, dim, rows, columns, warps, stages) for kernel in ("forward", "dq")]
            if dim <= 128:  # else the sums of keys and values alone are 256 registers a thread
                found += [(kernel, dim, columns, rows, warps, stages) for kernel in ("dkeys", "dprefix")]
    found += [
        (kernel, 256, queries, keys, 8, stages)
        for kernel, queries, keys, stages in itertools.product(("dkeys", "dprefix"), (16, 32, 64), (32, 64), (1, 2))
    ]
    found += [(BIASED + kernel, *rest) for kernel, *rest in found if kernel in KERNELS]
    return list(dict.fromkeys(found))


def inputs_of(case: Case) -> AttentionInputs:
    return attention_inputs(make_inputs(case, "cuda", torch.Generator("cuda").manual_seed(0)))


def use(candidate: Candidate) -> None:
    """Makes it the tile of its kernel on this GPU."""
    name, dim, *tile = candidate
    table = tile_sizes.BIASED if name.startswith(BIASED) else tile_sizes.TABLE
    key = name.removeprefix(BIASED), tile_sizes.architecture_of(torch.device("cuda")), 16, dim
    table[key] = tile_sizes.Tile(*tile, "a candidate")


def run(kernel: str, inputs: AttentionInputs, saved: tuple | None) -> tuple:
    kernel = kernel.removeprefix(BIASED)
    if kernel == "hopper":
        return hopper_forward.forward(inputs)
    if kernel == "forward":
        return forward_kernel.forward(inputs)
    out, lse, grad_out = saved
    regimes, name = dict.fromkeys(WANTED, ()), kernel.removeprefix("hopper_")
    if name != kernel:
        regimes[name] = (tile_sizes.Regime(inputs.q.shape[-1], 1, 1),)
    with mock.patch.object(tile_sizes, "HOPPER_BACKWARD_REGIMES", regimes):
        grads = backward_kernels.backward(inputs, out, lse, grad_out, None, WANTED[name])
    return tuple(grad for grad in grads if grad is not None)


def once(kernel: str, inputs: AttentionInputs, saved: tuple, index: int) -> None:
    run(kernel, inputs, saved)


_inputs: dict = {}  # of a compiling process


def compile_one(candidate: Candidate) -> str | None:
    """Runs it once, which leaves its code in Triton's cache; why not, if it does not run."""
    kernel, dim = candidate[:2]
    try:
        biased = kernel.startswith(BIASED)
        if (dim, biased) not in _inputs:
            # Two biases: another kernel is compiled where a query's columns are no multiple of 16.
            small = [Case("small", 2, 4, 2, dim, 64, 64, prefix_len, bias=biased) for prefix_len in (32, 36)[: 1 + biased]]
            every = [inputs_of(case) for case in small]
            _inputs[dim, biased] = [(inputs, (*forward_kernel.forward(inputs), inputs.q)) for inputs in every]
        if not kernel.startswith("hopper"):
            use(candidate)
        for inputs, saved in _inputs[dim, biased]:
            run(kernel, inputs, saved)
        torch.cuda.synchronize()
    except Exception as error:
        return measure.first_line(error)
    return None


def difference(results: tuple, expected: tuple) -> float:
    pairs = zip(results, expected, strict=True)
    return max(((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in pairs)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("results", type=Path, help="folder of tiles.json")
    parser.add_argument("--seconds", type=float, default=120.0, help="after which no further row is begun; default 120")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile; default: one a core")
    parser.add_argument("--rows", action="append", default=[], help="only rows whose key contains these words; repeatable")
    parser.add_argument(
        "--tiles", action="append", default=[], help="of the candidates 64x32 w4 s2, … only those with these words, beside the "
        "table's own; repeatable"
    )  # fmt: skip
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("torch finds no GPU")
    begin = time.monotonic()
    rows = [(name, shape, BIASED * shape.bias + kernel) for (name, shape), kernel in itertools.product(SHAPES.items(), KERNELS)]
    rows = [row for row in rows if not args.rows or any(words in f"{row[2]} {row[0]}" for words in args.rows)]
    if not rows:
        parser.error(f"--rows: no row's key contains {', '.join(args.rows)}")
    kinds = {(kernel, shape.head_dim) for _, shape, kernel in rows}
    wanted = [(ON_HOPPER[kernel], dim, 0, 0, 0, 0) for kernel, dim in sorted(kinds) if kernel in ON_HOPPER]
    wanted += [each for each in candidates() if each[:2] in kinds and (
        not args.tiles or each in own_candidates() or any(words in name_of(each) for words in args.tiles)
    )]  # fmt: skip
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        said = dict(zip(wanted, pool.map(compile_one, wanted), strict=True))
    print(
        f"compiled {len(wanted)} candidates, {sum(v is not None for v in said.values())} failed: "
        f"{time.monotonic() - begin:.0f} s"
    )
    results = measure.Results(args.results / "tiles.json", measure.environment("cuda"))
    measure.GPU_SECONDS = 0.01
    for name, shape, kernel in rows:
        if time.monotonic() - begin > args.seconds:
            print("time is over")
            break
        inputs = inputs_of(shape)
        table = tile_of(kernel, shape.head_dim)
        saved = (*forward_kernel.forward(inputs), torch.randn_like(inputs.q))
        expected = run(kernel, inputs, saved)
        timed = []
        own = (kernel, shape.head_dim, table.BLOCK_M, table.BLOCK_N, table.num_warps, table.num_stages)
        for candidate in dict.fromkeys([own, *wanted]):
            if candidate[:2] != own[:2] or said.get(candidate) is not None:
                continue
            use(candidate)
            try:
                wrong = difference(run(kernel, inputs, saved), expected)
                seconds = measure.device_timing(functools.partial(once, kernel, inputs, saved), 1)["median"]
            except Exception as error:
                print(candidate, measure.first_line(error))
                continue
            timed.append((seconds if wrong < LIMIT else float("inf"), list(candidate[2:]), wrong))
        use(own)
        other = None
        if hopper.why_not(inputs) is None and said[ON_HOPPER[kernel], shape.head_dim, 0, 0, 0, 0] is None:
            wrong = difference(run(ON_HOPPER[kernel], inputs, saved), expected)
            other = measure.device_timing(functools.partial(once, ON_HOPPER[kernel], inputs, saved), 1)["median"]
            other = other if wrong < LIMIT else float("inf")
        first = next(seconds for seconds, tile, _ in timed if tile == list(own[2:]))
        timed.sort(key=lambda each: each[0])
        results.put({
            "key": f"{kernel} {name}", "complete": True, "table": list(own[2:]), "table_seconds": first,
            "hopper_seconds": other,
            "tiles": [{"tile": tile, "seconds": seconds} for seconds, tile, _ in timed if seconds < float("inf")],
            "wrong": [tile for seconds, tile, _ in timed if seconds == float("inf")],
        })  # fmt: skip
        best = ", ".join(f"{name_of((kernel, 0, *tile))} {seconds * 1e6:.1f}" for seconds, tile, _ in timed[:4])
        print(f"{kernel} {name}: table {first * 1e6:.1f} us; {best}" + (f"; hopper {other * 1e6:.1f}" if other else ""))
    print(f"{time.monotonic() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    gc.freeze()  # else every graph capture goes through all of torch's objects
    sys.exit(main())
