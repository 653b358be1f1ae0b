"""The distribution as a user gets it: two packages from one place, a version, a command, an honest set-up script."""

import ctypes
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import prefix_kernels
import prefix_tuning
from support.building import NO_COMPILER, ROOT, build_in_place, copy_tree, cuda_compiler, libraries, needs_compiler, run

UNOPTIMIZED = "-DCMAKE_BUILD_TYPE=Debug"  # quicker to compile


def test_both_packages_come_from_one_root():
    kernels = Path(prefix_kernels.__file__).resolve().parent
    tuning = Path(prefix_tuning.__file__).resolve().parent
    this_checkout = (kernels, tuning) == (ROOT / "prefix_kernels", ROOT / "python" / "prefix_tuning")
    one_installation = kernels.parent == tuning.parent
    assert this_checkout or one_installation, f"mixed installation: {kernels} and {tuning}"


@needs_compiler
def test_the_extension_is_loaded_from_where_the_packages_are():
    """A source tree found before an installed wheel would otherwise run without its kernels, and nothing would fail."""
    library = Path(prefix_kernels.__file__).resolve().parent / "_C.so"
    assert library.exists(), "not built: make test, or PREFIX_KERNELS_BUILD=cpu python setup.py build_ext --inplace"
    q = torch.zeros(1, 1, 1, 16)
    prefix_kernels.prefix_attention(q, q, q, q[0], q[0], backend="cpu")
    assert [path for path in torch.ops.loaded_libraries if "prefix_kernels" in path] == [str(library)]
    assert torch.ops.prefix_kernels_cpu.isa(None) in ("baseline", "avx2", "avx512", "amx")


def test_installed_version_is_the_declared_one():
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE).group(1)
    assert importlib.metadata.version("prefix-kernels") == declared


def test_console_script_runs():
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="prefix-tuning")
    assert entry.value == "prefix_tuning.cli:main"
    script = shutil.which("prefix-tuning", path=Path(sys.executable).parent)
    assert script, f"no prefix-tuning beside {sys.executable}"
    shown = subprocess.run([script, "--help"], capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr
    for command in ("train", "evaluate", "generate", "doctor"):
        assert command in shown.stdout


def fake_python(folder: Path, body: str) -> Path:
    python = folder / "fake-python"
    python.write_text(f"#!/bin/sh\n{body}\n")
    python.chmod(0o755)
    return python


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("exit 1", "older than Python 3.10"),
        ('case "$2" in *ensurepip*) exit 1;; esac', "no venv module"),
    ],
)
def test_setup_names_what_is_missing(tmp_path, body, message):
    environment = os.environ | {"PYTHON": str(fake_python(tmp_path, body)), "VENV": str(tmp_path / "venv")}
    script = str(ROOT / "tools" / "setup_env.sh")
    failed = subprocess.run(["bash", script, "demo"], env=environment, capture_output=True, text=True, timeout=60)
    assert failed.returncode != 0
    assert message in failed.stderr


def set_up(tree: Path, **environment) -> subprocess.CompletedProcess:
    """tools/setup_env.sh with an environment that has everything: what it asks pip for is not installed again."""
    python = tree / "venv" / "bin" / "python"
    if not python.exists():
        python.parent.mkdir(parents=True)
        fake_python(python.parent, f'case "$1 $2" in "-m pip") exit 0;; esac; exec "{sys.executable}" "$@"').rename(python)
    return run("bash", tree / "tools" / "setup_env.sh", "test", VENV=str(python.parents[1]), **environment)


@needs_compiler
def test_setup_builds_what_changed(tmp_path):
    tree = copy_tree(tmp_path / "tree")
    compiled = re.compile(r"kernels_baseline\.dir/csrc/cpu/(\w+)\.cpp")
    options = {"CMAKE_ARGS": UNOPTIMIZED, "PREFIX_KERNELS_BUILD": "cpu"}  # also where there are nvcc and a torch with CUDA
    first = set_up(tree, **options)
    assert first.returncode == 0 and libraries(tree / "prefix_kernels") == ["_C.so"], first.stdout
    assert sorted(compiled.findall(first.stdout)) == ["backward", "decode", "forward"]
    for name, again in (("decode", ["decode"]), (None, [])):
        if name:
            (tree / "csrc" / "cpu" / f"{name}.cpp").touch()
        later = set_up(tree, **options)
        assert later.returncode == 0 and "is ready" in later.stdout and compiled.findall(later.stdout) == again, later.stdout


def test_setup_without_a_compiler_warns_and_goes_on(tmp_path):
    tree = copy_tree(tmp_path / "tree")
    warned = set_up(tree, **NO_COMPILER)
    assert warned.returncode == 0 and "is ready" in warned.stdout, warned.stdout
    assert "as pure Python: no C++ compiler found (looked for /nonexistent/c++" in warned.stdout
    failed = set_up(tree, PREFIX_KERNELS_BUILD="cpu", **NO_COMPILER)
    assert failed.returncode != 0 and "PREFIX_KERNELS_BUILD=none does without them" in failed.stdout


def test_unknown_build_is_refused(tmp_path):
    refused = build_in_place(copy_tree(tmp_path / "tree"), PREFIX_KERNELS_BUILD="nonsense")
    assert refused.returncode != 0
    assert "PREFIX_KERNELS_BUILD: expected one of auto, none, cpu, cuda, got 'nonsense'" in refused.stdout


def test_build_of_nothing_says_nothing(tmp_path):
    tree = copy_tree(tmp_path / "tree")
    (tree / "prefix_kernels" / "_C.so").write_text("of an earlier build")
    built = build_in_place(tree, PREFIX_KERNELS_BUILD="none")
    assert (built.returncode, built.stdout) == (0, "")
    assert libraries(tree / "prefix_kernels") == [] and not (tree / "build").exists()


def test_build_drops_modules_that_are_gone(tmp_path):
    tree = copy_tree(tmp_path / "tree")
    gone = tree / "build" / "lib" / "prefix_tuning" / "gone.py"
    gone.parent.mkdir(parents=True)
    gone.write_text("")
    built = run(sys.executable, "setup.py", "-q", "build", cwd=tree, PREFIX_KERNELS_BUILD="none")
    assert built.returncode == 0, built.stdout
    assert (gone.parent / "train.py").exists() and not gone.exists()


@needs_compiler
def test_build_for_cuda_needs_nvcc(tmp_path):
    tree = copy_tree(tmp_path / "tree")
    failed = build_in_place(tree, PREFIX_KERNELS_BUILD="cuda", CUDACXX="/nonexistent/nvcc")
    assert failed.returncode != 0 and "PREFIX_KERNELS_BUILD=cuda: nvcc is missing" in failed.stdout


@needs_compiler
@pytest.mark.skipif(cuda_compiler() is None, reason="needs nvcc, and none is found")
def test_cuda_sources_are_compiled(tmp_path):
    """For the architectures asked for, with a torch that may have no CUDA; by `auto` beside a torch that has it alone, where a
    CUDA source that fails costs no CPU kernels."""
    tree = copy_tree(tmp_path / "tree")
    source = tree / "csrc" / "cuda" / "answer.cu"
    source.write_text(
        "__global__ void fill(int* out) { *out = 42; }\n"
        'extern "C" __attribute__((visibility("default"))) int answer() { return fill == nullptr ? 0 : 42; }\n'
    )
    arguments = f"{UNOPTIMIZED} -DPREFIX_KERNELS_CUDA_ARCHITECTURES=90a"
    built = build_in_place(tree, PREFIX_KERNELS_BUILD="cuda", CMAKE_ARGS=arguments)
    assert built.returncode == 0, built.stdout
    assert libraries(tree / "prefix_kernels") == ["_C.so", "_C_cuda.so"]
    assert ctypes.CDLL(tree / "prefix_kernels" / "_C_cuda.so").answer() == 42
    load = f"import torch; torch.ops.load_library({str(tree / 'prefix_kernels' / '_C_cuda.so')!r})"
    shown = run(sys.executable, "-c", f"{load}; print(torch.ops.prefix_kernels_cuda.decode.default._schema)")
    assert shown.stdout.strip().endswith("int first_key_position) -> (Tensor, Tensor)"), shown.stdout
    (commands,) = (tree / "build").glob("*/compile_commands.json")
    assert set(re.findall(r",code=(\w+)", commands.read_text())) == {"sm_90a", "compute_80"}

    source.write_text("#error this line\n")
    for has_cuda in (False, True):
        built = build_in_place(tree, CMAKE_ARGS=arguments, PYTHONPATH=str(torch_with_or_without_cuda(tmp_path, has_cuda)))
        assert built.returncode == 0, built.stdout
        assert ("WARNING: prefix-kernels is built without its CUDA kernels" in built.stdout) == has_cuda
        assert libraries(tree / "prefix_kernels") == ["_C.so"]


def torch_with_or_without_cuda(tmp_path: Path, has_cuda: bool) -> Path:
    """A folder for sys.path with this torch, as links, with or without the library that makes it one for CUDA."""
    installed, folder = Path(torch.__file__).parent, tmp_path / f"torch-{has_cuda}"
    (folder / "torch" / "lib").mkdir(parents=True)
    for source, target in ((installed, folder / "torch"), (installed / "lib", folder / "torch" / "lib")):
        for file in source.iterdir():
            if file.name not in ("lib", "libtorch_cuda.so"):
                (target / file.name).symlink_to(file)
    for metadata in installed.parent.glob("torch-*.dist-info"):
        (folder / metadata.name).symlink_to(metadata)
    if has_cuda:
        (folder / "torch" / "lib" / "libtorch_cuda.so").touch()
    return folder
