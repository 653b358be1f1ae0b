"""vLLM's OpenAI server with prefixes that a request chooses by its field "model", as it would choose a LoRA adapter.

To the server each prefix is such an adapter: it answers for names, lists them and hands the engine what was chosen. The engine
client here turns that into the prompt of a request with a prefix, and takes the placeholders out of what comes back.
"""

from __future__ import annotations

import signal
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import uvloop
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.entry import build_and_serve
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.launchers.launcher import setup_server
from vllm.entrypoints.openai.models.protocol import LoRAModulePath
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.exceptions import VLLMValidationError
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM

from prefix_tuning.served_prefixes import CONNECTOR, ServedPrefixes, asks_for_prefix, without_placeholders


class PrefixedEngine(AsyncLLM):
    """An engine client whose requests may name a prefix where they name a LoRA adapter."""

    def __init__(self, vllm_config, *args, **kwargs):
        transfer = vllm_config.kv_transfer_config
        if transfer.kv_connector != CONNECTOR:
            raise ValueError(f"kv_connector: expected {CONNECTOR}, got {transfer.kv_connector}; another option has replaced it")
        self.prefixes = ServedPrefixes.from_config(transfer.kv_connector_extra_config)
        longest, room = max(self.prefixes.lengths.values()), vllm_config.model_config.max_model_len
        if longest + 2 > room:
            raise ValueError(f"--max-model-len: expected room for a prefix of {longest} and two tokens behind it, got {room}")
        super().__init__(vllm_config, *args, **kwargs)

    async def add_lora(self, lora_request) -> bool:
        return self._prefix(lora_request) is not None or await super().add_lora(lora_request)

    def generate(self, prompt, sampling_params, request_id, *, lora_request=None, **kwargs) -> AsyncGenerator:
        """As AsyncLLM.generate. What is wrong with a request is raised by the call, before a streamed answer has begun."""
        name = self._prefix(lora_request)
        if name is None:
            if isinstance(prompt, dict) and asks_for_prefix(prompt.get("cache_salt")):
                raise VLLMValidationError(
                    "cache_salt: expected another beginning, got that of a prefix, which is chosen by model"
                )
            return super().generate(prompt, sampling_params, request_id, lora_request=lora_request, **kwargs)
        prompt = self._behind(name, prompt, sampling_params)
        return self._generate(self.prefixes.lengths[name], super().generate(prompt, sampling_params, request_id, **kwargs))

    def _prefix(self, lora_request) -> str | None:
        """The name of the prefix that stands behind an adapter, if one does."""
        named = lora_request is not None and self.prefixes.folders.get(lora_request.lora_name) == lora_request.lora_path
        return lora_request.lora_name if named else None

    @staticmethod
    async def _generate(prefix_len: int, outputs: AsyncGenerator) -> AsyncGenerator:
        async with aclosing(outputs):  # a client that goes away ends the request
            async for output in outputs:
                yield without_placeholders(output, prefix_len)

    def _behind(self, name: str, prompt, sampling_params):
        """The prompt, tokens by now, behind the placeholders of a prefix."""
        if not isinstance(prompt, dict) or prompt.get("type") != "token":
            kind = prompt.get("type") if isinstance(prompt, dict) else type(prompt).__name__
            raise VLLMValidationError(f"prompt: expected text behind the prefix {name}, got one of kind {kind}")
        wanted = sampling_params.prompt_logprobs is not None or sampling_params.prompt_logprob_token_ids is not None
        if wanted and not self.prefixes.prompt_logprobs:
            raise VLLMValidationError(
                f"prompt_logprobs, echo with logprobs: refused behind the prefix {name}: the server was started without "
                "--prompt-logprobs"
            )
        if sampling_params.prompt_logprob_token_ids is not None:
            raise VLLMValidationError(f"prompt_logprob_token_ids: not served behind a prefix ({name})")
        tokens, length = prompt["prompt_token_ids"], self.prefixes.lengths[name]
        if length + len(tokens) >= self.model_config.max_model_len:
            raise VLLMValidationError(
                f"prompt: expected fewer than {self.model_config.max_model_len} tokens in all, --max-model-len, got "
                f"{len(tokens)} behind the {length} positions of the prefix {name}"
            )
        try:
            behind = self.prefixes.prompt(name, tokens, prompt.get("cache_salt"))
        except ValueError as error:
            raise VLLMValidationError(str(error)) from error
        return {key: value for key, value in prompt.items() if key != "prompt_token_offsets"} | behind


def run(prefixes: ServedPrefixes, arguments: Sequence[str]) -> None:
    """Serves until it is interrupted.

    Args:
        arguments: those of `vllm serve`.

    Raises ValueError for arguments that would pass the prefixes by; vLLM's parser itself ends the process for others it does
    not know.
    """
    cli_env_setup()
    args = make_arg_parser(FlexibleArgumentParser(prog="prefix-tuning serve … --")).parse_args(list(arguments))
    for name, wanted in {"kv_transfer_config": None, "api_server_count": 1, "headless": False, "grpc": False}.items():
        if getattr(args, name, None) not in (None, wanted):
            raise ValueError(f"--{name.replace('_', '-')}: expected {wanted} beside prefixes, got {getattr(args, name)}")
    names = args.served_model_name or [args.model]
    taken = {*names, *(module.name for module in args.lora_modules or ())} & prefixes.lengths.keys()
    if taken:
        raise ValueError(f"--prefix: expected a name that no model or adapter has, got {min(taken)}")
    args.kv_transfer_config = KVTransferConfig(**prefixes.kv_transfer_config())
    served = [LoRAModulePath(name=name, path=folder) for name, folder in prefixes.folders.items()]
    args.lora_modules = [*(args.lora_modules or ()), *served]
    validate_parsed_serve_args(args)
    uvloop.run(_serve(args))


async def _serve(args) -> None:
    signal.signal(signal.SIGTERM, _interrupt)  # until the server has its own handler
    address, sock = setup_server(args, reuse_port=False)
    try:
        engine = PrefixedEngine.from_engine_args(
            AsyncEngineArgs.from_cli_args(args), usage_context=UsageContext.OPENAI_API_SERVER
        )
        try:
            await engine.reset_mm_cache()
            closing = await build_and_serve(engine, address, sock, args)
        finally:
            engine.shutdown(timeout=engine.vllm_config.shutdown_timeout)
        await closing
    finally:
        sock.close()


def _interrupt(*_) -> None:
    raise KeyboardInterrupt("terminated")
