"""Rows of several sequences: what transformers makes of position_ids that start anew, and what a call is told by `packed`."""

from dataclasses import replace

import pytest
import torch
from transformers.masking_utils import (
    blockwise_overlay,
    causal_mask_function,
    create_causal_mask,
    create_sliding_window_causal_mask,
    or_masks,
)

import prefix_tuning.attention
from prefix_tuning import PrefixBank, attach_prefix
from prefix_tuning.masks import MaskStructure, idle_mask, mask_structure
from prefix_tuning.packs import Pack, packed
from prefix_tuning.padding_free import why_padded
from prefix_tuning.stacks import attention_kinds
from support.capabilities import first_position, ids
from support.models import MODELS, random_prefix, tiny_model

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
PREFIX_LEN = 5
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 0, 1, 2], [0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]])
SEQUENCES = (slice(0, 9), slice(9, 11), slice(11, 14)), (slice(0, 1), slice(1, 14))


@pytest.fixture
def calls(monkeypatch):
    """The names of the operations that attention calls, and what options they get."""
    made = []

    def spied(name):
        original = getattr(prefix_tuning.attention, name)

        def spy(*args, **kwargs):
            made.append((name, kwargs))
            return original(*args, **kwargs)

        monkeypatch.setattr(prefix_tuning.attention, name, spy)

    spied("prefix_attention")
    spied("prefix_attention_varlen")
    return made


def test_where_sequences_begin():
    pack = Pack.of(torch.tensor([[0, 0, 1, 2, 2, 2], [5, 5, 5, 5, 5, 5]]))
    assert pack.cu_seqlens.tolist() == [0, 2, 3, 6, 12] and pack.cu_seqlens.dtype == torch.int32
    assert (pack.max_seqlen, pack.batch, pack.length, pack.parent) == (6, 2, 6, None)
    assert pack.rows().tolist() == [0, 0, 0, 1]
    seen = ~pack.hidden(None)
    assert seen.shape == (2, 1, 6, 6) and torch.equal(seen[1, 0], torch.ones(6, 6, dtype=torch.bool).tril())
    assert seen[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1],
    ]  # fmt: skip
    assert (~pack.hidden(2))[1, 0].sum(1).tolist() == [1, 2, 2, 2, 2, 2]
    assert Pack.of(torch.zeros(2, 0)).cu_seqlens.tolist() == [0]
    assert pack.to("meta").cu_seqlens.is_meta and pack.to("meta").parent is None
    mask = MaskStructure(causal=True, pack=replace(pack, parent=pack.rows().int())).to("meta")
    assert mask.pack.cu_seqlens.is_meta and mask.pack.parent.is_meta


@pytest.mark.parametrize("family", ("llama", "gpt2", "mistral", "gemma2", "gemma3", "cohere2", "smollm3"))
def test_packed_rows_need_no_mask_over_all_pairs(family, calls):
    """Two rows of several sequences: logits and prefix gradients of each sequence by itself, without a bias anywhere."""
    model, input_ids = tiny_model(family), ids(2, 14)
    prefix = random_prefix(model, PREFIX_LEN)
    weights = torch.randn(2, 14, 128, generator=torch.Generator().manual_seed(0))
    with attach_prefix(model, prefix):
        expected = torch.cat([
            torch.cat([model(input_ids=row[None, part]).logits for part in parts], 1)
            for row, parts in zip(input_ids, SEQUENCES, strict=True)
        ])  # fmt: skip
        right = torch.autograd.grad((expected * weights).sum(), list(prefix.parameters()))
        calls.clear()
        got = model(input_ids=input_ids, position_ids=POSITIONS, use_cache=False).logits
        found = torch.autograd.grad((got * weights).sum(), list(prefix.parameters()))
    torch.testing.assert_close(got, expected, **TOLERANCE)
    for value, wanted in zip(found, right, strict=True):
        torch.testing.assert_close(value, wanted, atol=1e-3, rtol=1e-3)
    assert {name for name, _ in calls} == {"prefix_attention_varlen"} and len(calls) == model.config.num_hidden_layers
    assert all(options["cu_seqlens_q"].tolist() == [0, 9, 11, 14, 15, 28] for _, options in calls)
    windows = {options["window"] for _, options in calls}
    assert (8 in windows) == (getattr(model.config, "sliding_window", None) == 8 and family != "smollm3")


@pytest.mark.parametrize("make", (create_causal_mask, create_sliding_window_causal_mask))
def test_code_that_is_traced_hides_the_other_sequences(make):
    model, embeds = tiny_model("mistral"), torch.zeros(1, 14, 64)

    def mask(embeds):
        return make(model.config, embeds, None, None, POSITIONS[:1])

    with attach_prefix(model, random_prefix(model, PREFIX_LEN)):
        structure, traced = mask(embeds), torch.compile(mask, backend="eager")(embeds)
    assert structure.pack is not None and torch.equal(traced.bias, structure.unpacked().bias)


def test_a_prefix_that_slides_needs_the_mask(calls):
    """Each sequence by itself under PEFT's window, which slides over the prefix."""
    model, input_ids = tiny_model("mistral"), ids(1, 14)
    with attach_prefix(model, random_prefix(model, PREFIX_LEN), prefix_window="peft"):
        expected = torch.cat([model(input_ids=input_ids[:, part]).logits for part in SEQUENCES[0]], 1)
        calls.clear()
        got = model(input_ids=input_ids, position_ids=POSITIONS[:1], use_cache=False).logits
    torch.testing.assert_close(got, expected, **TOLERANCE)
    assert {name for name, _ in calls} == {"prefix_attention"} and all(options["bias"] is not None for _, options in calls)


def test_sequences_of_a_row_have_its_prefix_of_a_bank(calls):
    model, input_ids = tiny_model("llama"), ids(2, 14)
    prefixes = {"short": random_prefix(model, 2), "long": random_prefix(model, 7, init="random")}
    bank = PrefixBank(prefixes)
    for names in (["long", "short"], ["short", None]):
        expected = []
        for row, parts, name in zip(input_ids, SEQUENCES, names, strict=True):
            if name is None:
                expected.append(torch.cat([model(input_ids=row[None, part]).logits for part in parts], 1))
            else:
                with attach_prefix(model, prefixes[name]):
                    expected.append(torch.cat([model(input_ids=row[None, part]).logits for part in parts], 1))
        calls.clear()
        with attach_prefix(model, bank):
            got = model(input_ids=input_ids, position_ids=POSITIONS, prefix_ids=names, use_cache=False).logits
        torch.testing.assert_close(got, torch.cat(expected), **TOLERANCE)
        assert {name for name, _ in calls} == {"prefix_attention_varlen"}


@pytest.mark.parametrize("shared", (False, True), ids=("apart", "one goes on from the other"))
@pytest.mark.parametrize("name", MODELS)
def test_a_call_that_is_told_its_sequences(name, shared):
    """Every family that does not refuse: sequences by themselves, or two that go on from one. Layers with a state run on, and
    are not asked (padding_free.why_padded); a window cannot be shared into."""
    model = tiny_model(name)
    reason = why_padded(model)
    one, other = ids(1, 12), ids(1, 9, seed=5)
    other[:, :5] = one[:, :5]
    if shared:
        parts, cut = (range(5), range(5, 12), range(5, 9)), 5
        row = torch.cat([one, other[:, 5:]], 1)
        pack = Pack(torch.tensor([0, 5, 12, 16], dtype=torch.int32), 7, 1, 16, torch.tensor([-1, 0, 0], dtype=torch.int32))
    else:
        parts, cut = (range(12), range(9)), 0
        row = torch.cat([one, other], 1)
        pack = Pack(torch.tensor([0, 12, 21], dtype=torch.int32), 12, 1, 21)
    positions = torch.tensor([[position for part in parts for position in part]]) + first_position(model)
    with torch.no_grad(), attach_prefix(model, random_prefix(model)):

        def run():
            with packed(pack), idle_mask(row) as mask:
                return model(input_ids=row, position_ids=positions, attention_mask=mask, use_cache=False).logits[:, cut:]

        expected = torch.cat([model(input_ids=ids, use_cache=False).logits[:, cut:] for ids in (one, other)], 1)
        if reason is None and shared and any(kind.get("window") for kind in attention_kinds(model.config).values()):
            with pytest.raises(ValueError, match="parent: expected None beside a window"):
                run()
            return
        if reason is not None and "state" not in reason:
            with pytest.raises(NotImplementedError, match="packed rows"):
                run()
            return
        got = run()
    equal = torch.allclose(got, expected, **TOLERANCE)
    assert equal == (reason is None)


def test_a_mask_that_knows_no_sequences_is_refused():
    pack = Pack(torch.tensor([0, 9, 14], dtype=torch.int32), 9, 1, 14)
    function = or_masks(causal_mask_function, blockwise_overlay(torch.full((1, 14), -1)))
    with packed(pack), idle_mask(ids(1, 14)) as mask, pytest.raises(NotImplementedError, match="under this model's masks"):
        mask_structure(1, 14, 14, mask_function=function, attention_mask=mask)
    assert not pack.taken


@pytest.mark.parametrize("name", MODELS)
def test_an_idle_mask_reaches_no_layer(name, calls):
    """Also where a model makes another tensor of it (GPT-2): a kernel that is told of a mask looks at it for every key."""
    model, input_ids = tiny_model(name), ids()
    with torch.no_grad(), attach_prefix(model, random_prefix(model)), idle_mask(input_ids) as mask:
        model(input_ids=input_ids, attention_mask=mask, use_cache=False)
    assert calls and all(options["key_mask"] is None for _, options in calls)
