"""The demo from end to end on a tiny model: what it writes, and that its numbers are those of what it wrote."""

import contextlib
import importlib.util
import io
import json
import random
from pathlib import Path

import pytest
import torch

from prefix_tuning import Prefix
from prefix_tuning.e2e import corpus_bleu, load_e2e
from support.models import tiny_model
from support.tokenizer import tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
KEYS = {
    "losses", "bleu_before", "bleu_after", "slot_error_before", "slot_error_after", "slot_error_references",
    "seconds_per_step", "trainable_parameters", "trainable_share", "backend",
}  # fmt: skip


def load_demo():
    spec = importlib.util.spec_from_file_location("demo", ROOT / "benchmarks" / "demo.py")
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    return demo


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder, model, what the demo printed) after three steps on a tiny model."""
    demo, folder = load_demo(), tmp_path_factory.mktemp("demo")
    model = tiny_model("llama", max_position_embeddings=512)
    demo.load_model_and_tokenizer = lambda device: (model, tiny_tokenizer())
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        arguments = ["--steps", "3", "--evaluate", "4", "--max-new-tokens", "6", "--prefix-len", "5"]
        assert demo.main(["--output", str(folder), *arguments]) == 0
    return folder, model, printed.getvalue()


def test_metrics(run):
    folder, model, _ = run
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics.keys() >= KEYS
    assert len(metrics["losses"]) == 3 and metrics["evaluated"] == 4
    parameters = 2 * 3 * 2 * 5 * 16  # keys and values, layers, kv heads, positions, head_dim
    assert metrics["trainable_parameters"] == parameters
    assert metrics["trainable_share"] == pytest.approx(parameters / (parameters + sum(p.numel() for p in model.parameters())))
    assert metrics["seconds_per_step"] > 0
    assert 0 <= metrics["slot_error_references"] <= metrics["slot_error_references_mean"] <= 1


def test_scores_are_those_of_the_texts_written(run):
    folder, *_ = run
    metrics = json.loads((folder / "metrics.json").read_text())
    rows = [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    for when in ("before", "after"):
        bleu = corpus_bleu([row[when] for row in rows], [row["references"] for row in rows])
        assert metrics[f"bleu_{when}"] == pytest.approx(bleu)
    assert [row["before"] for row in rows] != [row["after"] for row in rows]


def test_texts_are_those_of_60_dev_mrs_drawn_with_seed_0(run):
    folder, *_ = run
    rows = [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]
    dev = load_e2e(ROOT / "benchmarks" / "data" / "e2e" / "dev.jsonl.gz")
    assert [row["mr"] for row in rows] == [row["mr"] for row in random.Random(0).sample(dev, 4)]
    assert load_demo().arguments([]).evaluate == 60


def test_files_and_printed_table(run):
    folder, model, printed = run
    prefix = Prefix.load(folder / "prefix")
    prefix.check_fits(model)
    assert prefix.prefix_len == 5 and prefix.reparametrization is None
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    for words in ("BLEU", "slots left out", "median", "mean over all references", "parameters trained", "backend"):
        assert words in printed
    assert not hasattr(model.model.layers[0].self_attn, "layer_prefix")


def test_model_is_frozen(run):
    _, model, _ = run
    fresh = tiny_model("llama", max_position_embeddings=512)
    for (name, trained), (_, untouched) in zip(model.named_parameters(), fresh.named_parameters(), strict=True):
        assert torch.equal(trained, untouched), name


def test_it_runs_again_over_an_earlier_run(run):
    folder, model, _ = run
    before = (folder / "prefix" / "prefix.safetensors").read_bytes()
    demo = load_demo()
    demo.load_model_and_tokenizer = lambda device: (model, tiny_tokenizer())
    arguments = ["--steps", "3", "--evaluate", "4", "--max-new-tokens", "6", "--prefix-len", "5"]
    assert demo.main(["--output", str(folder), *arguments]) == 0
    assert (folder / "prefix" / "prefix.safetensors").read_bytes() == before


def test_wrong_settings_are_refused_before_anything_runs(tmp_path):
    demo = load_demo()
    demo.load_model_and_tokenizer = lambda **options: pytest.fail("the model was loaded")
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        demo.main(["--output", str(tmp_path / "run"), "--steps", "0"])
    assert not list(tmp_path.iterdir())
