"""Which backend serves a problem, and why the others do not. The only place that reads PREFIX_KERNELS_BACKEND."""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType

import torch

from prefix_kernels.problem import AttentionProblem

BACKENDS = ("cpu", "cuda", "triton", "sdpa", "reference")  # in order of preference, but see preferred()
WIDE_HEAD = 128  # above it sdpa comes before triton on a GPU, unless triton's kernels are known to be faster; assumed
# Between cuda and triton in decoding, see _cuda_is_faster():
LONG_PREFIX, SHORT_PREFIX = 2048, 64  # columns
SMALL_CALL, LARGE_CALL = 2**26, 2**28  # bytes of memory traffic
MOST_ROWS = 64
# Why a backend comes before those after it.
REASONS = {
    "cpu": "measured with AVX-512 and AMX, else assumed: 1.08 to 9.9 times as fast as sdpa at all points of "
    "benchmarks/results/cpu, so there is no threshold",
    "cuda": "measured on an H200 (benchmarks/results/nvidia-h200): the fastest in decoding with wide heads, of few queries a "
    "row behind prefixes shorter than the row, and where each head has a key head; in small calls as fast as triton, with one "
    "operator for the host to call",
    "triton": "measured on an H200 (benchmarks/results/nvidia-h200): faster than sdpa in training in 16 bit, and than cuda in "
    "decoding of many rows behind longer prefixes",
    "sdpa": "in float32 it was measured to be twice as fast as triton forward on an H200; with heads of more than 128 it is "
    "assumed to be faster, except for 16 bit on sm_90; elsewhere it copies nothing per row",
    "reference": "it is the only one left",
}


@functools.cache
def load_backend(name: str) -> ModuleType:
    """The backend's module."""
    return importlib.import_module(f"prefix_kernels.backends.{name}")


_VARIABLE = os.environ.encodekey("PREFIX_KERNELS_BACKEND")


def variable() -> str | None:
    """PREFIX_KERNELS_BACKEND, None where it is not set or empty. Every call asks; os.environ takes a microsecond to say no."""
    return None if _VARIABLE not in os.environ._data else os.environ["PREFIX_KERNELS_BACKEND"] or None


def requested_backend(backend: str | None) -> str | None:
    """The caller's `backend`, else the environment variable PREFIX_KERNELS_BACKEND, else None; ValueError if unknown."""
    source = "backend"
    if backend is None:
        source, backend = "PREFIX_KERNELS_BACKEND", variable()
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


def choose_backend(problem: AttentionProblem, backend: str | None) -> str:
    """The name of the backend to run. A backend asked for by name runs or raises NotImplementedError; it never falls back."""
    requested = requested_backend(backend)
    if requested is not None:
        reason = load_backend(requested).why_not(problem)
        if reason is not None:
            raise NotImplementedError(f"backend {requested!r} cannot serve this call: {reason}")
        return requested
    return next(name for name in preferred(problem) if load_backend(name).why_not(problem) is None)


def preferred(problem: AttentionProblem) -> tuple[str, ...]:
    """The backends, the one that is fastest for this problem first."""
    first: tuple[str, ...] = ()
    if problem.device == "cuda" and max(problem.head_dim, problem.value_dim) > WIDE_HEAD:
        first = ("cuda", "triton", "sdpa") if load_backend("triton").fast_with_wide_heads(problem) else ("cuda", "sdpa")
    elif problem.device == "cuda" and problem.dtype == torch.float32 and problem.q_len > load_backend("cuda").MAX_QUERIES:
        first = ("sdpa",)  # triton's float32 products have no tensor cores
    elif problem.device == "cuda" and not _cuda_is_faster(problem):
        first = ("triton",)
    return (*first, *(name for name in BACKENDS if name not in first))


def _cuda_is_faster(problem: AttentionProblem) -> bool:
    """Whether decoding with heads of up to 128 is cuda's rather than triton's; a bank's rows it alone groups by prefix."""
    alone = load_backend("cuda").each_row_reads_the_prefix(problem)
    if problem.has_prefix_ids or (alone and (problem.batch == 1 or problem.prefix_len < LONG_PREFIX)):
        return True
    if problem.prefix_len >= LONG_PREFIX:
        return alone and problem.prefix_len <= 2 * problem.kv_len and problem.bytes_moved() < LARGE_CALL
    few_rows = problem.head_dim > 64 and problem.prefix_len <= SHORT_PREFIX and problem.batch <= MOST_ROWS
    ungrouped = problem.heads == problem.kv_heads  # triton multiplies 16 queries where a row's key head has one
    return few_rows or ungrouped or problem.bytes_moved() < SMALL_CALL


def explain(problem: AttentionProblem, backend: str | None) -> dict[str, str]:
    """For every backend: 'chosen', 'not chosen: …', or the reason why it refuses the problem."""
    requested = requested_backend(backend)
    reasons = {name: load_backend(name).why_not(problem) for name in BACKENDS}
    usable = [name for name in preferred(problem) if reasons[name] is None]
    chosen = requested or usable[0]
    explanation = {}
    for name, reason in reasons.items():
        if reason is not None:
            explanation[name] = f"refused: {reason}"
        elif name == chosen:
            explanation[name] = "chosen"
        else:
            why = "was asked for" if requested else f"is preferred ({REASONS[chosen]})"
            explanation[name] = f"not chosen: {chosen} {why}{_code_of(name)}"
    return explanation


def _code_of(name: str) -> str:
    """Of a backend that was compiled for some GPUs, which of its code this one would run."""
    machine_code = getattr(load_backend(name), "machine_code", None)
    return "" if machine_code is None else f"; it would run {machine_code()}"


def workspace_bytes(problem: AttentionProblem, backend: str | None) -> dict[str, int]:
    """{"forward": …, "backward": …} of the backend that would run: extra memory in bytes, at most."""
    forward, backward = load_backend(choose_backend(problem, backend)).workspace_bytes(problem)
    return {"forward": forward, "backward": backward}


def available_backends() -> tuple[str, ...]:
    """The backends that can run on this machine, in order of preference."""
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    probes = [_small_problem(device, dtype) for device in devices for dtype in (torch.float32, torch.bfloat16)]
    return tuple(name for name in BACKENDS if any(load_backend(name).why_not(probe) is None for probe in probes))


def _small_problem(device: str, dtype: torch.dtype) -> AttentionProblem:
    """What every backend of that device serves in one of its dtypes: one query, head_dim 64, no option, no gradient."""
    return AttentionProblem(
        device=device, dtype=dtype, prefix_dtype=dtype, batch=1, heads=1, kv_heads=1, q_len=1, kv_len=1,
        q_tokens=1, k_tokens=1, head_dim=64, value_dim=64, prefixes=1, prefix_len=1, causal=True, window=None, softcap=None,
        first_key_position=None, has_key_mask=False, has_key_lens=False, has_bias=False, has_prefix_ids=False,
        varlen=False, has_parent=False, gradients=False,
    )  # fmt: skip
