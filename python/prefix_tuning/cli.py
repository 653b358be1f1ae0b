"""The command `prefix-tuning train | distill | evaluate | generate | convert | serve | doctor`.

Errors of the user's making are one line on stderr and exit status 2, Ctrl-C, once all is imported, is one and 130; --traceback
shows where they arose.
Where nobody reads stdout any more it ends in silence, with status 141 as a shell shows it.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from logging import LogRecord
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import get_int_from_env
from transformers.utils import logging

from prefix_kernels import available_backends
from prefix_tuning import serve as server
from prefix_tuning.attach import attach_prefix
from prefix_tuning.bank import PrefixBank
from prefix_tuning.data import check_row, is_e2e, read_rows
from prefix_tuning.distill import DistillSettings
from prefix_tuning.distill import distill as distill_text
from prefix_tuning.doctor import model_report, report
from prefix_tuning.e2e import check_bleu, load_e2e
from prefix_tuning.evaluate import e2e_reference_scores, evaluate_e2e, evaluate_rows, split_row
from prefix_tuning.files import check_writable, open_text, write_json, write_json_lines
from prefix_tuning.generate import generate_texts
from prefix_tuning.offline_model import OFFLINE_MODEL, load_model_and_tokenizer
from prefix_tuning.peft_adapters import TASK_TYPES
from prefix_tuning.plot import save_loss_curve
from prefix_tuning.prefix import Prefix
from prefix_tuning.prefix_files import library_version
from prefix_tuning.recipe import TrainSettings, train_prefix, write_metrics
from prefix_tuning.requests import (
    DEFAULT_PREFIX,
    answer_rows,
    check_unnamed,
    parse_conversation,
    prefix_folders,
    read_requests,
)

USER_ERRORS = (ValueError, TypeError, OSError, ImportError, NotImplementedError)
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with these arguments (default: the process's) and returns its exit status."""
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


def _settings(kind: type[TrainSettings], args: argparse.Namespace, **further: Any) -> TrainSettings:
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
        write_json(args.output, {**about, **scores, "texts": texts})


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
            raise ValueError(f"--device: got {device}, but torch finds {torch.cuda.device_count() or 'no'} GPU here")
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


def _check_name(file: str | None) -> None:
    if file and Path(file).is_dir():
        raise ValueError(f"--output: expected the name of a file, got the folder {file}")


def _check_folder(file: str | None) -> None:
    """Before there is work to lose, but behind whatever else may be wrong: it makes the folder."""
    if file:
        with _option("--output"):
            check_writable(Path(file).parent)


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
        raise FileNotFoundError(f"--prefix: {error}" + f"; did you mean {inside}?" * inside.is_dir()) from error
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


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str:
        says_nothing = action.default is None or isinstance(action.default, bool)
        return action.help if says_nothing else super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="prefix-tuning", description="Train, score and use prefixes of frozen language models.",
        epilog="prefix-tuning COMMAND --help says what a command takes.",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"prefix-tuning {library_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _train_options(_command(commands, train, "train a prefix on a file of prompts and completions, or conversations"))
    _distill_options(_command(commands, distill, "train a prefix that stands for a long text"))
    _evaluate_options(_command(commands, evaluate, "score a model, with or without a prefix, on a file"))
    _generate_options(_command(commands, generate, "write the answers to prompts"))
    _convert_options(_command(commands, convert, "turn an adapter of the package peft into a prefix, or a prefix into one"))
    _serve_options(_command(commands, serve, "answer requests over HTTP by vLLM's server, each with the prefix it names"))
    _command(commands, doctor, "say what this machine can run, and why not the rest").add_argument(
        "--model", metavar="NAME", help="hub id or folder: say what a prefix for it is and which backends serve its layers"
    )
    return parser


def _command(commands, run, text: str) -> argparse.ArgumentParser:
    description = text[0].upper() + text[1:] + "."
    parser = commands.add_parser(run.__name__, help=text, description=description, formatter_class=_Help)
    parser.set_defaults(run=run)
    parser.add_argument("--traceback", action="store_true", help="show where an error arose")
    return parser


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="NAME", help=f"hub id or folder; {OFFLINE_MODEL} if not given")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the model; prefixes are trained in float32")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; a GPU where there is one if not given")
    parser.add_argument("--backend", choices=available_backends(), help="attention backend; chosen per call if not given")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _train_options(parser: argparse.ArgumentParser) -> None:
    defaults = TrainSettings()
    add = parser.add_argument
    add("--train-file", required=True, help="JSON lines of prompt and completion or of messages, or E2E data; .gz too")
    add("--eval-file", help="the same for the evaluation loss")
    add("--eval-limit", type=int, metavar="N", help="evaluate on N rows drawn with --seed; all if not given")
    add("--output", required=True, metavar="FOLDER", help="where the prefix, metrics.json, loss.png and checkpoints go")
    _model_options(parser)
    add("--init", choices=("random", "text"), help="what it starts from; text if --init-text is given, else random")
    add("--init-text", metavar="TEXT", help="words of the task, whose keys and values the prefix starts from")
    add("--reparametrization", choices=("none", "mlp"), help="mlp for a random start and none for a text if not given")
    add("--hidden-size", type=int, default=defaults.hidden_size, help="of the MLP")
    add("--lr", dest="learning_rate", type=float, help="3e-2 for a text without MLP, else 1e-3 if not given")
    add("--padding-free", action=argparse.BooleanOptionalAction,
        help="rows behind one another without padding, common beginnings once; on a CPU if not said")  # fmt: skip
    _step_options(parser, defaults)


def _distill_options(parser: argparse.ArgumentParser) -> None:
    defaults = DistillSettings()
    add = parser.add_argument
    add("--text-file", required=True, help="the text, UTF-8; .gz too")
    add("--output", required=True, metavar="FOLDER",
        help="where the prefix, conversations.jsonl, metrics.json, loss.png and checkpoints go")  # fmt: skip
    _model_options(parser)
    add("--conversations", type=int, default=defaults.conversations, help="that the model has with itself about the text")
    add("--prompts-file", help="JSON lines of prompts or conversations to learn from in place of the model's own questions")
    add("--chunk-tokens", type=int, default=defaults.chunk_tokens, help="of the text, read at a time")
    add("--max-new-tokens", type=int, default=defaults.max_new_tokens, help="longest answer")
    add("--top-k", type=int, default=defaults.top_k, help="probabilities that are kept of each token of an answer")
    add("--held-out", type=float, default=defaults.held_out, help="share of the conversations that is measured instead")
    add("--lr", dest="learning_rate", type=float, default=3e-2, help="highest learning rate")
    _step_options(parser, defaults)


def _step_options(parser: argparse.ArgumentParser, defaults: TrainSettings) -> None:
    add = parser.add_argument
    add("--prefix-len", type=int, default=defaults.prefix_len, help="positions of the prefix")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="optimiser steps")
    length.add_argument("--epochs", type=float, help="passes over the rows; 3 if neither is given")
    add("--batch-size", type=int, default=defaults.batch_size, help="rows of a forward pass")
    add("--gradient-accumulation", type=int, default=1, metavar="N", help="forward passes of an optimiser step")
    add("--gradient-checkpointing", action="store_true", help="recompute the layers in the backward pass to save memory")
    add("--warmup", type=float, default=defaults.warmup, help="steps, or below 1 their share, of rising learning rate")
    add("--weight-decay", type=float, default=defaults.weight_decay, help="of AdamW")
    add("--max-grad-norm", type=float, default=defaults.max_grad_norm, help="gradients are clipped to it; 0 for not at all")
    add("--max-length", type=int, help="tokens of a row; longer prompts lose their beginning")
    add("--save-steps", type=int, default=0, metavar="N", help="checkpoint and evaluate every N steps; 0 for never")
    add("--patience", type=int, default=0, metavar="N", help="stop after N evaluations without a better loss; 0 for never")
    earlier = parser.add_mutually_exclusive_group()
    earlier.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    earlier.add_argument("--overwrite", action="store_true", help="replace the prefix and the checkpoints in --output")
    add("--report-to", default="none", help="a logger that transformers knows, such as tensorboard")


def _evaluate_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--file", required=True, help="E2E data (scored by BLEU and slot error), or rows as for training (loss and BLEU)")
    add("--prefix", metavar="FOLDER", help="a saved prefix; the plain model if not given")
    _model_options(parser)
    add("--limit", type=int, metavar="N", help="N rows drawn with --seed; all if not given")
    add("--batch-size", type=int, default=16, help="rows run together")
    add("--max-new-tokens", type=int, default=128, help="longest text")
    add("--num-beams", type=int, default=1, help="beam search above 1")
    add("--max-length", type=int, help="tokens of a row for the loss; longer prompts lose their beginning")
    add("--output", metavar="FILE", help="also write scores and texts here, as JSON")


def _generate_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--prompt", action="append", help="taken as it is: give a line end if one was trained with; may be given several times"
    )
    source.add_argument(
        "--file",
        help="JSON lines of prompt or messages, E2E data, or a prompt a line, without its line end; stdin if nothing is given",
    )
    source.add_argument("--messages", metavar="JSON", help='a conversation: [{"role": "user", "content": "…"}]')
    add(
        "--prefix", action="append", metavar="[NAME=]FOLDER",
        help='a saved prefix; the plain model if not given. Several, with names: a JSON line of --file chooses by its field '
        '"prefix", null for none; without the field it gets the one without a name, or none',
    )  # fmt: skip
    add(
        "--no-special-tokens", dest="special_tokens", action="store_false",
        help="add none to prompts: for a prefix made of a text, which begins with them",
    )  # fmt: skip
    _model_options(parser)
    add("--batch-size", type=int, default=8, help="prompts run together")
    add("--max-new-tokens", type=int, default=128, help="longest text")
    add("--num-beams", type=int, default=1, help="beam search above 1")
    add("--sample", action="store_true", help="draw tokens instead of taking the likeliest")
    add("--temperature", type=float, default=1.0, help="for --sample")
    add("--top-p", type=float, default=1.0, help="for --sample: draw from the likeliest tokens of this total probability")
    add("--output", metavar="FILE", help="JSON lines of prompt or messages and text, in place of the texts on stdout")


def _convert_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="SOURCE", help="folder or hub id of the adapter, or of the prefix")
    add("target", metavar="FOLDER", help="where the other is written")
    add("--to", choices=("prefix", "peft"), required=True, help="what is written")
    add("--task-type", choices=TASK_TYPES, help="for --to peft: what the model does, in PEFT's words; CAUSAL_LM if not given")
    add("--part", choices=("decoder", "encoder"), help="for --to prefix: encoder for BERT and its like; decoder if not given")


def _serve_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", metavar="NAME", help=f"hub id or folder; {OFFLINE_MODEL} if not given")
    add(
        "--prefix", action="append", required=True, metavar="NAME=FOLDER",
        help='a saved prefix and the name that requests choose it by, in their field "model"; may be given several times',
    )  # fmt: skip
    add("--host", help="address to listen on; all of the machine's if not given")
    add("--port", type=int, help="8000 if not given")
    add(
        "--prompt-logprobs", action="store_true",
        help="serve log-probabilities of prompts behind a prefix; decoding on a GPU is then slower for all",
    )  # fmt: skip
    add("arguments", nargs="*", metavar="ARGUMENT", help="behind -- further ones of vllm serve: -- --max-model-len 4096")


if __name__ == "__main__":
    sys.exit(main())
