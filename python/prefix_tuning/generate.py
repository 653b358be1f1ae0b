"""Texts from a model, with or without a prefix attached: prompts in padded batches, the answers alone returned."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import groupby
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase, StaticCache

from prefix_tuning import deferred_stops
from prefix_tuning.devices import execution_device
from prefix_tuning.graphed_decoding import GraphedDecoding, graphed
from prefix_tuning.own_cache import CACHE, LEAST_REPLAYED
from prefix_tuning.prompts import Prompt, encode_prompt, padding_id
from prefix_tuning.row_limits import fitting, pair_limits
from prefix_tuning.shapes import checked_int, checked_number
from prefix_tuning.task import Task, task_of

MAX_NEW_TOKENS = 128
CACHE_STEP = 128  # lengths of static caches are multiples of it, so that batches of similar prompts have one length


def generate_texts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    special_tokens: bool = True,
    cut_prompts: bool = False,
    **generation: Any,
) -> list[str]:
    """The model's continuation of each prompt, or an encoder-decoder's answer, without the prompt and without special tokens,
    in the prompts' order.

    Args:
        prompts: texts, or conversations up to the answer (through the tokenizer's chat template), lists of messages or
            {"messages", "tools"}, which encoder-decoders do not take.
        special_tokens: whether texts get the tokenizer's beginning of a text; not where a prefix made of a text has it.
        cut_prompts: whether prompts that would not fit are cut, as in training: a causal model's at their beginning, an
            encoder's where the tokenizer truncates.
        generation: as for `generate_ids`.

    Raises TypeError for a text in place of a list of prompts, ValueError for a prompt without tokens, numbers out of range and
    a prompt that does not fit: a table of positions must have room for prefix, prompt and max_new_tokens, in an
    encoder-decoder the encoder's for the prompt and the decoder's for max_new_tokens.
    """
    if isinstance(prompts, str):
        raise TypeError(f"prompts: expected a list of texts or conversations, got the text {prompts!r}")
    prompts = list(prompts)
    for i, prompt in enumerate(prompts):
        if "messages" not in prompt if isinstance(prompt, Mapping) else not isinstance(prompt, Sequence):
            raise TypeError(f"prompts[{i}]: expected a text or a conversation, got {prompt!r}")
    if task_of(model) is Task.ENCODER_DECODER:
        limit = pair_limits(model)[0] if cut_prompts else None
        cut = {"truncation": True, "max_length": limit} if limit is not None and limit > 0 else {}
        encoded = [list(tokenizer(_text(prompt), add_special_tokens=special_tokens, **cut)["input_ids"]) for prompt in prompts]
    else:
        encoded = [encode_prompt(prompt, tokenizer, special_tokens=special_tokens) for prompt in prompts]
    empty = next((i for i, ids in enumerate(encoded) if not ids), None)
    if empty is not None:
        raise ValueError(f"prompts[{empty}]: expected at least one token, got {prompts[empty]!r}")
    most = checked_int("max_new_tokens", generation.get("max_new_tokens", MAX_NEW_TOKENS), at_least=1)
    encoded = fitting(model, encoded, most, generation.get("prefix_ids"), cut_prompts)
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in generate_ids(model, tokenizer, encoded, **generation)]


def generate_ids(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[Sequence[int]],
    *,
    prefix_ids: Sequence[str | None] | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 8,
    num_beams: int = 1,
    sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int | None = None,
    progress: str | tqdm | None = None,
) -> list[list[int]]:
    """The ids that the model writes after each prompt's, in the prompts' order, without the token that ends them.

    On a GPU with a prefix attached, causal models that write 16 tokens or more, without beams, decode with a static cache of
    ours, whose steps are replayed as CUDA graphs where they can be (graphed_decoding.py); batches of similar length share
    cache and graphs. A cache_implementation in the model's generation config is used instead.

    Args:
        encoded: of each prompt one or more ids.
        prefix_ids: with a PrefixBank attached, the name of each prompt's prefix, None for no prefix.
        max_new_tokens: a text ends there, or before an end-of-text token of the tokenizer or of the model's generation config.
        batch_size: prompts of similar length are run together.
        num_beams: above 1, beam search.
        sample, temperature, top_p: draw tokens instead of taking the likeliest. Nothing else bends the distribution: of the
            model's generation config only the end-of-text tokens, those that open an encoder-decoder's text or must not be in
            it (Marian's padding, say) and the kind of cache count.
        seed: of the drawing; None draws from torch's generator.
        progress: title of a progress bar on stderr, or a bar to move; None for no bar.

    Raises ValueError for numbers out of range.
    """
    max_new_tokens = checked_int("max_new_tokens", max_new_tokens, at_least=1)
    batch_size = checked_int("batch_size", batch_size, at_least=1)
    num_beams = checked_int("num_beams", num_beams, at_least=1)
    temperature, top_p = checked_number("temperature", temperature), checked_number("top_p", top_p)
    if not temperature > 0:
        raise ValueError(f"temperature: expected more than 0, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected more than 0 and at most 1, got {top_p}")
    if isinstance(prefix_ids, str):
        raise TypeError(f"prefix_ids: expected a list with a name or None for each prompt, got {prefix_ids!r}")
    if prefix_ids is not None and len(prefix_ids) != len(encoded):
        raise ValueError(f"prefix_ids: expected one for each of {len(encoded)} prompts, got {len(prefix_ids)}")
    pairs = task_of(model) is Task.ENCODER_DECODER
    stop_ids, pad_id = _stop_ids(model, tokenizer), padding_id(tokenizer)
    own = model.generation_config
    names = ("decoder_start_token_id", "forced_bos_token_id", "bad_words_ids")
    kept = {name: getattr(own, name) for name in names} if pairs else {}
    drawing = {"top_k": 0, "temperature": temperature, "top_p": top_p} if sample else {}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, num_beams=num_beams, do_sample=sample, eos_token_id=stop_ids or None,
        pad_token_id=pad_id, cache_implementation=own.cache_implementation, **kept, **drawing,
    )  # fmt: skip
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    batches = [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
    replayed = not pairs and num_beams == 1 and max_new_tokens >= LEAST_REPLAYED and own.cache_implementation is None
    decoding = graphed(model) if replayed else None

    def size(rows: list[int]) -> tuple[int, int]:
        return len(rows), math.ceil((len(encoded[rows[-1]]) + max_new_tokens) / CACHE_STEP) * CACHE_STEP

    answers: list[list[int]] = [[] for _ in encoded]
    device = execution_device(model)
    settings = _every_setting(config, own)
    with progress_bar(progress, len(encoded)) as bar, torch.random.fork_rng() if seed is not None else nullcontext():
        if seed is not None:
            torch.manual_seed(seed)
        for (_, length), alike in groupby(batches, size):
            with _static_cache(decoding, length) as cache:
                for rows in alike:
                    input_ids, mask = _padded([encoded[i] for i in rows], pad_id, left=not pairs)
                    chosen = {} if prefix_ids is None else {"prefix_ids": [prefix_ids[i] for i in rows]}
                    inputs = {"input_ids": input_ids.to(device), "attention_mask": mask.to(device)}
                    generated = model.generate(**inputs, **chosen, **cache, **settings)
                    first = 1 if pairs else input_ids.shape[1]
                    for i, ids in zip(rows, generated[:, first:].tolist(), strict=True):
                        end = next((at for at, token in enumerate(ids) if token in stop_ids), None)
                        answers[i] = ids[:end]
                    for used in cache.values():
                        used.reset()
                    bar.update(len(rows))
    return answers


def progress_bar(progress: str | tqdm | None, texts: int) -> AbstractContextManager[tqdm]:
    """A bar of that title over so many texts; one that somebody else has made as it is."""
    if isinstance(progress, tqdm):
        return nullcontext(progress)
    return tqdm(total=texts, desc=progress, unit="text", disable=progress is None)


@contextmanager
def _static_cache(decoding: GraphedDecoding | None, length: int) -> Iterator[dict[str, StaticCache]]:
    """What generate gets for batches of one size whose steps are to be replayed; nothing for others."""
    if decoding is None:
        yield {}
    else:
        cache = StaticCache(config=decoding.model.config, max_cache_len=length)
        deferred_stops.drop(cache)
        with decoding.kept():
            yield {CACHE: cache}


def _text(prompt: Prompt) -> str:
    if not isinstance(prompt, str):
        raise ValueError(f"prompts: expected texts for an encoder-decoder, got the conversation {prompt!r}")
    return prompt


def first_line(text: str) -> str:
    """The first line of a text that is not blank, "" if there is none. Tasks whose answers are one line are scored on it."""
    return text.strip().partition("\n")[0].strip()


def _every_setting(config: GenerationConfig, own: GenerationConfig) -> dict[str, Any]:
    """`config` as arguments of `generate`, which would take whatever they leave open from the model's own.

    A GenerationConfig in their place would be filled from the model's, wherever it has None.
    """
    config.update(**GenerationConfig._get_default_generation_params(), defaults_only=True)
    names = vars(config).keys() | vars(own).keys()
    settings = {name: getattr(config, name, None) for name in names if not name.startswith("_")}
    return settings | {"max_length": None}  # beside max_new_tokens it would be one length too many


def _padded(encoded: Sequence[Sequence[int]], pad_id: int, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and attention_mask, int64 [rows, longest]. An encoder may count positions from the row's first column."""
    longest = max(map(len, encoded))
    input_ids = torch.full((len(encoded), longest), pad_id)
    mask = torch.zeros_like(input_ids)
    for i, ids in enumerate(encoded):
        columns = slice(longest - len(ids), None) if left else slice(len(ids))
        input_ids[i, columns] = torch.tensor(ids)
        mask[i, columns] = 1
    return input_ids, mask


def _stop_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Whatever ends a text: prefixes are trained to write the tokenizer's token, a chat model may know further ones."""
    known = model.generation_config.eos_token_id
    known = known if isinstance(known, list) else [known]
    return sorted({i for i in (*known, tokenizer.eos_token_id) if i is not None})
