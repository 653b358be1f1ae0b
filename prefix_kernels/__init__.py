"""Attention over a prefix that the whole batch shares, without ever building the concatenation."""

from prefix_kernels.api import explain_backends, prefix_attention, prefix_attention_varlen, workspace_bytes
from prefix_kernels.select import BACKENDS, available_backends

__all__ = [
    "BACKENDS", "available_backends", "explain_backends", "prefix_attention", "prefix_attention_varlen", "workspace_bytes",
]  # fmt: skip
