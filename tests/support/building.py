"""Builds of the project away from the checkout: a copy of its tree, environments that lack something."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("csrc", "prefix_kernels", "python", "tools")
FILES = ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md")
SET_BY_TESTS = ("PREFIX_KERNELS_BUILD", "PREFIX_KERNELS_BACKEND", "CMAKE_ARGS", "PYTHONPATH")
NO_COMPILER = {"CXX": "/nonexistent/c++", "CUDACXX": "/nonexistent/nvcc"}


def cxx_compiler() -> str | None:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next(filter(None, map(shutil.which, names)), None)


def cannot_build() -> str | None:
    """What this machine lacks to compile the kernels."""
    if os.environ.get("PREFIX_KERNELS_BUILD") == "none":
        return "PREFIX_KERNELS_BUILD=none: nothing is to be compiled"
    if cxx_compiler() is None:
        return "no C++ compiler found"
    scripts = sysconfig.get_path("scripts")
    missing = [name for name in ("cmake", "ninja") if not (shutil.which(name, path=scripts) or shutil.which(name))]
    return f"{' and '.join(missing)} not found" if missing else None


def cuda_compiler() -> str | None:
    return shutil.which(os.environ.get("CUDACXX") or "nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


needs_compiler = pytest.mark.skipif(cannot_build() is not None, reason=str(cannot_build()))


def copy_tree(target: Path) -> Path:
    """All that a build needs, nothing that was built."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, target / folder, ignore=ignored)
    for file in FILES:
        shutil.copy(ROOT / file, target / file)
    return target


def run(*command, **environment) -> subprocess.CompletedProcess:
    """stdout and stderr together in stdout; of the variables that tests set, only those of this call."""
    inherited = {name: value for name, value in os.environ.items() if name not in SET_BY_TESTS}
    cwd = environment.pop("cwd", None)
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=inherited | environment, text=True, timeout=600,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def build_in_place(tree: Path, **environment) -> subprocess.CompletedProcess:
    return run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=tree, **environment)


def libraries(package: Path) -> list[str]:
    """What a build left in the package."""
    return sorted(file.name for file in package.glob("_C*"))


class FreshEnvironment:
    """A virtual environment without a compiler in which the packages of this one can be imported, unless `packages` gives
    patterns for those that can; what is installed there, this project at most, comes first."""

    def __init__(self, folder: Path, packages: tuple[str, ...] | None = None):
        self.python, self.folder = folder / "bin" / "python", folder
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        lent = [Path(path) for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        if packages is not None:
            lent, installed = [folder / "lent"], lent
            lent[0].mkdir()
            for source in (file for path in installed for pattern in packages for file in path.glob(pattern)):
                (lent[0] / source.name).symlink_to(source)
        self.site_packages = Path(self.run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
        (self.site_packages / "lent.pth").write_text("".join(f"{path}\n" for path in lent))

    def run(self, *arguments, **environment) -> subprocess.CompletedProcess:
        """python with `arguments`, outside the checkout, with no compiler to be found."""
        return run(self.python, *arguments, cwd=self.folder, PATH=str(self.folder / "bin"), **(NO_COMPILER | environment))

    def install(self, archive: Path, **environment) -> subprocess.CompletedProcess:
        """Nothing but the archive: no index, no dependency."""
        options = ("--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed", "--verbose")
        return run(
            sys.executable, "-m", "pip", "--python", self.python, "install", *options, archive,
            cwd=self.folder, PATH=str(self.folder / "bin"), **(NO_COMPILER | environment),
        )  # fmt: skip
