"""The command prefix-tuning, in process, on a tiny model saved to a folder: what it writes, prints and refuses."""

import io
import json
import re

import pytest
import torch

from prefix_kernels import available_backends
from prefix_tuning import Prefix, attach_prefix, cli
from prefix_tuning.e2e import load_e2e
from support.models import random_prefix, tiny_model
from support.tokenizer import CHAT_TEMPLATE, tiny_tokenizer

ROWS = [{"prompt": f"name : {name}\n", "completion": f"{name} is a pub."} for name in ("Aromi", "Browns", "Cotto", "Strada")]
TALKS = [
    {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
    for row in ROWS
]
E2E = [
    {"mr": "name[Aromi], eatType[pub]", "refs": ["Aromi is a pub.", "There is a pub, Aromi."]},
    {"mr": "name[Cotto], food[Thai]", "refs": ["Cotto serves Thai food."]},
]
FILES = {"rows": ROWS, "talks": TALKS, "e2e": E2E}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model, its tokenizer, a prefix, and one data file of each form."""
    folder = tmp_path_factory.mktemp("cli")
    model = tiny_model("llama")
    model.save_pretrained(folder / "model")
    tiny_tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(folder / "model")
    random_prefix(model).save(folder / "prefix")
    random_prefix(tiny_model("llama", num_hidden_layers=2)).save(folder / "other")
    for name, rows in FILES.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
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


def train(run, output, *more, file="rows.jsonl"):
    return run(
        "train", "--model", "model", "--train-file", file, "--output", output, "--prefix-len", 4, "--hidden-size", 8,
        "--batch-size", 2, *more,
    )  # fmt: skip


@pytest.mark.parametrize("form", FILES)
def test_train_evaluate_generate(run, folder, form, tmp_path):
    status, out, err = train(run, tmp_path / "run", "--steps", 3, file=f"{form}.jsonl")
    assert status == 0, err
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert len(metrics["losses"]) == metrics["steps"] == 3 and metrics["model"] == "model"
    assert metrics["settings"]["reparametrization"] == "mlp" and metrics["prefix_parameters"] == 2 * 3 * 2 * 4 * 16
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert Prefix.load(tmp_path / "run" / "prefix").reparametrization is None
    assert "training" in err and "loss=" in err and "written:" in out

    common = ("--model", "model", "--prefix", tmp_path / "run" / "prefix", "--max-new-tokens", 5)
    status, out, err = run("evaluate", *common, "--file", f"{form}.jsonl", "--output", tmp_path / "scores.json")
    assert status == 0, err
    scores = json.loads((tmp_path / "scores.json").read_text())
    expected = {"bleu", "slot_error", "slot_error_references"} if form == "e2e" else {"loss", "perplexity", "bleu"}
    assert scores.keys() >= expected and len(scores["texts"]) == len(FILES[form]) == scores["rows"]
    for name in expected:
        assert name.replace("_", " ") in out

    status, out, err = run("generate", *common, "--file", f"{form}.jsonl")
    assert status == 0 and out.strip(), err


def test_generate_prints_the_text_of_the_attached_model(run, folder):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    ids = tokenizer("name : Aromi", return_tensors="pt")
    texts = []
    for prefix in (None, Prefix.load(folder / "prefix")):
        attachment = prefix and attach_prefix(model, prefix)
        tokens = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
        texts.append(tokenizer.decode(tokens, skip_special_tokens=True))
        if attachment:
            attachment.detach()
    assert texts[0] != texts[1]
    arguments = ("generate", "--model", "model", "--prompt", "name : Aromi", "--max-new-tokens", 6)
    assert run(*arguments)[1] == texts[0] + "\n"
    assert run(*arguments, "--prefix", "prefix")[1] == texts[1] + "\n"


def test_prompts_from_stdin_files_and_messages(run, folder, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "generate_texts", lambda model, tokenizer, prompts, **options: seen.append(prompts) or ["text"])
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\n")
    messages = [{"role": "user", "content": "hello"}]
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\n"))
    for arguments in (
        (), ("--file", tmp_path / "prompts.txt"), ("--messages", json.dumps(messages)), ("--file", "talks.jsonl"),
        ("--file", "e2e.jsonl"), ("--prompt", "p", "--prompt", "q"),
    ):  # fmt: skip
        assert run("generate", "--model", "model", *arguments)[0] == 0
    asked = [row["messages"][:-1] for row in TALKS]
    tables = ["name : Aromi | Type : pub\n", "name : Cotto | food : Thai\n"]
    assert seen == [["a", "b"], ["one", "two"], [messages], asked, tables, ["p", "q"]]


def test_options_arrive(run, monkeypatch, tmp_path):
    seen = {}

    def spy(model, tokenizer, rows, output, settings, **options):
        seen.update(vars(settings) | options | {"rows": rows, "dtype": model.dtype})
        return None, {"losses": [1.0], "eval_losses": [[1, 2.0]], "steps": 1, "trainable_parameters": 1,
                      "seconds_per_step": 1.0, "backend": "sdpa"}  # fmt: skip

    monkeypatch.setattr(cli, "train_prefix", spy)
    status, _, err = train(
        run, tmp_path, "--steps", 7, "--lr", 0.5, "--seed", 3, "--backend", "reference", "--save-steps", 2, "--patience", 4,
        "--resume", "--quiet", "--init-text", "words", "--reparametrization", "mlp", "--gradient-checkpointing",
        "--gradient-accumulation", 5, "--warmup", 0.25, "--weight-decay", 0.125, "--max-grad-norm", 2, "--max-length", 64,
        "--eval-file", "e2e.jsonl", "--eval-limit", 1, "--dtype", "bfloat16", "--report-to", "tensorboard",
    )  # fmt: skip
    assert status == 0, err
    expected = {
        "steps": 7, "epochs": None, "learning_rate": 0.5, "seed": 3, "backend": "reference", "save_steps": 2, "patience": 4,
        "resume": True, "progress": False, "init_text": "words", "reparametrization": "mlp", "gradient_checkpointing": True,
        "gradient_accumulation": 5, "warmup": 0.25, "weight_decay": 0.125, "max_grad_norm": 2.0, "max_length": 64,
        "batch_size": 2, "prefix_len": 4, "hidden_size": 8, "dtype": torch.bfloat16, "report_to": "tensorboard", "rows": ROWS,
    }  # fmt: skip
    assert {name: seen[name] for name in expected} == expected
    assert len(seen["eval_rows"]) == 1


def test_decoding_options_arrive(run, monkeypatch):
    seen = {}
    monkeypatch.setattr(cli, "generate_texts", lambda model, tokenizer, prompts, **options: seen.update(options) or [""])
    run(
        "generate", "--model", "model", "--prompt", "p", "--num-beams", 3, "--sample", "--temperature", 0.5, "--top-p", 0.75,
        "--seed", 9, "--batch-size", 2, "--max-new-tokens", 4,
    )  # fmt: skip
    assert seen == {
        "max_new_tokens": 4, "batch_size": 2, "num_beams": 3, "sample": True, "temperature": 0.5, "top_p": 0.75, "seed": 9,
    }  # fmt: skip


def test_limit_draws_by_seed(run, folder, tmp_path):
    many = [{"mr": f"name[Cafe {i}]", "refs": [f"Cafe {i}."]} for i in range(9)]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in many))
    drawn = []
    for seed in (0, 0, 1):
        arguments = ("--limit", 3, "--seed", seed, "--max-new-tokens", 1, "--output", tmp_path / "scores.json")
        assert run("evaluate", "--model", "model", "--file", tmp_path / "many.jsonl", *arguments)[0] == 0
        drawn.append(json.loads((tmp_path / "scores.json").read_text()))
    assert drawn[0] == drawn[1] and drawn[0]["rows"] == 3
    rows = load_e2e(tmp_path / "many.jsonl")
    assert cli._limited(rows, 3, 0) != cli._limited(rows, 3, 1)


def test_resume_goes_on(run, tmp_path):
    assert train(run, tmp_path, "--steps", 4, "--save-steps", 2)[0] == 0
    whole = Prefix.load(tmp_path / "prefix").state_dict()
    (tmp_path / "checkpoint-4").rename(tmp_path / "elsewhere")
    assert train(run, tmp_path, "--steps", 4, "--save-steps", 2, "--resume")[0] == 0
    assert len(json.loads((tmp_path / "metrics.json").read_text())["losses"]) == 4
    for name, tensor in Prefix.load(tmp_path / "prefix").state_dict().items():
        torch.testing.assert_close(tensor, whole[name])


def test_doctor_names_versions_devices_backends_and_the_model(run):
    status, out, _ = run("doctor")
    assert status == 0
    for words in (torch.__version__, "cpu, ", "no GPU" if not torch.cuda.is_available() else "cuda:0", *available_backends()):
        assert words in out
    assert "chosen" in out and "not chosen: " in out and "SmolLM2-135M-Instruct" in out


ERRORS = {
    "missing file": (("train", "--train-file", "none.jsonl", "--output", "x"), "none.jsonl"),
    "bad line": (("train", "--train-file", "bad.jsonl", "--output", "x"), "bad.jsonl, line 2"),
    "unknown model": (("generate", "--model", "no-such/model", "--prompt", "p"), "no-such/model"),
    "missing prefix": (("generate", "--prefix", "none", "--prompt", "p"), "none: neither a folder nor a hub repository"),
    "prefix of another model": (("generate", "--prefix", "other", "--prompt", "p"), "2 layers.*expected one for.*3 layers"),
    "no GPU": (("generate", "--device", "cuda", "--prompt", "p"), "--device: got cuda, but torch finds no GPU"),
    "messages": (("generate", "--messages", "{"), "--messages: not JSON"),
    "no steps": (("train", "--train-file", "rows.jsonl", "--output", "x", "--steps", "0"), "steps: expected more than 0"),
    "text for a random start": (
        ("train", "--train-file", "rows.jsonl", "--output", "x", "--init", "random", "--init-text", "words"), "text: given"
    ),
    "text missing": (("train", "--train-file", "rows.jsonl", "--output", "x", "--init", "text"), "text: init='text' needs it"),
    "empty prompt": (("generate", "--prompt", ""), r"prompts\[0\]"),
    "beams": (("generate", "--prompt", "p", "--num-beams", "0"), "num_beams: expected at least 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_one_line_and_status_2(run, folder, name):
    (folder / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    (command, *arguments), message = ERRORS[name]
    if name == "no GPU" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    model = () if "--model" in arguments else ("--model", "model")
    status, out, err = run(command, *model, *arguments)
    assert status == 2 and not out
    assert re.fullmatch(rf"prefix-tuning {command}: error: [^\n]*{message}[^\n]*\n", err), err
    assert not (folder / "x").exists(), "a failed run left files"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "train | evaluate"),
        (("fly",), "fly"),
        (("train", "--train-file", "rows.jsonl"), "--output"),
        (("train", "--train-file", "r", "--output", "x", "--steps", "1", "--epochs", "1"), "not allowed with"),
        (("generate", "--prompt", "p", "--backend", "magic"), "magic"),
        (("generate", "--prompt", "p", "--dtype", "int8"), "int8"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(run, arguments, message):
    status, out, err = run(*arguments)
    assert status == 2 and not out
    assert err.count("\n") == 1 and message in err and "--help" in err


def test_traceback_shows_where(folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(FileNotFoundError):
        cli.main(["train", "--traceback", "--model", "model", "--train-file", "none.jsonl", "--output", "x"])


@pytest.mark.parametrize("command", ["train", "evaluate", "generate", "doctor"])
def test_help(run, command):
    status, out, _ = run(command, "--help")
    assert status == 0 and f"prefix-tuning {command}" in out
