"""CUDA graphs counted: recorded on a GPU, or emulated on the CPU. Models under PEFT. The command prefix-tuning in a folder."""

import warnings
from unittest.mock import Mock

import pytest
import torch
from transformers import DynamicCache, GenerationMixin

from prefix_tuning import accelerate_peft, cli, cuda_graphs, graphed_decoding
from prefix_tuning.graphed_training import GraphedSteps
from support import command
from support.emulated_graphs import EmulatedGraph
from support.generation import CACHE
from support.models import FAMILIES, tiny_model
from support.peft_models import PREFIX_LEN, twins


@pytest.fixture
def graphs(monkeypatch):
    """Graphs of the CPU's operators, also of training steps; generate treats the CPU as transformers treats a GPU. Counts what
    is made and replayed."""

    def would_compile(model, model_kwargs, generation_config):
        cache = model_kwargs.get(CACHE)
        dynamic = type(getattr(cache, "self_attention_cache", cache)) is DynamicCache
        return not generation_config.disable_compile and cache is not None and cache.is_compileable and not dynamic

    class Graph(EmulatedGraph):
        pass

    monkeypatch.setattr(torch, "Event", Mock)  # the CPU has none
    monkeypatch.setattr(cuda_graphs, "Graph", Graph)
    monkeypatch.setattr(GraphedSteps, "_on_device", staticmethod(lambda ids: True))
    monkeypatch.setattr(graphed_decoding, "can_record", lambda model: True)
    monkeypatch.setattr(GenerationMixin, "_valid_auto_compile_criteria", would_compile)
    return Graph


@pytest.fixture
def device(request):
    """Real graphs on a GPU, emulated ones without."""
    if request.param == "cpu":
        request.getfixturevalue("graphs")
    return request.param


@pytest.fixture
def counted(monkeypatch):
    """Counts what is recorded and replayed on a GPU; what cannot be recorded is an error."""
    count = {"made": 0, "replays": 0}

    class Counted(cuda_graphs.Graph):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            count["made"] += 1

        def replay(self):
            count["replays"] += 1
            super().replay()

    monkeypatch.setattr(cuda_graphs, "Graph", Counted)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*cannot be recorded")
        yield count


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def pair(family):
    """(PEFT's own model, the accelerated one with the same parameters)."""
    rival, model = twins(tiny_model(family), PREFIX_LEN)
    return rival, accelerate_peft(model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With models, their tokenizers, prefixes, and one data file of each form."""
    folder = tmp_path_factory.mktemp("cli")
    command.fill(folder)
    return folder


@pytest.fixture
def run(folder, capsys, monkeypatch):
    """Runs the command in that folder; (status, stdout, stderr)."""
    monkeypatch.chdir(folder)

    def run(*arguments):
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run
