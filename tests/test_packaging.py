"""What `python -m build` makes: a wheel with the compiled kernels that needs no compiler, a source distribution that holds
all a build needs and is installed as pure Python where something is missing."""

import importlib.util
import re
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from support.building import ROOT, FreshEnvironment, build_in_place, copy_tree, libraries, needs_compiler, run

CALL = """
import pathlib, torch, prefix_kernels, prefix_tuning
from prefix_kernels import prefix_attention
q, k, v = (torch.randn(2, heads, 5, 16) for heads in (4, 2, 2))
prefix = [torch.randn(2, 3, 16) for _ in range(2)]
expected = prefix_attention(q, k, v, *prefix, backend="reference")
for backend in BACKENDS:
    torch.testing.assert_close(prefix_attention(q, k, v, *prefix, backend=backend), expected)
print("packages", *(pathlib.Path(package.__file__).parent for package in (prefix_kernels, prefix_tuning)))
print("libraries", *(path for path in torch.ops.loaded_libraries if "prefix_kernels" in path))
"""


def build(*arguments, **environment):
    return run(sys.executable, "-m", "build", "--no-isolation", *arguments, **environment)


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The folder with the source distribution and the wheel that is built from it, from nothing else."""
    folder = tmp_path_factory.mktemp("distributions")
    tree = copy_tree(tmp_path_factory.mktemp("tree"))
    built = build("--outdir", folder, tree)
    assert built.returncode == 0, built.stdout
    return folder


@pytest.fixture(scope="module")
def wheel(distributions):
    return next(distributions.glob("*.whl"))


@pytest.fixture(scope="module")
def sdist(distributions):
    return next(distributions.glob("*.tar.gz"))


def called(environment, backends):
    """The folders that the packages come from and the libraries that are loaded, in that environment."""
    shown = environment.run("-c", f"BACKENDS = {backends}\n{CALL}", OMP_NUM_THREADS="1")
    assert shown.returncode == 0, shown.stdout
    return (re.search(rf"^{name} ?(.*)$", shown.stdout, re.MULTILINE).group(1).split() for name in ("packages", "libraries"))


@needs_compiler
def test_wheel_has_the_library_and_serves_every_python(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    folders = {name.split("/")[0] for name in names}
    assert re.fullmatch(r"prefix_kernels-[\d.]+-py3-none-(?!any)\w+\.whl", wheel.name)
    assert "prefix_kernels/_C.so" in names and "prefix_tuning/train.py" in names
    assert {folder for folder in folders if not folder.endswith(".dist-info")} == {"prefix_kernels", "prefix_tuning"}


@needs_compiler
def test_wheel_runs_where_there_is_no_compiler(wheel, tmp_path):
    environment = FreshEnvironment(tmp_path / "venv")
    installed = environment.install(wheel)
    assert installed.returncode == 0, installed.stdout
    packages, loaded = called(environment, ["cpu", "sdpa"])
    assert packages == [str(environment.site_packages / name) for name in ("prefix_kernels", "prefix_tuning")]
    assert loaded == [str(environment.site_packages / "prefix_kernels" / "_C.so")]


def test_sdist_holds_all_that_a_build_needs(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(file.relative_to(ROOT)) for file in (ROOT / "csrc").rglob("*.*")}
    assert names >= sources | {"CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"}
    assert not [name for name in names if name.endswith(".so") or name.startswith("tests")]


@pytest.mark.parametrize("missing", ["no C++ compiler found", "torch is missing"])
def test_sdist_is_installed_as_pure_python_with_a_warning(sdist, tmp_path, missing):
    lent = ("setuptools*", "_distutils_hack") if missing.startswith("torch") else None
    environment = FreshEnvironment(tmp_path / "venv", packages=lent)
    installed = environment.install(sdist, **({"CXX": sys.executable} if lent else {}))  # any program: it is not called
    assert installed.returncode == 0, installed.stdout
    assert re.search(rf"WARNING: .*without its C\+\+ kernels, as pure Python: .*{re.escape(missing)}", installed.stdout)
    assert "PREFIX_KERNELS_BUILD=cpu pip install --no-deps --no-cache-dir --force-reinstall ." in installed.stdout
    assert libraries(environment.site_packages / "prefix_kernels") == []
    if not lent:
        packages, loaded = called(environment, [None, "sdpa"])
        assert packages[0] == str(environment.site_packages / "prefix_kernels") and not loaded


def test_pure_wheel_says_so(tmp_path):
    tree = copy_tree(tmp_path / "tree")
    built = build("--wheel", "--outdir", tmp_path, tree, PREFIX_KERNELS_BUILD="none")
    assert built.returncode == 0 and "WARNING" not in built.stdout, built.stdout
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(r"prefix_kernels-[\d.]+-py3-none-any\.whl", wheel.name)
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]


@pytest.fixture
def broken_tree(tmp_path):
    tree = copy_tree(tmp_path / "tree")
    with (tree / "csrc" / "cpu" / "problem.h").open("a") as source:
        source.write("#error this line\n")
    return tree


@needs_compiler
def test_build_that_hides_torch_uses_it_nevertheless(broken_tree, tmp_path):
    """As in pip's isolated builds, which would else end as pure Python, with a warning that pip does not show."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys; sys.path[:] = [path for path in sys.path if 'site-packages' not in path]\n"
    )
    for file in Path(importlib.util.find_spec("setuptools").origin).parents[1].iterdir():
        if not file.name.startswith("torch"):
            (tmp_path / file.name).symlink_to(file)
    failed = build_in_place(broken_tree, PREFIX_KERNELS_BUILD="cpu", PYTHONPATH=str(tmp_path))
    assert "#error this line" in failed.stdout, failed.stdout


@needs_compiler
def test_source_that_does_not_compile(broken_tree):
    tree = broken_tree
    (tree / "prefix_kernels" / "_C.so").write_text("of an earlier build")
    failed = build_in_place(tree, PREFIX_KERNELS_BUILD="cpu")
    assert failed.returncode != 0 and "#error this line" in failed.stdout
    assert "PREFIX_KERNELS_BUILD=cpu: `cmake --build …` ended with status 1, its output is above" in failed.stdout
    warned = build_in_place(tree)
    assert warned.returncode == 0 and "WARNING: prefix-kernels is built without its C++ kernels" in warned.stdout
    assert libraries(tree / "prefix_kernels") == []
