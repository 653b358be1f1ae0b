"""Compiles the Triton kernels ahead of time, without a GPU, and judges what came out: the gate behind `make aot`.

Every row of the tile table, each kernel with the options that cost registers, as the backend itself launches it: its own code
runs on tensors without memory, and every launch becomes a compilation. That the host code runs on such tensors also shows that
it reads no value back from a device. A row passes if

    - nothing spills: no stack and no local memory, with any option (float32, which has no tensor cores to feed: up to 8 words;
      a row that was measured to be the fastest: more, since a time says more than a spill);
    - shared memory fits the chips that the row serves;
    - 16-bit products use wgmma on sm_90 and tcgen05 on sm_100, unless the row's reason opens with "mma.sync";
    - the backward pass waits for the launch before where launches are dependent: from sm_90 on;
    - the kernels for Hopper also have what hopper_code.py looks for.

Triton emits those for products of at least 64 rows in programs of 4 or 8 warps; other tiles fall back to mma.sync.

    python tools/compile_kernels.py --verdicts FILE       every row; FILE records which code and which tiles were proven
    python tools/compile_kernels.py --rows "dq sm_90"     rows whose names contain the words
    python tools/compile_kernels.py --proven FILE         what has changed since FILE was written, and a sample of the rest

PREFIX_KERNELS_AOT_CACHE names a folder that keeps what was compiled; without it everything is compiled anew.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import tokenize
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # under it there is nothing to compile
os.environ["TRITON_CACHE_DIR"] = os.environ.get("PREFIX_KERNELS_AOT_CACHE") or tempfile.mkdtemp(prefix="aot-")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hopper_code
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from prefix_kernels import api
from prefix_kernels.backends.triton import (
    backward_kernels,
    decode_kernel,
    forward_kernel,
    hopper,
    hopper_forward,
    tile_sizes,
)  # fmt: skip
from prefix_kernels.problem import AttentionInputs

SOURCES = Path(tile_sizes.__file__).parent
SHARED = ("rows.py", "online_softmax.py", "launch.py")  # what every kernel is made of
FILES = {
    "forward": ("forward_kernel.py",), "dq": ("dq_kernel.py",), "dkeys": ("dkeys_kernels.py",),
    "dprefix": ("dkeys_kernels.py",), "delta": ("dq_kernel.py", "backward_kernels.py"),
    "decode": ("forward_kernel.py", "decode_kernel.py"), "hopper": ("hopper.py", "hopper_forward.py"),
    "hopper_dq": ("hopper.py", "hopper_dq.py"), "hopper_dkeys": ("hopper.py", "hopper_dkeys.py"),
    "hopper_dprefix": ("hopper.py", "hopper_dkeys.py"),
}  # fmt: skip
FORWARD = {"forward": forward_kernel, "hopper": hopper_forward, "decode": decode_kernel}
WANTED = {
    "dq": (True, False, False, False, False), "dkeys": (False, True, True, False, False),
    "dprefix": (False, True, True, True, True), "delta": (False,) * 5,
}  # fmt: skip
WANTED |= {f"hopper_{kernel}": WANTED[kernel] for kernel in ("dq", "dkeys", "dprefix")}
FUNCTIONS = {"hopper_dprefix": "hopper_dkeys_kernel"}  # the others': the row's name and _kernel
# KiB of a program. The rows of sm_80 serve every chip without rows of its own: 8.6, 8.9 and 12.x have 99.
SHARED_MEMORY = {80: 99, 90: 227, 100: 227}
STACK = {16: 0, 32: 32}  # bytes a thread, for the bits of the dtype
MEASURED_STACK = {64: 160, 128: 160, 256: 1024}  # for the head dimension
MOST_STACK = {"hopper": hopper_code.STACK} | dict.fromkeys(hopper_code.BACKWARD, hopper_code.BACKWARD_STACK)
TENSOR_CORES = {80: r"mma\.sync", 90: r"wgmma\.mma_async", 100: r"tcgen05\.mma"}
MOST_CHANGED, SAMPLE = 4, 3  # with --proven
BATCH, HEADS, KV_HEADS, LENGTH, PREFIX_LEN, PREFIXES = 8, 8, 2, 512, 128, 3


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def index(length: int) -> Tensor:
    return empty(length, dtype=torch.int32)


def mask() -> Tensor:
    return empty(BATCH, LENGTH, dtype=torch.bool)


def bias(q_len: int) -> Tensor:
    return empty(BATCH, HEADS, q_len, PREFIX_LEN + LENGTH, dtype=torch.float32)


def prefix(dim: int, dtype: torch.dtype, bank: bool) -> tuple[Tensor, Tensor]:
    shape = (PREFIXES, KV_HEADS, PREFIX_LEN, dim) if bank else (KV_HEADS, PREFIX_LEN, dim)
    return empty(*shape, dtype=dtype), empty(*shape, dtype=dtype)


def dense(dim: int, dtype: torch.dtype, bank: bool = False, q_len: int = LENGTH, **options) -> AttentionInputs:
    q = empty(BATCH, q_len, HEADS, dim, dtype=dtype).transpose(1, 2)
    k, v = (empty(BATCH, LENGTH, KV_HEADS, dim, dtype=dtype).transpose(1, 2) for _ in range(2))
    return api._dense_inputs(q, k, v, *prefix(dim, dtype, bank), **options)


def windowed(dim: int, dtype: torch.dtype, **more) -> AttentionInputs:
    ids = {"prefix_ids": index(BATCH), "prefix_lens": index(PREFIXES), "key_lens": index(BATCH)}
    return dense(dim, dtype, bank=True, window=64, first_key_position=0, softcap=30.0, **ids, **more)


def masked(dim: int, dtype: torch.dtype, **more) -> AttentionInputs:
    return windowed(dim, dtype, key_mask=mask(), **more)


def packed(dim: int, dtype: torch.dtype, **options) -> AttentionInputs:
    q, k, v = (empty(BATCH * LENGTH, heads, dim, dtype=dtype) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return api._varlen_inputs(
        q, k, v, *prefix(dim, dtype, True), cu_seqlens_q=index(BATCH + 1), cu_seqlens_k=index(BATCH + 1),
        max_seqlen_q=LENGTH, max_seqlen_k=LENGTH, prefix_ids=index(BATCH), **options,
    )  # fmt: skip


VARIANTS = {
    "plain": dense,
    "padded head": lambda dim, dtype: dense(dim * 3 // 4, dtype),
    "windowed": windowed,
    "masked": masked,
    "biased": lambda dim, dtype: dense(dim, dtype, causal=False, key_mask=mask(), bias=bias(LENGTH)),
    "biased, masked": lambda dim, dtype: masked(dim, dtype, bias=bias(LENGTH)),
    "packed": lambda dim, dtype: packed(dim, dtype, parent=index(BATCH), softcap=30.0, prefix_lens=index(PREFIXES)),
}
HOPPER_VARIANTS = {
    "plain": dense,
    "float16": lambda dim, dtype: dense(dim, torch.float16),
    "bank, not causal": lambda dim, dtype: dense(dim, dtype, bank=True, causal=False, prefix_ids=index(BATCH).long()),
    "packed": packed,
}
# BATCH · q_len · HEADS / KV_HEADS queries of a shared prefix fill a block of 64; without one, a row's own block of 16 or 32.
DECODE_VARIANTS = {
    "plain": lambda dim, dtype: dense(dim, dtype, q_len=2),
    "padded head": lambda dim, dtype: dense(dim * 3 // 4, dtype, q_len=2),
    "windowed": lambda dim, dtype: dense(
        dim, dtype, q_len=8, window=64, first_key_position=0, softcap=30.0, key_lens=index(BATCH)
    ),
    "masked": lambda dim, dtype: dense(dim, dtype, q_len=8, key_mask=mask()),
    "bank": lambda dim, dtype: windowed(dim, dtype, q_len=8),
    "biased": lambda dim, dtype: dense(dim, dtype, q_len=8, key_mask=mask(), bias=bias(8)),
}
VARIANTS_OF = {"decode": DECODE_VARIANTS} | dict.fromkeys(("hopper", *hopper_code.BACKWARD), HOPPER_VARIANTS)  # else VARIANTS


class NoDevice:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, architecture: int):
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_kernel(kernel: str, architecture: int, inputs: AttentionInputs) -> list:
    """What the backend launches of a kernel for a call on a GPU of this architecture, compiled."""
    compiled, run = [], JITFunction.run

    def compile_instead(function, *arguments, grid, warmup, **options):
        if function.__name__ == FUNCTIONS.get(kernel, f"{kernel}_kernel"):
            compiled.append(run(function, *arguments, grid=grid, warmup=True, **options))

    driver.set_active(NoDevice(architecture))
    of_device, tile_sizes.architecture_of = tile_sizes.architecture_of, lambda device: architecture
    regimes, why_not = tile_sizes.HOPPER_BACKWARD_REGIMES, hopper.why_not
    chosen = (tile_sizes.Regime(inputs.q.shape[-1], 1, 1),) if kernel in hopper_code.BACKWARD else ()
    tile_sizes.HOPPER_BACKWARD_REGIMES, hopper.why_not = {kernel.removeprefix("hopper_"): chosen}, hopper.why_not_on_hopper
    JITFunction.run = compile_instead
    try:
        if kernel in FORWARD:
            FORWARD[kernel].forward(inputs)
        else:
            out = empty(*inputs.q.shape, dtype=inputs.q.dtype)
            lse = empty(*((HEADS, BATCH * LENGTH) if inputs.varlen else inputs.q.shape[:3]), dtype=torch.float32)
            backward_kernels.backward(inputs, out, lse, out, lse, WANTED[kernel])
    finally:
        JITFunction.run, tile_sizes.architecture_of = run, of_device
        tile_sizes.HOPPER_BACKWARD_REGIMES, hopper.why_not = regimes, why_not
    return compiled


def measure(compiled, architecture: int) -> dict[str, int]:
    """Registers a thread, bytes of stack and local memory a thread, bytes of shared memory, products on tensor cores."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = (str(tools / "cuobjdump"), "--dump-resource-usage", file.name)
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {name: int(re.search(rf"\b{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK", "LOCAL")}
    return {
        "registers": numbers["REG"],
        "stack": numbers["STACK"] + numbers["LOCAL"],
        "shared": compiled.metadata.shared,
        "tensor_core_products": len(re.findall(TENSOR_CORES[architecture], compiled.asm["ptx"])),
    }


def name_of(key: tuple[str, int, int, int]) -> str:
    kernel, architecture, bits, dim = key
    return f"{kernel} sm_{architecture} {bits}-bit D{dim}"


def variants_of(key: tuple[str, int, int, int]) -> tuple[str, ...]:
    return ("plain", "packed") if key[0] == "delta" else tuple(VARIANTS_OF.get(key[0], VARIANTS))


def judge(key: tuple[str, int, int, int], variants: tuple[str, ...]) -> tuple[tuple[str, int, int, int], dict]:
    """The verdict on one row: what was measured with each variant, and what is wrong with it."""
    warnings.filterwarnings("ignore", category=UserWarning)
    kernel, architecture, bits, dim = key
    wrong, measured = [], {}
    for variant in variants:
        inputs = VARIANTS_OF.get(kernel, VARIANTS)[variant](dim, torch.bfloat16 if bits == 16 else torch.float32)
        for number, compiled in enumerate(compile_kernel(kernel, architecture, inputs)):
            name = f"{variant}, launch {number}" if number else variant
            numbers = measured[name] = measure(compiled, architecture)
            wrong += [f"{name}: {what}" for what in wrong_with(compiled, numbers, key, variant)]
    return key, {"fingerprint": fingerprint(key), "triton": triton.__version__, "measured": measured, "wrong": wrong}


def wrong_with(compiled, numbers: dict[str, int], key: tuple[str, int, int, int], variant: str) -> list[str]:
    """What is wrong with a compiled kernel of a row."""
    (kernel, architecture, bits, dim), tile, wrong = key, tile_sizes.TABLE[key], []
    if "biased" in variant:
        tile = tile_sizes.BIASED.get(key, tile)
    allowed = MOST_STACK.get(kernel, STACK[bits])
    if "measured" in tile.reason:
        allowed = MEASURED_STACK[dim]
    if numbers["stack"] > allowed:
        wrong.append(f"{numbers['stack']} bytes of stack")
    if numbers["shared"] > SHARED_MEMORY[architecture] * 1024:
        wrong.append(f"{numbers['shared'] / 1024:.0f} KiB of shared memory")
    fallback = tile.reason.startswith("mma.sync") or bits == 32 or kernel == "delta" or variant == "bank"
    if not fallback and not numbers["tensor_core_products"]:
        wrong.append(f"no {TENSOR_CORES[architecture]}")
    waits = len(re.findall(r"griddepcontrol\.wait", compiled.asm["ptx"]))
    if kernel in WANTED and (waits > 0) != (architecture >= 90):
        wrong.append(f"{waits} waits for the launch before")
    if kernel == "hopper":
        wrong += hopper_code.missing_in(compiled, tile)
    elif kernel in hopper_code.BACKWARD:
        wrong += hopper_code.missing_in_backward(compiled, kernel, tile, dim)
    return wrong


def fingerprint(key: tuple[str, int, int, int]) -> str:
    """Changes with the row's numbers and with the code of its kernel, not with comments, docstrings or line breaks."""
    words = [repr(key)]
    for tile in (tile_sizes.TABLE[key], tile_sizes.BIASED.get(key)):
        words.append(repr(tile and (tile.BLOCK_M, tile.BLOCK_N, tile.num_warps, tile.num_stages)))
    for file in (*SHARED, *FILES[key[0]]):
        for token in tokenize.generate_tokens(io.StringIO((SOURCES / file).read_text()).readline):
            docstring = token.string.startswith('"""')
            if token.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING) and not docstring:
                words.append(token.string)
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:16]


def table(verdicts: dict[tuple, dict]) -> str:
    lines = [f"{'row':32}{'tile':>16}  {'registers':>9}  {'stack':>5}  {'shared KiB':>10}  verdict"]
    for key, verdict in verdicts.items():
        tile, numbers = tile_sizes.TABLE[key], verdict["measured"].values()
        fewest, most = (of(n["registers"] for n in numbers) for of in (min, max))
        shape = f"{tile.BLOCK_M}x{tile.BLOCK_N} w{tile.num_warps} s{tile.num_stages}"
        lines.append(
            f"{name_of(key):32}{shape:>16}  {fewest:>4}-{most:<4}  {max(n['stack'] for n in numbers):>5}"
            f"  {max(n['shared'] for n in numbers) / 1024:>10.1f}  {'; '.join(verdict['wrong']) or 'ok'}"
        )
    return "\n".join(lines)


def write(path: Path, data: dict) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(data, indent=1) + "\n")
    temporary.replace(path)


def to_compile(proven: Path) -> dict[tuple, tuple[str, ...]]:
    """Rows that are not as they were proven, with all variants, and a few others with one: another sample for other code."""
    known = json.loads(proven.read_text())
    changed = [key for key in tile_sizes.TABLE if known.get(name_of(key)) != fingerprint(key)]
    if len(changed) > MOST_CHANGED:
        sys.exit(f"{len(changed)} rows, such as {name_of(changed[0])}, are not as they were proven: run make aot (minutes)")
    if set(known) != {name_of(key) for key in tile_sizes.TABLE}:
        sys.exit(f"{proven} has rows that the table does not have: run make aot (minutes)")
    others = [key for key in tile_sizes.TABLE if key not in changed]
    seeded = random.Random(" ".join(known.values()))
    sample = {key: (seeded.choice(variants_of(key)),) for key in seeded.sample(others, SAMPLE)}
    return {key: variants_of(key) for key in changed} | sample


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", action="append", default=[], help="only rows whose name contains these words; repeatable")
    parser.add_argument("--proven", type=Path, help="a file that --verdicts wrote: only rows that changed since, and a sample")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    parser.add_argument("--output", type=Path, help="a JSON file for all that was measured")
    parser.add_argument("--verdicts", type=Path, help="a JSON file for what was proven, written if every row passes")
    arguments = parser.parse_args()
    if arguments.verdicts and (arguments.rows or arguments.proven):
        parser.error("--verdicts: records a run over all rows only")
    jobs = {key: variants_of(key) for key in tile_sizes.TABLE} if arguments.proven is None else to_compile(arguments.proven)
    jobs = {key: v for key, v in jobs.items() if not arguments.rows or any(words in name_of(key) for words in arguments.rows)}
    if not jobs:
        parser.error(f"--rows: no row is named {', '.join(arguments.rows)}")
    verdicts = dict.fromkeys(jobs)
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        for done, future in enumerate(as_completed([pool.submit(judge, key, v) for key, v in jobs.items()]), 1):
            key, verdicts[key] = future.result()
            outcome = "; ".join(verdicts[key]["wrong"]) or "ok"
            print(f"{done}/{len(jobs)} {name_of(key)}: {outcome}", file=sys.stderr, flush=True)
    print(table(verdicts))
    if arguments.output:
        write(arguments.output, {name_of(key): verdict for key, verdict in verdicts.items()})
    failed = [key for key, verdict in verdicts.items() if verdict["wrong"]]
    if arguments.verdicts and not failed:
        write(arguments.verdicts, {name_of(key): verdict["fingerprint"] for key, verdict in verdicts.items()})
    print(f"{len(jobs) - len(failed)} of {len(jobs)} rows pass with Triton {triton.__version__}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
