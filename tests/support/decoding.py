"""Cases for the kernel for decoding (few queries a row), and the forward half of the comparison."""

from __future__ import annotations

import torch
from torch import Tensor

from support.cases import Case
from support.compare import DTYPES, expectation, slack_of
from support.inputs import Inputs, make_inputs
from support.tolerance import assert_close

_ONE = {"q_len": 1, "kv_len": 60, "prefix_len": 40}
_FIVE = {"q_len": 5, "kv_len": 70, "prefix_len": 90}
DECODE_CASES = (
    Case("decode, one query", **_ONE),
    Case("decode, five queries", **_FIVE),
    Case("decode, mha", **_FIVE | {"kv_heads": 4, "batch": 3}),
    Case("decode, groups of three", **_FIVE | {"heads": 9, "kv_heads": 3, "batch": 3}),
    Case("decode, mqa, eight queries", **_FIVE | {"heads": 16, "kv_heads": 1, "q_len": 8}),
    Case("decode, no prefix", **_FIVE | {"prefix_len": 0}),
    Case("decode, prefix of one", **_ONE | {"prefix_len": 1}),
    Case("decode, prefix of a block", **_ONE | {"prefix_len": 16}),
    Case("decode, long prefix", **_ONE | {"prefix_len": 700, "batch": 5}),
    Case("decode, one row, long prefix", **_FIVE | {"prefix_len": 700, "batch": 1}),
    Case("decode, only a prefix", **_ONE | {"kv_len": 0, "prefix_len": 150, "causal": False}),
    Case("decode, nothing", **_ONE | {"kv_len": 0, "prefix_len": 0, "causal": False}),
    Case("decode, a new key alone", **_ONE | {"kv_len": 1, "prefix_len": 150}),
    Case("decode, long cache", **_ONE | {"kv_len": 700, "prefix_len": 150, "heads": 2, "kv_heads": 1}),
    Case("decode, contiguous", **_FIVE, contiguous=True),
    Case("decode, fill", **_FIVE | {"batch": 4}, key_lens=(70, 33, 2, 0)),
    Case("decode, fill, no prefix", **_FIVE | {"batch": 4, "prefix_len": 0}, key_lens=(70, 33, 2, 0)),
    Case("decode, fill, not causal", **_FIVE | {"batch": 3}, key_lens=(50, 16, 0), causal=False),
    Case("decode, fill, window", **_FIVE | {"batch": 3}, key_lens=(60, 30, 0), window=17),
    Case("decode, window, not causal", **_FIVE, window=17, causal=False),
    Case("decode, sliding prefix", **_FIVE, window=100, first_key_position=0),
    Case("decode, sliding prefix, fill", **_FIVE | {"batch": 5}, key_lens=(70, 20, 0, 3, 41), window=60, first_key_position=2),
    Case("decode, sliding prefix, short one", **_ONE | {"prefix_len": 3}, window=62, first_key_position=0),
    Case("decode, sliding prefix, bank", **_FIVE | {"batch": 3}, window=80, first_key_position=1, prefixes=2,
         prefix_ids=(1, -1, 0), prefix_lens=(90, 33), key_lens=(70, 20, 11)),
    Case("decode, softcap", **_FIVE, softcap=2.0),
    Case("decode, left padding", **_FIVE, padding="left"),
    Case("decode, holes, fill", **_FIVE | {"batch": 3}, padding="holes", key_lens=(70, 33, 0)),
    Case("decode, everything hidden", **_FIVE | {"prefix_len": 0}, padding="all"),
    Case("decode, bias", **_ONE, bias=(0, 0, 0, 0)),
    Case("decode, bias, five queries", **_FIVE, bias=(1, 0, 0, 0), padding="left"),
    Case("decode, bias of heads, long prefix", **_ONE | {"prefix_len": 700, "batch": 5}, bias=(1, 0, 1, 0)),
    Case("decode, bias of rows", **_FIVE | {"batch": 3}, bias=(0, 1, 1, 0), key_lens=(70, 33, 0)),
    Case("decode, bias of queries", **_FIVE, bias=(0, 1, 0, 1), causal=False),
    Case("decode, bias that hides, softcap", **_FIVE | {"batch": 3}, bias=(0, 1, 0, 0), bias_hides=True, softcap=3.0),
    Case("decode, bias, one row", **_FIVE | {"batch": 1, "heads": 9, "kv_heads": 3}, bias=(0, 0, 0, 0)),
    Case("decode, bias, bank", **_FIVE | {"batch": 4}, prefixes=3, prefix_ids=(2, 0, -1, 1), prefix_lens=(90, 33, 17),
         bias=(0, 0, 0, 0)),
    Case("decode, bias, sliding prefix, fill", **_FIVE | {"batch": 5}, key_lens=(70, 20, 0, 3, 41), window=60,
         first_key_position=2, bias=(0, 0, 0, 0)),
    Case("decode, bank", **_ONE | {"batch": 5}, prefixes=3, prefix_ids=(2, -1, 0, 2, 1), prefix_lens=(33, 0, 40)),
    Case("decode, bank, five queries", **_FIVE | {"batch": 4}, prefixes=3, prefix_ids=(2, 0, -1, 1)),
    Case("decode, bank, one row", **_FIVE | {"batch": 1}, prefixes=2, prefix_ids=(1,), prefix_lens=(90, 50)),
    Case("decode, head_dim 80", **_FIVE, head_dim=80),
    Case("decode, head_dim 96", **_ONE, head_dim=96),
    Case("decode, value_dim", **_FIVE, head_dim=24, value_dim=40),
    Case("decode, head_dim 256", **_ONE | {"heads": 2, "kv_heads": 1}, head_dim=256, value_dim=160),
)  # fmt: skip

_LLAMA = {"heads": 32, "kv_heads": 8, "head_dim": 128}
LARGE_DECODE_CASES = (
    Case("large, short cache", **_LLAMA, batch=8, q_len=1, kv_len=128, prefix_len=2048),
    Case("large, fill", **_LLAMA, batch=8, q_len=4, kv_len=900, prefix_len=500, key_lens=(900, 0, 4, 100, 640, 64, 65, 899)),
    Case("large, one row", **_LLAMA, batch=1, q_len=1, kv_len=3000, prefix_len=700),
    Case("large, many rows", **_LLAMA | {"heads": 8, "kv_heads": 2}, batch=80, q_len=1, kv_len=200, prefix_len=300),
)


def check(
    case: Case, dtype: str, device: str = "cpu", backend: str = "triton", inputs: Inputs | None = None
) -> tuple[Tensor, Tensor]:
    """out and lse of a backend, as good as eager attention's. inputs: instead of the case's own, with the same values."""
    inputs = inputs or make_inputs(case, *DTYPES[dtype], device=device)
    got = inputs.call(backend=backend, return_lse=True)
    with torch.enable_grad():
        _, _, wide, eager = expectation(case, *DTYPES[dtype])
    assert got[0].dtype == DTYPES[dtype][0]
    for name, value, expected, yardstick in zip(("out", "lse"), got, wide, eager, strict=False):
        assert_close(value, expected, yardstick, name, slack_of(case))
    return got


def refill(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> None:
    """Other queries, and caches with so many tokens in each row, in place; NaN behind them."""
    q.normal_()
    for cache in (k, v):
        cache.normal_()
        for row, length in enumerate(lengths):
            cache[row, :, length:] = torch.nan
