"""What holds for every test: no network, few threads, fixed seeds, GPU tests skipped aloud where there is no GPU."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read by huggingface_hub when it is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import json
import random
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

# `from support.cases import …` works in every test. tests/ itself must stay off sys.path: its folders prefix_kernels/
# and prefix_tuning/ would hide the packages of the same names.
pytest.register_assert_rewrite("support")
support = types.ModuleType("support")
support.__path__ = [str(Path(__file__).parent / "support")]
sys.modules["support"] = support

if os.environ.get("TRITON_INTERPRET") == "1":  # a run that test_triton.py starts: the Triton backend serves CPU tensors
    from support.interpreter import trust_interpreter

    trust_interpreter()

processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))  # pytest-xdist's, which share the processor
torch.set_num_threads(max(1, min(4, torch.get_num_threads() // processes)))


def pytest_addoption(parser):
    parser.addoption("--update-support", action="store_true", help="write tests/prefix_tuning/*_support.json anew")


def pytest_configure(config):
    processes = config.getoption("numprocesses", None)
    if config.getoption("--update-support") and processes:
        raise pytest.UsageError(f"--update-support: one process has to see all tests, expected -n 0, got -n {processes}")


@pytest.fixture(autouse=True)
def fixed_seeds():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def proven(request):
    """Called at the end of a test of an encoder or encoder-decoder: proven(family, what the test has shown, …).

    README's table is made of what is written down in encoder_support.json, and a test fails that shows anything else. With
    --update-support the file is written, which takes both files of such tests run whole.
    """
    file = Path(__file__).parent / "prefix_tuning" / "encoder_support.json"
    update = request.config.getoption("--update-support")
    recorded, found = json.loads(file.read_text()) if file.exists() else {}, {}

    def prove(family: str, *capabilities: str, outcome: str = "yes") -> None:
        found.setdefault(family, {}).update(dict.fromkeys(capabilities, outcome))
        if not update and recorded["transformers"] == transformers.__version__:
            assert recorded["families"][family].items() >= dict.fromkeys(capabilities, outcome).items()

    yield prove
    if update and not request.session.testsfailed:
        families = {family: dict(sorted(found[family].items())) for family in sorted(found)}
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps({"transformers": transformers.__version__, "families": families}, indent=2) + "\n")
        temporary.replace(file)


@pytest.fixture
def uninitialized_memory_is_nan():
    """What a kernel leaves unwritten, or reads before it was written, shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(items):
    if processes > 1:  # what takes minutes first, else one process works on it when the others have nothing left
        items.sort(key=lambda item: not item.name.startswith(("test_in_the_interpreter", "test_on_pretended_gpus")))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch finds none"))
