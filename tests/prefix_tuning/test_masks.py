"""What attention adds to scores: made once for all layers of a pass, anew in each pass, in 16 bit where that is exact."""

import pytest
import torch
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from prefix_tuning import Prefix, attach_prefix, attention
from prefix_tuning.masks import dense_structure, mask_structure
from support.encoder_decoders import tiny_encoder_decoder
from support.models import random_prefix, tiny_model

BATCH, LENGTH = 2, 12


def seen_biases(monkeypatch) -> list[torch.Tensor]:
    """A list to which each call of the operation adds its bias, if it has one."""
    seen, real = [], attention.prefix_attention

    def watched(*args, bias, **options):
        seen.extend([] if bias is None else [bias])
        return real(*args, bias=bias, **options)

    monkeypatch.setattr(attention, "prefix_attention", watched)
    return seen


def own_mask(first_hidden: int) -> torch.Tensor:
    """Causal, bool [batch, 1, length, length] expanded over the batch, without one key."""
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    mask[first_hidden + 1 :, first_hidden] = False
    return mask[None, None].expand(BATCH, 1, -1, -1)


def padded(columns: int) -> torch.Tensor:
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[0, :columns] = 0
    return mask


PASSES = {  # family: the masks of two passes, what attach_prefix is told, how many kinds of masks its layers have
    "llama": ([own_mask(2), own_mask(5)], {}, 1),
    "gpt_neo": ([own_mask(2), own_mask(5)], {}, 2),
    "mistral": ([padded(2), padded(5)], {"prefix_window": "peft"}, 1),
    "bloom": ([padded(2), padded(5)], {}, 1),
    "falcon_alibi": ([padded(2), padded(5)], {}, 1),
    "mpt": ([padded(2), padded(5)], {}, 1),
}


@pytest.mark.parametrize("checkpointing", (False, True))
@pytest.mark.parametrize("family", PASSES)
def test_a_bias_is_made_once_a_pass(family, checkpointing, monkeypatch):
    masks, options, kinds = PASSES[family]
    model, seen = tiny_model(family), seen_biases(monkeypatch)
    prefix = random_prefix(model)
    ids = torch.randint(3, 100, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    if checkpointing:
        model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    passes = []
    with attach_prefix(model, prefix, **options):
        for mask in masks:
            seen.clear()
            model(input_ids=ids, attention_mask=mask, use_cache=False).logits.sum().backward()
            passes.append(list(seen))
    for biases in passes:
        assert len(biases) > kinds and len({id(bias) for bias in biases}) == kinds
    assert not any(torch.equal(*pair) for pair in zip(*passes, strict=True))


@pytest.mark.parametrize("name", ("t5", "mt5"))
def test_relative_positions_are_put_together_once_a_stack(name, monkeypatch):
    model, seen = tiny_encoder_decoder(name), seen_biases(monkeypatch)
    ids = torch.ones(BATCH, LENGTH, dtype=torch.long)
    with attach_prefix(model, Prefix.for_model(model, 5)):
        model(input_ids=ids, decoder_input_ids=ids[:, :4])
    assert len(seen) > 2 and len({id(bias) for bias in seen}) == 2


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_what_only_hides_is_exact_in_any_dtype(dtype):
    mask = own_mask(2)
    bias = dense_structure(mask).bias_over(3, dtype)
    assert bias.dtype == dtype and bias.shape == (1, 1, LENGTH, 3 + LENGTH)  # what all rows share is there once
    assert not bias[..., :3].any() and torch.equal(bias[..., 3:] == 0, mask[:1]) and bias.min() == -torch.inf


@pytest.mark.parametrize("given, wanted", (("bfloat16", "bfloat16"), ("float32", "float32"), ("float64", "float32")))
def test_what_adds_to_scores_keeps_its_digits(given, wanted):
    added = torch.randn(BATCH, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(0)).to(getattr(torch, given))
    bias = dense_structure(added).bias_over(3, torch.bfloat16)
    assert bias.dtype == getattr(torch, wanted) and torch.equal(bias[..., 3:], added.to(bias.dtype))


@pytest.mark.parametrize("family", ("llama", "gpt_neo", "llama4"))
def test_a_mask_of_integers_is_refused(family):
    """As torch's own attention refuses it: added to scores it would hide nothing."""
    model = tiny_model(family)
    ids = torch.ones(BATCH, LENGTH, dtype=torch.long)
    with attach_prefix(model, random_prefix(model)), pytest.raises(TypeError, match="attention_mask: expected bool.*int64"):
        model(input_ids=ids, attention_mask=own_mask(2).long())


@pytest.mark.parametrize("function, window", (
    (sliding_window_causal_mask_function(4), 4), (sliding_window_causal_mask_function(5), None),
    (and_masks(sliding_window_overlay(4), bidirectional_mask_function), None),
    (and_masks(sliding_window_overlay(4), causal_mask_function, bidirectional_mask_function), None),
))  # fmt: skip
def test_what_is_not_quite_the_window_it_is_said_to_be_is_a_bias(function, window):
    structure = mask_structure(1, LENGTH, LENGTH, mask_function=function, local_size=4)
    assert structure.window == window and (structure.bias is None) == (window is not None)
    if window is None:
        assert torch.equal(structure.bias, sdpa_mask(1, LENGTH, LENGTH, mask_function=function, allow_is_causal_skip=False))
