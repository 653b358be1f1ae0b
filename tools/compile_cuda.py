"""Compiles the CUDA C++ kernels without a GPU and judges what came out.

Every kernel, for every architecture that is shipped: nothing spills (no stack, no local memory), products run on tensor cores,
and shared memory fits, also that of a GPU for desktops, whose driver compiles the PTX. What they take is kept in a table.

    python tools/compile_cuda.py FILE             compares with the table, which is of one version of nvcc
    python tools/compile_cuda.py --write FILE     writes it
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc" / "cuda"
KERNEL = r"\w+?(decode|merge|few|share)_kernel\w+?ELi(\d+)E"  # a mangled name
DTYPES = ("bfloat16", "float16")
SHARED = {"80": 163, "90a": 227, "100": 227}  # KiB that a thread block may have
DESKTOP_SHARED = 99  # KiB, of sm_86, sm_89 and sm_120
ON_MULTIPROCESSOR = {"80": 164, "90a": 228, "100": 228}  # KiB for all thread blocks
SYSTEM_SHARED, REGISTERS = 1024, 65536  # bytes that each thread block takes besides; of a multiprocessor
THREADS = 128  # of a thread block

PRINT_SIZES = """
#include <cstdio>
#include "device.h"
#include "tile.h"
int main() { for (size_t bytes : {SIZES}) std::printf("%zu\\n", bytes); }
"""


def nvcc() -> str | None:
    return shutil.which(os.environ.get("CUDACXX") or "nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def disassembler() -> str | None:
    """CUDA's own, or the one that Triton brings."""
    triton = importlib.util.find_spec("triton")
    brought = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm" if triton else None
    return shutil.which("nvdisasm") or shutil.which("/usr/local/cuda/bin/nvdisasm") or shutil.which(str(brought))


def run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def version() -> str:
    return re.search(r"release ([\d.]+)", run(nvcc(), "--version")).group(1)


def shared_bytes(folder: Path, head_dims: list[str]) -> dict[str, int]:
    """Of a thread block for each head_dim."""
    source, sizes = folder / "sizes.cu", [f"sizeof(prefix_kernels::cuda::SharedMemory<{dim}>)" for dim in head_dims]
    source.write_text(PRINT_SIZES.replace("SIZES", ", ".join(sizes)))
    run(nvcc(), "-std=c++17", "-arch=sm_80", f"-I{SOURCES}", "-o", folder / "sizes", source)
    return dict(zip(head_dims, map(int, run(folder / "sizes").split()), strict=True))


def compiled(folder: Path, dtype: str, architecture: str) -> dict[str, dict[str, int]]:
    """For each head_dim, and for its other kernels ("64 merge", "64 few", "64 share"): registers, bytes of stack; of all but
    the merge products on tensor cores in the code."""
    cubin = folder / f"{dtype}-{architecture}.cubin"
    log = run(
        nvcc(), "-std=c++17", f"-gencode=arch=compute_{architecture},code=sm_{architecture}", "-Xptxas=-v", "-cubin",
        "-o", cubin, SOURCES / f"decode_{dtype}.cu",
    )  # fmt: skip
    kernels = {}
    entry = rf"Compiling entry function '{KERNEL}.*?\n(.*?Used \d+ registers)"
    for kernel, head_dim, report in re.findall(entry, log, re.DOTALL):
        stack, stores, loads = map(int, re.search(r"(\d+) bytes stack frame, (\d+) .*?, (\d+) ", report).groups())
        registers = int(re.search(r"Used (\d+) registers", report).group(1))
        kernels[_name(kernel, head_dim)] = {"registers": registers, "stack": stack + stores + loads}
    if tool := disassembler():
        for section in run(tool, "-c", cubin).split(".section\t.text.")[1:]:
            kernel, head_dim = re.match(KERNEL, section).groups()
            if kernel != "merge":
                kernels[_name(kernel, head_dim)]["tensor core products"] = len(re.findall(r"\bHMMA\.16816\.F32", section))
    return kernels


def _name(kernel: str, head_dim: str) -> str:
    return head_dim if kernel == "decode" else f"{head_dim} {kernel}"


def table() -> dict[str, dict[str, int]]:
    kernels = {}
    with tempfile.TemporaryDirectory() as name:
        folder, shared = Path(name), None
        for architecture in SHARED:
            for dtype in DTYPES:
                found = compiled(folder, dtype, architecture)
                shared = shared or shared_bytes(folder, [name for name in found if name.isdecimal()])
                for which, kernel in sorted(found.items(), key=lambda item: (int(item[0].split()[0]), item[0])):
                    if which in shared:
                        kernel["shared bytes"] = shared[which]
                        kernel["blocks on a multiprocessor"] = resident(architecture, kernel)
                    kernels[f"sm_{architecture} {dtype} {which}"] = kernel
    return kernels


def resident(architecture: str, kernel: dict[str, int]) -> int:
    by_registers = REGISTERS // (-(-kernel["registers"] // 8) * 8 * THREADS)
    return min(by_registers, ON_MULTIPROCESSOR[architecture] * 1024 // (kernel["shared bytes"] + SYSTEM_SHARED))


def problems(kernels: dict[str, dict[str, int]]) -> list[str]:
    found = []
    for name, kernel in kernels.items():
        architecture, head_dim = re.match(r"sm_(\w+) \w+ (\d+)", name).groups()
        if kernel["stack"]:
            found.append(f"{name}: {kernel['stack']} bytes of stack and spills")
        if kernel.get("shared bytes", 0) > min(SHARED[architecture], DESKTOP_SHARED) * 1024:
            found.append(f"{name}: {kernel['shared bytes']} bytes of shared memory")
        # A chunk of 16 keys: two products of 8 keys, and two of 8 dimensions, for every 16 dimensions. For few
        # queries: of 4 KiB of keys, one of 16 keys and one of 16 dimensions.
        if kernel.get("tensor core products", 1e9) < (16 if name.endswith(("few", "share")) else int(head_dim) // 16 * 4):
            found.append(f"{name}: {kernel['tensor core products']} products on tensor cores")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("file", type=Path, help="the table to compare with: tests/prefix_kernels/cuda_code.json")
    parser.add_argument("--write", action="store_true", help="write the table instead")
    args = parser.parse_args(argv)
    if nvcc() is None:
        print("nvcc is missing")
        return 1
    kernels, release = table(), version()
    failed = problems(kernels)
    if args.write and not failed:
        rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(kernel)}" for name, kernel in kernels.items())
        new = args.file.with_name(args.file.name + ".new")
        new.write_text(f'{{\n  "nvcc": {json.dumps(release)},\n  "kernels": {{\n{rows}\n  }}\n}}\n')
        os.replace(new, args.file)
    elif not args.write:
        kept = json.loads(args.file.read_text())
        if kept["nvcc"] != release:
            print(f"the table is of nvcc {kept['nvcc']}, this is {release}: registers are not compared")
        for name in sorted(kernels.keys() | kept["kernels"].keys()):
            old, new = kept["kernels"].get(name), kernels.get(name)
            if old is None or new is None or (kept["nvcc"] == release and any(old[key] != new[key] for key in new)):
                failed.append(f"{name}: {old} in the table, now {new}: tools/compile_cuda.py --write")
    print(*failed, f"{len(kernels)} kernels, {len(failed)} problems", sep="\n")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
