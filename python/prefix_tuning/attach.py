"""Attach a prefix to a frozen transformers model: its attention modules then call prefix_attention.

Three things change, on this model alone, and detach undoes them exactly: the model gets its own copy of the config that names
our attention; each self-attention module holds its layer's prefix; a hook on the base model shifts the positions.
"""

from __future__ import annotations

import copy
import inspect
from types import TracebackType

import torch
from torch import Tensor, nn

from prefix_tuning.attention import ATTENTION_NAME, LayerPrefix
from prefix_tuning.bank import PrefixBank
from prefix_tuning.families import attention_modules, family_of
from prefix_tuning.positions import check_learned_positions, new_tokens, sequence_positions
from prefix_tuning.prefix import Prefix
from prefix_tuning.prefix_ids import BANK_DEFAULT, PrefixIdsArgument, check_hands_on, row_ids

PREFIX_WINDOWS = ("pinned", "peft")


class Attachment:
    """A prefix attached to a model, until detach() or the end of the with block."""

    def __init__(self, model: nn.Module, prefix: Prefix | PrefixBank, backend: str | None, prefix_window: str):
        self.model = model
        self.prefix = prefix
        self._learned_positions = family_of(model).learned_positions
        self._modules = attention_modules(model)
        self._layers = [LayerPrefix(backend, slides=prefix_window == "peft") for _ in self._modules]
        self._config = model.config
        self._argument_names = list(inspect.signature(type(model.base_model).forward).parameters)[1:]
        self._replace_config(copy.deepcopy(model.config))
        model.config._attn_implementation = ATTENTION_NAME
        for module, layer in zip(self._modules, self._layers, strict=True):
            module.layer_prefix = layer
        self._hook = model.base_model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        self._dtype = model.dtype
        self._rounded: list[Tensor] = []  # keys, then values, in the model's dtype; empty: the layers hold the prefix itself
        self._bank = prefix if isinstance(prefix, PrefixBank) else None
        self._generation = None  # of the bank's tensors that the layers hold
        self._argument = None if self._bank is None else PrefixIdsArgument(model, self._bank)
        if self._bank is None:
            self._refresh()

    def detach(self) -> None:
        """Put the model back as it was. Calling it again does nothing."""
        if self._hook is None:
            return
        self._hook.remove()
        self._hook = None
        if self._argument is not None:
            self._argument.remove()
        for module in self._modules:
            del module.layer_prefix
        self._replace_config(self._config)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, error: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()

    def _replace_config(self, config) -> None:
        """Give every module that holds the model's config this one instead; another model may share the old one."""
        old = self.model.config
        for module in self.model.modules():
            if getattr(module, "config", None) is old:
                module.config = config

    def _refresh(self) -> None:
        for layer, (key, value) in zip(self._layers, self.prefix.layers("decoder"), strict=True):
            layer.key, layer.value = key, value

    def _rounds(self) -> bool:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        key = next(self.prefix.parameters())
        return key.is_cuda and key.dtype == torch.float32 and self._dtype.itemsize == 2

    def _round(self) -> None:
        """Without gradients on a GPU: rounds a float32 prefix for all layers at once; else each call of the op would."""
        if self._rounds():
            keys, values = zip(*self.prefix.layers("decoder"), strict=True)
            if not self._rounded:
                with torch.inference_mode(False):  # else they could not be written again outside of that mode
                    self._rounded = [torch.empty_like(tensor, dtype=self._dtype) for tensor in (*keys, *values)]
            torch._foreach_copy_(self._rounded, [*keys, *values])
            for layer, key, value in zip(self._layers, self._rounded, self._rounded[len(keys) :], strict=False):
                layer.key, layer.value = key, value
        elif self._rounded:
            self._rounded = []
            self._refresh()

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Shift the positions behind the prefix; evaluate a reparametrisation, once."""
        kwargs = {**dict(zip(self._argument_names, args, strict=False)), **kwargs}
        if kwargs.get("output_attentions") or module.config.output_attentions:
            raise NotImplementedError("output_attentions: attention weights are never built; detach the prefix to see them")
        self._check_checkpointing(module)
        if module.config._attn_implementation != ATTENTION_NAME:
            raise ValueError(
                f"attn_implementation: set to {module.config._attn_implementation!r} while a prefix is attached, which it "
                "would not see; detach the prefix first"
            )
        offset = self._take_prefix(kwargs) if self._bank is None else self._take_rows(kwargs)
        if "position_ids" in self._argument_names:
            positions = kwargs.get("position_ids")
            if positions is None:
                positions = sequence_positions(kwargs)
            kwargs["position_ids"] = positions + offset
            if self._learned_positions:
                check_learned_positions(kwargs["position_ids"], module.config.max_position_embeddings)
        return (), kwargs

    def _take_prefix(self, kwargs: dict) -> int:
        """The layers hold the prefix as it is now; returns where positions start behind it."""
        if kwargs.pop("prefix_ids", None) is not None:
            raise ValueError("prefix_ids: got some, but one Prefix is attached, for all rows; attach a PrefixBank to choose")
        if self.prefix.reparametrization is not None:
            self._refresh()
        else:
            self._round()
        return self.prefix.position_offset

    def _take_rows(self, kwargs: dict) -> Tensor:
        """kwargs get the id of each row, for every layer; returns where the positions of each row start, [batch, 1]."""
        tokens = new_tokens(kwargs)
        kwargs["prefix_ids"] = row_ids(self._bank, kwargs.get("prefix_ids", BANK_DEFAULT), len(tokens), tokens.device)
        if self._generation != self._bank.generation:
            self._generation = self._bank.generation
            for layer, (key, value) in zip(self._layers, self._bank.layers(), strict=True):
                layer.key, layer.value, layer.lens = key, value, self._bank.prefix_lens
        return self._bank.position_offsets(kwargs["prefix_ids"])

    def _check_checkpointing(self, module: nn.Module) -> None:
        keywords = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", None) or {}
        if getattr(module, "gradient_checkpointing", False) and module.training and keywords.get("use_reentrant"):
            raise ValueError(
                "gradient_checkpointing: expected use_reentrant=False; the reentrant kind gives a prefix under a frozen model "
                "no gradient"
            )


def attach_prefix(
    model: nn.Module, prefix: Prefix | PrefixBank, *, backend: str | None = None, prefix_window: str = "pinned"
) -> Attachment:
    """Let every call of `model` attend to `prefix`: forward, loss, generate. Nothing is concatenated and nothing is cached.

    Args:
        model: a transformers model of a family in families.py. It gets no parameter; its weights stay as they are.
        prefix: one made for this model's shape; it is moved to the model's device. Or a bank of them, moved to the model's
            device and dtype: forward and generate then take prefix_ids, a list with a name or None (no prefix) for each row,
            or an int tensor [batch] from bank.ids; None is no prefix for any row, and a call without it gets the bank's
            default. Behind its prefix each row's positions start at that prefix's own position_offset.
        backend: the backend of prefix_attention; None picks one per call.
        prefix_window: under sliding-window attention, "pinned" keeps the prefix visible to every token (the default);
            "peft" lets it slide out of the window as PEFT does.

    Returns:
        An Attachment: a context manager, or call its detach().

    Raises:
        NotImplementedError: a family or a request that is not served.
        ValueError: a prefix of another shape, a model that already has a prefix, an unknown prefix_window; from the model's
            calls: prefix_ids that fit neither bank nor batch.
        TypeError: `prefix` is neither a Prefix nor a PrefixBank.
    """
    if not isinstance(prefix, (Prefix, PrefixBank)):
        raise TypeError(f"prefix: expected a Prefix or a PrefixBank, got {type(prefix).__name__}")
    if prefix_window not in PREFIX_WINDOWS:
        raise ValueError(f"prefix_window: expected 'pinned' or 'peft', got {prefix_window!r}")
    modules = attention_modules(model)
    if hasattr(modules[0], "layer_prefix"):
        raise ValueError("model: it already has a prefix attached; detach that first")
    prefix.check_fits(model)
    device = next(model.parameters()).device
    if isinstance(prefix, PrefixBank):
        check_hands_on(model)
        prefix.to(device, model.dtype)
    else:
        prefix.to(device)
    return Attachment(model, prefix, backend, prefix_window)
