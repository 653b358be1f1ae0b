"""Two GPUs for a torch without CUDA: tensors that say they lie there, keep their values on the CPU, and refuse to meet others.

A pytest plugin, for a process of its own into which pretended_gpus.cpp was loaded before torch (see test_pretended_gpus.py). It
shows what the host's code forgets to move, with the numbers of the CPU. prefix_attention runs on the CPU's kernels, whichever
backend was chosen; no kernel for a GPU runs, and graphs are emulated.
"""

from __future__ import annotations

import types
from typing import Any

import torch
import torch._dynamo.device_interface  # asks whether there is CUDA when it is imported
import torch._inductor.utils
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
MOVE = (aten._to_copy.default, aten.copy_.default)
INDEX = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


class GpuTensor(Tensor):
    """A tensor that says it lies on a GPU; `values` has what it holds."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: Tensor, index: int = 0):
        return Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype,
            layout=values.layout, device=torch.device("cuda", index),
        )  # fmt: skip

    def __init__(self, values: Tensor, index: int = 0):
        self.values = values

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"GpuTensor({self.values!r}, {self.device})"

    def __reduce_ex__(self, protocol: int):
        return GpuTensor, (self.values, self.device.index)

    def __deepcopy__(self, memo: dict) -> GpuTensor:
        if id(self) not in memo:
            copy = GpuTensor(self.values.detach().clone(), self.device.index)
            is_parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = (
                torch.nn.Parameter(copy, self.requires_grad) if is_parameter else copy.requires_grad_(self.requires_grad)
            )
        return memo[id(self)]

    def tolist(self) -> Any:
        return self.values.tolist()

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.values.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, operator, types_, args=(), kwargs=None):
        return _run(operator, args, kwargs or {})


def _values(tensor: Tensor) -> Tensor:
    return tensor.values if isinstance(tensor, GpuTensor) else tensor


def _index(device: torch.device | None) -> int:
    return (device and device.index) or 0


def _check_devices(operator, tensors: list[Tensor]) -> None:
    indexed = operator in INDEX and isinstance(tensors[0], GpuTensor)  # by indices on the CPU, too
    devices = [tensor.device for tensor in tensors if isinstance(tensor, GpuTensor) or (tensor.dim() > 0 and not indexed)]
    if operator not in MOVE and len(set(devices)) > 1:
        raise RuntimeError(f"{operator}: expected all tensors to be on the same device, got {', '.join(map(str, devices))}")


def _run(operator, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The operator on the values, its results where the tensors lie or where it is asked to put them."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    _check_devices(operator, tensors)
    if operator is aten._fused_sdp_choice.default:
        return 0  # composed of operators that every device has
    device = kwargs.get("device") or next(tensor.device for tensor in tensors if isinstance(tensor, GpuTensor))
    if device.type == "cuda" and "device" in kwargs:
        kwargs = kwargs | {"device": torch.device("cpu")}
    args_of_values, kwargs_of_values = tree_map_only(GpuTensor, _values, (args, kwargs))
    if operator.namespace == "prefix_kernels":  # the backend that was chosen for a GPU
        args_of_values = tuple(None if isinstance(arg, str) else arg for arg in args_of_values)
    if operator is aten.histc.default:  # which knows integers on a GPU alone
        result = operator(args_of_values[0].float(), *args_of_values[1:]).to(args[0].dtype)
    else:
        result = operator(*args_of_values, **kwargs_of_values)
    if device.type != "cuda":
        return result
    if operator is aten.copy_.default:
        return args[0]
    result = tree_map_only(Tensor, lambda tensor: GpuTensor(tensor.resolve_conj(), _index(device)), result)
    return return_and_correct_aliasing(operator, args, kwargs, result) if operator.namespace == "aten" else result


def _made(name: str):
    """A kernel for CUDA of an operator that makes tensors: the CPU's, its result on that GPU."""
    operator = getattr(aten, name.split(".")[0])
    operator = getattr(operator, name.split(".")[1] if "." in name else "default")

    def make(*args, device=None, pin_memory=None, **options):
        return GpuTensor(operator(*args, device=torch.device("cpu"), **options), _index(device))

    return make


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    _values(target).copy_(_values(source))
    return target


_library = torch.library.Library("aten", "IMPL")
for _name in (
    "empty.memory_format", "empty_strided", "arange", "arange.start", "arange.start_step", "randperm", "randperm.generator",
    "eye", "eye.m", "linspace", "tril_indices", "triu_indices",
):  # fmt: skip
    _library.impl(_name, _made(_name), "CUDA")
_library.impl("copy_", _copy, "CUDA")


def _swap(one: Tensor, other: Tensor) -> None:
    """torch.utils.swap_tensors, of tensors with weak references, too: `.data = …`, by which modules move, needs one class."""
    one.__class__, other.__class__ = other.__class__, one.__class__
    one.__dict__, other.__dict__ = other.__dict__, one.__dict__
    torch._C._swap_tensor_impl(one, other)


class _Nothing:
    """A stream, an event, or a device that is the current one: whatever is done to it does nothing."""

    cuda_stream = 0

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name: str):
        return lambda *args, **kwargs: None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


PROPERTIES = types.SimpleNamespace(name="pretended", major=9, minor=0, multi_processor_count=132, total_memory=2**36)
CUDA = {
    "is_available": True, "is_initialized": True, "device_count": 2, "current_device": 0, "get_device_capability": (9, 0),
    "get_device_name": "pretended", "get_device_properties": PROPERTIES, "current_stream": _Nothing(),
    "default_stream": _Nothing(), "is_current_stream_capturing": False, "mem_get_info": (2**36, 2**36), "memory_allocated": 0,
    "memory_reserved": 0, "max_memory_allocated": 0, "is_bf16_supported": True, "_lazy_init": None, "set_device": None,
    "synchronize": None, "empty_cache": None, "manual_seed": None, "manual_seed_all": None, "reset_peak_memory_stats": None,
    "set_rng_state": None, "set_rng_state_all": None, "_exchange_device": 0, "_maybe_exchange_device": 0,
}  # fmt: skip


def _answer(value: Any):
    return lambda *args, **kwargs: value


for _name, _value in CUDA.items():
    setattr(torch.cuda, _name, _answer(_value))
for _name in ("Stream", "Event", "stream", "device", "device_of"):
    setattr(torch.cuda, _name, _Nothing)
torch.cuda.get_rng_state, torch.cuda.get_rng_state_all = _answer(torch.get_rng_state()), _answer([torch.get_rng_state()])
torch.cuda.default_generators = (torch.default_generator,) * 2
torch._C._cuda_getDevice = _answer(0)
torch.utils.swap_tensors = _swap
torch.Event, torch.Tensor.pin_memory, zeros = _Nothing, lambda tensor, *device: tensor, torch.zeros
torch.zeros = lambda *size, pin_memory=None, **options: zeros(*size, **options)
torch.__future__.set_swap_module_params_on_conversion(True)


def pytest_collection() -> None:
    from prefix_tuning import cuda_graphs
    from support.emulated_graphs import EmulatedGraph

    cuda_graphs.Graph = EmulatedGraph
