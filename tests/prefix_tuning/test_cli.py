"""The command prefix-tuning, in process, on a tiny model saved to a folder: what it writes and prints."""

import gzip
import io
import json
import logging
import os
import re
import threading

import pytest
import torch

import prefix_tuning.attention
import prefix_tuning.recipe
from prefix_kernels import available_backends
from prefix_tuning import Prefix, attach_prefix, cli
from prefix_tuning.e2e import load_e2e
from support.command import FILES, ROWS, TALKS, train
from support.models import random_prefix, tiny_model
from support.processes import run_twice
from support.tokenizer import tiny_tokenizer


def test_two_processes_train_together_and_one_of_them_tells(folder, tmp_path):
    """As torchrun starts them. They take two rows at a time where one process takes four."""
    options = ("--model", folder / "model", "--train-file", folder / "rows.jsonl", "--device", "cpu", "--steps", 2, "--quiet")
    printed = run_twice("-m", "prefix_tuning.cli", "train", *options, "--output", tmp_path / "two", "--batch-size", 2)
    assert cli.main([*map(str, ("train", *options, "--output", tmp_path / "one", "--batch-size", 4))]) == 0
    two, one = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("two", "one"))
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert sorted("written:" in out for out, _ in printed) == [False, True]
    assert {out for out, _ in printed if "written:" not in out} == {""}
    prefixes = [Prefix.load(tmp_path / name / "prefix").state_dict() for name in ("two", "one")]
    assert all(torch.allclose(tensor, prefixes[1][name], atol=1e-5) for name, tensor in prefixes[0].items())


@pytest.mark.parametrize(("device", "expected"), [("cuda", "cuda:1"), ("cuda:0", "cuda:0"), ("cpu", "cpu")])
def test_each_process_loads_the_model_to_its_own_gpu(device, expected, run, monkeypatch):
    loaded = []

    def load(name, dtype, device):
        loaded.append(device)
        raise OSError("enough")

    monkeypatch.setattr(cli, "load_model_and_tokenizer", load)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    run("generate", "--device", device, "--prompt", "p")
    assert loaded == [expected]


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
    assert scores.keys() >= expected and len(scores["answers"]) == len(FILES[form]) == scores["rows"]
    asked = {"rows": "prompt", "talks": "messages", "e2e": "mr"}[form]
    assert all(answer.keys() >= {asked, "text"} for answer in scores["answers"])
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


def test_each_line_chooses_its_prefix(run, folder):
    lines = [{"prompt": "name : Aromi", "prefix": "a"}, {"prompt": "name : Cotto", "prefix": None}, {"prompt": "name : Cotto"}]
    lines.append({"messages": [{"role": "user", "content": "hi"}], "prefix": "b"})
    (folder / "chosen.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = ("generate", "--model", "model", "--max-new-tokens", 6)

    def alone(line, *prefix):
        source = ("--messages", json.dumps(line["messages"])) if "messages" in line else ("--prompt", line["prompt"])
        return run(*common, *source, *prefix)[1]

    a, b = ("--prefix", "prefix"), ("--prefix", "short")
    named = ("--prefix", "a=prefix", "--prefix", "b=short")
    expected = [alone(lines[0], *a), alone(lines[1]), alone(lines[2]), alone(lines[3], *b)]
    status, out, err = run(*common, "--file", "chosen.jsonl", *named)
    assert status == 0 and out == "".join(expected), err
    expected[2] = alone(lines[2], *b)
    assert expected[2] != expected[1]
    assert run(*common, "--file", "chosen.jsonl", *named, *b)[1] == "".join(expected)
    assert run(*common, "--file", "chosen.jsonl", *named, *b, "--batch-size", 1, "--num-beams", 2)[0] == 0


def test_a_folder_whose_name_has_an_equals_sign(run, folder):
    (folder / "prefix").rename(folder / "a=prefix")
    try:
        status, out, err = run("generate", "--model", "model", "--prompt", "p", "--prefix", "a=prefix", "--max-new-tokens", 2)
    finally:
        (folder / "a=prefix").rename(folder / "prefix")
    assert status == 0, err


def test_no_special_tokens(run, monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "generate_texts", lambda *_, **options: seen.append(options["special_tokens"]) or ["text"])
    for more in ((), ("--no-special-tokens",)):
        assert run("generate", "--model", "model", "--prompt", "p", *more)[0] == 0
    assert seen == [True, False]


def test_prompts_from_stdin_files_and_messages(run, folder, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "generate_texts", lambda model, tokenizer, prompts, **options: seen.append(prompts) or ["text"])
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\n")
    (tmp_path / "prompts.txt.gz").write_bytes(gzip.compress(b"three"))
    messages = [{"role": "user", "content": "hello"}]
    again = [*TALKS[0]["messages"], {"role": "user", "content": "and then?"}]
    (tmp_path / "again.jsonl").write_text(json.dumps({"messages": again}))
    (tmp_path / "dev.json").write_text("\n" + json.dumps(ROWS[0]))
    (tmp_path / "prompts.JSONL").write_text(json.dumps({"prompt": "four\n"}))
    (tmp_path / "lines.txt").write_bytes("a\u2028b\r\nc\x0cd\re".encode())
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\n"))
    for arguments in (
        (), ("--file", tmp_path / "prompts.txt"), ("--messages", json.dumps(messages)), ("--file", "talks.jsonl"),
        ("--file", "e2e.jsonl"), ("--prompt", "p", "--prompt", "q"), ("--file", tmp_path / "prompts.txt.gz"),
        ("--file", tmp_path / "again.jsonl"), ("--file", tmp_path / "dev.json"), ("--file", tmp_path / "prompts.JSONL"),
        ("--file", tmp_path / "lines.txt"),
    ):  # fmt: skip
        assert run("generate", "--model", "model", *arguments)[0] == 0
    asked = [row["messages"][:-1] for row in TALKS]
    tables = ["name : Aromi | Type : pub\n", "name : Cotto | food : Thai\n"]
    assert seen == [
        ["a", "b"], ["one", "two"], [messages], asked, tables, ["p", "q"], ["three"], [again], [ROWS[0]["prompt"]], ["four\n"],
        ["a\u2028b", "c\x0cd", "e"],
    ]  # fmt: skip
    for mark in ("", "\ufeff"):
        monkeypatch.setattr("sys.stdin", io.StringIO(mark + json.dumps(ROWS[0])))
        assert run("generate", "--model", "model")[0] == 0 and seen[-1] == [ROWS[0]["prompt"]]
    assert run("generate", "--model", "model", "--messages", json.dumps(TALKS[0]["messages"]))[0] == 0
    assert seen[-1] == [TALKS[0]["messages"][:-1]]  # as the same conversation in a file


def test_texts_go_to_a_file(run, folder, tmp_path):
    """With what was asked, and the prefix where lines choose one."""
    lines = [{"prompt": "name : Aromi", "prefix": "a"}, {"prompt": "name : Cotto", "prefix": None}, TALKS[0] | {"prefix": "a"}]
    (tmp_path / "chosen.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = ("generate", "--model", "model", "--max-new-tokens", 3)
    file = tmp_path / "new" / "texts.jsonl"
    for options in (("--file", tmp_path / "chosen.jsonl", "--prefix", "a=prefix"), ("--file", "rows.jsonl")):
        texts = run(*common, *options)[1]
        status, out, err = run(*common, *options, "--output", file)
        assert status == 0 and out == f"written: {file}\n", err
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert "".join(row["text"] + "\n" for row in rows) == texts
        asked = [{name: value for name, value in row.items() if name != "text"} for row in rows]
        if "a=prefix" in options:
            assert asked == [*lines[:2], {"messages": TALKS[0]["messages"][:1], "prefix": "a"}]
        else:
            assert asked == [{"prompt": row["prompt"]} for row in ROWS]
    assert [path.name for path in file.parent.iterdir()] == ["texts.jsonl"]


def test_tools_go_along(run, folder, tmp_path, monkeypatch):
    seen, row = [], TALKS[0] | {"tools": [{"name": "search"}]}
    monkeypatch.setattr(cli, "generate_texts", lambda model, tokenizer, prompts, **options: seen.append(prompts) or ["text"])
    (tmp_path / "tools.jsonl").write_text(json.dumps(row))
    assert run("generate", "--model", "model", "--file", tmp_path / "tools.jsonl", "--output", tmp_path / "out.jsonl")[0] == 0
    asked = {"messages": TALKS[0]["messages"][:-1], "tools": row["tools"]}
    assert seen == [[asked]] and json.loads((tmp_path / "out.jsonl").read_text()) == asked | {"text": "text"}


def test_texts_go_to_a_pipe(run, folder, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    status = run("generate", "--model", "model", "--prompt", "p", "--max-new-tokens", 2, "--output", tmp_path / "pipe")[0]
    reader.join(10)
    assert status == 0 and json.loads(read[0])["prompt"] == "p" and (tmp_path / "pipe").is_fifo()


def test_a_prefix_of_another_model_is_told(run, folder, tmp_path):
    common = ("generate", "--model", "model", "--prompt", "p", "--max-new-tokens", 1, "--prefix")
    for name, warning in (("some/model", ""), ("some/other-model", "made for the model some/other-model, used with model\n")):
        prefix = Prefix.load(folder / "prefix")
        prefix.base_model = name
        prefix.save(tmp_path / "prefix")
        status, _, err = run(*common, tmp_path / "prefix")
        assert status == 0 and err == (warning and f"warning: --prefix {tmp_path / 'prefix'}: {warning}")


def test_rows_that_were_cut_in_training_are_scored(run, folder, tmp_path):
    """And a model whose positions end does not run out of them."""
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    random_prefix(model, 3).save(tmp_path / "prefix")
    rows = [ROWS[0], {"prompt": "word " * model.config.n_positions, "completion": "b"}]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ("--model", tmp_path / "model", "--file", tmp_path / "long.jsonl")
    for prefix in ((), ("--prefix", tmp_path / "prefix")):
        status, out, err = run("evaluate", *common, *prefix, "--max-new-tokens", 3)
        assert status == 0 and "loss" in out, err
        status, out, err = run("generate", *common, *prefix, "--max-new-tokens", 3)
        left = model.config.n_positions - 3 * bool(prefix)
        assert status == 2 and err.count("\n") == 1 and f"the model's {left} positions" in err
        assert "error: prompts[1]: expected at most " in err and "lower max_new_tokens" in err


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
        "--eval-file", "e2e.jsonl", "--eval-limit", 1, "--dtype", "bfloat16", "--report-to", "all",
    )  # fmt: skip
    assert status == 0, err
    expected = {
        "steps": 7, "epochs": None, "learning_rate": 0.5, "seed": 3, "backend": "reference", "save_steps": 2, "patience": 4,
        "resume": True, "progress": False, "init_text": "words", "reparametrization": "mlp", "gradient_checkpointing": True,
        "gradient_accumulation": 5, "warmup": 0.25, "weight_decay": 0.125, "max_grad_norm": 2.0, "max_length": 64,
        "batch_size": 2, "prefix_len": 4, "hidden_size": 8, "dtype": torch.bfloat16, "report_to": "all", "rows": ROWS,
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
        "progress": None, "prefix_ids": None, "special_tokens": True,
    }  # fmt: skip


@pytest.mark.parametrize("command", ("evaluate", "generate"))
def test_progress_is_shown_on_stderr_unless_quiet(command, run):
    arguments = (command, "--model", "model", "--file", "rows.jsonl", "--batch-size", 2, "--max-new-tokens", 1)
    loud, quiet = run(*arguments), run(*arguments, "--quiet")
    assert loud[:2] == quiet[:2] and quiet[2] == ""
    assert "generating: 100%" in loud[2] and "4/4" in loud[2]


def test_evaluation_options_arrive(run, folder, monkeypatch):
    seen = []

    def spy(model, tokenizer, rows, **options):
        seen.append(options | {"backend": model.model.layers[0].self_attn.layer_prefix.backend, "dtype": model.dtype})
        return {"bleu": 1.0}, ["text"]

    monkeypatch.setattr(cli, "evaluate_e2e", spy)
    monkeypatch.setattr(cli, "evaluate_rows", spy)
    for file in ("e2e.jsonl", "rows.jsonl"):
        status, out, err = run(
            "evaluate", "--model", "model", "--prefix", "prefix", "--file", file, "--num-beams", 3, "--batch-size", 5,
            "--max-new-tokens", 7, "--max-length", 50, "--backend", "reference", "--dtype", "bfloat16", "--quiet",
        )  # fmt: skip
        assert status == 0 and "bleu" in out, err
    options = {"max_new_tokens": 7, "num_beams": 3, "batch_size": 5, "progress": None}
    options |= {"backend": "reference", "dtype": torch.bfloat16}
    assert seen == [options, options | {"max_length": 50}]


def test_generate_uses_the_backend(run, monkeypatch):
    seen, original = set(), prefix_tuning.attention.prefix_attention
    monkeypatch.setattr(
        prefix_tuning.attention, "prefix_attention", lambda *a, **k: seen.add(k["backend"]) or original(*a, **k)
    )
    arguments = ("generate", "--model", "model", "--prefix", "prefix", "--prompt", "p", "--max-new-tokens", 1)
    assert run(*arguments)[0] == run(*arguments, "--backend", "reference")[0] == 0
    assert seen == {None, "reference"}


def test_limit_draws_by_seed(run, monkeypatch, tmp_path):
    many = [{"mr": f"name[Cafe {i}]", "refs": [f"Cafe {i}."]} for i in range(9)]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in many))
    drawn = []
    monkeypatch.setattr(cli, "evaluate_e2e", lambda model, tokenizer, rows, **_: drawn.append(rows) or ({"bleu": 1.0}, []))
    for arguments in (("--limit", 3), ("--limit", 3, "--seed", 0), ("--limit", 3, "--seed", 1), ("--limit", 99), ()):
        assert run("evaluate", "--model", "model", "--file", tmp_path / "many.jsonl", *arguments)[0] == 0
    every = load_e2e(tmp_path / "many.jsonl")
    assert drawn[0] == drawn[1] != drawn[2] and drawn[3] == drawn[4] == every
    for rows in drawn[:3]:
        assert len(rows) == 3 and all(row in every for row in rows)


def test_resume_goes_on(run, tmp_path):
    assert train(run, tmp_path, "--steps", 4, "--save-steps", 2)[0] == 0
    whole = Prefix.load(tmp_path / "prefix").state_dict()
    (tmp_path / "checkpoint-4").rename(tmp_path / "elsewhere")
    assert train(run, tmp_path, "--steps", 4, "--save-steps", 2, "--resume")[0] == 0
    assert len(json.loads((tmp_path / "metrics.json").read_text())["losses"]) == 4
    for name, tensor in Prefix.load(tmp_path / "prefix").state_dict().items():
        torch.testing.assert_close(tensor, whole[name])


def test_resuming_a_finished_run_and_starting_over_it(run, tmp_path):
    assert train(run, tmp_path, "--steps", 3, "--save-steps", 2)[0] == 0
    before = (tmp_path / "prefix" / "prefix.safetensors").read_bytes()
    status, out, err = train(run, tmp_path, "--steps", 3, "--save-steps", 2, "--resume")
    assert status == 0 and re.search(r"^steps +3$", out, re.MULTILINE), err
    status, out, err = train(run, tmp_path, "--steps", 3, "--save-steps", 2)
    assert status == 2 and err.count("\n") == 1 and "holds the checkpoints and the prefix of an earlier run" in err
    assert (tmp_path / "prefix" / "prefix.safetensors").read_bytes() == before
    status, out, err = train(run, tmp_path, "--steps", 2, "--save-steps", 2, "--overwrite")
    assert status == 0 and sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2"], err
    assert (tmp_path / "prefix" / "prefix.safetensors").read_bytes() != before


def test_a_prefix_is_not_written_over_by_mistake(run, tmp_path):
    assert train(run, tmp_path, "--steps", 1)[0] == 0
    status, out, err = train(run, tmp_path, "--steps", 1)
    assert status == 2 and err.startswith(f"prefix-tuning train: error: output: {tmp_path} holds the prefix of an earlier run;")
    assert train(run, tmp_path, "--steps", 1, "--overwrite")[0] == 0


def test_a_checkpoint_that_is_cut_short_is_named(run, tmp_path):
    assert train(run, tmp_path, "--steps", 4, "--save-steps", 2)[0] == 0
    file = tmp_path / "checkpoint-4" / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:100])
    status, out, err = train(run, tmp_path, "--steps", 6, "--save-steps", 2, "--resume")
    assert status == 2 and err.count("\n") == 1 and f"resume: {file} is cut short or damaged; remove {file.parent}" in err


def test_rows_without_an_attention_mask_call_for_no_advice(run, tmp_path):
    """Whose masks are left out because they hide nothing; transformers warns once in a process."""
    records, handler = [], logging.Handler()
    handler.emit = records.append
    logging.Logger.warning_once.cache_clear()
    logging.getLogger("transformers").addHandler(handler)
    try:
        assert train(run, tmp_path, "--steps", 1, "--no-padding-free", "--model", "gpt2")[0] == 0
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert not [record for record in records if "attention_mask" in record.getMessage()]


def test_evaluation_loss_and_patience(run, tmp_path):
    """Rows of one letter make another ever less likely, so one worse evaluation ends the run."""
    for name in "aZ":
        rows = [row | {"completion": name * 20} for row in ROWS]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, out, err = train(
        run, tmp_path / "run", "--steps", 40, "--save-steps", 2, "--patience", 1, "--lr", 0.1, "--reparametrization", "none",
        "--eval-file", tmp_path / "Z.jsonl", file=tmp_path / "a.jsonl",
    )  # fmt: skip
    assert status == 0, err
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    evaluated = [loss for _, loss in metrics["eval_losses"]]
    assert metrics["steps"] == 2 * len(evaluated) < 40
    assert re.search(rf"^lowest evaluation loss +{min(evaluated):.4g}$", out, re.MULTILINE)


def test_without_matplotlib_all_but_the_picture_is_written(run, tmp_path, monkeypatch):
    def missing(*args, **kwargs):
        raise ImportError("drawing the loss needs matplotlib: pip install matplotlib")

    monkeypatch.setattr(cli, "save_loss_curve", missing)
    status, out, err = train(run, tmp_path, "--steps", 1, "--quiet")
    assert status == 0 and err == "no loss.png: drawing the loss needs matplotlib: pip install matplotlib\n"
    assert {path.name for path in tmp_path.iterdir()} == {"prefix", "metrics.json"} and "loss.png" not in out


def test_convert_there_and_back(run, folder, tmp_path):
    adapter, back, encoder = tmp_path / "adapter", tmp_path / "back", tmp_path / "encoder"
    status, out, _ = run("convert", "prefix", adapter, "--to", "peft", "--task-type", "SEQ_CLS")
    assert status == 0 and out == f"written: {adapter}\n"
    assert json.loads((adapter / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    assert run("convert", adapter, back, "--to", "prefix")[0] == 0
    pairs = zip(Prefix.load(back).parameters(), Prefix.load(folder / "prefix").parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert run("convert", adapter, encoder, "--to", "prefix", "--part", "encoder")[0] == 0
    assert list(Prefix.load(encoder).parts) == ["encoder"]
    status, _, err = run("convert", encoder, adapter, "--to", "peft")
    assert status == 2 and "task_type: expected one of FEATURE_EXTRACTION, " in err
    status, _, err = run("convert", "prefix", adapter, "--to", "peft", "--part", "encoder")
    assert status == 2 and err == "prefix-tuning convert: error: --part: --to peft does not ask for it\n"
    status, _, err = run("convert", adapter, back, "--to", "prefix", "--task-type", "SEQ_CLS")
    assert status == 2 and err == "prefix-tuning convert: error: --task-type: --to prefix does not ask for it\n"
    status, _, err = run("convert", back, adapter, "--to", "prefix")
    assert status == 2 and err.startswith("prefix-tuning convert: error: ") and "adapter_config.json: expected the" in err


def test_doctor_names_versions_devices_backends_and_the_model(run):
    status, out, _ = run("doctor")
    assert status == 0
    for words in (torch.__version__, "cpu, ", "no GPU" if not torch.cuda.is_available() else "cuda:0", *available_backends()):
        assert words in out
    assert "chosen" in out and "not chosen: " in out and "SmolLM2-135M-Instruct" in out
