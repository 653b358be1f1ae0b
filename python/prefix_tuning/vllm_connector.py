"""Trained prefixes in vLLM's paged cache: a KV connector that writes their keys and values where a request has placeholders.

vLLM asks the connector of the scheduler how many tokens of a request it need not compute, and has the connector of each worker
fill their blocks before the forward pass. A request with a prefix is made by ServedPrefixes.prompt. One that names an unknown
prefix, or lacks the placeholders, ends with finish_reason "error" before it is computed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger

from prefix_tuning.engine_checks import check_engine, check_version, layer_numbers
from prefix_tuning.paged_cache import heads_of_rank, slots
from prefix_tuning.prefix import Prefix
from prefix_tuning.served_prefixes import ServedPrefixes, asks_for_prefix, check_servable

logger = init_logger(f"vllm.{__name__}")


@dataclass
class Load:
    """The positions start … stop − 1 of a prefix, to be written into a request's blocks."""

    name: str
    start: int
    stop: int
    block_ids: list[int]


@dataclass
class Step(KVConnectorMetadata):
    """What the workers do in one step.

    Attributes:
        loads: written before the forward pass.
        overwrites: written in each layer over what that pass has just computed for the placeholders.
        refused: ids of requests to end with an error.
    """

    loads: list[Load] = field(default_factory=list)
    overwrites: list[Load] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)


class PrefixConnector(KVConnectorBase_V1):
    """Writes the prefixes of its configuration (ServedPrefixes.kv_transfer_config) into the caches of the requests that ask.

    Raises NotImplementedError or ValueError where the engine starts for another version of vLLM than was tested and for engines
    whose cache cannot hold the prefixes (engine_checks.py).
    """

    def __init__(self, vllm_config, role: KVConnectorRole, kv_cache_config):
        check_version(vllm.__version__)
        super().__init__(vllm_config, role, kv_cache_config)
        self.prefixes = ServedPrefixes.from_config(vllm_config.kv_transfer_config.kv_connector_extra_config)
        check_engine(vllm_config, kv_cache_config, self.prefixes.shape)
        (group,) = kv_cache_config.kv_cache_groups
        self._numbers, self._block_size = layer_numbers(group.layer_names), group.kv_cache_spec.block_size
        # of the scheduler: requests by id, and what the next step does
        self._chosen: dict[str, str] = {}
        self._computed: set[str] = set()  # of these vLLM computes every token of the prompt
        self._refused: set[str] = set()
        self._next = Step()
        # of a worker: each prefix's keys and values [prefix_len, heads, dim] of each layer, vLLM's layers, where they compute,
        # and what this step overwrites in which slots
        self._tensors: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._attention: dict[str, torch.nn.Module] = {}
        self._device = torch.device("cpu")
        self._overwrites: list[tuple[Load, torch.Tensor]] = []

    # In the scheduler

    def bind_kv_cache_manager(self, kv_cache_manager) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        self._block_ids_of = kv_cache_manager.get_block_ids

    def on_new_request(self, request) -> None:
        if not asks_for_prefix(request.cache_salt):
            return
        try:
            self._check_served(request)
            self._chosen[request.request_id] = self.prefixes.chosen(request.prompt_token_ids, request.cache_salt)
        except ValueError as error:
            logger.error("Refused request %s: %s", request.request_id, error)
            self._refused.add(request.request_id)
            request.skip_reading_prefix_cache = False  # else vLLM would not ask about it
            return
        if request.skip_reading_prefix_cache:
            self._computed.add(request.request_id)

    def get_num_new_matched_tokens(self, request, num_computed_tokens: int) -> tuple[int, bool]:
        if request.request_id in self._refused:
            return 1, True  # a token that waits for its load, which fails
        if request.request_id not in self._chosen or request.request_id in self._computed:
            return 0, False
        return max(0, self.prefixes.lengths[self._chosen[request.request_id]] - num_computed_tokens), False

    def update_state_after_alloc(self, request, blocks, num_external_tokens: int) -> None:
        if not num_external_tokens:
            return
        if request.request_id in self._refused:
            self._next.refused.add(request.request_id)
            return
        name = self._chosen[request.request_id]
        stop = self.prefixes.lengths[name]
        self._next.loads.append(Load(name, stop - num_external_tokens, stop, list(blocks.get_block_ids()[0])))

    def build_connector_meta(self, scheduler_output) -> Step:
        step, self._next = self._next, Step()
        cached = scheduler_output.scheduled_cached_reqs
        starts = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        starts |= {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
        for request_id in self._computed & starts.keys():
            name, start = self._chosen[request_id], starts[request_id]
            stop = min(self.prefixes.lengths[name], start + scheduler_output.num_scheduled_tokens[request_id])
            if start < stop:
                step.overwrites.append(Load(name, start, stop, list(self._block_ids_of(request_id)[0])))
        return step

    def request_finished(self, request, block_ids) -> tuple[bool, None]:
        self._chosen.pop(request.request_id, None)
        self._computed.discard(request.request_id)
        self._refused.discard(request.request_id)
        return False, None

    def _check_served(self, request) -> None:
        """ValueError for what a request with a prefix cannot ask for."""
        params = request.sampling_params
        if params is None or request.mm_features or request.resumable:
            raise ValueError("prompt: expected text to go on from, got images, a streamed prompt or a pooling request")
        whole = request.skip_reading_prefix_cache
        if whole and not self.prefixes.prompt_logprobs:
            raise ValueError("prompt_logprobs, skip_reading_prefix_cache: expected ServedPrefixes that allow them, got others")
        if params.prompt_logprobs is not None and not whole:
            raise ValueError("skip_reading_prefix_cache: expected none beside prompt_logprobs, got False")

    # In the workers

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        context, dtype = self._vllm_config.compilation_config.static_forward_context, self._vllm_config.model_config.dtype
        self._attention = {name: context[name] for name in self._numbers}
        for name, layer in self._attention.items():
            if layer.attn_backend.forward_includes_kv_cache_update:
                backend = layer.attn_backend.get_name()
                raise NotImplementedError(f"attention backend: {backend} writes its cache by itself, in layer {name}")
        rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        self._device = kv_caches[next(iter(self._numbers))].device
        for name, folder in self.prefixes.folders.items():
            prefix = Prefix.load(folder)
            check_servable(name, prefix)
            if (prefix.parts["decoder"], prefix.prefix_len) != (self.prefixes.shape, self.prefixes.lengths[name]):
                raise ValueError(f"prefix {name}: {folder} has changed since the engine was started")
            with torch.no_grad():
                self._tensors[name] = [
                    tuple(heads_of_rank(tensor, rank, ranks).to(self._device, dtype) for tensor in pair)
                    for pair in prefix.layers()
                ]

    def bind_connector_metadata(self, connector_metadata: Step) -> None:
        super().bind_connector_metadata(connector_metadata)
        self._overwrites = [(load, self._slots(load)) for load in connector_metadata.overwrites]

    def start_load_kv(self, forward_context, **kwargs) -> None:
        for load in self._get_connector_metadata().loads:
            where = self._slots(load)
            for layer_name in self._attention:
                self._write(load, layer_name, where)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Called in each layer when the step's own keys and values are in the cache and nothing has attended to them."""
        for load, where in self._overwrites:
            self._write(load, layer_name, where)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        refused = self._get_connector_metadata().refused
        return KVConnectorTransferResults(finished_recving=set(refused), failed_recving=set(refused))

    def save_kv_layer(self, layer_name, kv_layer, attn_metadata, **kwargs) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config) -> bool:
        return bool(extra_config["prompt_logprobs"])  # a graph of a whole step would not call wait_for_layer_load

    def _slots(self, load: Load) -> torch.Tensor:
        return slots(load.block_ids, self._block_size, load.start, load.stop).to(self._device)

    def _write(self, load: Load, layer_name: str, where: torch.Tensor) -> None:
        layer = self._attention[layer_name]
        key, value = self._tensors[load.name][self._numbers[layer_name]]
        # the backend's own: it knows how the cache is laid out, packed and quantised
        layer.impl.do_kv_cache_update(layer, key[load.start : load.stop], value[load.start : load.stop], layer.kv_cache, where)
