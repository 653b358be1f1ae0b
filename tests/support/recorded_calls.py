"""Calls of one kind after another with the Triton backend: the third is repeated from a recording."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from prefix_kernels.backends.triton import recorded
from support.cases import Case
from support.compare import DTYPES
from support.inputs import Inputs, make_inputs

SHAPE = {"heads": 2, "kv_heads": 1, "head_dim": 16, "q_len": 7, "kv_len": 7}
WINDOW = {"window": 4, "first_key_position": 0, "prefixes": 2, "prefix_ids": (1, 0), "prefix_lens": (2, 5)}
RECORDED = {
    "dense": Case("dense", **SHAPE),
    "two heads": Case("two heads", **SHAPE | {"kv_heads": 2}, value_dim=32),
    "mask": Case("mask", **SHAPE, padding="left", softcap=5.0),
    "fill": Case("fill", **SHAPE | {"q_len": 2}, key_lens=(3, 7), causal=False),
    "bank": Case("bank", **SHAPE, **WINDOW),
    "bias": Case("bias", **SHAPE, bias=(0, 0, 0, 0), padding="left"),
    "bias of heads": Case("bias of heads", **SHAPE, bias=(1, 0, 1, 0)),
    "decode": Case("decode", **SHAPE | {"q_len": 1}),
    "decode, bias": Case("decode, bias", **SHAPE | {"q_len": 1}, bias=(0, 1, 1, 0)),
    "packed": Case("packed", **SHAPE, seqlens_q=(9, 4, 1), prefixes=3, prefix_ids=(2, -1, 0)),
}


def results(inputs: Inputs, wanted: tuple[bool, ...] = (True,) * 5) -> list[Tensor]:
    """out, lse and the gradients that are wanted."""
    tensors = [tensor if needed else tensor.detach() for tensor, needed in zip(inputs.tensors, wanted, strict=True)]
    out, lse = Inputs(tuple(tensors), inputs.options).call(backend="triton", return_lse=True)
    loss = out.float().square().sum() + lse.masked_fill(lse == -torch.inf, 0).sum()
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    return [out, lse, *torch.autograd.grad(loss, leaves)] if leaves else [out, lse]


def repeated_calls(
    case: Case, dtype: str, wanted: tuple[bool, ...], begin: Callable[[], None], device: str = "cpu"
) -> Iterator[tuple[int, list[Tensor], list[Tensor]]]:
    """(number, results, the results of the long way) of three calls, each with values of its own at addresses of its own.

    begin: called before each.
    """
    kept, expected = [make_inputs(case, *DTYPES[dtype], seed=seed, device=device) for seed in range(3)], []
    for inputs in kept:
        recorded._kinds.clear()
        expected.append(results(inputs, wanted))
    recorded._kinds.clear()
    for number, inputs in enumerate(kept):
        begin()
        yield number, results(inputs, wanted), expected[number]


def assert_same(found: list[Tensor], right: list[Tensor]) -> None:
    for value, other in zip(found, right, strict=True):
        assert value.dtype == other.dtype and value.stride() == other.stride()
        assert torch.equal(value, other) and not value.isnan().any()
