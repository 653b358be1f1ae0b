"""What holds for every test: no network, few threads, fixed seeds, GPU tests skipped aloud where there is no GPU."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read by huggingface_hub when it is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import random
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

# `from support.cases import …` works in every test. tests/ itself must stay off sys.path: its folders prefix_kernels/
# and prefix_tuning/ would hide the packages of the same names.
pytest.register_assert_rewrite("support")
support = types.ModuleType("support")
support.__path__ = [str(Path(__file__).parent / "support")]
sys.modules["support"] = support

if os.environ.get("TRITON_INTERPRET") == "1":  # a run that test_triton.py starts: the Triton backend serves CPU tensors
    from support.interpreter import trust_interpreter

    trust_interpreter()

torch.set_num_threads(min(4, torch.get_num_threads()))


def pytest_addoption(parser):
    parser.addoption("--update-support", action="store_true", help="write tests/prefix_tuning/family_support.json anew")


@pytest.fixture(autouse=True)
def fixed_seeds():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def uninitialized_memory_is_nan():
    """What a kernel leaves unwritten, or reads before it was written, shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch finds none"))
