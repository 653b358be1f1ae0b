"""One attention call as data: its tensors and options (AttentionInputs), and its shape alone (AttentionProblem).

Backends receive an AttentionInputs and nothing else; selection looks only at the AttentionProblem.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor


class _Arguments(NamedTuple):
    """The fields of AttentionInputs."""

    q: Tensor
    k: Tensor
    v: Tensor
    prefix_k: Tensor
    prefix_v: Tensor
    key_mask: Tensor | None  # bool [batch, kv_len]
    key_lens: Tensor | None  # int [batch]
    bias: Tensor | None  # [batch or 1, heads or 1, q_len or 1, prefix_len + kv_len]
    prefix_ids: Tensor | None  # int [batch] or [sequences]
    prefix_lens: Tensor | None  # int [prefixes]
    cu_seqlens_q: Tensor | None  # int [sequences + 1]
    cu_seqlens_k: Tensor | None  # int [sequences + 1]
    parent: Tensor | None  # int [sequences]
    causal: bool
    scale: float
    window: int | None
    softcap: float | None
    first_key_position: int | None
    max_seqlen_q: int | None
    max_seqlen_k: int | None


class AttentionInputs(_Arguments):
    """The validated arguments of one call, in the order of the operator's schema.

    Dense: q [batch, heads, q_len, head_dim], k [batch, kv_heads, kv_len, head_dim], v [batch, kv_heads, kv_len, value_dim].
    Varlen (cu_seqlens_q is set): q [q_tokens, heads, head_dim], k and v [k_tokens, kv_heads, ...].
    The prefix always has its bank axis here: [prefixes, kv_heads, prefix_len, ...]; prefix_ids None means prefix 0 for all.
    """

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q, k, v, prefix_k, prefix_v: what has a gradient."""
        return self.q, self.k, self.v, self.prefix_k, self.prefix_v

    @property
    def varlen(self) -> bool:
        return self.cu_seqlens_q is not None

    def sequences(self) -> list[tuple[slice, slice, slice | None]]:
        """Where each packed sequence's queries, its keys and its parent's keys, if it has a parent, lie among the tokens.

        Reads the index tensors. ValueError where they describe no sequences of these tokens, which nothing has checked of a
        call that was compiled.
        """
        places = []
        for name, tensor, tokens in (("cu_seqlens_q", self.cu_seqlens_q, self.q), ("cu_seqlens_k", self.cu_seqlens_k, self.k)):
            ends = tensor.tolist()
            if ends[0] != 0 or ends[-1] != len(tokens) or ends != sorted(ends):
                raise ValueError(
                    f"{name}: expected values that start at 0, never fall and end at {len(tokens)} tokens, got {ends[:16]}"
                )
            places.append([slice(*pair) for pair in itertools.pairwise(ends)])
        queries, keys = places
        parents = [-1] * len(queries) if self.parent is None else self.parent.tolist()
        ids = [0] * len(queries) if self.parent is None or self.prefix_ids is None else self.prefix_ids.tolist()
        for index, parent in enumerate(parents):
            if parent >= index or (parent >= 0 and (parents[parent] >= 0 or ids[parent] != ids[index])):
                raise ValueError(f"parent: expected an earlier sequence with the same prefix and no parent, got {parent}")
        return list(zip(queries, keys, [keys[parent] if parent >= 0 else None for parent in parents], strict=True))

    def problem(self, gradients: bool | None = None) -> AttentionProblem:
        """The shape of this call, made once; reads no tensor values.

        Args:
            gradients: None asks autograd the first time, which must not be off for another reason than the caller's (inside an
                operator it is).
        """
        found = self.__dict__.get("_problem")
        if found is None or gradients not in (None, found.gradients):
            if gradients is None:
                gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in self.tensors)
            found = self._problem = self._describe(gradients)
        return found

    def _describe(self, gradients: bool) -> AttentionProblem:
        if self.varlen:
            q_tokens, heads, head_dim = self.q.shape
            k_tokens, kv_heads, value_dim = self.v.shape
            batch, q_len, kv_len = self.cu_seqlens_q.shape[0] - 1, self.max_seqlen_q, self.max_seqlen_k
        else:
            batch, heads, q_len, head_dim = self.q.shape
            kv_heads, kv_len, value_dim = self.v.shape[1:]
            q_tokens, k_tokens = batch * q_len, batch * kv_len
        return AttentionProblem(
            device=self.q.device.type, dtype=self.q.dtype, prefix_dtype=self.prefix_k.dtype,
            batch=batch, heads=heads, kv_heads=kv_heads, q_len=q_len, kv_len=kv_len, q_tokens=q_tokens, k_tokens=k_tokens,
            head_dim=head_dim, value_dim=value_dim, prefixes=self.prefix_k.shape[0], prefix_len=self.prefix_k.shape[2],
            causal=self.causal, window=self.window, softcap=self.softcap, first_key_position=self.first_key_position,
            has_key_mask=self.key_mask is not None, has_key_lens=self.key_lens is not None, has_bias=self.bias is not None,
            has_prefix_ids=self.prefix_ids is not None, varlen=self.varlen, has_parent=self.parent is not None,
            gradients=gradients,
        )  # fmt: skip


class AttentionProblem(NamedTuple):
    """What selection may look at: sizes, dtypes and which options are present. Varlen: batch is the number of sequences."""

    device: str
    dtype: torch.dtype
    prefix_dtype: torch.dtype
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    q_tokens: int
    k_tokens: int
    head_dim: int
    value_dim: int
    prefixes: int
    prefix_len: int
    causal: bool
    window: int | None
    softcap: float | None
    first_key_position: int | None
    has_key_mask: bool
    has_key_lens: bool
    has_bias: bool
    has_prefix_ids: bool
    varlen: bool
    has_parent: bool
    gradients: bool  # whether any may be asked for

    def flops(self) -> int:
        """Floating point operations of the forward pass (the backward pass has 2.5 times as many).

        Counts visible query-key pairs of full rows: prefix_len per query, plus the causal triangle or the rectangle;
        padding, windows and varlen lengths shorter than the maximum are not subtracted.
        """
        own = self.kv_len - (self.q_len - 1) / 2 if self.causal else self.kv_len
        return int(2 * (self.head_dim + self.value_dim) * self.heads * self.q_tokens * (self.prefix_len + own))

    def bytes_moved(self) -> int:
        """Least memory traffic of the forward pass in bytes: q, k, v and out once, every prefix once, lse in float32."""
        tokens = (self.query_values() + self.key_values()) * self.dtype.itemsize
        return tokens + 4 * self.q_tokens * self.heads + self.prefix_values() * self.prefix_dtype.itemsize

    def query_values(self) -> int:
        """Elements of q and out together."""
        return self.q_tokens * self.heads * (self.head_dim + self.value_dim)

    def key_values(self) -> int:
        """Elements of k and v together."""
        return self.k_tokens * self.kv_heads * (self.head_dim + self.value_dim)

    def prefix_values(self) -> int:
        """Elements of prefix_k and prefix_v together, of the whole bank."""
        return self.prefixes * self.kv_heads * self.prefix_len * (self.head_dim + self.value_dim)


def empty_token_major(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor of `shape` whose memory order is token by token.

    Dense [batch, heads, len, dim] is stored as [batch, len, heads, dim], which the model's output projection reads without
    a copy; varlen [tokens, heads, dim] is stored as it is.
    """
    if len(shape) == 3:
        return like.new_empty(shape, dtype=dtype)
    batch, heads, length, dim = shape
    return like.new_empty((batch, length, heads, dim), dtype=dtype).transpose(1, 2)
