"""What a machine without a GPU can test of one: that everything is moved to where it is computed with."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support.building import ROOT, cxx_compiler, needs_compiler

SUPPORT, TORCH = ROOT / "tests" / "support", Path(torch.__file__).parent
# Of the tests for a GPU some of each kind: whole models, in which nothing but prefix_attention is a kernel of ours.
TESTS = (
    "on_pretended_gpus.py",
    "test_moved_models.py::test_a_trainer_takes_the_model_along",
    "test_graphed_training.py::test_steps_equal[llama-reparametrised-cuda]",
    "test_graphed_training.py::test_on_a_gpu_a_prefix_slides_out_of_the_window_of_rows_padded_on_the_left[mistral]",
    "test_graphed_outputs.py::test_steps_equal[llama-projection-cuda]",
    "test_padding_free.py::test_replayed_steps_are_the_steps[cuda-prefix]",
    "test_graphed_texts.py::test_on_a_gpu_texts_are_those_of_plain_steps[peft]",
)


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="loads a library before torch by LD_PRELOAD")
@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="a torch built with CUDA knows by itself whether there are GPUs")
def test_on_pretended_gpus(tmp_path):
    """A failing case shows with its assertion, as the inner run prints it."""
    library = tmp_path / "pretended_gpus.so"
    command = [
        cxx_compiler(), "-std=c++20", "-shared", "-fPIC", "-o", library, SUPPORT / "pretended_gpus.cpp",
        f"-I{TORCH / 'include'}", f"-L{TORCH / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{TORCH / 'lib'}",
    ]  # fmt: skip
    subprocess.run(command, check=True)
    path = os.pathsep.join(filter(None, (str(SUPPORT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    options = ("-p", "pretended_gpus", "-q", "-p", "no:cacheprovider", "--tb=short")
    tests = (f"tests/prefix_tuning/{test}" for test in TESTS)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if run.returncode != 0:
        pytest.fail(f"on pretended GPUs:\n{run.stdout}\n{run.stderr}", pytrace=False)
    counts = dict(reversed(count) for count in re.findall(r"(\d+) (\w+)", run.stdout.splitlines()[-1]))
    assert int(counts["passed"]) > 20 and "skipped" not in counts, run.stdout
