"""One training run, from rows of text to a saved prefix with its numbers. The command line and the demo are calls of it."""

from __future__ import annotations

import dataclasses
import math
import shutil
import statistics
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer import OPTIMIZER_NAME

from prefix_kernels import available_backends
from prefix_tuning.checkpoints import checkpoints, last_checkpoint
from prefix_tuning.data import iter_rows
from prefix_tuning.explain import explain_training
from prefix_tuning.files import check_writable, write_json
from prefix_tuning.prefix import Prefix
from prefix_tuning.prefix_files import CONFIG_FILE
from prefix_tuning.run_callbacks import LossBar, StepClock, StepLosses
from prefix_tuning.shapes import checked_int, checked_number
from prefix_tuning.train import PrefixTrainer

METRICS_FILE = "metrics.json"
LOGGED_STEPS = 10  # together on a GPU: the host waits for what is logged


@dataclass(frozen=True)
class TrainSettings:
    """How a prefix is made and trained. None: the value that the line says.

    Attributes:
        init: "text" (the keys and values of init_text) or "random"; None: "text" where init_text is given.
        reparametrization: "mlp" or "none"; None: "mlp" for a random prefix, "none" for a text's.
        learning_rate: None is 1e-3 with an MLP, 3e-2 for keys and values that start from a text, 1e-3 from random.
        steps, epochs: optimiser steps, or passes over the rows; at most one of them, None for both: 3 passes.
        warmup: steps (1 or more) or their share (below 1, rounded up) in which the learning rate rises, from 0 in the first of
            them; then it falls linearly. A run of one step has none.
        padding_free: as for PrefixTrainer.
        save_steps: a checkpoint, and an evaluation where there are rows for it, every so many steps; 0: none.
        patience: stop after so many evaluations without a better loss; 0: never.
        report_to: a logger that transformers knows and that is installed, "all" of those or "none".
    """

    prefix_len: int = 16
    init: str | None = None
    init_text: str | None = None
    reparametrization: str | None = None
    hidden_size: int = 512
    learning_rate: float | None = None
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 8
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    padding_free: bool | None = None
    warmup: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_length: int | None = None
    save_steps: int = 0
    patience: int = 0
    backend: str | None = None
    seed: int = 0
    report_to: str = "none"

    def resolved(self) -> TrainSettings:
        """The same with every None replaced that has a rule; ValueError for settings that contradict each other."""
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"steps: expected steps or epochs, got both ({self.steps} and {self.epochs})")
        counts = ("prefix_len", "hidden_size", "steps", "batch_size", "gradient_accumulation", "max_length")
        least = dict.fromkeys(counts, 1) | dict.fromkeys(("save_steps", "patience", "seed"), 0)
        floats = ("epochs", "learning_rate", "warmup", "weight_decay", "max_grad_norm")
        given = {name: value for name in (*least, *floats) if (value := getattr(self, name)) is not None}
        numbers = {
            name: checked_int(name, value, least[name]) if name in least else checked_number(name, value)
            for name, value in given.items()
        }
        for name in ("epochs", "learning_rate"):
            if name in numbers and not numbers[name] > 0:
                raise ValueError(f"{name}: expected more than 0, got {numbers[name]}")
        for name in ("warmup", "weight_decay", "max_grad_norm"):
            if not numbers[name] >= 0:
                raise ValueError(f"{name}: expected at least 0, got {numbers[name]}")
        for name in ("epochs", "learning_rate", "warmup", "weight_decay"):
            if numbers.get(name) == math.inf:
                raise ValueError(f"{name}: expected a finite number, got inf")
        for name, choices in (("init", ("text", "random")), ("reparametrization", ("mlp", "none"))):
            if getattr(self, name) not in (None, *choices):
                raise ValueError(f"{name}: expected {' or '.join(choices)}, got {getattr(self, name)!r}")
        init = self.init or ("random" if self.init_text is None else "text")
        if init == "text" and self.init_text is None:
            raise ValueError("init_text: expected the text that init 'text' starts from, got None")
        if init == "random" and self.init_text is not None:
            raise ValueError(f"init_text: expected None beside init 'random', got {self.init_text!r}")
        if self.patience and not self.save_steps:
            raise ValueError(f"patience: expected save_steps beside it, which says when to evaluate, got {self.patience} alone")
        if self.backend not in (None, *available_backends()):
            raise ValueError(f"backend: expected one of {', '.join(available_backends())}, got {self.backend!r}")
        loggers = ("none", "all", *get_available_reporting_integrations())
        if self.report_to not in loggers:
            raise ValueError(f"report_to: expected one of {', '.join(loggers)} (what is installed), got {self.report_to!r}")
        mlp = self.reparametrization or ("none" if init == "text" else "mlp")
        rules = {"learning_rate": 3e-2 if mlp == "none" and init == "text" else 1e-3}
        if self.steps is None:
            rules["epochs"] = 3.0
        return dataclasses.replace(self, init=init, reparametrization=mlp, **rules | numbers)


def train_prefix(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    output: str | Path,
    settings: TrainSettings,
    *,
    eval_rows: Sequence[Mapping[str, Any]] | None = None,
    prefix: Prefix | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> tuple[Prefix, dict[str, Any]]:
    """Trains a prefix on rows of text (as in data.py) and writes it to `output`/prefix; checkpoints go to `output`.

    With eval_rows and save_steps, the prefix with the lowest evaluation loss is the one that is kept.

    Args:
        prefix: what start_prefix has made for these settings, where somebody needs it before.
        resume: go on from the last checkpoint in `output`, with the same rows and settings, of which more steps or epochs may
            be asked for; where that is the end of the run, nothing is trained.
        overwrite: remove an earlier run's checkpoints, replace its prefix at the end.

    Returns the prefix and its numbers: losses (one a step), eval_losses [[step, loss], …], seconds_per_step (of this call's
    steps; NaN without any), trainable_parameters, trainable_share (of model and prefix), prefix_parameters, backend, steps,
    settings. The model is the plain model again afterwards.

    Raises ValueError for wrong settings and rows, where checkpoints are missing or damaged (resume) or, as may a prefix, stand
    in the way (otherwise), and for a run that diverged, whose prefix is not written; OSError, before anything is trained, for
    an output that is no folder or cannot be written to.
    """
    settings, output = settings.resolved(), Path(output)
    arguments = check_run(model, output, settings, resume, overwrite, evaluate=eval_rows is not None)
    prefix = start_prefix(model, tokenizer, settings) if prefix is None else prefix
    clock, losses = StepClock(), StepLosses()
    callbacks: list[TrainerCallback] = [clock, losses]
    if settings.patience:
        callbacks.append(EarlyStoppingCallback(settings.patience))
    if progress:
        callbacks.append(LossBar())
    trainer = _Trainer(
        model, prefix, arguments, train_dataset=rows, eval_dataset=eval_rows, processing_class=tokenizer,
        padding_free=settings.padding_free, max_length=settings.max_length, backend=settings.backend, callbacks=callbacks,
    )  # fmt: skip
    trainer.step_losses = losses
    trainer.remove_callback(PrinterCallback)  # stands in for transformers' own bar, and writes to stdout
    try:
        check_writable(output)
        if overwrite and arguments.should_save:
            for checkpoint in checkpoints(output):
                shutil.rmtree(checkpoint)
        trainer.train(resume_from_checkpoint=resume or None)
        if eval_rows is not None and not settings.save_steps:
            trainer.evaluate()
    finally:
        trainer.detach()
    history = trainer.state.log_history
    if not all(bool(parameter.isfinite().all()) for parameter in prefix.parameters()):
        lost = (entry["step"] for entry in history if not math.isfinite(entry.get("loss", 0.0)))
        step = next(lost, trainer.state.global_step)
        raise ValueError(
            f"learning_rate: with {settings.learning_rate:g} the run diverged by step {step}; its prefix is not finite and was "
            "not written; take a lower rate"
        )
    trainer.save_model(str(output / "prefix"))

    trained = sum(p.numel() for p in prefix.parameters())
    frozen = sum(p.numel() for p in model.parameters())
    length = round(statistics.median(len(example["input_ids"]) for example in iter_rows(trainer.train_dataset)))
    reasons = explain_training(
        model, next(prefix.parameters()).dtype, batch=settings.batch_size, length=length,
        prefix_len=settings.prefix_len, backend=settings.backend,
    )  # fmt: skip
    return prefix, {
        "losses": [entry["loss"] for entry in history if "loss" in entry],
        "eval_losses": [[entry["step"], entry["eval_loss"]] for entry in history if "eval_loss" in entry],
        "seconds_per_step": clock.seconds / clock.steps if clock.steps else math.nan,
        "trainable_parameters": trained,
        "trainable_share": trained / (trained + frozen),
        "prefix_parameters": sum(t.numel() for part in prefix.parts for pair in prefix.layers(part) for t in pair),
        "backend": next(name for name, reason in reasons.items() if reason == "chosen"),
        "steps": trainer.state.global_step,
        "settings": dataclasses.asdict(settings),
    }


def start_prefix(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: TrainSettings) -> Prefix:
    """The prefix that training with these settings, resolved, starts from."""
    return Prefix.for_model(
        model, settings.prefix_len, init=settings.init, text=settings.init_text, tokenizer=tokenizer,
        reparametrization=None if settings.reparametrization == "none" else settings.reparametrization,
        hidden_size=settings.hidden_size, seed=settings.seed,
    )  # fmt: skip


def check_run(
    model: PreTrainedModel, output: Path, settings: TrainSettings, resume: bool, overwrite: bool, *, evaluate: bool
) -> TrainingArguments:
    """The arguments of a run with these settings, resolved; ValueError where it cannot be, as train_prefix says."""
    arguments = _arguments(model, output, settings, evaluate=evaluate)
    _check_output(output, resume, overwrite)
    if resume:
        _check_optimizer(Path(last_checkpoint(output)), settings)
    return arguments


def write_metrics(output: str | Path, metrics: Mapping[str, Any]) -> Path:
    """Writes `output`/metrics.json."""
    path = Path(output) / METRICS_FILE
    write_json(path, metrics)
    return path


def _check_output(output: Path, resume: bool, overwrite: bool) -> None:
    found = checkpoints(output)
    if resume and overwrite:
        raise ValueError("resume: expected resume or overwrite, got both")
    if resume and not found:
        raise ValueError(f"resume: expected a checkpoint to go on from, got none in {output}")
    if resume:
        files = sorted(Path(last_checkpoint(output)).glob("*.pt*"))
        damaged = next((file for file in files if not zipfile.is_zipfile(file)), None)
        if damaged is not None:
            raise ValueError(f"resume: {damaged} is cut short or damaged; remove {damaged.parent} to go on from an earlier one")
    held = ["checkpoints"] * bool(found) + ["prefix"] * (output / "prefix" / CONFIG_FILE).exists()
    if held and not resume and not overwrite:
        raise ValueError(
            f"output: {output} holds the {' and the '.join(held)} of an earlier run; resume that, overwrite it or take another "
            "folder"
        )


class _Trainer(PrefixTrainer):
    """One whose run may be a single step, and which hands on the loss of each."""

    step_losses: StepLosses

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        if num_training_steps == 1 and self.args.warmup_steps < 1:  # it would be the warm-up, at a rate of 0
            self.args.warmup_steps = 0
        return super().create_scheduler(num_training_steps, optimizer)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.step_losses.add(loss)
        return loss


def _check_optimizer(checkpoint: Path, settings: TrainSettings) -> None:
    """ValueError where the optimiser of a checkpoint would go on with other numbers than the settings say."""
    file = checkpoint / OPTIMIZER_NAME
    if not file.exists():  # then training goes on with a new one
        return
    group = torch.load(file, map_location="cpu", weights_only=True)["param_groups"][0]
    for name, value in (("learning_rate", group["initial_lr"]), ("weight_decay", group["weight_decay"])):
        if value != getattr(settings, name):
            raise ValueError(f"{name}: expected {value:g}, with which {checkpoint} goes on, got {getattr(settings, name):g}")


def _arguments(model: PreTrainedModel, output: Path, settings: TrainSettings, *, evaluate: bool) -> TrainingArguments:
    parameter = next(model.parameters())
    on_cpu, dtype = parameter.device.type == "cpu", parameter.dtype
    if dtype == torch.float16 and on_cpu:
        raise ValueError("dtype: expected a GPU to train in float16 (its loss is scaled there), got the CPU; take bfloat16")
    if settings.patience and not evaluate:
        raise ValueError(
            f"patience: expected eval_rows beside it, whose loss tells when to stop, got {settings.patience} alone"
        )
    strategy = "steps" if settings.save_steps else "no"
    # Newer versions of transformers (5.24) call gradient checkpointing activation checkpointing.
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    recompute = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in names)
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=settings.steps or -1,
        num_train_epochs=settings.epochs or 1.0,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        fp16=dtype == torch.float16,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy=strategy,
        save_steps=settings.save_steps or 1,
        save_total_limit=2,
        eval_strategy=strategy if evaluate else "no",
        eval_steps=settings.save_steps or None,
        load_best_model_at_end=evaluate and bool(settings.save_steps),
        metric_for_best_model="loss" if evaluate else None,
        greater_is_better=False if evaluate else None,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        seed=settings.seed,
        report_to=settings.report_to,
        disable_tqdm=True,
        **{recompute: settings.gradient_checkpointing},
    )
    if arguments.device.type != "cpu" and arguments.world_size == 1:  # else the losses of the others would be missing
        arguments.logging_steps = LOGGED_STEPS
    if parameter.device.index and parameter.device != arguments.device:
        raise ValueError(
            f"device: expected the model on {arguments.device}, where training runs, got it on {parameter.device}; choose the "
            "GPU with CUDA_VISIBLE_DEVICES"
        )
    return arguments
