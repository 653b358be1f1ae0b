"""The CUDA kernels compiled as plain C++ (emulator/emulated_device.h), behind the `cuda` backend for CPU tensors."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from prefix_kernels import repeated
from prefix_kernels.backends import cuda
from support.building import ROOT, cxx_compiler

EMULATOR = Path(__file__).with_name("emulator")
OPERATORS = "prefix_kernels_emulated"
OPTIONS = ("-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE")


class EmulatedGpu:
    """The operators of csrc/bindings_cuda.cpp for the CPU, and builds of the kernels that they can launch."""

    def __init__(self, folder: Path):
        self.folder, torch_folder = folder, Path(torch.__file__).parent
        self._compile(
            "operators", ROOT / "csrc" / "bindings_cuda.cpp", EMULATOR / "emulated_runtime.cpp", f"-I{ROOT / 'csrc'}",
            "-DPREFIX_KERNELS_DEVICE=CPU", f"-DPREFIX_KERNELS_OPERATORS={OPERATORS}",
            "-DTORCH_TARGET_VERSION=0x020b000000000000", "-isystem", torch_folder / "include",
            torch_folder / "lib" / "libtorch_cpu.so",
        )  # fmt: skip
        torch.ops.load_library(folder / "operators.so")
        self.functions = ctypes.CDLL(folder / "operators.so")
        self.kernels = self.build_kernels("kernels", cuda.HEAD_DIMS)

    def build_kernels(self, name: str, head_dims: tuple[int, ...], mutation: tuple[str, str, str] | None = None):
        """mutation: (file in csrc/cuda, text, replacement), to see that a test notices."""
        tree = ROOT / "csrc"
        if mutation is not None:
            file, text, replacement = mutation
            tree = self.folder / name
            shutil.copytree(ROOT / "csrc" / "cuda", tree / "cuda")
            source = (tree / "cuda" / file).read_text()
            assert source.count(text) == 1, f"{file}: {text!r} is there {source.count(text)} times"
            (tree / "cuda" / file).write_text(source.replace(text, replacement))
        dims = " ".join(f"HEAD_DIM({dim})" for dim in head_dims)
        self._compile(name, EMULATOR / "emulated_kernels.cpp", f"-DHEAD_DIMS={dims}", f"-I{tree}", f"-I{EMULATOR}")
        return ctypes.CDLL(self.folder / f"{name}.so").emulated_decode

    def _compile(self, name: str, *arguments: str | Path) -> None:
        command = [cxx_compiler(), *OPTIONS, "-o", self.folder / f"{name}.so", *arguments]
        built = subprocess.run(command, capture_output=True, text=True)
        assert built.returncode == 0, built.stderr

    def set(self, order: int = 0, multiprocessors: int = 132, clusters: bool = True) -> None:
        """order: in which thread blocks and warps run; clusters: whether the GPU has clusters of thread blocks."""
        self.functions.emulator_set(order, multiprocessors, clusters)

    @contextmanager
    def serving(self, kernels=None):
        """Within, the backend `cuda` runs CPU tensors here, by these kernels."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda, "DEVICE", "cpu")
            patch.setattr(repeated, "_kernels", {})
            patch.setattr(cuda, "OPERATORS", OPERATORS)
            patch.setattr(cuda, "_missing", lambda: None)
            patch.setattr(cuda, "machine_code", lambda: "in an emulation")
            cuda._operator.cache_clear()
            self.set()
            self.functions.emulator_use(kernels or self.kernels)
            yield self
        cuda._operator.cache_clear()
