"""From a call to a kernel's arguments. The kernels share the names of their lengths and constants."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton

from prefix_kernels.backends.triton import tile_sizes
from prefix_kernels.backends.triton.rows import Tokens, distances, rows_of, tokens
from prefix_kernels.backends.triton.tile_sizes import Tile
from prefix_kernels.problem import AttentionInputs

# Run-time values: another length never compiles a kernel again.
LENGTHS = (
    "batch", "heads", "kv_heads", "q_len", "kv_len", "q_tokens", "k_tokens", "prefixes", "prefix_len", "window", "slide",
)  # fmt: skip


class Call:
    """One call: its tensors as kernels read them, and the arguments that do not depend on the kernel."""

    def __init__(self, inputs: AttentionInputs):
        problem = inputs.problem()
        self.problem, self.device = problem, inputs.q.device
        self.tensors = tuple(tokens(tensor, problem.varlen) for tensor in (inputs.q, inputs.k, inputs.v)) + tuple(
            tokens(tensor.to(problem.dtype)) for tensor in (inputs.prefix_k, inputs.prefix_v)
        )  # a float32 prefix is rounded once, and not by every block of queries that reads it
        self.rows = rows_of(inputs)
        window, slide = distances(inputs)
        self.lengths = {
            "batch": problem.batch, "heads": problem.heads, "kv_heads": problem.kv_heads,
            "q_len": problem.q_len, "kv_len": problem.kv_len, "q_tokens": problem.q_tokens, "k_tokens": problem.k_tokens,
            "prefixes": problem.prefixes, "prefix_len": problem.prefix_len, "window": window, "slide": slide,
            "scale": inputs.scale, "softcap": inputs.softcap,
        }  # fmt: skip
        self.constants = {
            "CAUSAL": problem.causal, "HEAD_DIM": problem.head_dim, "VALUE_DIM": problem.value_dim,
            "BLOCK_DIM": max(16, triton.next_power_of_2(problem.head_dim)),
            "BLOCK_VALUE_DIM": max(16, triton.next_power_of_2(problem.value_dim)),
        }  # fmt: skip

    def tile(self, kernel: str) -> Tile:
        """The tile sizes of one kernel for this call."""
        problem = self.problem
        return tile_sizes.find(kernel, self.device, problem.dtype, max(problem.head_dim, problem.value_dim))

    def launch(self, kernel, tile: Tile, programs: int, **arguments: Tokens | int | None) -> None:
        """Runs `programs` programs of a kernel, or nothing."""
        if programs == 0:
            return
        with self.on_device():
            kernel[(programs,)](
                **arguments, rows=self.rows, **self.lengths, **self.constants, BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N,
                num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
            )  # fmt: skip

    def on_device(self) -> AbstractContextManager:
        """Triton launches on the current device: make it the call's."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
