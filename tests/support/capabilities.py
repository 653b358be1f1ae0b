"""What a family must be able to do with a prefix: one check each, which fails at the first difference from the reference.

Every check holds logits and tokens, and where a loss is taken the loss and the gradients of the prefix, against the reference.
"""

from __future__ import annotations

import inspect
import re
from functools import cached_property

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import StaticCache

from prefix_tuning import attach_prefix
from support.checkpointing import counted_attention, train_with_checkpointing
from support.models import WITH_LATENTS, WITH_STATE, random_prefix, tiny_model
from support.reference import Concatenation, PastInsideTheWindow, PastKeyValues, first_position, text_model

PREFIX_LEN, NEW_TOKENS = 5, 8
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
GREEDY = {"max_new_tokens": NEW_TOKENS, "eos_token_id": None, "pad_token_id": 0, "do_sample": False, "use_cache": True}


def ids(batch=2, length=7, seed=1):
    return torch.randint(3, 100, (batch, length), generator=torch.Generator().manual_seed(seed))


_EXPECTED_TOKENS: dict[str, dict[bool, tuple[torch.Tensor, torch.Tensor]]] = {}  # of each family, without and with padding


class NotPossible(Exception):
    """The plain model cannot do it either."""


def mean_loss(logits, rows):
    """Cross-entropy of each token that another precedes, given the logits [tokens, vocabulary] of rows [1, tokens]."""
    return cross_entropy(torch.cat([row[:-1] for row in logits]), torch.cat([row[0, 1:] for row in rows]))


class Case:
    """A family's tiny model, a random prefix, a batch with and without padding, and what they must give."""

    def __init__(self, name: str, model=None):
        self.name, self.model = name, tiny_model(name) if model is None else model
        self.expected_tokens = _EXPECTED_TOKENS.setdefault(name, {}) if model is None else {}
        self.prefix = random_prefix(self.model, PREFIX_LEN)
        self.input_ids, self.mask = ids(), torch.ones(2, 7, dtype=torch.long)
        self.mask[0, :3] = 0
        self.rows = [self.input_ids[:1, 3:], self.input_ids[1:]]
        self.reference = self.padded_reference = Concatenation() if name in (*WITH_STATE, *WITH_LATENTS) else PastKeyValues()
        config = self.model.config.get_text_config()
        if any(getattr(config, window, None) for window in ("sliding_window", "attention_chunk_size")):
            # A window over the prefix counts the padding too: only a pinned prefix is seen alike with and without it.
            self.padded_reference = Concatenation()
        if name == "gpt_neo":
            self.padded_reference = PastInsideTheWindow()

    def attached(self, reference):
        return attach_prefix(self.model, self.prefix, prefix_window=reference.window)

    def expect(self, reference, rows, **options):
        """The reference's logits of each row, and tokens that follow them with the logits they were taken from."""
        logits = [reference.forward(self.model, self.prefix, row, **options).logits[0] for row in rows]
        loss = mean_loss(logits, rows)
        return logits, loss, self.gradients(loss)

    def greedy(self, padded: bool):
        """Of each row the tokens that the reference would add and the logits that they were taken from; computed once."""
        if padded not in self.expected_tokens:
            reference = self.padded_reference if padded else self.reference
            rows = [self._continued(reference, row) for row in (self.rows if padded else self.input_ids[:, None])]
            tokens, logits = zip(*rows, strict=True)
            self.expected_tokens[padded] = torch.stack(tokens), torch.stack(logits, 1)
        return self.expected_tokens[padded]

    def _continued(self, reference, row):
        logits = []
        with torch.no_grad():
            for _ in range(NEW_TOKENS):
                logits.append(reference.forward(self.model, self.prefix, row).logits[:, -1])
                row = torch.cat([row, logits[-1].argmax(-1)[:, None]], 1)
        return row[0, -NEW_TOKENS:], torch.cat(logits)

    @cached_property
    def counts_padding(self):
        """Whether padding changes what the plain model computes."""
        counted = (self.mask.cumsum(-1) - 1).clamp(min=0) + first_position(self.model)
        positions = {"position_ids": counted} if self.takes("position_ids") else {}
        logits = self.model(input_ids=self.input_ids, attention_mask=self.mask, **positions).logits[self.mask.bool()]
        alone = torch.cat([self.model(input_ids=row).logits[0] for row in self.rows])
        return not torch.allclose(logits, alone, **TOLERANCE)

    def gradients(self, loss):
        return torch.autograd.grad(loss, list(self.prefix.parameters()))

    def takes(self, argument):
        return argument in inspect.signature(type(text_model(self.model)).forward).parameters

    def equal(self, got, expected):
        torch.testing.assert_close(got, expected, **TOLERANCE)


def forward(case: Case) -> None:
    """Logits, loss and prefix gradients; zeros for a prefix give something else, and detaching restores the model."""
    rows = list(case.input_ids[:, None])
    logits, loss, gradients = case.expect(case.reference, rows)
    before, state = case.model(input_ids=case.input_ids).logits, list(case.model.state_dict())
    attributes = {module: dict(vars(module)) for module in case.model.modules()}
    configs = [getattr(module, "config", None) for module in case.model.modules()]
    with case.attached(case.reference):
        got = case.model(input_ids=case.input_ids, labels=case.input_ids)
        case.equal(got.logits, torch.stack(logits))
        case.equal(got.loss, loss)
        found = case.gradients(got.loss)
        with torch.no_grad():
            kept = [parameter.clone() for parameter in case.prefix.parameters()]
            for parameter in case.prefix.parameters():
                parameter.zero_()
            zeroed = case.model(input_ids=case.input_ids).logits
            for parameter, value in zip(case.prefix.parameters(), kept, strict=True):
                parameter.copy_(value)
        assert list(case.model.state_dict()) == state
    case.equal(found, gradients)
    assert all(gradient.abs().max() > 1e-4 for gradient in found)
    assert (got.logits - zeroed).abs().max() > 1e-2 and (got.logits - before).abs().max() > 1e-2
    assert attributes == {module: dict(vars(module)) for module in case.model.modules()}
    assert all(getattr(m, "config", None) is config for m, config in zip(case.model.modules(), configs, strict=True))
    assert torch.equal(case.model(input_ids=case.input_ids).logits, before)


def greedy(case: Case) -> None:
    _generation(case, padded=False)


def beams(case: Case) -> None:
    _same_generation(case, num_beams=3)


def sampling(case: Case) -> None:
    _same_generation(case, do_sample=True)


def _same_generation(case: Case, **options) -> None:
    options, mask = GREEDY | options, torch.ones_like(case.input_ids)
    torch.manual_seed(3)
    expected = case.reference.generate(case.model, case.prefix, case.input_ids, **options)
    torch.manual_seed(3)
    with case.attached(case.reference):
        got = case.model.generate(input_ids=case.input_ids, attention_mask=mask, **options)
    assert torch.equal(got, expected)
    assert not torch.equal(got, case.model.generate(input_ids=case.input_ids, attention_mask=mask, **options))


def padding(case: Case) -> None:
    """A padded row gives what it gives alone, without padding."""
    _padded_forward(case)
    _generation(case)


def padding_with_position_ids(case: Case) -> None:
    if not case.takes("position_ids"):
        raise NotPossible("the model takes no position_ids")
    _padded_forward(case, position_ids=(case.mask.cumsum(-1) - 1).clamp(min=0) + first_position(case.model))


def _padded_forward(case: Case, **options) -> None:
    if case.counts_padding:
        raise NotPossible("the model itself counts padding")
    logits, loss, gradients = case.expect(case.padded_reference, case.rows)
    labels = case.input_ids.masked_fill(case.mask.cumsum(-1) < 2, -100)  # the first real token is predicted by none
    labels[1, 0] = case.input_ids[1, 0]
    with case.attached(case.padded_reference):
        got = case.model(input_ids=case.input_ids, attention_mask=case.mask, labels=labels, **options)
        case.equal(case.gradients(got.loss), gradients)
    case.equal(got.logits[case.mask.bool()], torch.cat(logits))
    case.equal(got.loss, loss)


def static_cache(case: Case) -> None:
    try:
        _generation(case, padded=not case.counts_padding, cache_implementation="static")
    except TypeError as error:  # Llama 4 in transformers 5.17
        with pytest.raises(TypeError, match=re.escape(str(error))):
            case.model.generate(input_ids=case.input_ids, cache_implementation="static", **GREEDY)
        raise NotPossible("the model itself does not run over a static cache") from error


def without_cache(case: Case) -> None:
    _generation(case, padded=not case.counts_padding, use_cache=False)


def _generation(case: Case, padded: bool = True, **options) -> None:
    mask = case.mask if padded else torch.ones_like(case.input_ids)
    reference = case.padded_reference if padded else case.reference
    tokens, logits = case.greedy(padded)
    with case.attached(reference):
        got = case.model.generate(
            input_ids=case.input_ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True,
            **GREEDY | options,
        )  # fmt: skip
    cache = got.get("cache", got.get("past_key_values"))  # renamed in transformers 5.24
    assert isinstance(cache, StaticCache) if "cache_implementation" in options else (cache is None) is ("use_cache" in options)
    assert torch.equal(got.sequences[:, -NEW_TOKENS:], tokens)
    case.equal(torch.stack(got.logits), logits)


def turns(case: Case) -> None:
    """A call that goes on from the cache of an earlier one, with a prefix that slides and with one that stays."""
    input_ids = ids(2, 12)
    for reference in [case.reference] if case.counts_padding else [case.reference, case.padded_reference]:
        logits, _, _ = case.expect(reference, list(input_ids[:, None]))
        with case.attached(reference):
            got = _in_two_calls(case, input_ids)
        try:
            case.equal(got, torch.stack(logits))
        except AssertionError:
            if torch.allclose(_in_two_calls(case, input_ids), case.model(input_ids=input_ids).logits, **TOLERANCE):
                raise
            raise NotPossible("the model itself does not go on with several tokens from its cache") from None


def _in_two_calls(case: Case, input_ids: torch.Tensor) -> torch.Tensor:
    first = case.model(input_ids=input_ids[:, :6], use_cache=True)
    name = "cache" if "cache" in first else "past_key_values"  # renamed in transformers 5.24
    assert first[name].get_seq_length() == 6
    second = case.model(input_ids=input_ids[:, 6:], use_cache=True, **{name: first[name]})
    return torch.cat([first.logits, second.logits], 1)


def checkpointing(case: Case) -> None:
    """Every attention call is computed anew in the backward pass, with the same loss and gradients."""
    _, loss, gradients = case.expect(case.reference, list(case.input_ids[:, None]))
    train_with_checkpointing(case.model)
    with case.attached(case.reference), counted_attention() as calls:
        got = case.model(input_ids=case.input_ids, labels=case.input_ids, use_cache=False).loss
        layers = len(calls)
        found = case.gradients(got)
    assert len(calls) == 2 * layers > 0
    case.equal(got, loss)
    case.equal(found, gradients)


def packing(case: Case) -> None:
    """Packed sequences do not see each other; each sees the prefix right in front of it."""
    if not case.takes("position_ids"):
        raise NotPossible("the model takes no position_ids")
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]]) + first_position(case.model)
    packed = torch.cat([case.input_ids[:1, :4], case.input_ids[1:, :3]], 1)
    apart = [case.input_ids[:1, :4], case.input_ids[1:, :3]]
    plain = case.model(input_ids=packed, position_ids=positions, use_cache=False).logits
    if not torch.allclose(plain, torch.cat([case.model(input_ids=row).logits for row in apart], 1), **TOLERANCE):
        raise NotPossible("the model does not keep packed sequences apart")
    logits, loss, gradients = case.expect(case.padded_reference, apart)
    labels = packed.clone()
    labels[0, 4] = -100
    with case.attached(case.padded_reference):
        got = case.model(input_ids=packed, position_ids=positions, labels=labels, use_cache=False)
        case.equal(case.gradients(got.loss), gradients)
    case.equal(got.logits[0], torch.cat(logits))
    case.equal(got.loss, loss)


def compiling(case: Case) -> None:
    """A forward pass over a padded batch in one graph, and its gradients."""
    padded = not case.counts_padding
    rows, mask = (case.rows, case.mask) if padded else (case.input_ids[:, None], torch.ones_like(case.input_ids))
    reference = case.padded_reference if padded else case.reference
    logits, _, gradients = case.expect(reference, rows)
    try:
        with case.attached(reference):
            got = _compiled(case, mask)[mask.bool()]
            case.equal(got, torch.cat(logits))
            case.equal(case.gradients(mean_loss(got.split([row.shape[1] for row in rows]), rows)), gradients)
    except torch._dynamo.exc.UserError as error:  # of code that depends on the values of tensors
        with pytest.raises(type(error)):
            _compiled(case, mask)
        raise NotPossible("the model itself is not compiled in one graph") from error


def _compiled(case: Case, mask: torch.Tensor) -> torch.Tensor:
    torch._dynamo.reset()
    compiled = torch.compile(case.model.forward, backend="eager", fullgraph=True)
    return compiled(input_ids=case.input_ids, attention_mask=mask, use_cache=False).logits


CAPABILITIES = {
    "forward, loss, gradients": forward,
    "greedy": greedy,
    "beams": beams,
    "sampling": sampling,
    "left padding": padding,
    "left padding, position_ids given": padding_with_position_ids,
    "static cache": static_cache,
    "use_cache=False": without_cache,
    "several turns": turns,
    "gradient checkpointing": checkpointing,
    "packing": packing,
    "torch.compile": compiling,
}
