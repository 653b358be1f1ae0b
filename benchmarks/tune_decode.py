"""Times variants of the CUDA kernel for decoding on this GPU: python benchmarks/tune_decode.py RESULTS_DIR [--seconds 150]

A variant is the kernel's source with one line changed: how work is cut into items, how many thread blocks a multiprocessor
keeps registers for. All are compiled first, on all processor cores, each with operators of its own name; then one process times
them in turn over the shapes below, each only if its numbers agree with those of the source as it is.
RESULTS_DIR/decode_variants.json gets a row for each shape.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import torch

import measure
from cases import Case, gpu_decode_cases
from prefix_kernels.backends import cuda
from rivals import attention_inputs, make_inputs
from tune_tiles import difference

SOURCES = measure.ROOT / "csrc"
KERNELS = ("decode_bfloat16.cu", "decode_float16.cu", "runtime.cu")
WHICH = {(batch, length) for batch in (8, 64) for length in (128, 1024)}
LIMIT = 2e-2  # ‖difference‖ / ‖result of the source as it is‖ in bfloat16
OWN = "as it is"


def _constant(name: str, old: int | str, new: int | str) -> tuple[str, str, str]:
    return "schedule.h", f"constexpr int64_t {name} = {old};", f"constexpr int64_t {name} = {new};"


def _items(halves: str) -> tuple[str, str, str]:
    return "schedule.h", "ceil_div(blocks, slots)", f"ceil_div(2 * blocks, {halves} * slots)"


VARIANTS: dict[str, tuple[str, str, str] | None] = {  # file in csrc/cuda, its text, what takes its place
    OWN: None,
    "half as many items": _items("1"),
    "twice as many items": _items("4"),
    "64 columns a split": _constant("LEAST_COLUMNS", 128, 64),
    "256 columns a split": _constant("LEAST_COLUMNS", 128, 256),
    "64 shared columns a split": _constant("LEAST_SHARED_COLUMNS", 128, 64),
    "256 shared columns a split": _constant("LEAST_SHARED_COLUMNS", 128, 256),
    "rows of 128 unsplit": _constant("SHORT_ROW", 256, 128),
    "rows of 1024 unsplit": _constant("SHORT_ROW", 256, 1024),
    "half as much read again": _constant("READ_AGAIN", "48 << 20", "24 << 20"),
    "twice as much read again": _constant("READ_AGAIN", "48 << 20", "96 << 20"),
    "every prefix shared": ("schedule.h", "if (!has_few_queries(z)) return", "return"),
    "clusters of up to eight": ("schedule.h", "splits < z.largest_cluster", "splits < FEW_CLUSTER"),
    "merged by the second kernel": ("schedule.h", "s.clustered = s.length == 0", "s.clustered = false"),
    "nine warps": ("tile_sizes.h", "FEW_WARPS = 11;", "FEW_WARPS = 9;"),
    "one tile": ("schedule.h", "ceil_div(units * unit_queries, 2)", "units * unit_queries"),
    "four tiles": ("schedule.h", "ceil_div(units * unit_queries, 2)", "ceil_div(units * unit_queries, 4)"),
    "a thread block more": ("tile_sizes.h", "dim <= 96 ? 3 : 2", "dim <= 96 ? 4 : 3"),
    "three stages": ("tile_sizes.h", "STAGES = 2;", "STAGES = 3;"),
    "16 partial results under way": ("merge.h", "LOADS_AHEAD = 8", "LOADS_AHEAD = 16"),
}  # fmt: skip


def varied(folder: Path, variant: tuple[str, str, str] | None) -> Path:
    """A copy of csrc with the change."""
    tree = folder / "csrc"
    shutil.copytree(SOURCES, tree)
    if variant is not None:
        file, text, other = variant
        source = (tree / "cuda" / file).read_text()
        if source.count(text) != 1:
            raise ValueError(f"{file}: expected {text!r} once, found it {source.count(text)} times")
        (tree / "cuda" / file).write_text(source.replace(text, other))
    return tree


def build(folder: Path, name: str, architecture: str) -> tuple[str, Path]:
    """(the name of its operators, its library)"""
    folder.mkdir()
    tree, operators, torch_folder = varied(folder, VARIANTS[name]), f"prefix_kernels_{folder.name}", Path(torch.__file__).parent
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    binding, library = folder / "binding.o", folder / "library.so"
    subprocess.run(
        ["c++", "-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020b000000000000",
         "-DPREFIX_KERNELS_DEVICE=CUDA", f"-DPREFIX_KERNELS_OPERATORS={operators}", f"-I{tree}", "-isystem",
         torch_folder / "include", "-c", "-o", binding, tree / "bindings_cuda.cpp"],
        check=True, capture_output=True,
    )  # fmt: skip
    kernels = [tree / "cuda" / kernel for kernel in KERNELS]
    subprocess.run(
        [nvcc, "-std=c++17", "-O3", f"-gencode=arch=compute_{architecture},code=sm_{architecture}", "-Xcompiler",
         "-fPIC,-fvisibility=hidden", "-shared", "-o", library, *kernels, binding, torch_folder / "lib" / "libtorch_cpu.so"],
        check=True, capture_output=True,
    )  # fmt: skip
    return operators, library


def shapes() -> list[Case]:
    return [case for case in gpu_decode_cases() if (case.batch, case.kv_len) in WHICH and case.head_dim in (64, 128)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("results", type=Path, help="folder of decode_variants.json")
    parser.add_argument("--seconds", type=float, default=150.0, help="after which no further shape is begun; default 150")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("torch finds no GPU")
    begin = time.monotonic()
    major, minor = torch.cuda.get_device_capability()
    architecture = f"{major}{minor}" + ("a" if major == 9 else "")
    results = measure.Results(args.results / "decode_variants.json", measure.environment("cuda"))
    measure.GPU_SECONDS = 0.02
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        folders = [Path(folder) / f"variant{number}" for number in range(len(VARIANTS))]
        built = dict(zip(VARIANTS, pool.map(build, folders, VARIANTS, [architecture] * len(VARIANTS)), strict=True))
        for _, library in built.values():
            torch.ops.load_library(library)
    print(f"compiled {len(built)} variants: {time.monotonic() - begin:.0f} s")
    for case in shapes():
        if time.monotonic() - begin > args.seconds:
            print("time is over")
            break
        put_times(results, case, built)
    return 0


def put_times(results: measure.Results, case: Case, built: dict[str, tuple[str, Path]]) -> None:
    """The row of one shape."""
    generator = torch.Generator("cuda").manual_seed(0)
    sets = [attention_inputs(make_inputs(case, "cuda", generator))]
    wanted, _ = measure.sets_needed(sum(tensor.nbytes for tensor in sets[0].tensors), "cuda")
    sets += [attention_inputs(make_inputs(case, "cuda", generator)) for _ in range(wanted - 1)]
    seconds: dict[str, float] = {}
    expected = None
    for name, (operators, _) in built.items():
        with mock.patch.object(cuda, "OPERATORS", operators), torch.no_grad():
            cuda._operator.cache_clear()
            got = cuda.forward(sets[0])
            expected = expected or got
            if difference(got, expected) < LIMIT:
                seconds[name] = measure.device_timing(functools.partial(call, sets), len(sets))["median"]
            else:
                print(f"{case.key}: {name} is wrong")
    cuda._operator.cache_clear()
    results.put({"key": case.key, "complete": True, "seconds": seconds})
    best = sorted(seconds, key=seconds.get)[:4]
    print(f"{case.key}: {seconds[OWN] * 1e6:.1f} us; " + ", ".join(f"{name} {seconds[name] * 1e6:.1f}" for name in best))


def call(sets: list, index: int) -> None:
    cuda.forward(sets[index])


if __name__ == "__main__":
    gc.freeze()  # else every graph capture goes through all of torch's objects
    sys.exit(main())
