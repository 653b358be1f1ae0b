"""Where the two import packages of the one distribution lie, and the build of csrc/; everything else is in pyproject.toml.

PREFIX_KERNELS_BUILD says what is compiled, with CMake and ninja, into prefix_kernels/:
  auto  (default) _C.so, and _C_cuda.so where nvcc is found and torch has CUDA; what fails is left out with a warning
  none  nothing: pure Python
  cpu   _C.so, or an error
  cuda  _C.so and _C_cuda.so, or an error
CMAKE_ARGS adds arguments to CMake's configuration; CXX and CUDACXX name the compilers.
"""

import hashlib
import importlib.machinery
import importlib.metadata
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Command, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
PACKAGES = {"prefix_kernels": "prefix_kernels", "prefix_tuning": "python/prefix_tuning"}
LIBRARIES = ("_C.so", "_C_cuda.so")
MODES = ("auto", "none", "cpu", "cuda")
MODE = os.environ.get("PREFIX_KERNELS_BUILD") or "auto"
if MODE not in MODES:
    raise SystemExit(f"PREFIX_KERNELS_BUILD: expected one of {', '.join(MODES)}, got {MODE!r}")

LEFT_OUT = """
WARNING: prefix-kernels is built without its {what}: {error}.
WARNING: It works, but more slowly. To build them later, with that put right, run in this folder
WARNING:   PREFIX_KERNELS_BUILD={mode} pip install --no-deps --no-cache-dir --force-reinstall .
WARNING: PREFIX_KERNELS_BUILD=none builds nothing and says nothing; cuda and cpu make a failure an error.
"""


class CannotBuildError(Exception):
    """What is missing, or what failed."""


def tool(name: str) -> str:
    """The path of cmake or ninja: that of this Python's environment, which need not be activated, else that on PATH."""
    path = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if path is None:
        raise CannotBuildError(f"{name} is missing (pip install cmake ninja)")
    return path


def cxx_compiler() -> str:
    names = [shlex.split(os.environ["CXX"])[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        raise CannotBuildError(f"no C++ compiler found (looked for {', '.join(names)}; CXX may name one)")
    return path


def cuda_compiler() -> str | None:
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    names = [os.environ["CUDACXX"]] if os.environ.get("CUDACXX") else ["nvcc", f"{home}/bin/nvcc"]
    return next(filter(None, map(shutil.which, names)), None)


def find_torch() -> tuple[Path, str]:
    """Its folder and version, without importing it, which takes seconds. pip's isolated builds hide it, but run in the
    environment that they build for."""
    path = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    spec = importlib.machinery.PathFinder.find_spec("torch", path)
    if spec is None or spec.origin is None:
        raise CannotBuildError(
            "torch is missing where this is built (install torch >= 2.11 first; tools other than pip find it without "
            "isolation alone, as `python -m build --no-isolation`)"
        )
    version = next(iter(importlib.metadata.distributions(name="torch", path=path))).version
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < (2, 11):
        raise CannotBuildError(f"torch {version} is older than 2.11")
    return Path(spec.origin).parent, version


def torch_has_cuda() -> bool:
    """Beside a torch without CUDA nothing would call the CUDA kernels, which take longer to compile than all others."""
    try:
        return (find_torch()[0] / "lib" / "libtorch_cuda.so").exists()
    except CannotBuildError:
        return False


def call(*command: str) -> None:
    if status := subprocess.run(command).returncode:
        raise CannotBuildError(f"`{Path(command[0]).name} {command[1]} …` ended with status {status}, its output is above")


def compile_kernels(base: Path, with_cuda: bool) -> list[Path]:
    """Compiles what changed since the last time and gives the libraries. Every environment has a folder of its own under
    `base`, so that the cache of another one is never read."""
    cxx, nvcc, (torch, version), cmake, ninja = cxx_compiler(), cuda_compiler(), find_torch(), tool("cmake"), tool("ninja")
    arguments = [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DTORCH_DIR={torch}", *shlex.split(os.environ.get("CMAKE_ARGS", ""))]
    flags = [os.environ.get(name) for name in ("CXX", "CXXFLAGS", "LDFLAGS", "CUDAFLAGS", "CUDAHOSTCXX")]
    environment = repr((ROOT, cmake, cxx, nvcc, version, arguments, flags))
    folder = base / f"cmake-{hashlib.sha256(environment.encode()).hexdigest()[:12]}"
    if with_cuda:
        if nvcc is None:
            raise CannotBuildError("nvcc is missing (install the CUDA toolkit; CUDACXX may name its nvcc)")
        arguments.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
    arguments.append(f"-DPREFIX_KERNELS_CUDA={'ON' if with_cuda else 'OFF'}")
    call(cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *arguments)
    call(cmake, "--build", str(folder))
    return [folder / name for name in LIBRARIES[: 1 + with_cuda]]


class BuildExt(Command):
    """Puts what PREFIX_KERNELS_BUILD asks for into the package; a library that was not built now does not stay there."""

    description = "compile csrc/ with CMake"
    user_options = [
        ("build-lib=", None, "folder the package is built in"),
        ("inplace", "i", "put the libraries into the source tree"),
    ]
    boolean_options = ["inplace"]

    def initialize_options(self):
        self.build_lib = None
        self.inplace = self.editable_mode = False

    def finalize_options(self):
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self):
        package = self._package()
        package.mkdir(parents=True, exist_ok=True)
        built = {library.name: library for library in self._build()}
        for name in LIBRARIES:
            if name in built:  # renamed into place: a running process may have the old one mapped
                shutil.copy2(built[name], package / f"{name}.new")
                os.replace(package / f"{name}.new", package / name)
            else:
                (package / name).unlink(missing_ok=True)

    def get_outputs(self):
        return [str(Path(self.build_lib, "prefix_kernels", name)) for name in LIBRARIES if (self._package() / name).exists()]

    def get_output_mapping(self):
        in_place = self.inplace or self.editable_mode
        return {name: str(self._package() / Path(name).name) for name in self.get_outputs()} if in_place else {}

    def _package(self) -> Path:
        if self.inplace or self.editable_mode:
            return Path(self.get_finalized_command("build_py").get_package_dir("prefix_kernels"))
        return Path(self.build_lib, "prefix_kernels")

    def _build(self) -> list[Path]:
        base = Path(self.get_finalized_command("build").build_base).resolve()
        with_cuda = [True, False] if cuda_compiler() and torch_has_cuda() else [False]
        for cuda in {"none": [], "cpu": [False], "cuda": [True], "auto": with_cuda}[MODE]:
            try:
                return compile_kernels(base, cuda)
            except CannotBuildError as error:
                if MODE != "auto":
                    raise SystemExit(f"PREFIX_KERNELS_BUILD={MODE}: {error}") from None
                what, mode = ("CUDA kernels", "cuda") if cuda else ("C++ kernels, as pure Python", "cpu")
                logging.warning(LEFT_OUT.format(what=what, mode=mode, error=error))
        return []


class Build(build):
    """Always runs build_ext, which decides itself."""

    sub_commands = [(name, None if name == "build_ext" else needed) for name, needed in build.sub_commands]

    def run(self):
        for package, source in PACKAGES.items():  # an earlier build's may have modules that are gone since
            built = Path(self.build_lib, package)
            if built.resolve() != ROOT / source:
                shutil.rmtree(built, ignore_errors=True)
        super().run()


class BdistWheel(bdist_wheel):
    """py3-none-any, or py3-none-<platform> with libraries in it: they use no Python API, one wheel serves every version."""

    def get_tag(self):
        self.root_is_pure = not any(Path(self.bdist_dir, "prefix_kernels", name).exists() for name in LIBRARIES)
        return "py3", "none", super().get_tag()[2]


setup(
    package_dir=PACKAGES,
    packages=find_packages(include=["prefix_kernels", "prefix_kernels.*"]) + find_packages("python"),
    package_data={"": ["py.typed"]},
    cmdclass={"build": Build, "build_ext": BuildExt, "bdist_wheel": BdistWheel},
)
