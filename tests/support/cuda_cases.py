"""Cases for the CUDA kernel: those of decoding with head sizes that it has, and what is particular to its tiles and items."""

from __future__ import annotations

from dataclasses import replace

import torch

from prefix_kernels.backends.cuda import HEAD_DIMS
from support.cases import Case
from support.compare import DTYPES
from support.decoding import DECODE_CASES
from support.inputs import Inputs, make_inputs


def fitted(case: Case) -> Case:
    """The case with the next head_dim that the kernel has, for keys and values."""
    head_dim = next(dim for dim in HEAD_DIMS if dim >= max(case.head_dim, case.value_dim or 0))
    return replace(case, head_dim=head_dim, value_dim=None)


_ROWS = {"heads": 6, "kv_heads": 2, "q_len": 1, "head_dim": 80, "kv_len": 30, "prefix_len": 70}
_IDS = (2, 0, -1, 2, 4, 2, 0, 2, 2, 1, 4, -1, 2, 0, 2, 2, 4, 0, 2, 2, 2, 2)
_BANK = _ROWS | {"batch": 22, "prefixes": 6, "prefix_ids": _IDS}
_FEW = {"batch": 5, "heads": 6, "kv_heads": 2, "q_len": 1, "head_dim": 64, "kv_len": 700, "prefix_len": 10}
CUDA_CASES = (
    *(fitted(case) for case in DECODE_CASES if case.bias is None),
    Case("tiles, all full", **_ROWS | {"batch": 16, "heads": 8}),
    Case("tiles, last one short", **_ROWS | {"batch": 25}),
    Case("tiles, rows that fill no tile", **_ROWS | {"batch": 7, "heads": 22}),
    Case("tiles, head_dim 256", **_ROWS | {"batch": 13, "head_dim": 256}),
    Case("tiles, sliding prefix, fill", **_ROWS | {"batch": 7, "q_len": 3}, window=60, first_key_position=1,
         key_lens=(30, 3, 17, 0, 29, 8, 1)),
    Case("units, several of a row", **_ROWS | {"batch": 2, "heads": 20, "kv_heads": 1, "q_len": 7, "kv_len": 150}, window=90),
    Case("units, several of a row, bank", **_ROWS | {"batch": 4, "heads": 22, "kv_heads": 2, "q_len": 7}, prefixes=2,
         prefix_ids=(1, -1, 0, 1), key_lens=(30, 12, 5, 0)),
    Case("bank, many rows", **_BANK),
    Case("bank, many rows, lengths", **_BANK, prefix_lens=(70, 65, 3, 70, 0, 9)),
    Case("bank, many rows, five queries", **_BANK | {"q_len": 5, "heads": 4}, prefix_lens=(70, 65, 3, 70, 0, 9), window=50,
         first_key_position=0),
    Case("bank, more prefixes than lanes", **_ROWS | {"batch": 6, "prefixes": 70, "heads": 2, "kv_heads": 1},
         prefix_ids=(69, 33, 31, 32, 69, 0)),
    Case("bank, more rows than lanes", **_ROWS | {"batch": 75, "prefixes": 3, "heads": 2, "kv_heads": 1, "kv_len": 3},
         prefix_ids=tuple((i * i) % 4 - 1 for i in range(75))),
    Case("bank, none has one", **_ROWS | {"batch": 3}, prefixes=2, prefix_ids=(-1, -1, -1)),
    Case("holes, long cache", **_ROWS | {"kv_len": 290, "prefix_len": 10}, padding="holes"),
    Case("holes, sixteen queries", **_ROWS | {"kv_len": 190, "heads": 64, "q_len": 2}, padding="holes", window=100),
    Case("split with nothing in it", **_ROWS | {"kv_len": 900, "batch": 2}, key_lens=(5, 130)),
    Case("few", **_FEW | {"prefix_len": 0, "batch": 13}),
    Case("few, head_dim 128", **_FEW | {"head_dim": 128}),
    Case("few, prefix of some chunks", **_FEW | {"prefix_len": 300, "batch": 7}),
    Case("few, cluster of sixteen", **_FEW | {"batch": 1, "kv_len": 3000, "prefix_len": 2700, "heads": 3, "kv_heads": 1}),
    Case("few, fill", **_FEW | {"q_len": 2}, key_lens=(700, 3, 650, 1, 129), softcap=2.0),
    Case("few, holes", **_FEW | {"batch": 11, "kv_len": 333}, padding="holes"),
    Case("few, sliding prefix", **_FEW | {"q_len": 2, "prefix_len": 64}, window=500, first_key_position=0),
    Case("few, bank", **_FEW | {"prefix_len": 70}, prefixes=3, prefix_ids=(0, -1, 2, 2, -1), key_lens=(700, 3, 650, 0, 129)),
)  # fmt: skip


def aligned_inputs(case: Case, dtype: str, device: str = "cpu") -> Inputs:
    """The case's inputs, each token at a multiple of 16 bytes and NaN between them; those of make_inputs lie anywhere."""
    inputs = make_inputs(case, *DTYPES[dtype])
    tensors = []
    for tensor in inputs.tensors:
        buffer = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 8), torch.nan, dtype=tensor.dtype, device=device)
        tensors.append(buffer[..., 8:].copy_(tensor.detach()))
    options = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.options.items()}
    return Inputs(tuple(tensors), options)
