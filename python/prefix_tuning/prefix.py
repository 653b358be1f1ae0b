"""A prefix: for every layer of a model, keys and values that each token may attend to. Made, saved and loaded here."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prefix_tuning.reparametrization import MLPReparametrization

PARTS = ("decoder", "encoder", "cross")
RANDOM_STD = 0.02
FORMAT, FORMAT_VERSION = "prefix-tuning", 1
CONFIG_FILE, TENSORS_FILE, MLP_FILE = "prefix_config.json", "prefix.safetensors", "reparametrization.safetensors"

Layers = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ModelShape:
    """What a prefix must share with the model it is for."""

    layers: int
    kv_heads: int
    head_dim: int
    value_dim: int

    def __str__(self) -> str:
        value = "" if self.value_dim == self.head_dim else f", value_dim {self.value_dim}"
        return f"{self.layers} layers, {self.kv_heads} kv_heads, head_dim {self.head_dim}{value}"


def model_shape(config) -> ModelShape:
    """The shape of a transformers model, from its config (a composite one: from its text part).

    Raises ValueError for a config without the number of layers, heads or the hidden size.
    """
    config = config.get_text_config()
    layers, heads, hidden_size = (
        getattr(config, name, None) for name in ("num_hidden_layers", "num_attention_heads", "hidden_size")
    )
    if not (layers and heads and hidden_size):
        raise ValueError(
            f"config: {type(config).__name__} has num_hidden_layers {layers}, num_attention_heads {heads}, hidden_size "
            f"{hidden_size}; expected positive numbers"
        )
    head_dim = getattr(config, "head_dim", None) or hidden_size // heads
    return ModelShape(layers, getattr(config, "num_key_value_heads", None) or heads, head_dim, head_dim)


class Prefix(nn.Module):
    """Keys and values in front of a sequence, one copy for the whole batch.

    parts            what the prefix consists of: "decoder", "encoder" or "cross" (attention), each either its layers' pairs
                     (key [kv_heads, prefix_len, head_dim], value [kv_heads, prefix_len, value_dim]), which become
                     parameters without a copy, or a MLPReparametrization that produces them
    position_offset  where the positions of the sequence start; None: prefix_len
    base_model       name of the model it was made for, for information

    Attributes: prefix_len, position_offset, base_model, parts (each part's ModelShape) and reparametrization (the MLP of
    each part; None without any). Bad shapes, dtypes and part names raise ValueError.
    """

    def __init__(
        self,
        parts: Mapping[str, Sequence[tuple[Tensor, Tensor]] | MLPReparametrization],
        *,
        position_offset: int | None = None,
        base_model: str = "",
    ):
        super().__init__()
        if not parts or not set(parts) <= set(PARTS):
            raise ValueError(f"parts: got {list(parts)}, expected one or more of {', '.join(PARTS)}")
        self.parts: dict[str, ModelShape] = {}
        self.keys, self.values, mlps = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        lengths = set()
        for name, source in parts.items():
            if isinstance(source, MLPReparametrization):
                self.parts[name] = ModelShape(source.layers, source.kv_heads, source.head_dim, source.value_dim)
                lengths.add(source.prefix_len)
                mlps[name] = source
            else:
                self.parts[name], length = _check_layers(name, source)
                lengths.add(length)
                self.keys[name], self.values[name] = (
                    nn.ParameterList(nn.Parameter(pair[i].detach().contiguous()) for pair in source) for i in (0, 1)
                )
        self.reparametrization = mlps if mlps else None
        if len(lengths) > 1:
            raise ValueError(f"parts: got prefix_len {sorted(lengths)}, expected the same for all")
        self.prefix_len: int = lengths.pop()
        self.position_offset = self.prefix_len if position_offset is None else position_offset
        _check_int("position_offset", self.position_offset, at_least=0)
        self.base_model = base_model

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        prefix_len: int,
        *,
        init: str = "random",
        text: str | None = None,
        tokenizer=None,
        reparametrization: str | None = None,
        hidden_size: int = 512,
        dtype: torch.dtype = torch.float32,
        seed: int | None = None,
    ) -> Prefix:
        """A new, trainable prefix for the decoder of a transformers model, on the model's device.

        init               "text": the keys and values which the model gives to the tokens of `text` at the positions 0 …
                           prefix_len − 1, tokenised without special tokens, repeated where too short and cut where too
                           long (the paper's section 7.4; any words do, those of the task do best). "random": normal with
                           standard deviation 0.02. Training that directly is unstable, as the paper says of its own
                           random start: take a text, or the MLP
        reparametrization  "mlp": the parameters are those of an MLP that produces the keys and values (section 4.3). With
                           init="text" it is first fitted to the text's; with "random" its own random start is the prefix's
        hidden_size        of the MLP
        dtype              of the parameters, float32 by default: gradients then never pass through 16 bit
        seed               of everything random; None draws from torch's CPU generator

        Raises ValueError (TypeError for a wrong type) naming the argument.
        """
        _check_int("prefix_len", prefix_len, at_least=1)
        _check_int("hidden_size", hidden_size, at_least=1)
        _check_dtype(dtype)
        if init not in ("text", "random"):
            raise ValueError(f"init: got {init!r}, expected 'text' or 'random'")
        if reparametrization not in (None, "mlp"):
            raise ValueError(f"reparametrization: got {reparametrization!r}, expected None or 'mlp'")
        if text is not None and init != "text":
            raise ValueError(f"text: given, but init is {init!r}; expected init='text' with it")
        shape, device = model_shape(model.config), next(model.parameters()).device
        if init == "text":
            if text is None or tokenizer is None:
                raise ValueError(f"{'text' if text is None else 'tokenizer'}: init='text' needs it, got None")
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if not ids:
                raise ValueError(f"text: {text!r} has no tokens, expected one or more")
            source = _run_model(model, (ids * -(-prefix_len // len(ids)))[:prefix_len])
        elif reparametrization is None:
            with _seeded(seed):
                source = _random_layers(shape, prefix_len)
        else:
            source = None
        if reparametrization == "mlp":
            embedding_dim = model.config.get_text_config().hidden_size
            with _seeded(seed):
                mlp = MLPReparametrization(prefix_len, embedding_dim, hidden_size, **asdict(shape), device="cpu")
            mlp.to(device)
            if source is not None:
                mlp.fit(source)
            source = mlp
        return cls({"decoder": source}, base_model=_name_of(model)).to(device, dtype)

    @classmethod
    def from_text(
        cls,
        model: nn.Module,
        tokenizer,
        text: str | None = None,
        *,
        messages: Sequence[Mapping] | None = None,
        input_ids: Tensor | Sequence[int] | None = None,
    ) -> Prefix:
        """A real text as a frozen prefix (requires_grad False): its keys and values in the model's own dtype and device.

        Exactly one of these gives the text; prefix_len is its number of tokens:
        text       tokenised with the tokenizer's special tokens. Where it adds a beginning-of-text token, that is the
                   prefix's first; what follows the prefix must then be tokenised without
        messages   a conversation, through the tokenizer's chat template, without a generation prompt
        input_ids  int [tokens] or [1, tokens], taken as they are; `tokenizer` may then be None

        The model sees no other text, with dropout off. Raises ValueError naming the argument, also for more tokens than
        the model has positions and for a model with a prefix attached, which its keys and values would depend on.
        """
        given = {"text": text, "messages": messages, "input_ids": input_ids}
        names = [name for name, value in given.items() if value is not None]
        if len(names) != 1:
            raise ValueError(f"text, messages, input_ids: got {' and '.join(names) or 'none'}, expected exactly one")
        if tokenizer is None and input_ids is None:
            raise ValueError(f"tokenizer: got None, expected the one for {names[0]}")
        if text is not None:
            input_ids = tokenizer(text)["input_ids"]
        elif messages is not None:
            input_ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        layers = _run_model(model, input_ids)
        return cls({"decoder": layers}, base_model=_name_of(model)).requires_grad_(False)

    def layers(self, part: str = "decoder") -> Layers:
        """Of each layer (key [kv_heads, prefix_len, head_dim], value [kv_heads, prefix_len, value_dim]): the parameters
        themselves, or one evaluation of the MLP: call it once per forward pass. A part that is not there: ValueError."""
        if part not in self.parts:
            raise ValueError(f"part: got {part!r}, but this prefix has only {', '.join(self.parts)}")
        if part in self.keys:
            return list(zip(self.keys[part], self.values[part], strict=True))
        return self.reparametrization[part]()

    def check_fits(self, model: nn.Module) -> None:
        """Raises ValueError where the decoder part is missing or was made for another shape than the model's."""
        expected, shape = model_shape(model.config), self.parts.get("decoder")
        if shape != expected:
            made_for = f"made for {self.base_model or 'a model'} with {shape}" if shape else "without a decoder part"
            raise ValueError(f"prefix: {made_for}, expected one for {_name_of(model) or type(model).__name__} with {expected}")

    def save(self, directory: str | os.PathLike, *, keep_reparametrization: bool = False) -> None:
        """Writes prefix.safetensors and prefix_config.json to `directory`, which is created where it is missing.

        An MLP is dropped: what is stored are the keys and values it gives. With keep_reparametrization it is written beside
        them, to reparametrization.safetensors, so that training can go on; without, such a file of an earlier save is
        removed. Each file is replaced whole, the json last, and none before all are written.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        with torch.no_grad():
            tensors = {
                f"{part}.{index}.{name}": tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
                for part in self.parts
                for index, pair in enumerate(self.layers(part))
                for name, tensor in zip(("key", "value"), pair, strict=True)
            }
        config = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "library_version": _library_version(),
            "base_model": self.base_model,
            "prefix_len": self.prefix_len,
            "position_offset": self.position_offset,
            "parts": {name: asdict(shape) for name, shape in self.parts.items()},
        }
        keep_mlp = keep_reparametrization and self.reparametrization is not None
        with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as temporary:
            written = Path(temporary)
            save_file(tensors, written / TENSORS_FILE, metadata={"format": "pt"})
            if keep_mlp:
                state = {name: tensor.cpu() for name, tensor in self.reparametrization.state_dict().items()}
                save_file(state, written / MLP_FILE, metadata={"format": "pt"})
            (written / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            for file in written.iterdir():  # safetensors gives its files to their owner alone
                shutil.copymode(written / CONFIG_FILE, file)
            if keep_mlp:
                os.replace(written / MLP_FILE, directory / MLP_FILE)
            else:
                (directory / MLP_FILE).unlink(missing_ok=True)
            os.replace(written / TENSORS_FILE, directory / TENSORS_FILE)
            os.replace(written / CONFIG_FILE, directory / CONFIG_FILE)

    @classmethod
    def load(
        cls,
        directory_or_hub_id: str | os.PathLike,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Prefix:
        """The prefix that `save` wrote to a folder, or that `push_to_hub` uploaded; trainable, with its MLP where one was kept.

        device, dtype  where it goes and what it is converted to; None: the CPU, and as stored

        A missing file is a FileNotFoundError, a damaged or foreign one, or one that contradicts the json, a ValueError:
        each names the file and what was expected in it.
        """
        if dtype is not None:
            _check_dtype(dtype)
        directory = Path(directory_or_hub_id)
        if not directory.is_dir():
            directory = _download(str(directory_or_hub_id))
        config = _read_config(directory / CONFIG_FILE)
        prefix_len = config["prefix_len"]
        shapes = {name: ModelShape(**shape) for name, shape in config["parts"].items()}
        tensors = _read_tensors(
            directory / TENSORS_FILE,
            lambda _: {
                f"{part}.{index}.{name}": [shape.kv_heads, prefix_len, dim]
                for part, shape in shapes.items()
                for index in range(shape.layers)
                for name, dim in (("key", shape.head_dim), ("value", shape.value_dim))
            },
        )
        parts = {
            part: [(tensors[f"{part}.{i}.key"], tensors[f"{part}.{i}.value"]) for i in range(shape.layers)]
            for part, shape in shapes.items()
        }
        if (directory / MLP_FILE).exists():
            parts |= _read_mlps(directory / MLP_FILE, prefix_len, shapes)
        prefix = cls(parts, position_offset=config["position_offset"], base_model=config["base_model"])
        return prefix.to(device=device, dtype=dtype)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None, **kwargs) -> None:
        """Uploads what `save` writes (without the MLP) to a Hugging Face repository, which is created where it is missing.

        kwargs go to `huggingface_hub.HfApi.upload_folder` (commit_message, revision, …).
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save(folder)
            api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=folder, **kwargs)

    def extra_repr(self) -> str:
        parts = "; ".join(f"{name}: {shape}" for name, shape in self.parts.items())
        return f"prefix_len={self.prefix_len}, position_offset={self.position_offset}, {parts}"


def _check_int(name: str, value, at_least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, expected an int")
    if value < at_least:
        raise ValueError(f"{name}: got {value}, expected at least {at_least}")


def _check_dtype(dtype) -> None:
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype: got {dtype!r}, expected a floating torch.dtype such as torch.float32")


def _check_layers(part: str, layers: Sequence[tuple[Tensor, Tensor]]) -> tuple[ModelShape, int]:
    """The shape and prefix_len that all pairs agree on."""
    if not layers:
        raise ValueError(f"parts: {part} has no layers, expected at least one")
    found = {(tuple(key.shape), tuple(value.shape), key.dtype, value.dtype) for key, value in layers}
    key, value, key_dtype, value_dtype = next(iter(found))
    agree = len(found) == 1 and len(key) == len(value) == 3 and key[:2] == value[:2] and min(key + value) > 0
    if not agree or key_dtype != value_dtype or not key_dtype.is_floating_point:
        raise ValueError(
            f"parts: {part} has keys and values {sorted(map(str, found))}, expected in all layers the same non-empty "
            "[kv_heads, prefix_len, head_dim] and [kv_heads, prefix_len, value_dim] of one floating dtype"
        )
    return ModelShape(len(layers), key[0], key[2], value[2]), key[1]


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """torch's CPU generator starts from `seed` inside, and goes on as if nothing had happened afterwards."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _random_layers(shape: ModelShape, prefix_len: int) -> Layers:
    dims = (shape.head_dim, shape.value_dim)
    return [
        tuple(RANDOM_STD * torch.randn(shape.kv_heads, prefix_len, dim, device="cpu") for dim in dims)
        for _ in range(shape.layers)
    ]


def _name_of(model: nn.Module) -> str:
    return getattr(model.config, "name_or_path", None) or ""


def _run_model(model: nn.Module, input_ids: Tensor | Sequence[int]) -> Layers:
    """The keys and values that the model caches for the tokens, in eval mode; its modules' modes are put back."""
    ids = torch.as_tensor(input_ids)
    ids = ids[0] if ids.dim() == 2 and len(ids) == 1 else ids
    if ids.dim() != 1 or not len(ids) or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"input_ids: got {ids.dtype} of shape {list(ids.shape)}, expected one or more ints [tokens]")
    known = model.get_input_embeddings().weight.shape[0]
    if ids.min() < 0 or ids.max() >= known:
        raise ValueError(f"input_ids: got {ids.min()} … {ids.max()}, expected 0 … {known - 1}: is it another tokenizer's?")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and len(ids) > positions:
        raise ValueError(f"input_ids: got {len(ids)} tokens, but the model has only {positions} positions")
    if any(hasattr(module, "layer_prefix") for module in model.modules()):
        raise ValueError("model: it has a prefix attached, which the text would see; detach that first")

    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            cache = _cache_of(model, ids[None].to(next(model.parameters()).device))
    finally:
        for module, mode in modes.items():
            module.training = mode
    layers = [(layer.keys[0], layer.values[0]) for layer in cache.layers]
    expected, found = model_shape(model.config), _check_layers("decoder", layers)
    if found != (expected, len(ids)):
        raise ValueError(f"model: caches {found[1]} tokens, {found[0]}, but its config says {len(ids)} tokens, {expected}")
    return layers


def _cache_of(model: nn.Module, ids: Tensor):
    """The model's cache after ids [1, tokens], with all tokens also where its attention has a sliding window."""
    backbone = getattr(model, "base_model", model)
    outputs = backbone(input_ids=ids, use_cache=True, return_dict=True)
    name = "cache" if "cache" in outputs else "past_key_values"  # renamed in transformers 5.24
    cache = outputs[name]
    if any(layer.keys.shape[-2] < ids.shape[1] for layer in cache.layers):
        cache = backbone(input_ids=ids, use_cache=True, return_dict=True, **{name: type(cache)()})[name]
    return cache


def _library_version() -> str:
    try:
        return importlib.metadata.version("prefix-kernels")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _download(repo_id: str) -> Path:
    """The folder where the files of a hub repository are, downloaded or from the cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(repo_id, allow_patterns=[CONFIG_FILE, TENSORS_FILE, MLP_FILE]))
    except (HFValidationError, OSError) as error:
        raise FileNotFoundError(f"{repo_id}: neither a folder nor a hub repository in reach ({error})") from error


def _read_config(file: Path) -> dict:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file, expected the description of a prefix that Prefix.save writes")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON ({error})") from error
    found = (config.get("format"), config.get("format_version")) if isinstance(config, dict) else type(config).__name__
    if found != (FORMAT, FORMAT_VERSION):
        raise ValueError(f"{file}: got format {found}, expected {(FORMAT, FORMAT_VERSION)} (format, format_version)")
    try:
        _check_int("prefix_len", config["prefix_len"], at_least=1)
        _check_int("position_offset", config["position_offset"], at_least=0)
        if not isinstance(config["base_model"], str):
            raise TypeError(f"base_model: got {config['base_model']!r}, expected a string")
        if not isinstance(config["parts"], dict) or not set(config["parts"]) <= set(PARTS) or not config["parts"]:
            raise TypeError(f"parts: got {config['parts']!r}, expected one or more of {', '.join(PARTS)}")
        for part, shape in config["parts"].items():
            if not isinstance(shape, dict) or set(shape) != {field.name for field in fields(ModelShape)}:
                raise TypeError(f"{part}: got {shape!r}, expected {', '.join(field.name for field in fields(ModelShape))}")
            for name, value in shape.items():
                _check_int(f"{part}.{name}", value, at_least=1)
    except KeyError as error:
        raise ValueError(f"{file}: expected the key {error}, got only {', '.join(config)}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
    return config


def _read_tensors(file: Path, shapes_of) -> dict[str, Tensor]:
    """The tensors of a safetensors file: exactly those of `shapes_of(tensors)`, name → shape, in one floating dtype."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file, expected the tensors that Prefix.save writes")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: damaged, or not a safetensors file ({error})") from error
    expected, found = shapes_of(tensors), {name: list(tensor.shape) for name, tensor in tensors.items()}
    wrong = [name for name in sorted(expected | found) if expected.get(name) != found.get(name)]
    if wrong:
        raise ValueError(
            f"{file}: {wrong[0]} is {found.get(wrong[0], 'missing')}, but by {CONFIG_FILE} expected "
            f"{expected.get(wrong[0], 'no such tensor')} ({len(wrong)} such differences)"
        )
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) != 1 or not dtypes.copy().pop().is_floating_point:
        raise ValueError(f"{file}: got {', '.join(sorted(map(str, dtypes))) or 'no tensor'}, expected one floating dtype")
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
