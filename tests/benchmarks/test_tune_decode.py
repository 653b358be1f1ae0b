"""The variants of the CUDA kernel that are timed on a GPU: each changes one line that is there. Without a GPU."""

import sys

import pytest

pytest.importorskip("triton")  # tune_tiles.py, whose comparison it uses, times Triton's kernels
import tune_decode
from support.building import cannot_build, cuda_compiler, run


@pytest.mark.parametrize("name", tune_decode.VARIANTS)
def test_a_variant_changes_one_line(tmp_path, name):
    tree = tune_decode.varied(tmp_path, tune_decode.VARIANTS[name])
    changed = [
        file.name
        for file in (tree / "cuda").iterdir()
        if file.read_text() != (tune_decode.SOURCES / "cuda" / file.name).read_text()
    ]
    assert len(changed) == (name != tune_decode.OWN)


def test_a_line_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="found it 0 times"):
        tune_decode.varied(tmp_path, ("schedule.h", "no such text", ""))


def test_shapes():
    assert len(tune_decode.shapes()) >= 20 and {case.head_dim for case in tune_decode.shapes()} == {64, 128}


@pytest.mark.skipif(cuda_compiler() is None or cannot_build() is not None, reason="needs nvcc and a C++ compiler")
def test_a_variant_is_compiled(tmp_path):
    operators, library = tune_decode.build(tmp_path / "variant", tune_decode.OWN, "90a")
    load = f"import torch; torch.ops.load_library({str(library)!r})"
    shown = run(sys.executable, "-c", f"{load}; print(torch.ops.{operators}.decode.default)")
    assert shown.stdout.strip() == "prefix_kernels_variant.decode.default", shown.stdout
