"""What watches a training run: its time, its losses, its progress bar."""

from __future__ import annotations

import time

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import TrainerCallback


class StepClock(TrainerCallback):
    """Time spent in optimiser steps and on the way from one to the next, without evaluations and checkpoints."""

    def __init__(self) -> None:
        self.seconds, self.steps = 0.0, 0
        self._begin: float | None = None

    def on_step_begin(self, args, state, control, **kwargs):
        if self._begin is None:
            self._begin = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1
        if control.should_evaluate or control.should_save or control.should_training_stop:
            if args.device.type == "cuda":
                torch.cuda.synchronize(args.device)
            self.seconds, self._begin = self.seconds + time.perf_counter() - self._begin, None


class StepLosses(TrainerCallback):
    """Keeps the loss of each step on the device until Trainer logs their mean, and puts them into the log in its place.

    So the host, which waits for what it logs, waits for no other step. Asks for a log before whatever saves or reads it.
    """

    def __init__(self) -> None:
        self._of_step: Tensor | None = None  # the sum of its batches so far
        self._steps: list[Tensor] = []

    def add(self, loss: Tensor) -> None:
        """Of a batch, divided by the number of batches of the step."""
        self._of_step = loss if self._of_step is None else self._of_step + loss

    def on_step_end(self, args, state, control, **kwargs):
        self._steps.append(self._of_step)
        self._of_step = None
        if control.should_evaluate or control.should_save or control.should_training_stop:
            control.should_log = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in (logs or {}):
            return
        if len(self._steps) > 1:
            losses, mean = torch.stack(self._steps).tolist(), state.log_history.pop()
            first = state.global_step - len(losses) + 1
            state.log_history += [{"loss": loss, "step": first + index} for index, loss in enumerate(losses[:-1])]
            state.log_history.append(mean | {"loss": losses[-1]})
        self._steps.clear()


class LossBar(TrainerCallback):
    """A progress bar over the optimiser steps with the latest losses, in one line."""

    def on_train_begin(self, args, state, control, **kwargs):
        self._losses: dict[str, str] = {}
        self._bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="training", unit="step", dynamic_ncols=True,
            disable=not state.is_world_process_zero,
        )  # fmt: skip

    def on_step_end(self, args, state, control, **kwargs):
        self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = {name: f"{logs[name]:.3f}" for name in ("loss", "eval_loss") if name in (logs or {})}
        if shown:
            self._losses |= shown
            self._bar.set_postfix(self._losses)

    def on_train_end(self, args, state, control, **kwargs):
        self._bar.close()
