"""Calls for the kernels for Hopper: several blocks, odd edges, and tensors that TMA can read."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import torch

from prefix_kernels import api
from prefix_kernels.problem import AttentionInputs
from support.cases import Case
from support.inputs import Inputs

ROOT = Path(__file__).resolve().parents[2]
WIDE = {"batch": 1, "heads": 4, "kv_heads": 2, "head_dim": 256}
ROWS = {"batch": 1, "heads": 2, "kv_heads": 1, "head_dim": 64}
CASES_BY_NAME = {case.name: case for case in (
    Case("whole blocks", **ROWS, q_len=256, kv_len=256, prefix_len=128),
    Case("odd lengths", **ROWS | {"batch": 2, "kv_heads": 2}, q_len=200, kv_len=200, prefix_len=150),
    Case("head_dim 128", **ROWS | {"heads": 4, "kv_heads": 2, "head_dim": 128}, q_len=150, kv_len=150, prefix_len=300),
    Case("contiguous", **ROWS, q_len=65, kv_len=65, prefix_len=1, contiguous=True),
    Case("short", **ROWS | {"batch": 2}, q_len=5, kv_len=5, prefix_len=3),
    Case("no prefix", **ROWS, q_len=130, kv_len=130, prefix_len=0),
    Case("long prefix", **ROWS, q_len=20, kv_len=20, prefix_len=700),
    Case("chunk", **ROWS, q_len=70, kv_len=300, prefix_len=20),
    Case("one new token", **ROWS | {"heads": 4}, q_len=1, kv_len=140, prefix_len=20),
    Case("not causal", **ROWS, q_len=140, kv_len=260, prefix_len=130, causal=False),
    Case("not causal, fewer keys", **ROWS, q_len=140, kv_len=20, prefix_len=0, causal=False),
    Case("no keys", **ROWS, q_len=70, kv_len=0, prefix_len=140, causal=False),
    Case("nothing to see", **ROWS, q_len=70, kv_len=0, prefix_len=0, causal=False),
    Case("no rows", **ROWS | {"batch": 0}, q_len=70, kv_len=70, prefix_len=20),
    Case("bank", **ROWS | {"batch": 4}, q_len=66, kv_len=66, prefix_len=150, prefixes=3, prefix_ids=(2, -1, 0, 2)),
    Case("scale", **ROWS, q_len=66, kv_len=66, prefix_len=20, scale=0.5),
    Case("pack", **ROWS, seqlens_q=(140, 1, 0, 128, 25), prefix_len=130),
    Case("pack, no prefix", **ROWS, seqlens_q=(129, 40), prefix_len=0),
    Case("pack, longer keys", **ROWS, seqlens_q=(20, 1, 70), seqlens_k=(150, 33, 70), prefix_len=20),
    Case("pack, not causal", **ROWS, seqlens_q=(40, 130, 7), seqlens_k=(180, 50, 0), prefix_len=20, causal=False),
    Case("pack, bank", **ROWS | {"head_dim": 128}, seqlens_q=(20, 50, 7), prefix_len=70, prefixes=2, prefix_ids=(1, -1, 0)),
    Case("head_dim 256", **WIDE, q_len=150, kv_len=150, prefix_len=200),
    Case("head_dim 256, not causal", **WIDE, q_len=70, kv_len=330, prefix_len=0, causal=False),
    Case("head_dim 256, bank", **WIDE | {"batch": 3}, q_len=5, kv_len=40, prefix_len=70, prefixes=2, prefix_ids=(1, -1, 0)),
    Case("head_dim 256, pack", **WIDE, seqlens_q=(140, 1, 0, 64, 25), prefix_len=130),
)}  # fmt: skip
CASES = tuple(CASES_BY_NAME.values())


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The values in a larger buffer of NaN, as in support.inputs, with strides of 16 bytes."""
    swap = tensor.dim() == 4 and tensor.stride(1) < tensor.stride(2)
    values = tensor.detach().transpose(1, 2) if swap else tensor.detach()
    buffer = values.new_full([*(size + 2 for size in values.shape[:-1]), values.shape[-1] + 16], torch.nan)
    view = buffer[(slice(1, -1),) * (values.dim() - 1) + (slice(8, -8),)].copy_(values)
    return view.transpose(1, 2) if swap else view


def call_of(inputs: Inputs) -> AttentionInputs:
    """What the kernels receive of a public call."""
    make = api._varlen_inputs if "cu_seqlens_q" in inputs.options else api._dense_inputs
    return make(*map(aligned, inputs.tensors), **inputs.options)


def machine_code(monkeypatch, ptx: str, sass: str):
    """tools/hopper_code.py, which reads `sass` in place of what is disassembled, and a compiled kernel with this code."""
    spec = importlib.util.spec_from_file_location("hopper_code", ROOT / "tools" / "hopper_code.py")
    hopper_code = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hopper_code)
    monkeypatch.setattr(hopper_code, "disassembled", lambda cubin: sass)
    return hopper_code, SimpleNamespace(asm={"ptx": ptx, "cubin": b""})
