"""The arguments of the command: what each of its commands takes and says about it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch

from prefix_kernels import available_backends
from prefix_tuning.distill import DistillSettings
from prefix_tuning.offline_model import OFFLINE_MODEL
from prefix_tuning.peft_adapters import TASK_TYPES
from prefix_tuning.prefix_files import library_version
from prefix_tuning.recipe import TrainSettings

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str:
        says_nothing = action.default is None or isinstance(action.default, bool)
        return action.help if says_nothing else super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def command_parser(runs: Sequence[Callable[[argparse.Namespace], None]]) -> argparse.ArgumentParser:
    """The parser of the command, whose namespaces have as `run` the function with the name of what is to be done."""
    parser = _Parser(
        prog="prefix-tuning", description="Train, score and use prefixes of frozen language models.",
        epilog="prefix-tuning COMMAND --help says what a command takes.",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"prefix-tuning {library_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for run in runs:
        text, add_options = COMMANDS[run.__name__]
        command = commands.add_parser(
            run.__name__, help=text, description=text[0].upper() + text[1:] + ".", formatter_class=_Help
        )
        command.set_defaults(run=run)
        command.add_argument("--traceback", action="store_true", help="show where an error arose")
        add_options(command)
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
        help="rows behind one another without padding, common beginnings once; on a CPU, and on a GPU in bfloat16, "
        "if not said")  # fmt: skip
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
    add("--held-out", type=float, default=defaults.held_out, help="share of the conversations to measure on, not to train on")
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
    add(
        "--save-steps",
        type=int,
        default=0,
        metavar="N",
        help="checkpoint and evaluate every N steps; 0 for no checkpoint, and one evaluation at the end",
    )
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
    add("--output", metavar="FILE", help="also write scores, and each row with its text, here as JSON")


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


def _doctor_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="NAME", help="hub id or folder: say what a prefix for it is and which backends serve its layers"
    )


COMMANDS = {  # what it does, and what it takes
    "train": ("train a prefix on a file of prompts and completions, or conversations", _train_options),
    "distill": ("train a prefix that stands for a long text", _distill_options),
    "evaluate": ("score a model, with or without a prefix, on a file", _evaluate_options),
    "generate": ("write the answers to prompts", _generate_options),
    "convert": ("turn an adapter of the package peft into a prefix, or a prefix into one", _convert_options),
    "serve": ("answer requests over HTTP by vLLM's server, each with the prefix it names", _serve_options),
    "doctor": ("say what this machine can run, and why not the rest", _doctor_options),
}
