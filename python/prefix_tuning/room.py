"""How many tokens a row may have: what a model has positions for behind the prefix that is attached to it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from prefix_tuning.bank import PrefixBank
from prefix_tuning.families import FAMILIES
from prefix_tuning.multimodal_families import text_part
from prefix_tuning.stacks import row_limit, tokens_left


def longest_row(model: nn.Module, max_length: int | None) -> int | None:
    """max_length, or what there are positions for where that is less, as in training; None for any number."""
    try:
        return row_limit(model, _offsets(model, None, 1)[0], max_length)
    except NotImplementedError:  # a plain model of a family that is not served
        return max_length


def fitting(
    model: nn.Module,
    encoded: Sequence[Sequence[int]],
    max_new_tokens: int,
    prefix_ids: Sequence[str | None] | None,
    cut: bool,
) -> list[Sequence[int]]:
    """The prompts, which leave max_new_tokens positions each where a model's positions are a table that ends.

    cut: whether a longer prompt loses its beginning. ValueError naming it otherwise, and where there is no room for a prompt.
    """
    family, fit = FAMILIES.get(text_part(model.config).model_type), []
    if family is None or not family.learned_positions:
        return list(encoded)
    for i, (ids, offset) in enumerate(zip(encoded, _offsets(model, prefix_ids, len(encoded)), strict=True)):
        left = tokens_left(model, offset)
        room = left - max_new_tokens + 1  # the last new token is not read
        if len(ids) > room and (room < 1 or not cut):
            behind = " behind the prefix" if offset else ""
            raise ValueError(
                f"prompts[{i}]: its {len(ids)} tokens and max_new_tokens {max_new_tokens} are more than the model's {left} "
                f"positions{behind}; lower max_new_tokens or shorten the prompt"
            )
        fit.append(ids[max(0, len(ids) - room) :])
    return fit


def _offsets(model: nn.Module, prefix_ids: Sequence[str | None] | None, rows: int) -> list[int]:
    """Where the positions of each row start."""
    layer = next((module.layer_prefix for module in model.modules() if hasattr(module, "layer_prefix")), None)
    attached = None if layer is None or layer.switched_off else layer.prefix
    if isinstance(attached, PrefixBank):
        names = [attached.default] * rows if prefix_ids is None else prefix_ids
        return attached.position_offsets(attached.ids(names)).flatten().tolist()
    return [0 if attached is None else attached.position_offset] * rows
