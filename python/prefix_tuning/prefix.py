"""A prefix: for every layer of a model, keys and values that each token may attend to. Made, saved and loaded here."""

from __future__ import annotations

import operator
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import torch
from torch import Tensor, nn

from prefix_tuning.devices import execution_device
from prefix_tuning.heads import HEAD_NAMES, check_heads_fit, head_parameters
from prefix_tuning.peft_adapters import SEQ_2_SEQ, TASK_TYPES, read_adapter, write_adapter
from prefix_tuning.prefix_files import read_prefix, write_prefix
from prefix_tuning.prompts import encode_beginning, encode_prompt
from prefix_tuning.reparametrization import MLPReparametrization
from prefix_tuning.shapes import PARTS, Layers, ModelShape, check_dtype, check_layers, check_model, checked_int
from prefix_tuning.stacks import check_served, part_shapes, text_config
from prefix_tuning.text_cache import cached_layers
from prefix_tuning.text_layers import computed_layers

RANDOM_STD = 0.02


class Prefix(nn.Module):
    """Keys and values in front of a sequence, one copy for the whole batch.

    Args:
        parts: what the prefix consists of: "decoder", "encoder" or "cross" (attention), each either its layers' pairs (key
            [kv_heads, prefix_len, head_dim], value [kv_heads, prefix_len, value_dim]), which become parameters without a copy,
            or a MLPReparametrization that produces them.
        heads: modules of the model that are trained and saved with the prefix: path in the model -> name of each of the
            module's parameters -> its value, which becomes a parameter without a copy.
        position_offset: where the positions of the sequence start; None: prefix_len.
        base_model: name of the model it was made for, for information.

    Attributes:
        prefix_len: how many positions it has.
        position_offset, base_model: as above.
        parts: each part's ModelShape.
        reparametrization: the MLP of each part; None without any.
        heads: as above; empty without any.

    Raises ValueError for bad shapes, dtypes and part names.
    """

    def __init__(
        self,
        parts: Mapping[str, Sequence[tuple[Tensor, Tensor]] | MLPReparametrization],
        *,
        heads: Mapping[str, Mapping[str, Tensor]] | None = None,
        position_offset: int | None = None,
        base_model: str = "",
    ):
        super().__init__()
        if not parts or not set(parts) <= set(PARTS):
            raise ValueError(f"parts: expected one or more of {', '.join(PARTS)}, got {list(parts)}")
        self.parts: dict[str, ModelShape] = {}
        self.keys, self.values, mlps = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        lengths = set()
        for name, source in parts.items():
            if isinstance(source, MLPReparametrization):
                self.parts[name] = ModelShape(source.layers, source.kv_heads, source.head_dim, source.value_dim)
                lengths.add(source.prefix_len)
                mlps[name] = source
            else:
                self.parts[name], length = check_layers(name, source)
                lengths.add(length)
                self.keys[name], self.values[name] = (nn.ParameterList(_parameter(pair[i]) for pair in source) for i in (0, 1))
        self.reparametrization = mlps if mlps else None
        self._heads = nn.ParameterDict()  # its names may hold no dots
        for module, parameters in (heads or {}).items():
            for name, value in parameters.items():
                if not (isinstance(value, Tensor) and value.is_floating_point()):
                    raise ValueError(f"heads: expected a floating tensor as {module}.{name}, got {value!r}")
                self._heads[f"{module}/{name}".replace(".", ":")] = _parameter(value)
        dtypes = {parameter.dtype for parameter in self.parameters()}
        if heads and len(dtypes) > 1:
            raise ValueError(f"heads: expected one dtype for heads, keys and values, got {', '.join(sorted(map(str, dtypes)))}")
        if len(lengths) > 1:
            raise ValueError(f"parts: expected the same prefix_len for all, got {sorted(lengths)}")
        self.prefix_len: int = lengths.pop()
        offset = self.prefix_len if position_offset is None else position_offset
        self.position_offset: int = checked_int("position_offset", offset, at_least=0)
        self.base_model = base_model
        self.register_load_state_dict_pre_hook(_refuse_assign)

    @property
    def heads(self) -> dict[str, dict[str, nn.Parameter]]:
        """Path of a module in the model -> name of each of its parameters -> that parameter, as the prefix trains it."""
        heads: dict[str, dict[str, nn.Parameter]] = {}
        for key, parameter in self._heads.items():
            module, name = key.replace(":", ".").split("/")
            heads.setdefault(module, {})[name] = parameter
        return heads

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
        parts: Sequence[str] | None = None,
        modules_to_save: Sequence[str] | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int | None = None,
    ) -> Prefix:
        """A new, trainable prefix for a transformers model, on the model's device.

        position_offset is prefix_len; for an encoder-decoder it is 0: its tokens keep the positions they have without a prefix.

        Args:
            init: "text": the keys and values which the model gives to the tokens of `text` at the positions 0 … prefix_len − 1,
                tokenised without special tokens, repeated where too short and cut where too long (the paper's section 7.4; any
                words do, those of the task do best). "random": normal with standard deviation 0.02. Training that directly is
                unstable, as the paper says of its own random start: take a text, or the MLP. An encoder-decoder reads the text
                with its encoder and again with its decoder.
            reparametrization: "mlp": the parameters are those of an MLP that produces the keys and values (section 4.3). With
                init="text" it is first fitted to the text's; with "random" its own random start is the prefix's.
            hidden_size: of the MLP; each part has its own.
            parts: of an encoder-decoder one or more of "encoder" (its self-attention), "decoder" (its self-attention) and
                "cross" (the decoder's attention over the encoder's states); None: all three, as in the paper (section 4.2). An
                encoder has "encoder" and a causal model "decoder" alone.
            modules_to_save: names of modules that are trained, saved and loaded with the prefix: while it is attached the model
                runs with the prefix's copies of their parameters. None: the model's head for classification or question
                answering (classifier, score, qa_outputs, classification_head) where it has one.
            dtype: of the parameters, float32 by default: gradients then never pass through 16 bit.
            seed: of everything random; None draws from torch's CPU generator.

        Raises ValueError (TypeError for a wrong type) naming the argument; NotImplementedError for a family that is not served.
        """
        prefix_len = checked_int("prefix_len", prefix_len, at_least=1)
        hidden_size = checked_int("hidden_size", hidden_size, at_least=1)
        check_dtype(dtype)
        check_model(model)
        if init not in ("text", "random"):
            raise ValueError(f"init: expected 'text' or 'random', got {init!r}")
        if reparametrization not in (None, "mlp"):
            raise ValueError(f"reparametrization: expected None or 'mlp', got {reparametrization!r}")
        if text is not None and init != "text":
            raise ValueError(f"text: expected none beside init {init!r}, got one; init='text' starts from it")
        check_served(model.config)
        shapes, device = _shapes_of(model, parts), execution_device(model)
        source: dict[str, Layers | MLPReparametrization] = {}
        if init == "text":
            if text is None or tokenizer is None:
                raise ValueError(f"{'text' if text is None else 'tokenizer'}: expected one beside init='text', got None")
            if not isinstance(text, str):
                raise TypeError(f"text: expected one text, got {type(text).__name__}")
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if not ids:
                raise ValueError(f"text: expected one token or more, got {text!r}")
            ids = (ids * -(-prefix_len // len(ids)))[:prefix_len]
            if list(part_shapes(model.config)) == ["decoder"]:
                source["decoder"] = cached_layers(model, ids)
            else:
                computed = computed_layers(model, ids)
                source = {part: computed[part] for part in shapes}
        elif reparametrization is None:
            with _seeded(seed):
                source = {part: _random_layers(shape, prefix_len) for part, shape in shapes.items()}
        if reparametrization == "mlp":
            embedding_dim = text_config(model.config).hidden_size
            with _seeded(seed):
                mlps = {
                    part: MLPReparametrization(prefix_len, embedding_dim, hidden_size, **asdict(shape), device="cpu")
                    for part, shape in shapes.items()
                }
            for part, mlp in mlps.items():
                mlp.to(device)
                if part in source:
                    mlp.fit(source[part])
            source = mlps
        offset = 0 if "cross" in part_shapes(model.config) else prefix_len
        of_text = init == "text" and reparametrization is None
        heads = head_parameters(model, modules_to_save, model.dtype if of_text else torch.float32)
        return cls(source, heads=heads, position_offset=offset, base_model=_name_of(model)).to(device, dtype)

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

        Attached, it gives what putting the text in front of every row gives, to the tokens of float32 greedy decoding. Where
        attention has a sliding window or chunks attach it with prefix_window="peft": a text slides out of the window, a
        pinned prefix does not.

        Text and rows are tokenised apart and their ids joined, as prompts and completions are: no token spans the boundary. Let
        the text end where a token ends, say with a line break, and the ids are those of the joined text.

        The model sees no other text, with dropout off, in chunks over its own cache, so that beside the prefix memory grows
        with prefix_len and not its square.

        Exactly one of text, messages and input_ids gives the text; prefix_len is its number of tokens.

        Args:
            text: tokenised with the tokenizer's special tokens, except a closing one. Where that adds a beginning-of-text
                token it is the prefix's first, so tokenise the rows with add_special_tokens=False.
            messages: a conversation, through the tokenizer's chat template, without a generation prompt. Of the whole
                conversation through the template, a row is what follows the first prefix_len tokens. Turns that the template
                shows otherwise once another follows, as some do with the last answer, are refused.
            input_ids: int [tokens] or [1, tokens], taken as they are; `tokenizer` may then be None.

        Raises ValueError naming the argument, also for more tokens than the model has positions and for a model with a prefix
        attached, which its keys and values would depend on; NotImplementedError for one that is no causal model or caches more
        than keys and values.
        """
        given = {"text": text, "messages": messages, "input_ids": input_ids}
        names = [name for name, value in given.items() if value is not None]
        if len(names) != 1:
            raise ValueError(f"text, messages, input_ids: expected exactly one, got {' and '.join(names) or 'none'}")
        if tokenizer is None and input_ids is None:
            raise ValueError(f"tokenizer: expected the one for {names[0]}, got None")
        if text is not None:
            if not isinstance(text, str):
                raise TypeError(f"text: expected one text, got {type(text).__name__}")
            input_ids = encode_prompt(text, tokenizer)
            if not input_ids:
                raise ValueError(f"text: expected one token or more, got {text!r}")
        elif messages is not None:
            input_ids = encode_beginning(messages, tokenizer)
        layers = cached_layers(model, input_ids)
        return cls({"decoder": layers}, base_model=_name_of(model)).requires_grad_(False)

    def layers(self, part: str = "decoder") -> Layers:
        """Of each layer (key [kv_heads, prefix_len, head_dim], value [kv_heads, prefix_len, value_dim]): the parameters
        themselves, or one evaluation of the MLP: call it once per forward pass. A part that is not there: ValueError."""
        if part not in self.parts:
            raise ValueError(f"part: expected one of this prefix, {', '.join(self.parts)}, got {part!r}")
        if part in self.keys:
            return list(zip(self.keys[part], self.values[part], strict=True))
        return self.reparametrization[part]()

    def check_fits(self, model: nn.Module) -> None:
        """Raises ValueError where a part or a head is of another shape than the model's, or one that the model has not."""
        shapes, name = part_shapes(model.config), _name_of(model) or type(model).__name__
        for part in self.parts if self.parts.keys() <= shapes.keys() else shapes:
            expected, shape = shapes[part], self.parts.get(part)
            if shape != expected:
                lacking = f"without {'an' if part == 'encoder' else 'a'} {part} part"
                made_for = f"made for {self.base_model or 'a model'} with {shape}" if shape else lacking
                raise ValueError(f"prefix: expected one for {name} with {expected}, got one {made_for}")
        check_heads_fit(model, self.heads)

    def save(self, directory: str | os.PathLike, *, keep_reparametrization: bool = False) -> None:
        """Writes prefix.safetensors and prefix_config.json to `directory`, which is created where it is missing.

        An MLP is dropped: what is stored are the keys and values it gives. With keep_reparametrization it is written beside
        them, to reparametrization.safetensors, so that training can go on; without, such a file of an earlier save is
        removed. Each file is replaced whole, the json last, and none before all are written.
        """
        with torch.no_grad():
            layers = {part: self.layers(part) for part in self.parts}
        description = {
            "base_model": self.base_model,
            "prefix_len": self.prefix_len,
            "position_offset": self.position_offset,
            "parts": {name: asdict(shape) for name, shape in self.parts.items()},
        }
        write_prefix(directory, layers, self.heads, description, self.reparametrization if keep_reparametrization else None)

    @classmethod
    def load(
        cls,
        directory_or_hub_id: str | os.PathLike,
        *,
        revision: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Prefix:
        """The prefix that `save` wrote to a folder, or that `push_to_hub` uploaded; trainable, with its MLP where one was kept.

        Args:
            revision: branch, tag or commit of a hub repository; None: its main branch.
            device, dtype: where it goes and what it is converted to; None: the CPU, and as stored.

        A missing file is a FileNotFoundError, a damaged or foreign one, or one that contradicts the json, a ValueError:
        each names the file and what was expected in it.
        """
        if dtype is not None:
            check_dtype(dtype)
        parts, heads, description = read_prefix(directory_or_hub_id, revision)
        offset, base_model = description["position_offset"], description["base_model"]
        prefix = cls(parts, heads=heads, position_offset=offset, base_model=base_model)
        return prefix.to(device=device, dtype=dtype)

    @classmethod
    def from_peft(
        cls,
        source: str | os.PathLike | nn.Module,
        *,
        part: str | None = None,
        revision: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Prefix:
        """A prefix that was trained by the package peft, as prefix tuning or as a cartridge; trainable, frozen tokens included,
        with the head that was trained with it (its modules_to_save).

        With attach_prefix(model, prefix, prefix_window="peft") a model then computes what it computes under PEFT. For a
        sequence-to-sequence adapter decoder layer i gets the stored layer that PEFT gives it, 2i modulo the layers.

        Args:
            source: a folder or hub repository that PEFT wrote, or a PeftModel, whose active adapter is copied.
            part: "decoder" or "encoder", whose self-attention it is for. None: that of the PeftModel's model; from files, which
                do not tell an encoder such as BERT from a causal model, "decoder".
            revision: branch, tag or commit of a hub repository; None: its main branch.
            device, dtype: where it goes and what it is converted to; None: as it is, from files on the CPU.

        Raises FileNotFoundError or ValueError naming the file or the argument, NotImplementedError for other kinds of adapters.
        """
        if dtype is not None:
            check_dtype(dtype)
        if part is None:
            encoder = isinstance(source, nn.Module) and list(part_shapes(source.config)) == ["encoder"]
            part = "encoder" if encoder else "decoder"
        if part not in ("decoder", "encoder"):
            raise ValueError(f"part: expected 'decoder' or 'encoder', got {part!r}")
        layers, heads, base_model = read_adapter(source, revision)
        shapes = part_shapes(source.config) if isinstance(source, nn.Module) else {}
        if "cross" in shapes:  # PEFT counts the encoder's layers, and the decoder may have fewer
            layers = layers[: shapes[part].layers]
        return cls({part: layers}, heads=heads, base_model=base_model).to(device=device, dtype=dtype)

    def to_peft(self, directory: str | os.PathLike, *, task_type: str = "CAUSAL_LM") -> None:
        """Writes the prefix as an adapter, in float32, that peft's PeftModel.from_pretrained(model, directory) loads.

        Args:
            task_type: PEFT's name for what the model does: CAUSAL_LM, SEQ_2_SEQ_LM, SEQ_CLS, …; it decides how PEFT applies the
                prefix, which does not know its model. A head goes with it.

        Raises ValueError for an unknown task_type and for CAUSAL_LM with an encoder's prefix or a classifier's head, and
        NotImplementedError, before anything is written, for what PEFT cannot express: more than the self-attention of a
        decoder, or of an encoder that stands alone; positions that do not start at prefix_len; value_dim other than head_dim;
        layers that differ in shape; and, for SEQ_2_SEQ_LM with an even number of layers, layers that differ where PEFT reads
        one stored layer for two.
        """
        part, *others = self.parts
        if others or part == "cross" or (part == "encoder" and task_type == SEQ_2_SEQ):
            raise NotImplementedError(
                "prefix: expected one of a single self-attention, in an encoder-decoder the decoder's, as PEFT has it, got "
                f"{', '.join(self.parts)} for task_type {task_type}"
            )
        if part == "encoder" and task_type == "CAUSAL_LM":
            expected = ", ".join(sorted(set(TASK_TYPES) - {"CAUSAL_LM", SEQ_2_SEQ}))
            raise ValueError(f"task_type: expected one of {expected} for an encoder's prefix, got CAUSAL_LM")
        if self.position_offset != self.prefix_len:
            raise NotImplementedError(
                f"prefix: expected position_offset {self.prefix_len}, the prefix_len, where PEFT's positions start, got "
                f"{self.position_offset}"
            )
        classifies = any(path.endswith(HEAD_NAMES) for path in self.heads)
        if classifies and task_type in ("CAUSAL_LM", SEQ_2_SEQ):
            expected = ", ".join(sorted({"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"}))
            raise ValueError(
                f"task_type: expected one of {expected} for a prefix with {', '.join(self.heads)}, got {task_type}"
            )
        with torch.no_grad():
            write_adapter(directory, self.layers(part), self.heads, self.base_model, task_type)

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
        heads = f"; heads: {', '.join(self.heads)}" if self.heads else ""
        return f"prefix_len={self.prefix_len}, position_offset={self.position_offset}, {parts}{heads}"


def _parameter(tensor: Tensor) -> nn.Parameter:
    """The tensor as a parameter, without a copy but where autograd may not save it, as it was made in inference mode."""
    with torch.inference_mode(False):
        return nn.Parameter((tensor.clone() if tensor.is_inference() else tensor.detach()).contiguous())


def _refuse_assign(prefix: Prefix, state_dict: Mapping, name: str, metadata: Mapping, *others) -> None:
    if metadata.get("assign_to_params_buffers"):
        raise NotImplementedError(
            "assign: expected False, got True; a model that the prefix is attached to holds its parameters and would not see "
            "others"
        )


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """torch's CPU generator starts from `seed` inside, and goes on as if nothing had happened afterwards."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(operator.index(seed))
        yield


def _random_layers(shape: ModelShape, prefix_len: int) -> Layers:
    return [
        tuple(RANDOM_STD * torch.randn(kv_heads, prefix_len, dim, device="cpu") for dim in dims)
        for kv_heads, *dims in map(shape.of, range(shape.layers))
    ]


def _shapes_of(model: nn.Module, parts: Sequence[str] | None) -> dict[str, ModelShape]:
    """The shapes of the model's parts, of those asked for, in the order of PARTS."""
    shapes = part_shapes(model.config)
    if parts is None:
        parts = list(shapes)
    if isinstance(parts, str) or not parts or not set(parts) <= shapes.keys():
        raise ValueError(f"parts: expected one or more of {', '.join(shapes)} for {type(model).__name__}, got {parts!r}")
    return {part: shapes[part] for part in PARTS if part in parts}


def _name_of(model: nn.Module) -> str:
    return getattr(model.config, "name_or_path", None) or ""
