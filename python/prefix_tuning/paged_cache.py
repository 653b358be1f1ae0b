"""A prefix in an engine's paged cache: which of its heads a process holds, and in which slots its positions stand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def heads_of_rank(tensor: Tensor, rank: int, ranks: int) -> Tensor:
    """The keys or values of one process under tensor parallelism, [prefix_len, heads, dim], from [kv_heads, prefix_len, dim].

    As in vLLM ranks share the heads out in order; where there are fewer heads than ranks each has one, neighbours the same.
    ValueError where they do not divide.
    """
    kv_heads = tensor.shape[0]
    if max(kv_heads, ranks) % min(kv_heads, ranks):
        raise ValueError(f"tensor_parallel_size: expected a divisor or a multiple of {kv_heads} kv_heads, got {ranks}")
    heads = max(1, kv_heads // ranks)
    first = rank * kv_heads // ranks
    return tensor[first : first + heads].transpose(0, 1).contiguous()


def slots(block_ids: Sequence[int], block_size: int, start: int, stop: int) -> Tensor:
    """Where the positions start … stop − 1 of a request stand in the cache, int64 [stop − start].

    Args:
        block_ids: the request's blocks from position 0 on.

    Raises ValueError where the blocks do not reach `stop`.
    """
    if stop > len(block_ids) * block_size:
        raise ValueError(f"stop: expected at most {len(block_ids)} blocks of {block_size}, got {stop}")
    positions = torch.arange(start, stop)
    return torch.tensor(block_ids, dtype=torch.int64)[positions // block_size] * block_size + positions % block_size
