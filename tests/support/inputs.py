"""Tensors for a case. Every float tensor is a slice of a NaN-filled buffer, and what may be NaN is NaN."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import prefix_kernels
from support.cases import Case


@dataclass
class Inputs:
    """Leaf tensors q, k, v, prefix_k, prefix_v, and the keyword arguments of the call."""

    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    options: dict

    def call(self, **more):
        """The public function that the case is about."""
        function = prefix_kernels.prefix_attention
        if "cu_seqlens_q" in self.options:
            function = prefix_kernels.prefix_attention_varlen
        return function(*self.tensors, **self.options, **more)

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values as new leaf tensors of another dtype."""
        return Inputs(tuple(t.detach().to(dtype).requires_grad_() for t in self.tensors), self.options)


def make_inputs(case: Case, dtype=torch.float32, prefix_dtype=None, seed: int = 0, device: str = "cpu") -> Inputs:
    """Normal random values, rounded to their dtype; gradients wanted for all five tensors."""
    generator = torch.Generator().manual_seed(seed)
    value_dim = case.value_dim or case.head_dim
    bank = () if case.prefixes is None else (case.prefixes,)
    prefix_shape = (*bank, case.kv_heads, case.prefix_len)
    prefix_dtype = prefix_dtype or dtype

    def random(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    if case.seqlens_q is None:
        q = _token_major(random(case.batch, case.heads, case.q_len, case.head_dim, dtype=dtype), case.contiguous)
        k = _token_major(random(case.batch, case.kv_heads, case.kv_len, case.head_dim, dtype=dtype), case.contiguous)
        v = _token_major(random(case.batch, case.kv_heads, case.kv_len, value_dim, dtype=dtype), case.contiguous)
    else:
        tokens_q, tokens_k = sum(case.seqlens_q), sum(case.seqlens_k or case.seqlens_q)
        q = _framed(random(tokens_q, case.heads, case.head_dim, dtype=dtype))
        k = _framed(random(tokens_k, case.kv_heads, case.head_dim, dtype=dtype))
        v = _framed(random(tokens_k, case.kv_heads, value_dim, dtype=dtype))
    prefix_k = _framed(random(*prefix_shape, case.head_dim, dtype=prefix_dtype))
    prefix_v = _framed(random(*prefix_shape, value_dim, dtype=prefix_dtype))
    options = _options(case, generator)
    if case.key_lens is not None:
        for row, fill in enumerate(case.key_lens):
            k[row, :, fill:] = torch.nan
            v[row, :, fill:] = torch.nan
    if case.prefix_lens is not None:
        for index, length in enumerate(case.prefix_lens):
            prefix_k[index, :, length:] = torch.nan
            prefix_v[index, :, length:] = torch.nan
    tensors = tuple(tensor.to(device).detach().requires_grad_() for tensor in (q, k, v, prefix_k, prefix_v))
    options = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    return Inputs(tensors, options)


def _framed(values: Tensor) -> Tensor:
    """`values` as a slice of a larger buffer of NaN, last stride 1."""
    buffer = values.new_full([size + 2 for size in values.shape], torch.nan)
    view = buffer[tuple(slice(1, 1 + size) for size in values.shape)]
    return view.copy_(values)


def _token_major(values: Tensor, contiguous: bool) -> Tensor:
    return _framed(values) if contiguous else _framed(values.transpose(1, 2)).transpose(1, 2)


def _options(case: Case, generator: torch.Generator) -> dict:
    def index(values):
        return None if values is None else torch.tensor(values, dtype=torch.int32)

    options = {
        "causal": case.causal, "scale": case.scale, "window": case.window, "softcap": case.softcap,
        "prefix_ids": index(case.prefix_ids), "prefix_lens": index(case.prefix_lens),
    }  # fmt: skip
    if case.seqlens_q is not None:
        seqlens_k = case.seqlens_k or case.seqlens_q
        for name, lengths in (("q", case.seqlens_q), ("k", seqlens_k)):
            ends = torch.tensor([0, *lengths]).cumsum(0)
            options |= {f"cu_seqlens_{name}": ends.int(), f"max_seqlen_{name}": max(lengths, default=0) + 1}
        return options | {"parent": index(case.parent)}
    options |= {"first_key_position": case.first_key_position, "key_lens": index(case.key_lens)}
    options |= {"key_mask": _padding(case, generator), "bias": _bias(case, generator)}
    return options


def _padding(case: Case, generator: torch.Generator) -> Tensor | None:
    if case.padding is None:
        return None
    mask = torch.ones(case.batch, case.kv_len, dtype=torch.bool)
    for row in range(case.batch):
        pad = min(1 + 2 * row, case.kv_len)
        if case.padding == "left":
            mask[row, :pad] = False
        elif case.padding == "right":
            mask[row, case.kv_len - pad :] = False
        elif case.padding == "holes":
            mask[row] = torch.rand(case.kv_len, generator=generator) > 0.5
        elif case.padding == "all" or row == 0:
            mask[row] = False
    return mask


def _bias(case: Case, generator: torch.Generator) -> Tensor | None:
    if case.bias is None:
        return None
    full = (case.batch, case.heads, case.q_len, case.prefix_len + case.kv_len)
    shape = [size if axis == 0 else 1 for axis, size in zip(case.bias, full, strict=True)]
    bias = torch.randn(shape, generator=generator) * 2
    if case.bias_hides:
        bias[torch.rand(shape, generator=generator) > 0.7] = -torch.inf
        bias[:, :, 2] = -torch.inf  # one query sees nothing at all
    return bias
