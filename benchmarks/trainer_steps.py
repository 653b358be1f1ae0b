"""A step as transformers.Trainer takes it, of a whole run: PrefixTrainer, and Trainer around PEFT's model, on the same rows.

What Trainer does between two steps counts too: batches and their way to the device, the gradients' norm, optimiser, callbacks.
Nothing is logged, saved or evaluated meanwhile. Under Trainer PEFT's model drops out where its config says so, as GPT-2's does.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import measure
from prefix_tuning import PrefixTrainer
from prefix_tuning.data import PromptCompletionCollator

WARM_UP = 16  # steps, in which each of four batches comes four times: a shape is recorded when it comes for the second time
WINDOWS, WINDOW = 3, 8  # samples, and steps of one

Example = Mapping[str, Sequence[int]]


def examples_of(batches: Sequence[Mapping[str, Tensor]]) -> list[Example]:
    """The rows of padded batches."""
    rows = []
    for batch in batches:
        lengths = batch["attention_mask"].sum(1).tolist()
        rows += [
            {name: batch[name][row, :length].tolist() for name in ("input_ids", "labels")} for row, length in enumerate(lengths)
        ]
    return rows


def trainer_seconds(
    model: nn.Module, prefix: nn.Module | None, examples: Sequence[Example], batch: int, learning_rate: float
) -> dict[str, Any]:
    """The seconds of a step, as measure.summary.

    Args:
        model: a plain one, whose prefix is trained; or with prefix=None one that Trainer trains as it is.
        batch: rows of a step, which takes the examples in their order, again and again.
    """
    clock, steps = _Clock(model.device), WARM_UP + WINDOWS * WINDOW
    rows = [examples[index % len(examples)] for index in range(steps * batch)]
    make = partial(PrefixTrainer, model, prefix, processing_class=_tokenizer())
    if prefix is None:
        make = partial(Trainer, model, data_collator=PromptCompletionCollator(_tokenizer()))
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=batch, learning_rate=learning_rate, logging_strategy="no",
            save_strategy="no", report_to="none", disable_tqdm=True, train_sampling_strategy="sequential",
            use_cpu=model.device.type == "cpu",
        )  # fmt: skip
        trainer = make(args=args, callbacks=[clock], train_dataset=rows)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        if prefix is not None:
            trainer.detach()
    return measure.summary(clock.samples, WINDOW)


def _tokenizer() -> PreTrainedTokenizerFast:
    """It is asked for the token that pads alone: the rows are tokens already."""
    words = Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>")


class _Clock(TrainerCallback):
    def __init__(self, device: torch.device):
        self.device, self.samples, self._begin = device, [], 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self._stamp(state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        self._stamp(state.global_step)

    def _stamp(self, steps: int) -> None:
        """Waits for the device where a window ends."""
        if steps < WARM_UP or (steps - WARM_UP) % WINDOW:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if steps > WARM_UP:
            self.samples.append((now - self._begin) / WINDOW)
        self._begin = now
