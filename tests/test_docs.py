"""What the documents say is so: files they name exist, the tree is real, the examples run, tables are the committed results."""

import importlib.util
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
import transformers

from prefix_tuning import Prefix, attach_prefix, cli
from prefix_tuning.encoder_families import ENCODER_DECODERS, ENCODERS
from prefix_tuning.peft import STATE
from support.encoder_decoders import tiny_encoder_decoder
from support.encoders import tiny_encoder
from support.models import random_prefix, tiny_model
from support.tokenizer import CHAT_TEMPLATE, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted((ROOT / "docs").glob("*.md"))
PYTHON_FOLDERS = ("prefix_kernels", "python/prefix_tuning", "benchmarks")


def real_files(folder):
    """Python files below a folder, without the __init__.py that every package has."""
    return {file for file in (ROOT / folder).rglob("*.py") if file.name != "__init__.py"}


def described_paths():
    """Every path of the tree in docs/architecture.md, by indentation: `a/` opens a folder, two names may share a line."""
    (tree,) = re.findall(r"## Files\n\n((?:    .*\n)+)", (ROOT / "docs" / "architecture.md").read_text())
    folders, paths = {0: ROOT}, []
    for line in tree.splitlines():
        depth = len(line) - len(line.lstrip())
        names = re.match(r"((?:\S+\s{1,2})*\S+)", line.strip()).group(1).split()
        parent = folders[max(level for level in folders if level < depth)]
        for name in names:
            if "." not in name and "/" not in name:
                break
            paths.append(parent / name.rstrip("/"))
            if name.endswith("/"):
                folders = {level: folder for level, folder in folders.items() if level < depth} | {depth: paths[-1]}
    return paths


def sections(document):
    """What a link calls the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_files_exist(document):
    text = document.read_text()
    links = [link.partition("#") for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    missing = [name for name, _, _ in links if not (document.parent / name).exists()]
    missing += [section for name, _, section in links if section and section not in sections(document.parent / name)]
    quoted = re.findall(r"`((?:csrc|prefix_kernels|python|tests|benchmarks|docs|tools)/[\w./-]+)`", text)
    missing += [path for path in quoted if not (ROOT / path).exists()]
    assert not missing


def test_tree_is_the_real_one():
    paths = described_paths()
    assert [str(path) for path in paths if not path.exists()] == []
    undescribed = {file for folder in PYTHON_FOLDERS for file in real_files(folder)} - set(paths)
    assert not undescribed, "not in docs/architecture.md"


def test_readme_quotes_the_committed_results():
    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks" / "report.py")
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    text = (ROOT / "README.md").read_text()
    assert report.render(text) == text, "run python benchmarks/report.py"
    assert report.render(text.replace("| slots left", "| slots found")) == text


def test_distillation_quotes_the_committed_results():
    results = ROOT / "benchmarks" / "results" / "distill"
    metrics = json.loads((results / "metrics.json").read_text())
    rows = [json.loads(line) for line in (results / "conversations.jsonl").read_text().splitlines()]
    text = (ROOT / "docs" / "distill.md").read_text()
    (command,) = re.findall(r"^    prefix-tuning (distill --text-file benchmarks/.*)$", text, re.MULTILINE)
    args = vars(cli._parser().parse_args(shlex.split(command)))
    settings = metrics["settings"]
    assert {name: args[name] for name in settings.keys() & args.keys() - {"backend"}} == {
        name: settings[name] for name in settings.keys() & args.keys() - {"backend"}
    }
    assert settings["init_text"] == (ROOT / args["text_file"]).read_text() and len(rows) == metrics["conversations"]
    assert f"{sum(row['held_out'] for row in rows)} conversations held out" in text
    assert re.findall(r"\| (\d\.\d\d) \|$", text, re.MULTILINE) == [f"{nats:.2f}" for nats in metrics["divergences"].values()]


def test_readme_quotes_the_committed_training_steps():
    results = json.loads((ROOT / "benchmarks" / "results" / "cpu" / "training.json").read_text())
    seconds = {
        row["run"]["batch"]: [f"{row['ways'][way]['median']:.2f}" for way in ("selected", "padded", "peft")]
        for row in results["rows"]
    }
    assert results["environment"]["instructions"] == "AVX2" and not results["environment"]["dirty"]
    text = " ".join((ROOT / "README.md").read_text().split())
    assert "took {} s, of padded rows {} and of PEFT {};".format(*seconds[16]) in text
    assert "one of 4 rows {}, {} and {} (".format(*seconds[4]) in text


def test_every_encoder_and_encoder_decoder_is_in_the_table():
    support = json.loads((ROOT / "tests" / "prefix_tuning" / "encoder_support.json").read_text())
    assert support["families"].keys() == {*ENCODER_DECODERS, *ENCODERS, "deberta-v2"}


def python_examples(document):
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


def test_first_readme_examples_run(tmp_path, monkeypatch, capsys):
    """A run of the trainer and, with what it leaves, a training loop of one's own."""
    source, loop, *_ = python_examples("README.md")
    model = tiny_model("llama", max_position_embeddings=256)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name: model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: tiny_tokenizer())
    monkeypatch.chdir(tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exec(compile(source.replace("max_steps=100", "max_steps=2"), "README.md", "exec"), names := {})
    assert (tmp_path / "runs/mine/prefix/prefix.safetensors").exists()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert "name : Aromi" in capsys.readouterr().out
    for collator in ("PromptCompletionCollator(tokenizer)", "prefix_tuning.padding_free.padding_free_collator(model, True)"):
        trained = names["prefix"].layers()[0][0].detach().clone()
        source = "import prefix_tuning.padding_free\n" + loop.replace("PromptCompletionCollator(tokenizer)", collator)
        exec(compile(source, "README.md", "exec"), names)
        assert not torch.equal(names["prefix"].layers()[0][0], trained)


def test_further_readme_examples_run(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    bank, accelerated, operation = python_examples("README.md")[2:]
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    monkeypatch.chdir(tmp_path)
    random_prefix(model, 3).save("runs/pubs/prefix")
    rows = {"input_ids": torch.randint(3, 128, (3, 5)), "attention_mask": torch.ones(3, 5, dtype=torch.long)}
    names = {"model": model, "tokenizer": tokenizer, "three_rows": rows, "Prefix": Prefix, "attach_prefix": attach_prefix}
    exec(compile(bank, "README.md", "exec"), names)
    assert names["tokens"].shape[0] == 3
    adapted = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    exec(compile(accelerated, "README.md", "exec"), names := {"model": adapted})
    assert names["model"] is adapted and hasattr(adapted, STATE)
    exec(compile(operation, "README.md", "exec"), names := {})
    assert names["out"].shape == names["q"].shape


def test_serving_examples_run(tmp_path, monkeypatch):
    source = "".join(python_examples("docs/serving.md"))
    model = tiny_model("llama", max_position_embeddings=256)
    tokenizer = tiny_tokenizer(bos=True, chat_template=CHAT_TEMPLATE)
    tokenizer.padding_side = "left"
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name: model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name, padding_side: tokenizer)
    monkeypatch.chdir(tmp_path)
    for prefix_len, name in enumerate(("pubs", "food", "wine"), start=3):
        random_prefix(model, prefix_len).save(f"runs/{name}/prefix")
    names = {}
    exec(compile(source, "serving.md", "exec"), names)
    assert names["logits"].shape[0] == 3 and names["tokens"].shape[0] == 1 and names["bank"].capacity == 8


def test_distillation_example_runs(tmp_path, monkeypatch, capsys):
    (source,) = python_examples("docs/distill.md")
    for given, small in (("prefix_len=128", "prefix_len=4"), ("conversations=256", "conversations=8"), ("epochs=3", "steps=1")):
        assert given in source
        source = source.replace(given, small)
    monkeypatch.chdir(tmp_path)
    Path("manual.txt").write_text("The lamp is lit by hand at sunset.")
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    names = {"model": tiny_model("llama", max_position_embeddings=512), "tokenizer": tokenizer}
    exec(compile(source, "distill.md", "exec"), names)
    assert names["tokens"].shape[0] == 1 and "distilled" in capsys.readouterr().out


def test_examples_for_encoders_run(tmp_path, monkeypatch):
    source = "".join(python_examples("docs/encoders.md"))
    models = {
        "Seq2SeqLM": tiny_encoder_decoder("t5", vocab_size=128),
        "SequenceClassification": tiny_encoder("modernbert", vocab_size=128),
    }
    for name, model in models.items():
        auto = getattr(transformers, f"AutoModelFor{name}")
        monkeypatch.setattr(auto, "from_pretrained", lambda *_, model=model, **__: model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: tiny_tokenizer(adds_eos=True))
    monkeypatch.chdir(tmp_path)
    Prefix.for_model(models["Seq2SeqLM"], 3, parts=("encoder", "cross")).save("runs/food/prefix")
    names = {}
    exec(compile(source.replace("max_steps=100", "max_steps=2"), "encoders.md", "exec"), names)
    assert names["tokens"].shape[0] == 3 and names["logits"].shape == (1, 3) and list(names["prefix"].heads) == ["classifier"]
    assert set(Prefix.load("runs/flan/prefix").parts) == {"encoder", "cross"}


def test_commands_of_the_readme_exist():
    targets = re.findall(r"^    make (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert targets[:2] == ["demo", "test"]
    for target in targets:
        shown = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert shown.returncode == 0, shown.stderr


def test_commands_of_the_documents_are_understood():
    commands = [line for path in DOCUMENTS for line in re.findall(r"^    prefix-tuning (.*)$", path.read_text(), re.MULTILINE)]
    parsed = [cli._parser().parse_args(shlex.split(command, comments=True)) for command in commands]
    assert {args.command for args in parsed} == {"train", "distill", "evaluate", "generate", "convert", "serve", "doctor"}
