"""The command `prefix-tuning train | distill | evaluate | generate | convert | serve | doctor`.

Errors of the user's making are one line on stderr and exit status 2, Ctrl-C, once all is imported, is one and 130; --traceback
shows where they arose.
Where nobody reads stdout any more it ends in silence, with status 141 as a shell shows it.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from logging import LogRecord
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import get_int_from_env
from transformers.utils import logging

from prefix_tuning import serve as server
from prefix_tuning.attach import attach_prefix
from prefix_tuning.bank import PrefixBank
from prefix_tuning.command_line import DTYPES, command_parser
from prefix_tuning.data import check_row, is_e2e, read_rows
from prefix_tuning.distill import DistillSettings
from prefix_tuning.distill import distill as distill_text
from prefix_tuning.doctor import model_report, report
from prefix_tuning.e2e import check_bleu, load_e2e
from prefix_tuning.evaluate import e2e_reference_scores, evaluate_e2e, evaluate_rows, split_row
from prefix_tuning.files import check_writable, open_text, write_json, write_json_lines
from prefix_tuning.generate import generate_texts
from prefix_tuning.offline_model import OFFLINE_MODEL, load_model_and_tokenizer
from prefix_tuning.plot import save_loss_curve
from prefix_tuning.prefix import Prefix
from prefix_tuning.recipe import TrainSettings, train_prefix, write_metrics
from prefix_tuning.requests import (
    DEFAULT_PREFIX,
    answer_rows,
    check_unnamed,
    parse_conversation,
    prefix_folders,
    read_requests,
)

Settings = TypeVar("Settings", bound=TrainSettings)
USER_ERRORS = (ValueError, TypeError, OSError, ImportError, NotImplementedError)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with these arguments (default: the process's) and returns its exit status."""
    for stream in (sys.stdout, sys.stderr):  # where the locale has no other characters than ASCII
        if isinstance(stream, io.TextIOWrapper) and not stream.closed:
            stream.reconfigure(errors="backslashreplace")
    args = _parser().parse_args(argv)
    if args.command != "doctor":
        logging.disable_progress_bar()  # of loading the weights
        logging.get_logger("transformers.modeling_utils").addFilter(_is_no_advice)
    try:
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed at exit
        return 141
    except USER_ERRORS as error:
        if args.traceback:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"prefix-tuning {args.command}: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if args.traceback:
            raise
        lost = args.command == "train" and not args.save_steps
        saved = "; nothing was saved, --save-steps N keeps checkpoints" if lost else ""
        print(f"\nprefix-tuning {args.command}: interrupted{saved}", file=sys.stderr)  # a progress bar ends no line
        return 130
    return 0


def _is_no_advice(record: LogRecord) -> bool:
    """Of transformers' warnings not the one about calls without an attention mask: those that hide nothing are left out."""
    return "strongly recommend passing in an `attention_mask`" not in record.getMessage()


def train(args: argparse.Namespace) -> None:
    settings = _settings(TrainSettings, args)
    if args.eval_file is None and (args.eval_limit is not None or args.patience):
        raise ValueError("--eval-limit, --patience: they need --eval-file")
    with _option("--train-file"):
        rows = read_rows(args.train_file)
    with _option("--eval-file"):
        eval_rows = _limited(read_rows(args.eval_file), args.eval_limit, args.seed) if args.eval_file else None
    model, tokenizer = _model(args)
    with _option("--output"):
        _, metrics = train_prefix(
            model, tokenizer, rows, args.output, settings, eval_rows=eval_rows, resume=args.resume, overwrite=args.overwrite,
            progress=not args.quiet,
        )  # fmt: skip
    if PartialState().is_main_process:  # of several under torchrun one writes and tells
        lowest = {"lowest evaluation loss": min(loss for _, loss in metrics["eval_losses"])} if eval_rows else {}
        _write_run(args, {**metrics, "rows": len(rows)}, lowest)


def distill(args: argparse.Namespace) -> None:
    with _option("--text-file"), open_text(args.text_file) as file:
        text = file.read()
    settings = _settings(DistillSettings, args, init_text=text)
    with _option("--prompts-file"):
        prompts = read_rows(args.prompts_file, partial(check_row, answered=False)) if args.prompts_file else None
    model, tokenizer = _model(args)
    with _option("--output"):
        _, metrics = distill_text(
            model, tokenizer, text, args.output, settings, prompts=prompts, resume=args.resume, overwrite=args.overwrite,
            progress=not args.quiet,
        )  # fmt: skip
    measured = {f"divergence, {name.replace('_', ' ')}": nats for name, nats in metrics["divergences"].items()}
    _write_run(args, metrics, {"conversations": metrics["conversations"], **measured})


def _settings(kind: type[Settings], args: argparse.Namespace, **further: Any) -> Settings:
    _check_named(args.output)
    settings = kind(**{name: getattr(args, name) for name in kind.__dataclass_fields__ if hasattr(args, name)}, **further)
    settings.resolved()  # says what is wrong before the model is loaded
    return settings


def _write_run(args: argparse.Namespace, metrics: dict[str, Any], measured: dict[str, Any]) -> None:
    """The run's numbers and its loss curve into --output, and in short on stdout."""
    metrics = {**metrics, "model": args.model or OFFLINE_MODEL}
    written = [Path(args.output) / "prefix", write_metrics(args.output, metrics)]
    try:
        picture = Path(args.output) / "loss.png"
        save_loss_curve(metrics["losses"], picture, eval_losses=metrics["eval_losses"])
        written.append(picture)
    except ImportError as error:
        print(f"no loss.png: {error}", file=sys.stderr)
    _table(
        {
            "steps": metrics["steps"],
            "last loss": metrics["losses"][-1],
            **measured,
            "trainable parameters": metrics["trainable_parameters"],
            "seconds per step": metrics["seconds_per_step"],
            "backend": metrics["backend"],
        }
    )
    print("written: " + ", ".join(map(str, written)))


def evaluate(args: argparse.Namespace) -> None:
    check_bleu()
    _check_name(args.output)
    with _option("--file"):
        e2e = is_e2e(args.file)
        rows = _limited(load_e2e(args.file) if e2e else read_rows(args.file, split_row), args.limit, args.seed)
    model, tokenizer = _model(args)
    _check_folder(args.output)
    options: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "num_beams": args.num_beams}
    options |= {"batch_size": args.batch_size, "progress": None if args.quiet else "generating"}
    with _attached(model, {} if args.prefix is None else {DEFAULT_PREFIX: args.prefix}, args):
        if e2e:
            scores, texts = evaluate_e2e(model, tokenizer, rows, **options)
            scores |= e2e_reference_scores(rows)
        else:
            scores, texts = evaluate_rows(model, tokenizer, rows, max_length=args.max_length, **options)
    _table({"rows": len(rows), **scores})
    if args.output:
        about = {"model": args.model or OFFLINE_MODEL, "prefix": args.prefix, "file": args.file, "rows": len(rows)}
        answers = [{**row, "text": text} for row, text in zip(rows, texts, strict=True)]
        write_json(args.output, {**about, **scores, "answers": answers})


def generate(args: argparse.Namespace) -> None:
    if not args.sample and (args.temperature, args.top_p) != (1.0, 1.0):
        raise ValueError("--temperature, --top-p: they need --sample")
    prefixes = prefix_folders(args.prefix or ())
    _check_name(args.output)
    if args.prompt is None and args.messages is None:
        with _option("--file"):
            prompts, names = read_requests(args.file, prefixes)
    else:
        check_unnamed(prefixes, "a prompt")
        prompts, names = args.prompt or [parse_conversation(args.messages)], []
    chosen = names if prefixes.keys() - {DEFAULT_PREFIX} else None
    model, tokenizer = _model(args)
    _check_folder(args.output)
    with _attached(model, prefixes, args):
        texts = generate_texts(
            model, tokenizer, prompts, prefix_ids=chosen, special_tokens=args.special_tokens,
            max_new_tokens=args.max_new_tokens, batch_size=args.batch_size, num_beams=args.num_beams, sample=args.sample,
            temperature=args.temperature, top_p=args.top_p, seed=args.seed,
            progress=None if args.quiet or len(prompts) <= args.batch_size else "generating",
        )  # fmt: skip
    if args.output:
        write_json_lines(args.output, answer_rows(prompts, chosen, texts))
        print(f"written: {args.output}")
    else:
        for text in texts:
            print(text)


def convert(args: argparse.Namespace) -> None:
    unheeded = {"peft": "part", "prefix": "task_type"}[args.to]
    if getattr(args, unheeded) is not None:
        raise ValueError(f"--{unheeded.replace('_', '-')}: --to {args.to} does not ask for it")
    _check_named(args.source, "SOURCE")
    _check_named(args.target, "FOLDER")
    if args.to == "peft":
        Prefix.load(args.source).to_peft(args.target, task_type=args.task_type or "CAUSAL_LM")
    else:
        Prefix.from_peft(args.source, part=args.part).save(args.target)
    print(f"written: {args.target}")


def serve(args: argparse.Namespace) -> None:
    server.serve(
        args.model, prefix_folders(args.prefix), host=args.host, port=args.port, prompt_logprobs=args.prompt_logprobs,
        arguments=args.arguments,
    )  # fmt: skip


def doctor(args: argparse.Namespace) -> None:
    if args.model is None:
        print(report())
        return
    with _named(args.model):
        print(model_report(args.model))


def _model(args: argparse.Namespace):
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"--device: expected cpu, cuda or cuda:N, got {device!r}")
    if device != "cpu":
        number = int(device[5:] or get_int_from_env(["LOCAL_RANK"], 0))  # each process of torchrun has its own
        if number >= torch.cuda.device_count():
            raise ValueError(f"--device: expected one of torch's {torch.cuda.device_count()} GPUs here or cpu, got {device}")
        device = f"cuda:{number}"
    with _named(args.model or OFFLINE_MODEL):
        return load_model_and_tokenizer(args.model, dtype=DTYPES[args.dtype], device=device)


@contextmanager
def _named(model: str) -> Iterator[None]:
    """Errors say which model they are about, as those of transformers do not always."""
    if not Path(model).exists() and not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", model):
        raise ValueError(f"--model {model}: no such folder, and no hub id")
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {model}: {error}") from error


@contextmanager
def _option(name: str) -> Iterator[None]:
    """Errors of the system that are about a file say which option gave it."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise type(error)(f"{name}: {error.filename}: {error.strerror}") from error


def _check_named(given: str | None, argument: str = "--output") -> None:
    if given == "":  # an unset variable of the shell, in quotes
        raise ValueError(f"{argument}: expected a name, got an empty one")


def _check_name(file: str | None) -> None:
    _check_named(file)
    if file and Path(file).is_dir():
        raise ValueError(f"--output: expected the name of a file, got the folder {file}")


def _check_folder(file: str | None) -> None:
    """Before there is work to lose, but behind whatever else may be wrong: it makes the folder."""
    if file:
        path = Path(file)
        if path.is_file() or not path.exists():  # no device or pipe
            with _option("--output"):
                check_writable((path.resolve() if path.is_symlink() else path).parent)


def _attached(model, folders: dict[str, str], args: argparse.Namespace) -> AbstractContextManager:
    """The prefixes of these folders or hub ids on the model: none, the one without a name, or a bank by name."""
    if not folders:
        return nullcontext()
    loaded = {name: _prefix(folder, args.model or OFFLINE_MODEL) for name, folder in folders.items()}
    only = loaded.get(DEFAULT_PREFIX) if len(loaded) == 1 else None
    return attach_prefix(model, PrefixBank(loaded) if only is None else only, backend=args.backend)


def _prefix(folder: str, model: str) -> Prefix:
    try:
        prefix = Prefix.load(folder)
    except FileNotFoundError as error:
        inside = Path(folder) / "prefix"
        hint = f"; did you mean {inside}?" * inside.is_dir()
        if (Path(folder) / "adapter_config.json").is_file():
            hint = "; it is a PEFT adapter, of which prefix-tuning convert makes a prefix"
        raise FileNotFoundError(f"--prefix: {error}{hint}") from error
    if Path(prefix.base_model).name not in ("", Path(model).resolve().name):
        print(f"warning: --prefix {folder}: made for the model {prefix.base_model}, used with {model}", file=sys.stderr)
    return prefix


def _limited(rows: list, limit: int | None, seed: int) -> list:
    if limit is not None and limit < 1:
        raise ValueError(f"--limit, --eval-limit: expected at least 1, got {limit}")
    return rows if limit is None or limit >= len(rows) else random.Random(seed).sample(rows, limit)


def _table(values: dict[str, Any]) -> None:
    width = max(map(len, values))
    for name, value in values.items():
        shown = f"{value:.4g}" if isinstance(value, float) else value
        print(f"{name.replace('_', ' '):<{width}}  {shown}")


def _parser() -> argparse.ArgumentParser:
    return command_parser((train, distill, evaluate, generate, convert, serve, doctor))


if __name__ == "__main__":
    sys.exit(main())
