"""Which block sizes each kernel runs with: kernel × architecture × width of the dtype × head dimension.

A row that was timed says "measured". The others are assumed: a large one of the shapes tried that compiles without spilling a
register, whatever the options, with two pipeline stages or more where they fit; `make aot` proves it for every row.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch

from prefix_kernels.problem import AttentionProblem


@dataclass(frozen=True)
class Tile:
    """BLOCK_M queries and BLOCK_N keys a block, warps of a program, stages of the software pipeline, and why."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    reason: str


MASK_SPILLS = "assumed; the next larger block spills with key masks"
PACK_SPILLS = "assumed; the next larger block spills in packs with parents"
SMALL_SHARED = "assumed; a second stage would exceed the 99 KiB of 8.6, 8.9 and 12.x"
LARGEST = "assumed; a large block that leaves room for its pipeline stages"
RING = "assumed; the keys and values that shared memory holds beside the queries"
NO_STAGE = "assumed; a second stage spills"
NO_TCGEN05 = "mma.sync: with 64 keys, which tcgen05 needs, every shape tried spills; assumed"
TIMED = "measured: the fastest of 6 to 27 shapes on an H200 (benchmarks/results/nvidia-h200/tiles.json)"
TIMED_NEXT = "measured: the fastest of 8 to 27 shapes on an H200 (benchmarks/results/nvidia-h200/tiles_256.json)"
TIMED_BIAS = "measured: the fastest of some 8 shapes on an H200 (benchmarks/results/nvidia-h200/tiles_bias.json)"
AS_DKEYS = "as dkeys, where it was measured to be the fastest of 6 shapes"
STREAM = "assumed; stages enough to stream the keys, for two programs on a multiprocessor"
BIAS_STAGE = "as without a bias, with a stage less: one more spills or exceeds shared memory; assumed"
BIAS_TILE = "assumed; as without a bias, with any number of stages, it spills"
SCALAR = "assumed; IEEE products have no tensor cores; up to 8 words spilled are let pass"

# (kernel, bits): {architecture: {head dimension: (BLOCK_M, BLOCK_N, num_warps, num_stages, reason)}}
_ROWS = {
    ("forward", 16): {
        80: {64: (128, 64, 8, 3, LARGEST), 128: (64, 64, 8, 2, MASK_SPILLS), 256: (64, 32, 8, 2, SMALL_SHARED)},
        90: {64: (64, 32, 4, 2, TIMED_NEXT), 128: (64, 64, 4, 3, TIMED), 256: (128, 32, 8, 3, TIMED_NEXT)},
        100: {64: (128, 64, 8, 3, LARGEST), 128: (128, 64, 8, 3, LARGEST), 256: (64, 64, 8, 2, LARGEST)},
    },
    ("decode", 16): {
        80: {64: (64, 64, 4, 3, STREAM), 128: (64, 32, 4, 4, STREAM), 256: (64, 32, 8, 2, SMALL_SHARED)},
        90: {64: (64, 64, 4, 4, STREAM), 128: (64, 64, 4, 3, STREAM), 256: (64, 32, 8, 3, STREAM)},
        100: {64: (64, 64, 8, 4, STREAM), 128: (64, 64, 4, 3, STREAM), 256: (64, 32, 8, 3, STREAM)},
    },
    ("hopper", 16): {  # warps of a consumer, stages of a ring
        90: {64: (128, 128, 4, 3, RING), 128: (128, 128, 4, 2, RING), 256: (128, 64, 4, 2, RING)},
    },
    ("hopper_dq", 16): {90: {64: (128, 64, 4, 4, RING), 128: (128, 64, 4, 4, RING)}},
    ("hopper_dkeys", 16): {90: {64: (64, 128, 4, 4, RING), 128: (64, 128, 4, 3, RING), 256: (32, 128, 4, 2, RING)}},
    ("hopper_dprefix", 16): {90: {64: (64, 128, 4, 4, RING), 128: (64, 128, 4, 3, RING), 256: (32, 128, 4, 2, RING)}},
    ("dq", 16): {
        80: {64: (64, 64, 8, 2, MASK_SPILLS), 128: (64, 64, 8, 2, LARGEST), 256: (64, 32, 8, 1, SMALL_SHARED)},
        90: {64: (64, 32, 4, 3, TIMED), 128: (64, 64, 4, 2, TIMED), 256: (128, 32, 8, 3, TIMED_NEXT)},
        100: {64: (128, 64, 8, 2, LARGEST), 128: (128, 64, 8, 2, LARGEST), 256: (64, 32, 8, 1, NO_STAGE)},
    },
    ("dkeys", 16): {
        80: {64: (32, 128, 8, 2, MASK_SPILLS), 128: (32, 64, 8, 2, PACK_SPILLS), 256: (32, 32, 8, 2, MASK_SPILLS)},
        90: {64: (64, 64, 4, 2, TIMED), 128: (32, 64, 4, 2, TIMED), 256: (64, 64, 8, 2, TIMED_NEXT)},
        100: {64: (32, 128, 8, 2, MASK_SPILLS), 128: (32, 128, 8, 1, NO_STAGE), 256: (32, 32, 8, 2, NO_TCGEN05)},
    },
    ("dprefix", 16): {
        80: {64: (32, 128, 8, 2, MASK_SPILLS), 128: (64, 64, 8, 2, LARGEST), 256: (32, 32, 8, 2, MASK_SPILLS)},
        90: {64: (64, 64, 4, 2, AS_DKEYS), 128: (32, 64, 4, 2, TIMED), 256: (64, 64, 8, 2, TIMED_NEXT)},
        100: {64: (32, 128, 8, 2, MASK_SPILLS), 128: (32, 128, 8, 1, NO_STAGE), 256: (32, 32, 8, 2, NO_TCGEN05)},
    },
}  # fmt: skip
_FLOAT32 = {
    "decode": {64: (32, 32, 8, 2, SCALAR), 128: (32, 16, 8, 2, SCALAR), 256: (16, 16, 8, 2, SCALAR)},
    "forward": {64: (32, 32, 4, 1, SCALAR), 128: (32, 16, 8, 1, SCALAR), 256: (16, 16, 4, 1, SCALAR)},
    "dq": {64: (64, 32, 8, 1, SCALAR), 128: (32, 16, 8, 1, SCALAR), 256: (16, 16, 8, 1, SCALAR)},
    "dkeys": {64: (32, 16, 4, 1, SCALAR), 128: (16, 16, 4, 1, SCALAR), 256: (16, 16, 8, 1, SCALAR)},
    "dprefix": {64: (32, 16, 4, 1, SCALAR), 128: (16, 16, 4, 1, SCALAR), 256: (16, 16, 8, 1, SCALAR)},
}  # fmt: skip
# Rows of calls with a bias: those that were measured, or that differ from those above.
_BIASED = {
    ("forward", 16): {
        80: {64: (64, 64, 8, 2, BIAS_TILE)}, 90: {64: (64, 32, 4, 3, TIMED_BIAS)},
        100: {64: (128, 64, 8, 2, BIAS_STAGE), 128: (128, 64, 8, 2, BIAS_STAGE)},
    },
    ("decode", 16): {
        80: {128: (64, 32, 8, 4, BIAS_TILE), 256: (64, 32, 8, 1, BIAS_STAGE)}, 90: {128: (64, 64, 8, 3, BIAS_TILE)},
        100: {128: (64, 64, 8, 3, BIAS_TILE)},
    },
    ("dq", 16): {
        80: {64: (64, 64, 8, 1, BIAS_STAGE)}, 90: {64: (64, 32, 4, 3, TIMED_BIAS), 256: (128, 32, 8, 2, BIAS_STAGE)},
        100: {128: (128, 64, 8, 1, BIAS_STAGE)},
    },
    ("dkeys", 16): {
        90: {64: (32, 64, 4, 1, TIMED_BIAS), 128: (32, 64, 4, 1, BIAS_STAGE)}, 100: {64: (32, 128, 8, 1, BIAS_STAGE)},
    },
    ("dprefix", 16): {
        80: {64: (32, 64, 8, 2, BIAS_TILE), 128: (64, 64, 8, 1, BIAS_STAGE)},
        90: {64: (64, 64, 4, 1, TIMED_BIAS), 128: (32, 128, 8, 1, BIAS_TILE)},
    },
}  # fmt: skip
_DELTA = {64: (128, 16, 4, 1, LARGEST), 128: (64, 16, 4, 1, LARGEST), 256: (32, 16, 4, 1, LARGEST)}
ARCHITECTURES = (80, 90, 100)


class Regime(NamedTuple):
    """Calls of which a kernel for Hopper is faster than that for every GPU."""

    head_dim: int
    least_q_len: int
    least_programs: int  # (128 queries) · heads · batch

    def covers(self, problem: AttentionProblem) -> bool:
        programs = -(-problem.q_len // 128) * problem.heads * problem.batch
        large = problem.q_len >= self.least_q_len and programs >= self.least_programs
        return large and problem.head_dim == problem.value_dim == self.head_dim


# Elsewhere the kernel for every GPU is at least as fast; each kernel was timed against its other by itself.
_LARGE = Regime(128, 256, 128)  # nvidia-h200/tiles_128.json, at lengths of 512 and 2048
_WIDE = Regime(256, 9, 1)  # nvidia-h200/tiles_256.json; assumed of fewer than 1024 queries, decoding (8) excepted
_WIDE_BACKWARD = Regime(256, 256, 128)  # nvidia-h200/tiles_256.json; assumed of fewer than 512 programs
HOPPER_REGIMES: tuple[Regime, ...] = (_LARGE, _WIDE)
HOPPER_BACKWARD_REGIMES: dict[str, tuple[Regime, ...]] = {
    "dq": (_LARGE,), "dkeys": (_LARGE, _WIDE_BACKWARD), "dprefix": (_LARGE, _WIDE_BACKWARD),
}  # fmt: skip
INTERPRETER = Tile(64, 64, 4, 1, "whole test cases in a block: the interpreter's time goes with the number of blocks")


def _table(rows: dict) -> dict[tuple[str, int, int, int], Tile]:
    return {
        (kernel, architecture, bits, dim): Tile(*row)
        for (kernel, bits), by_architecture in rows.items()
        for architecture, by_dim in by_architecture.items()
        for dim, row in by_dim.items()
    }


# (kernel, architecture, bits of the dtype, head dimension)
TABLE = _table(
    _ROWS
    | {(kernel, 32): dict.fromkeys(ARCHITECTURES, by_dim) for kernel, by_dim in _FLOAT32.items()}
    | {("delta", bits): dict.fromkeys(ARCHITECTURES, _DELTA) for bits in (16, 32)}
)
BIASED = _table(_BIASED)  # instead, for calls with a bias


def find(kernel: str, device: torch.device, dtype: torch.dtype, dim: int, biased: bool = False) -> Tile:
    """The row for heads of up to `dim`; biased: of a call with a bias."""
    if device.type == "cpu":
        return INTERPRETER
    key = kernel, architecture_of(device), 8 * dtype.itemsize, 64 if dim <= 64 else 128 if dim <= 128 else 256
    return BIASED.get(key, TABLE[key]) if biased else TABLE[key]


@functools.cache
def architecture_of(device: torch.device) -> int:
    """The architecture whose rows serve a device: its own, or sm_80's, which keep within what every newer chip has."""
    major, _ = torch.cuda.get_device_capability(device)
    return 10 * major if 10 * major in ARCHITECTURES else 80
