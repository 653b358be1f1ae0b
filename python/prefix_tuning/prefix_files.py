"""The files of a prefix: tensors, their description, and the MLP where training goes on. Read with every doubt."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prefix_tuning.files import replacing_files
from prefix_tuning.reparametrization import MLPReparametrization
from prefix_tuning.shapes import PARTS, Layers, ModelShape, checked_int

FORMAT, FORMAT_VERSION = "prefix-tuning", 1
CONFIG_FILE, TENSORS_FILE, MLP_FILE = "prefix_config.json", "prefix.safetensors", "reparametrization.safetensors"


def write_prefix(
    directory: str | os.PathLike,
    layers: Mapping[str, Layers],
    heads: Mapping[str, Mapping[str, Tensor]],
    description: Mapping[str, Any],
    mlps: nn.ModuleDict | None,
) -> None:
    """Writes prefix.safetensors, prefix_config.json and, with `mlps`, reparametrization.safetensors to a folder, which is
    created where it is missing.

    Each file is replaced whole, the json last, and none before all are written.

    Args:
        layers: each part's (key, value) pairs.
        heads: of each trained module its parameters.
        description: base_model, prefix_len, position_offset and parts (each part's ModelShape as a dict).
        mlps: each part's MLPReparametrization; None removes such a file of an earlier save.

    Raises OSError where the system cannot write.
    """
    tensors = {
        f"{part}.{index}.{name}": tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for part, pairs in layers.items()
        for index, pair in enumerate(pairs)
        for name, tensor in zip(("key", "value"), pair, strict=True)
    }
    for module, parameters in heads.items():
        tensors |= {f"head.{module}.{name}": value.detach().to("cpu", copy=True) for name, value in parameters.items()}
    config = {"format": FORMAT, "format_version": FORMAT_VERSION, "library_version": library_version(), **description}
    if heads:
        config["heads"] = {
            module: {name: list(value.shape) for name, value in parameters.items()} for module, parameters in heads.items()
        }
    with replacing_files(directory, MLP_FILE, TENSORS_FILE, CONFIG_FILE) as folder:
        write_tensors(folder / TENSORS_FILE, tensors)
        if mlps is not None:
            write_tensors(folder / MLP_FILE, {name: tensor.cpu() for name, tensor in mlps.state_dict().items()})
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_prefix(
    directory_or_hub_id: str | os.PathLike, revision: str | None = None
) -> tuple[dict[str, Layers | MLPReparametrization], dict[str, dict[str, Tensor]], dict[str, Any]]:
    """What `write_prefix` wrote to a folder, or what of it is in a hub repository: (each part's pairs or MLP, each trained
    module's parameters, description).

    A missing file is a FileNotFoundError, a damaged or foreign one, or one that contradicts the json, a ValueError: each
    names the file and what was expected in it.
    """
    directory = Path(directory_or_hub_id)
    if not directory.is_dir():
        directory = download(str(directory_or_hub_id), [CONFIG_FILE, TENSORS_FILE, MLP_FILE], revision)
    config = _read_config(directory / CONFIG_FILE)
    prefix_len = config["prefix_len"]
    shapes = {name: ModelShape(**shape) for name, shape in config["parts"].items()}
    heads = config.get("heads", {})
    tensors = _read_tensors(
        directory / TENSORS_FILE,
        lambda found: (
            {
                f"{part}.{index}.{name}": [kv_heads, prefix_len, dim]
                for part, shape in shapes.items()
                for index in range(min(shape.layers, len(found)))  # a damaged json may speak of 10⁹; one too many says as much
                for kv_heads, *dims in [shape.of(index)]
                for name, dim in zip(("key", "value"), dims, strict=True)
            }
            | {f"head.{module}.{name}": shape for module, parameters in heads.items() for name, shape in parameters.items()}
        ),
    )
    parts = {
        part: [(tensors[f"{part}.{i}.key"], tensors[f"{part}.{i}.value"]) for i in range(shape.layers)]
        for part, shape in shapes.items()
    }
    if (directory / MLP_FILE).exists():
        parts |= _read_mlps(directory / MLP_FILE, prefix_len, shapes)
    saved = {module: {name: tensors[f"head.{module}.{name}"] for name in names} for module, names in heads.items()}
    return parts, saved, config


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a safetensors file; OSError, as for any other file, where the system cannot."""
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{file}: {error}") from error


def library_version() -> str:
    try:
        return importlib.metadata.version("prefix-kernels")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def download(repo_id: str, names: list[str], revision: str | None = None) -> Path:
    """The folder where a hub repository's files of these names are, downloaded or from the cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=names))
    except (HFValidationError, OSError) as error:
        raise FileNotFoundError(f"{repo_id}: expected a folder or a hub repository in reach, got neither ({error})") from error


def _read_config(file: Path) -> dict:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: expected the description of a prefix that Prefix.save writes, got no such file")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: expected JSON ({error})") from error
    found = (config.get("format"), config.get("format_version")) if isinstance(config, dict) else type(config).__name__
    if found != (FORMAT, FORMAT_VERSION):
        raise ValueError(f"{file}: expected {(FORMAT, FORMAT_VERSION)} (format, format_version), got {found}")
    try:
        checked_int("prefix_len", config["prefix_len"], at_least=1)
        checked_int("position_offset", config["position_offset"], at_least=0)
        if not isinstance(config["base_model"], str):
            raise TypeError(f"base_model: expected a string, got {config['base_model']!r}")
        if not isinstance(config["parts"], dict) or not set(config["parts"]) <= set(PARTS) or not config["parts"]:
            raise TypeError(f"parts: expected one or more of {', '.join(PARTS)}, got {config['parts']!r}")
        for part, shape in config["parts"].items():
            if not isinstance(shape, dict) or set(shape) != {field.name for field in fields(ModelShape)}:
                raise TypeError(f"{part}: expected {', '.join(field.name for field in fields(ModelShape))}, got {shape!r}")
            for name, value in shape.items():
                for size in value if isinstance(value, list) and name != "layers" else [value]:
                    checked_int(f"{part}.{name}", size, at_least=1)
            ModelShape(**shape)
        _check_heads(config.get("heads", {}))
    except KeyError as error:
        raise ValueError(f"{file}: expected the key {error}, got only {', '.join(config)}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
    return config


def _check_heads(heads: Any) -> None:
    if not isinstance(heads, dict) or not all(isinstance(parameters, dict) for parameters in heads.values()):
        raise TypeError(f"heads: expected of each module the shape of each parameter, got {heads!r}")
    for module, parameters in heads.items():
        for name, shape in parameters.items():
            if not isinstance(shape, list):
                raise TypeError(f"heads: expected a shape as {module}.{name}, got {shape!r}")
            for size in shape:
                checked_int(f"heads: {module}.{name}", size, at_least=1)


def _read_tensors(file: Path, shapes_of) -> dict[str, Tensor]:
    """The tensors of a safetensors file: exactly those of `shapes_of(tensors)`, name → shape, in one floating dtype."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: expected the tensors that Prefix.save writes, got no such file")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: damaged, or not a safetensors file ({error})") from error
    expected, found = shapes_of(tensors), {name: list(tensor.shape) for name, tensor in tensors.items()}
    wrong = [name for name in sorted(expected | found) if expected.get(name) != found.get(name)]
    if wrong:
        raise ValueError(
            f"{file}: {wrong[0]}: expected {expected.get(wrong[0], 'no such tensor')} by {CONFIG_FILE}, got "
            f"{found.get(wrong[0], 'none')} ({len(wrong)} such differences)"
        )
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) != 1 or not dtypes.copy().pop().is_floating_point:
        raise ValueError(f"{file}: expected one floating dtype, got {', '.join(sorted(map(str, dtypes))) or 'no tensor'}")
    return tensors


def _read_mlps(file: Path, prefix_len: int, shapes: Mapping[str, ModelShape]) -> dict[str, MLPReparametrization]:
    """The MLP of each part that the file holds; its own two widths are read off its weights."""
    mlps = nn.ModuleDict()

    def shapes_of(tensors: dict[str, Tensor]) -> dict[str, list[int]]:
        for part, shape in shapes.items():
            weight = tensors.get(f"{part}.hidden.weight")
            if weight is not None and weight.dim() == 2:
                hidden_size, embedding_dim = weight.shape
                mlps[part] = MLPReparametrization(prefix_len, embedding_dim, hidden_size, **asdict(shape), device="meta")
        return {name: list(tensor.shape) for name, tensor in mlps.state_dict().items()}

    mlps.load_state_dict(_read_tensors(file, shapes_of), assign=True)
    return dict(mlps.items())
