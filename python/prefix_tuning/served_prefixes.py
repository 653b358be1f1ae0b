"""Saved prefixes as a serving engine needs them: checked before it starts, chosen by name, placeholders in front of a prompt.

vLLM keeps the keys and values of a request's tokens in blocks. A request with a prefix has prefix_len placeholder tokens in
front of its own; their keys and values are not computed but the prefix's. Which prefix, the request's cache salt says. vLLM
also hashes the salt with the tokens of a block, so that requests of one prefix share its blocks and no others do.
"""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prefix_tuning.prefix import Prefix
from prefix_tuning.shapes import ModelShape, checked_int
from prefix_tuning.stacks import attention_kinds, part_shapes

CONNECTOR, CONNECTOR_MODULE = "PrefixConnector", "prefix_tuning.vllm_connector"
MARK = "prefix-tuning:"  # what the cache salt of a request with a prefix begins with
# vLLM takes an adapter of such a name for the one that every message with such a part wants.
PART_NAMES = {"audio", "file", "image", "input", "output", "prompt", "refusal", "text", "thinking", "tool", "video", "vision"}


@dataclass(frozen=True)
class ServedPrefixes:
    """The prefixes of one engine.

    Attributes:
        folders: name → folder or hub id of a saved prefix.
        lengths: name → prefix_len.
        shape: what all of them share with the model: layers, kv_heads, head_dim.
        placeholder_id: the token that stands where a prefix goes. It is never computed, but a repetition penalty counts it:
            take one that is not generated, such as padding.
        prompt_logprobs: whether requests with a prefix may ask for log-probabilities of their prompt. vLLM then does without
            CUDA graphs of whole decoding steps, so such requests are refused unless it is wanted.
    """

    folders: Mapping[str, str]
    lengths: Mapping[str, int]
    shape: ModelShape
    placeholder_id: int = 0
    prompt_logprobs: bool = False

    @classmethod
    def load(
        cls,
        folders: Mapping[str, str | os.PathLike],
        *,
        model: str | os.PathLike | None = None,
        placeholder_id: int = 0,
        prompt_logprobs: bool = False,
    ) -> ServedPrefixes:
        """Reads and checks the prefixes; the engine reads them again when it starts.

        Args:
            model: hub id or folder of the model, to be told here that prefixes do not fit and not by a starting engine.

        Raises ValueError for a name that cannot be chosen and for prefixes of other shapes than the model's, or each other's;
        NotImplementedError for what vLLM has no place for; errors of files as Prefix.load does.
        """
        placeholder_id = checked_int("placeholder_id", placeholder_id, at_least=0)
        if not isinstance(folders, Mapping) or not folders:
            raise ValueError(f"folders: expected the folder of at least one prefix by name, got {folders or 'none'}")
        shapes, lengths = {}, {}
        for name, folder in folders.items():
            _check_name(name)
            prefix = Prefix.load(folder)
            check_servable(name, prefix)
            shapes[name], lengths[name] = prefix.parts["decoder"], prefix.prefix_len
        expected, what = next(iter(shapes.values())), f"as {next(iter(shapes))} has"
        if model is not None:
            expected, what = _model_shape(model), f"as {model} has"
        for name, shape in shapes.items():
            if shape != expected:
                raise ValueError(f"prefix {name}: expected {expected}, {what}, got one with {shape}")
        places = {name: str(Path(folder).resolve() if Path(folder).is_dir() else folder) for name, folder in folders.items()}
        return cls(places, lengths, expected, placeholder_id, prompt_logprobs)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ServedPrefixes:
        """What kv_transfer_config()["kv_connector_extra_config"] says, back again."""
        return cls(**{**config, "shape": ModelShape(**config["shape"])})

    def kv_transfer_config(self) -> dict[str, Any]:
        """vLLM's kv_transfer_config for an engine with these prefixes: LLM(model, kv_transfer_config=…)."""
        return {
            "kv_connector": CONNECTOR,
            "kv_connector_module_path": CONNECTOR_MODULE,
            "kv_role": "kv_consumer",
            "kv_connector_extra_config": {
                "folders": dict(self.folders),
                "lengths": dict(self.lengths),
                "shape": asdict(self.shape),
                "placeholder_id": self.placeholder_id,
                "prompt_logprobs": self.prompt_logprobs,
            },
        }

    def prompt(self, name: str, token_ids: Sequence[int], cache_salt: str | None = None) -> dict[str, Any]:
        """The prompt that vLLM is to be given for tokens behind the prefix `name`.

        Args:
            token_ids: int [tokens], at least one, with the special tokens that the model wants.
            cache_salt: requests share cached blocks with those of the same prefix and salt alone, as in vLLM.

        Raises ValueError for a name that is not served, for no tokens and for what is no row of ints.
        """
        self._check_served(name)
        try:
            ids = list(map(operator.index, token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids))
        except TypeError:
            raise ValueError(f"token_ids: expected ints [tokens], got {token_ids!r:.99}") from None
        if not ids:
            raise ValueError("token_ids: expected at least one token behind the prefix, got none")
        placeholders = [self.placeholder_id] * self.lengths[name]
        return {"prompt_token_ids": placeholders + ids, "cache_salt": MARK + json.dumps([name, cache_salt])}

    def chosen(self, token_ids: Sequence[int] | None, cache_salt: str | None) -> str | None:
        """The name of the prefix that a request's salt asks for, or None; ValueError where the request is not what `prompt`
        makes: an unknown name, placeholders missing, nothing behind them."""
        if not asks_for_prefix(cache_salt):
            return None
        try:
            name, _ = json.loads(cache_salt.removeprefix(MARK))
        except (ValueError, TypeError, RecursionError):
            raise ValueError(f"cache_salt: expected what ServedPrefixes.prompt makes, got {cache_salt!r:.99}") from None
        self._check_served(name)
        length = self.lengths[name]
        if token_ids is None or list(token_ids[:length]) != [self.placeholder_id] * length:
            raise ValueError(
                f"prompt: expected what ServedPrefixes.prompt makes, got one that does not begin with the {length} tokens "
                f"{self.placeholder_id} whose place the prefix {name} takes"
            )
        if len(token_ids) == length:
            raise ValueError(f"prompt: expected at least one token behind the placeholders of the prefix {name}, got none")
        return name

    def _check_served(self, name: Any) -> None:
        if not isinstance(name, str) or name not in self.lengths:
            raise ValueError(f"prefix: expected one of {', '.join(self.lengths)}, got {name!r}")


def asks_for_prefix(cache_salt: str | None) -> bool:
    """Whether a request's salt is one that only ServedPrefixes.prompt makes."""
    return cache_salt is not None and cache_salt.startswith(MARK)


def check_servable(name: str, prefix: Prefix) -> None:
    """NotImplementedError, saying why, for a prefix that cannot stand in an engine's cache of keys and values."""
    shape, offset, length = prefix.parts.get("decoder"), prefix.position_offset, prefix.prefix_len
    if list(prefix.parts) != ["decoder"]:
        problem = f"that of a causal model, decoder, alone, got parts {', '.join(prefix.parts)}"
    elif prefix.heads:
        problem = f"no heads, as the engine runs the model's own, got {', '.join(prefix.heads)}"
    elif offset != length:
        problem = f"position_offset {length}, the prefix_len, from where the engine counts, got {offset}"
    elif not shape.uniform or shape.value_dim != shape.head_dim:
        problem = f"layers that are all alike, with values as long as keys, got {shape}"
    else:
        return
    raise NotImplementedError(f"prefix {name}: vLLM cannot serve it: expected {problem}")


def without_placeholders(output: Any, prefix_len: int) -> Any:
    """A vLLM RequestOutput of a request with a prefix as it is without: the prompt's tokens and their log-probabilities, where
    the first has none, as nothing predicts it, and the number of cached tokens. Changes and returns `output`."""
    if output.prompt_token_ids is not None:
        output.prompt_token_ids = output.prompt_token_ids[prefix_len:]
    if output.prompt_logprobs:
        output.prompt_logprobs = [None, *output.prompt_logprobs[prefix_len + 1 :]]
    if output.num_cached_tokens is not None:
        output.num_cached_tokens = max(0, output.num_cached_tokens - prefix_len)
    return output


def _check_name(name: Any) -> None:
    if not isinstance(name, str):
        raise ValueError(f"prefix: expected a string as its name, got {name!r}")
    if not name or name in PART_NAMES:
        raise ValueError(
            f"prefix: expected a name that is not empty nor that of a part of a message, {', '.join(sorted(PART_NAMES))}, got "
            f"{name!r}"
        )


def _model_shape(model: str | os.PathLike) -> ModelShape:
    """The shape of a prefix for this model; NotImplementedError where not every layer attends to all tokens."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    for kind, options in attention_kinds(config).items():
        if options.get("window") or "chunks" in kind:
            raise NotImplementedError(
                f"model {model}: expected full attention, got {kind}, which a pinned prefix would slide out of"
            )
    shapes = part_shapes(config)
    if list(shapes) != ["decoder"]:
        raise NotImplementedError(f"model {model}: expected a causal model, got a {config.model_type}")
    return shapes["decoder"]
