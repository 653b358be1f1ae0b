"""The command prefix-tuning, in process, on a tiny model saved to a folder: what it refuses, and what its help says."""

import importlib.metadata
import io
import json
import os
import re
import subprocess
import sys

import pytest
import torch

import prefix_tuning.attention
import prefix_tuning.recipe
from prefix_tuning import Prefix, cli
from support.command import TALKS, train

TRAIN = ("train", "--train-file", "rows.jsonl", "--output", "x")
ERRORS = {
    "missing file": (("train", "--train-file", "none.jsonl", "--output", "x"), "none.jsonl"),
    "bad line": (("train", "--train-file", "bad.jsonl", "--output", "x"), "bad.jsonl, line 2"),
    "unknown model": (("generate", "--model", "no-such/model", "--prompt", "p"), "no-such/model"),
    "missing prefix": (("generate", "--prefix", "none", "--prompt", "p"), "none: expected a folder or a hub repository"),
    "prefix of another model": (("generate", "--prefix", "other", "--prompt", "p"), "expected one for.*3 layers.*2 layers"),
    "prefix without folder": (("generate", "--prefix", "a=", "--prompt", "p"), "--prefix: expected .*NAME=FOLDER, got a="),
    "two prefixes of one name": (
        ("generate", "--prefix", "a=prefix", "--prefix", "a=short", "--file", "rows.jsonl"),
        "--prefix: two are named a: prefix and short",
    ),
    "two prefixes without name": (
        ("generate", "--prefix", "prefix", "--prefix", "short", "--file", "rows.jsonl"),
        "--prefix: two have no name: prefix and short",
    ),
    "names beside a prompt": (("generate", "--prefix", "a=prefix", "--prompt", "p"), 'JSON lines, which a prompt has not'),
    "names beside tables": (("generate", "--prefix", "a=prefix", "--file", "e2e.jsonl"), "which e2e.jsonl has not"),
    "unknown prefix": (
        ("generate", "--prefix", "b=prefix", "--prefix", "c=short", "--file", "chooses.jsonl"),
        r"chooses.jsonl, line 2: prefix: expected null or the name of a --prefix NAME=FOLDER \(b, c\), got 'a'",
    ),
    "prefix chosen, none given": (("generate", "--file", "chooses.jsonl"), r"chooses.jsonl, line 2: .*\(none\), got 'a'"),
    "prefix of no kind": (
        ("generate", "--prefix", "b=prefix", "--file", "lists.jsonl"), r"lists.jsonl, line 1: prefix: .*\(b\), got \['b'\]"
    ),
    "no prompt in a line": (("generate", "--file", "answers.jsonl"), 'line 1: expected an object with "prompt",'),
    "no GPU": (("generate", "--device", "cuda", "--prompt", "p"), "--device: expected one of torch's 0 GPUs .*, got cuda"),
    "messages": (("generate", "--messages", "{"), "--messages: not JSON"),
    "no steps": ((*TRAIN, "--steps", "0"), "steps: expected at least 1"),
    "text for a random start": ((*TRAIN, "--init", "random", "--init-text", "words"), "init_text: expected None beside init"),
    "text missing": ((*TRAIN, "--init", "text"), "init_text: expected the text"),
    "settings": ((*TRAIN, "--hidden-size", "0"), "hidden_size: expected at least 1, got 0"),
    "nothing to resume": ((*TRAIN, "--resume"), "resume: expected a checkpoint to go on from, got none in x"),
    "patience without save steps": ((*TRAIN, "--patience", "1", "--eval-file", "rows.jsonl"), "patience: .* save_steps"),
    "patience without eval file": (
        (*TRAIN, "--patience", "1", "--save-steps", "1"), "--eval-limit, --patience: they need --eval-file"
    ),
    "eval limit alone": ((*TRAIN, "--eval-limit", "1"), "--eval-limit, --patience: they need --eval-file"),
    "eval limit": ((*TRAIN, "--eval-file", "rows.jsonl", "--eval-limit", "0"), "--eval-limit: expected at least 1, got 0"),
    "logger": ((*TRAIN, "--report-to", "paper"), "report_to: expected one of none, all"),
    "max length": ((*TRAIN, "--max-length", "4"), r"train_dataset: rows\[0\]: max_length"),
    "float16 on the CPU": ((*TRAIN, "--dtype", "float16", "--device", "cpu"), "dtype: expected a GPU to train in float16"),
    "another family": ((*TRAIN, "--model", "ctrl", "--init-text", "words"), "model: expected one of type .*'ctrl'"),
    "limit": (("evaluate", "--file", "rows.jsonl", "--limit", "-1"), "--limit, .*: expected at least 1, got -1"),
    "folder for scores": (("evaluate", "--file", "rows.jsonl", "--output", "model"), "--output: .* got the folder model"),
    "bad E2E file": (("evaluate", "--file", "bad_e2e.jsonl", "--output", "x"), "bad_e2e.jsonl, line 2: .*got 'size'"),
    "scores of another prefix": (
        ("evaluate", "--file", "rows.jsonl", "--prefix", "other", "--output", "x"), "expected one for.*3 layers.*2 layers"
    ),
    "device": (("generate", "--device", "tpu", "--prompt", "p"), "--device: expected cpu, cuda or cuda:N, got 'tpu'"),
    "GPU number": (("generate", "--device", "cuda:99", "--prompt", "p"), "--device: expected one of .*, got cuda:99"),
    "no turn": (("generate", "--file", "no_turn.jsonl"), "no_turn.jsonl, line 1: messages: expected at least one turn"),
    "scores below a file": (("evaluate", "--file", "rows.jsonl", "--output", "rows.jsonl/x"), "rows.jsonl"),
    "training below a file": ((*TRAIN[:-1], "rows.jsonl/x"), "rows.jsonl"),
    "one message": (("generate", "--messages", '{"role": "user", "content": "hi"}'), "--messages: expected a list of objects"),
    "no message": (("generate", "--messages", "[]"), "--messages: expected at least one turn, got none"),
    "message without role": (("generate", "--messages", '[{"content": "hi"}]'), "--messages: expected a list of objects"),
    "empty messages": (("generate", "--messages", ""), "--messages: not JSON"),
    "deep messages": (("generate", "--messages", "[" * 100_000), "--messages: not JSON"),
    "no chat template": (
        ("generate", "--model", "ctrl", "--messages", '[{"role": "user", "content": "hi"}]'),
        "tokenizer has no chat template",
    ),
    "refused by the template": (
        ("generate", "--model", "strict", "--messages", '[{"role": "user", "content": "hi"}]'),
        "messages: .*roles must alternate",
    ),
    "rows refused by the template": (
        (*TRAIN[:2], "talks.jsonl", *TRAIN[3:], "--model", "strict"), r"train_dataset: rows\[0\]: .*roles must alternate"
    ),
    "content of no kind": (("generate", "--messages", '[{"role": "user", "content": 1}]'), "--messages: content of 'user'"),
    "temperature alone": (("generate", "--prompt", "p", "--temperature", "0.5"), "--temperature, --top-p: they need --sample"),
    "bytes": (("generate", "--file", "bytes.txt"), "bytes.txt: not a UTF-8 text file"),
    "no prompts": (("generate", "--file", "blank.txt"), "blank.txt: holds no prompts"),
    "empty prompt": (("generate", "--prompt", ""), r"prompts\[0\]"),
    "training file": (("train", "--train-file", "none.jsonl", "--output", "x"), "--train-file: none.jsonl: No such file"),
    "evaluation file": ((*TRAIN, "--eval-file", "none.jsonl"), "--eval-file: none.jsonl: No such file or directory"),
    "prompts file": (("generate", "--file", "none.txt"), "--file: none.txt: No such file or directory"),
    "output of training": ((*TRAIN[:-1], "rows.jsonl/x"), "--output: rows.jsonl/x: Not a directory"),
    "output of generation": (("generate", "--prompt", "p", "--output", "rows.jsonl/x"), "--output: rows.jsonl: File exists"),
    "folder for texts": (("generate", "--prompt", "p", "--output", "model"), "--output: expected .* got the folder model"),
    "no name for texts": (("generate", "--prompt", "p", "--output", ""), "--output: expected a name, got an empty one"),
    "no name for a converted prefix": (("convert", "prefix", "", "--to", "peft"), "FOLDER: expected a name, got an empty one"),
    "nothing to convert": (("convert", "", "x", "--to", "peft"), "SOURCE: expected a name, got an empty one"),
    "no name for a run": ((*TRAIN[:-1], ""), "--output: expected a name, got an empty one"),
    "seed": ((*TRAIN, "--seed", "-1"), "seed: expected at least 0, got -1"),
    "an adapter of PEFT": (("generate", "--prefix", "adapter", "--prompt", "p"), "it is a PEFT adapter, of which"),
    "run for a prefix": (("generate", "--prefix", "run", "--prompt", "p"), "--prefix: run/.*; did you mean run/prefix"),
    "no folder": (("generate", "--model", "/no/such/folder", "--prompt", "p"), "--model /no/such/folder: no such folder"),
    "encoder": (("generate", "--model", "bert", "--prompt", "p"), "--model bert: expected a model that writes text, got bert"),
    "encoder to train": ((*TRAIN, "--model", "bert"), "--model bert: expected a model that writes text, got bert"),
    "no answer at the end": (("evaluate", "--file", "asks.jsonl"), "asks.jsonl, line 1: messages: expected an assistant turn"),
    "too long": (("generate", "--model", "gpt2", "--prompt", "p", "--max-new-tokens", "999"), r"prompts\[0\]: .*got 1 tokens"),
    "beams": (("generate", "--prompt", "p", "--num-beams", "0"), "num_beams: expected at least 1, got 0"),
}  # fmt: skip


def test_help_where_the_locale_has_no_other_characters_than_ascii():
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    for arguments in (["generate", "--help"], ["doctor"]):
        command = [sys.executable, "-m", "prefix_tuning.cli", *arguments]
        shown = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert shown.returncode == 0 and shown.stdout and not shown.stderr


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_one_line_and_status_2(run, folder, name):
    (folder / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    (folder / "bad_e2e.jsonl").write_text('{"mr": "name[A]", "refs": ["A."]}\n{"mr": "size[big]", "refs": ["B."]}\n')
    (folder / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "blank.txt").write_text(" \n\n")
    (folder / "chooses.jsonl").write_text('{"prompt": "p"}\n{"prompt": "p", "prefix": "a"}\n')
    (folder / "lists.jsonl").write_text('{"prompt": "p", "prefix": ["b"]}\n')
    (folder / "answers.jsonl").write_text('{"completion": "p"}\n')
    (folder / "no_turn.jsonl").write_text('{"messages": []}\n')
    (folder / "asks.jsonl").write_text(json.dumps({"messages": [*TALKS[0]["messages"], {"role": "user", "content": "?"}]}))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    (command, *arguments), message = ERRORS[name]
    if name == "no GPU" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    model = () if "--model" in arguments or command == "convert" else ("--model", "model")
    status, out, err = run(command, *model, *arguments)
    assert status == 2 and not out
    assert re.fullmatch(rf"prefix-tuning {command}: error: [^\n]*{message}[^\n]*\n", err), err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before, "a failed run left files"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "COMMAND"),
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


def test_stdin_that_is_no_text_is_named(run, folder, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff"), encoding="utf-8"))
    status, out, err = run("generate", "--model", "model")
    assert status == 2 and not out and err.startswith("prefix-tuning generate: error: stdin: not a utf-8 text: ")


def test_traceback_shows_where(folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(FileNotFoundError):
        cli.main(["train", "--traceback", "--model", "model", "--train-file", "none.jsonl", "--output", "x"])


def test_an_interrupt_leaves_whole_files(run, tmp_path, monkeypatch):
    def interrupted(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(prefix_tuning.recipe.StepClock, "on_step_begin", interrupted)
        patched.setattr(prefix_tuning.recipe.StepClock, "on_step_end", lambda *args, **kwargs: None)
        status, out, err = train(run, tmp_path, "--steps", 9, "--save-steps", 2, "--quiet")
    assert status == 130 and not out and err.endswith("\nprefix-tuning train: interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    Prefix.load(tmp_path / "checkpoint-2")
    status, out, _ = train(run, tmp_path, "--steps", 9, "--save-steps", 2, "--resume")
    assert status == 0 and (tmp_path / "prefix").is_dir()


def test_an_interrupt_without_checkpoints_says_that_nothing_is_left(run, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(prefix_tuning.recipe.StepClock, "on_step_begin", interrupted)
    status, out, err = train(run, tmp_path, "--steps", 9, "--quiet")
    message = "prefix-tuning train: interrupted; nothing was saved, --save-steps N keeps checkpoints"
    assert status == 130 and err.endswith(f"\n{message}\n")


def test_a_reader_that_has_enough_is_no_error(folder):
    """As head, which closes the pipe."""
    command = ("-m", "prefix_tuning.cli", "generate", "--model", "model", "--prompt", "p", "--max-new-tokens", "1")
    found = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    running = subprocess.Popen([sys.executable, *command], cwd=folder, env=found, **pipes)
    running.stdout.close()
    with running.stderr:
        assert running.stderr.read() == b"" and running.wait(timeout=60) == 141


def test_version(run):
    status, out, _ = run("--version")
    assert status == 0 and out == f"prefix-tuning {importlib.metadata.version('prefix-kernels')}\n"


def test_doctor_names_the_model_that_it_cannot_read(run):
    status, _, err = run("doctor", "--model", "no/such")
    assert status == 2 and err.startswith("prefix-tuning doctor: error: --model no/such: ")


@pytest.mark.parametrize("command", ["train", "distill", "evaluate", "generate", "convert", "serve", "doctor"])
def test_help(run, command):
    status, out, _ = run(command, "--help")
    assert status == 0 and f"prefix-tuning {command}" in out
    assert not re.search(r"default:\s+(True|False|None)", out)
    assert ("--seed" in out) == bool(re.search(r"everything random\s+\(default:\s+0\)", out))
