"""How many tokens a row may have: what a model has positions for behind a prefix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from prefix_tuning.bank import PrefixBank
from prefix_tuning.encoder_families import ENCODER_DECODERS
from prefix_tuning.families import FAMILIES
from prefix_tuning.multimodal_families import unwrapped_config
from prefix_tuning.prefix import Prefix
from prefix_tuning.shapes import checked_int
from prefix_tuning.stacks import Stack, stacks
from prefix_tuning.task import Task, task_of


def tokens_left(model: nn.Module, position_offset: int) -> int | None:
    """How many tokens of a row a model has positions for behind a prefix; None for any number."""
    positions = getattr(unwrapped_config(model.config), "max_position_embeddings", None)
    return None if positions is None else positions - position_offset - stacks(model)[0].first_position


def row_limit(model: nn.Module, position_offset: int, max_length: int | None) -> int | None:
    """How many tokens a row may have behind a prefix: max_length, or tokens_left where that is less; None for any number."""
    limits = (max_length, tokens_left(model, position_offset))
    return min((limit for limit in limits if limit is not None), default=None)


def longest_row(model: nn.Module, max_length: int | None) -> int | None:
    """row_limit behind the prefix that is attached to the model, as in training; None for any number."""
    try:
        return row_limit(model, _offsets(model, None, 1)[0], max_length)
    except NotImplementedError:  # a plain model of a family that is not served
        return max_length


def training_length(model: nn.Module, prefix: Prefix, max_length: int | None) -> int | None:
    """row_limit behind a prefix.

    Raises ValueError for a max_length below 1, and where the prefix takes all of the model's positions.
    """
    if max_length is not None:
        max_length = checked_int("max_length", max_length, at_least=1)
    left = tokens_left(model, prefix.position_offset)
    if left is not None and left < 1:
        most = unwrapped_config(model.config).max_position_embeddings
        raise ValueError(f"prefix: it takes {prefix.position_offset} of the model's {most} positions, which leaves none")
    return row_limit(model, prefix.position_offset, max_length)


def pair_limits(model: nn.Module) -> tuple[int | None, int | None]:
    """How many tokens the tables of positions of an encoder-decoder have room for behind the prefix that is attached to it: its
    encoder's and its decoder's; None for any number."""
    if model.config.model_type not in ENCODER_DECODERS:  # a plain model of a family that is not served
        return None, None
    attached = _attached(model)

    def limit(stack: Stack) -> int | None:
        table = getattr(stack.module, "embed_positions", None)
        if not isinstance(table, nn.Embedding):
            return None
        moved = isinstance(attached, Prefix) and stack.self_attention in attached.parts  # no bank moves a table's tokens
        offset = attached.position_offset if moved else 0
        return table.num_embeddings - getattr(table, "offset", 0) - offset

    encoder, decoder = map(limit, stacks(model))
    return encoder, decoder


def fitting(
    model: nn.Module,
    encoded: Sequence[Sequence[int]],
    max_new_tokens: int,
    prefix_ids: Sequence[str | None] | None,
    cut: bool,
) -> list[Sequence[int]]:
    """The prompts, which leave max_new_tokens positions each where a model's positions are a table that ends. In an
    encoder-decoder both have a table of their own.

    Args:
        cut: whether a causal model's longer prompt loses its beginning.

    Raises ValueError naming a longer prompt otherwise, and where there is no room for a prompt or, in a decoder's table, for
    the new tokens.
    """
    if task_of(model) is Task.ENCODER_DECODER:
        _check_pairs(encoded, max_new_tokens, *pair_limits(model))
        return list(encoded)
    family, fit = FAMILIES.get(unwrapped_config(model.config).model_type), []
    if family is None or not family.learned_positions:
        return list(encoded)
    for i, (ids, offset) in enumerate(zip(encoded, _offsets(model, prefix_ids, len(encoded)), strict=True)):
        left = tokens_left(model, offset)
        room = left - max_new_tokens + 1  # the last new token is not read
        if len(ids) > room and (room < 1 or not cut):
            behind = " behind the prefix" if offset else ""
            raise ValueError(
                f"prompts[{i}]: expected at most the model's {left} positions{behind} for prompt and new tokens, got "
                f"{len(ids)} tokens and max_new_tokens {max_new_tokens}; lower max_new_tokens or shorten the prompt"
            )
        fit.append(ids[max(0, len(ids) - room) :])
    return fit


def _check_pairs(
    encoded: Sequence[Sequence[int]], max_new_tokens: int, encoder_limit: int | None, decoder_limit: int | None
) -> None:
    for i, ids in enumerate(encoded):
        if encoder_limit is not None and len(ids) > encoder_limit:
            raise ValueError(
                f"prompts[{i}]: expected at most the {encoder_limit} tokens that the model's encoder has positions for, got "
                f"{len(ids)}; shorten the prompt"
            )
    if decoder_limit is not None and max_new_tokens > decoder_limit:
        most = f"at most the {decoder_limit} that the model's decoder has positions for"
        raise ValueError(f"max_new_tokens: expected {most}, got {max_new_tokens}")


def _attached(model: nn.Module) -> Any:
    """The prefix or bank that is attached to the model, None for none and where it is switched off."""
    layer = next((module.layer_prefix for module in model.modules() if hasattr(module, "layer_prefix")), None)
    return None if layer is None or layer.switched_off else layer.prefix


def _offsets(model: nn.Module, prefix_ids: Sequence[str | None] | None, rows: int) -> list[int]:
    """Where the positions of each row start."""
    attached = _attached(model)
    if isinstance(attached, PrefixBank):
        names = [attached.default] * rows if prefix_ids is None else prefix_ids
        return attached.position_offsets(attached.ids(names)).flatten().tolist()
    return [0 if attached is None else attached.position_offset] * rows
