"""PEFT's prefix adapters in and out: its files and its one flat tensor, without the package peft.

The tensor is `prompt_embeddings` [prefix_len, layers · 2 · kv_heads · head_dim]: in each row the key, then the value, of the
first layer, then of the second, and so on. Positions start at prefix_len.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from prefix_tuning.files import replacing_files
from prefix_tuning.heads import Heads
from prefix_tuning.prefix_files import download, write_tensors
from prefix_tuning.shapes import Layers, ModelShape, check_layers, checked_int

CONFIG_FILE, TENSORS_FILE, PICKLED_FILE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
EMBEDDINGS, BASE = "prompt_embeddings", "base_model."
PEFT_TYPES = ("PREFIX_TUNING", "CARTRIDGE")
SEQ_2_SEQ = "SEQ_2_SEQ_LM"
TASK_TYPES = ("CAUSAL_LM", "FEATURE_EXTRACTION", "QUESTION_ANS", SEQ_2_SEQ, "SEQ_CLS", "TOKEN_CLS")


@dataclass(frozen=True)
class AdapterLayout:
    """How the keys and values of the layers lie in a flat tensor."""

    prefix_len: int
    shape: ModelShape
    seq2seq: bool

    def split(self, embeddings: Tensor) -> Layers:
        """Of each layer the key and the value [kv_heads, prefix_len, head_dim], views of one unbind of the flat tensor."""
        shape = self.shape
        stacked = embeddings.view(self.prefix_len, shape.layers * 2, shape.kv_heads, shape.head_dim)
        keys_and_values = stacked.permute(1, 2, 0, 3).unbind(0)
        stored = list(zip(keys_and_values[0::2], keys_and_values[1::2], strict=True))
        return [stored[index] for index in self.stored_layers()]

    def stored_layers(self) -> list[int]:
        """Which stored layer each layer reads. PEFT doubles the tensor for sequence-to-sequence models and splits it by
        fours, so that decoder layer i reads layer 2i modulo the layers: with an even number, half of them are never read."""
        layers = self.shape.layers
        return [2 * index % layers if self.seq2seq else index for index in range(layers)]

    @property
    def flat_shape(self) -> list[int]:
        return [self.prefix_len, self.shape.layers * 2 * self.shape.kv_heads * self.shape.head_dim]


def adapter_layout(config: Mapping[str, Any]) -> AdapterLayout:
    """The layout that a PEFT config describes.

    Raises NotImplementedError for another kind of adapter, ValueError or TypeError for a config that describes none.
    """
    if config.get("peft_type") not in PEFT_TYPES:
        raise NotImplementedError(
            f"peft_type: expected an adapter of type {' or '.join(PEFT_TYPES)}, got {_name(config.get('peft_type'))}"
        )
    names = ("num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim")
    prefix_len, layers, kv_heads, token_dim = (checked_int(name, config.get(name), at_least=1) for name in names)
    if token_dim % kv_heads:
        raise ValueError(f"token_dim: expected a multiple of num_attention_heads, {kv_heads}, got {token_dim}")
    seq2seq = config.get("task_type") == SEQ_2_SEQ
    submodules = config.get("num_transformer_submodules")
    if submodules not in (None, 2 if seq2seq else 1):
        raise NotImplementedError(
            f"num_transformer_submodules: expected {2 if seq2seq else 1} for task_type {_name(config.get('task_type'))}, got "
            f"{submodules}"
        )
    head_dim = token_dim // kv_heads
    return AdapterLayout(prefix_len, ModelShape(layers, kv_heads, head_dim, head_dim), seq2seq)


def prompt_embeddings(encoder: nn.Module, config) -> Tensor:
    """The flat tensor of one adapter of a PeftModel, [prefix_len, layers · 2 · kv_heads · head_dim], evaluated once.

    PEFT keeps the projection's result, not the projection, in an adapter that is for inference.

    Args:
        encoder, config: its entries of the model's prompt_encoder and peft_config.
    """
    if getattr(config, "prefix_projection", False) and not config.inference_mode:
        return encoder.transform(encoder.embedding.weight)
    return encoder.embedding.weight


def read_adapter(source: str | os.PathLike | nn.Module, revision: str | None = None) -> tuple[Layers, Heads, str]:
    """The layers of an adapter, (key, value) [kv_heads, prefix_len, head_dim] each, the modules that were trained with it
    (its modules_to_save) and the name of its base model.

    Args:
        source: a folder or hub repository that PEFT's save_pretrained wrote, or a PeftModel, of which the active adapter is
            read.
        revision: branch, tag or commit of a hub repository; None: its main branch.

    Raises FileNotFoundError, ValueError naming the file, NotImplementedError for an adapter of another kind.
    """
    if isinstance(source, nn.Module):
        return _active_adapter(source)
    directory = Path(source)
    if not directory.is_dir():
        directory = download(str(source), [CONFIG_FILE, TENSORS_FILE, PICKLED_FILE], revision)
    file = directory / CONFIG_FILE
    if not file.is_file():
        below = sorted(str(found.parent) for found in directory.glob(f"*/{CONFIG_FILE}"))
        hint = f"; there is one in {', '.join(below)}" if below else ""  # where PEFT saves adapters of other names than default
        raise FileNotFoundError(f"{file}: expected the description of an adapter that PEFT saves, got no such file{hint}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        layout = adapter_layout(config)
        base_model, modules_to_save = config.get("base_model_name_or_path") or "", config.get("modules_to_save") or []
        if not isinstance(base_model, str):
            raise TypeError(f"base_model_name_or_path: expected a string, got {base_model!r}")
        if not isinstance(modules_to_save, list) or not all(isinstance(name, str) for name in modules_to_save):
            raise TypeError(f"modules_to_save: expected a list of names, got {modules_to_save!r}")
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: expected the JSON of a PEFT adapter ({error})") from error
    except NotImplementedError as error:
        raise NotImplementedError(f"{file}: {error}") from None
    embeddings, others = _read_tensors(directory, layout)
    return _own_layers(embeddings, layout), _heads(file, modules_to_save, others, embeddings.dtype), base_model


def write_adapter(
    directory: str | os.PathLike, layers: Layers, heads: Mapping[str, Mapping[str, Tensor]], base_model: str, task_type: str
) -> None:
    """Writes adapter_model.safetensors (float32) and adapter_config.json, as PEFT's save_pretrained names and fills them.

    Both files are written before either takes its place.

    Args:
        layers: (key, value) [kv_heads, prefix_len, head_dim] of each.
        heads: of each trained module its parameters.

    Raises ValueError for an unknown task_type, NotImplementedError for keys and values that PEFT has no way to read.
    """
    if task_type not in TASK_TYPES:
        raise ValueError(f"task_type: expected one of {', '.join(TASK_TYPES)}, got {task_type!r}")
    shape, prefix_len = check_layers("decoder", layers)
    if not shape.uniform or shape.value_dim != shape.head_dim:
        raise NotImplementedError(
            f"prefix: expected one size for keys and values and for all layers, as PEFT has it, got {shape}"
        )
    kv_heads, head_dim = shape.kv_heads, shape.head_dim
    layout = AdapterLayout(prefix_len, shape, task_type == SEQ_2_SEQ)
    config = {
        "base_model_name_or_path": base_model or None,
        "encoder_hidden_size": kv_heads * head_dim,
        "inference_mode": True,
        "modules_to_save": [module.split(".")[-1] for module in heads] or None,
        "num_attention_heads": kv_heads,
        "num_layers": len(layers),
        "num_transformer_submodules": 2 if layout.seq2seq else 1,
        "num_virtual_tokens": prefix_len,
        "peft_type": "PREFIX_TUNING",
        "prefix_projection": False,
        "task_type": task_type,
        "token_dim": kv_heads * head_dim,
    }
    tensors = {EMBEDDINGS: _flat(layers, layout)}
    for module, parameters in heads.items():
        for name, value in parameters.items():
            tensors[f"{BASE}{module}.{name}"] = value.detach().cpu().float().clone(memory_format=torch.contiguous_format)
    with replacing_files(directory, PICKLED_FILE, TENSORS_FILE, CONFIG_FILE) as folder:
        write_tensors(folder / TENSORS_FILE, tensors)
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _flat(layers: Layers, layout: AdapterLayout) -> Tensor:
    """What AdapterLayout.split takes apart; stored layers that no layer reads are zero."""
    stored = torch.zeros(len(layers), 2, *layers[0][0].shape)
    filled: dict[int, int] = {}
    for index, place in enumerate(layout.stored_layers()):
        pair = torch.stack([tensor.detach().cpu().float() for tensor in layers[index]])
        if place in filled and not torch.equal(stored[place], pair):
            raise NotImplementedError(
                f"task_type: in PEFT's {SEQ_2_SEQ} layers {filled[place]} and {index} of {len(layers)} read the same stored "
                "layer (an even number of layers leaves half of the stored ones unread), but here they differ"
            )
        stored[place] = pair
        filled[place] = index
    return stored.flatten(0, 1).permute(2, 0, 1, 3).reshape(layout.flat_shape)


def _active_adapter(model: nn.Module) -> tuple[Layers, Heads, str]:
    configs, name = getattr(model, "peft_config", None), getattr(model, "active_adapter", None)
    if not isinstance(configs, Mapping) or name not in configs:
        raise TypeError(f"source: expected a folder or a PeftModel with an active adapter, got {type(model).__name__}")
    config = configs[name]
    layout = adapter_layout(config.to_dict())
    with torch.no_grad():
        embeddings = prompt_embeddings(model.prompt_encoder[name], config)
    trained = f".modules_to_save.{name}."
    others = {
        parameter_name.replace(trained, "."): parameter.detach().clone()
        for parameter_name, parameter in model.named_parameters(remove_duplicate=False)
        if trained in parameter_name
    }
    heads = _heads(f"adapter {name!r}", config.modules_to_save or (), others, embeddings.dtype)
    base_model = config.base_model_name_or_path or getattr(model.config, "name_or_path", "") or ""
    return _own_layers(embeddings, layout), heads, base_model


def _own_layers(embeddings: Tensor, layout: AdapterLayout) -> Layers:
    """The layers in memory of their own: none is a view of another, nor of the adapter."""
    pairs = layout.split(embeddings)
    return [tuple(tensor.clone(memory_format=torch.contiguous_format) for tensor in pair) for pair in pairs]


def _read_tensors(directory: Path, layout: AdapterLayout) -> tuple[Tensor, dict[str, Tensor]]:
    """The flat tensor, and the others by name."""
    file = directory / TENSORS_FILE
    if not file.is_file() and (directory / PICKLED_FILE).is_file():
        file = directory / PICKLED_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file}: expected the tensors that PEFT saves, got no such file")
    try:
        tensors = load_file(file) if file.suffix == ".safetensors" else torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what is no pickle may end in any
        raise ValueError(f"{file}: damaged, or not the tensors of a PEFT adapter ({error})") from error
    if not (isinstance(tensors, dict) and all(isinstance(n, str) and isinstance(t, Tensor) for n, t in tensors.items())):
        raise ValueError(f"{file}: expected the tensors of a PEFT adapter by their names, got another {type(tensors).__name__}")
    embeddings = tensors.pop(EMBEDDINGS, None)
    found = "none" if embeddings is None else f"{embeddings.dtype} {list(embeddings.shape)}"
    if embeddings is None or list(embeddings.shape) != layout.flat_shape or not embeddings.is_floating_point():
        raise ValueError(f"{file}: expected {EMBEDDINGS} of floats {layout.flat_shape} by {CONFIG_FILE}, got {found}")
    return embeddings, tensors


def _heads(where, modules_to_save: Sequence[str], tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Heads:
    """The tensors by module and name within it: "base_model.classifier.dense.weight" is classifier's "dense.weight"."""
    heads: Heads = {}
    for key, tensor in sorted(tensors.items()):
        parts = key.removeprefix(BASE).split(".")
        ends = [i for i, part in enumerate(parts[:-1], 1) if part.endswith(tuple(modules_to_save))]
        if not key.startswith(BASE) or not ends or not tensor.is_floating_point():
            raise NotImplementedError(f"{where}: expected {EMBEDDINGS} and the modules_to_save {modules_to_save}, got {key}")
        heads.setdefault(".".join(parts[: ends[0]]), {})[".".join(parts[ends[0] :])] = tensor.to(dtype)
    return heads


def _name(value) -> str:
    return str(getattr(value, "value", value))
