"""Training a prefix with transformers.Trainer: the model stays frozen, the prefix alone is trained and saved."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    DataCollator,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import TrainOutput
from transformers.utils import find_labels

from prefix_tuning.attach import Attachment, attach_prefix
from prefix_tuning.checkpoints import last_checkpoint, load_checkpoint
from prefix_tuning.data import default_collator, tokenized, without_idle_mask
from prefix_tuning.devices import is_spread
from prefix_tuning.loss import count_targets
from prefix_tuning.padding_free import (
    EVALUATION_METHODS,
    PaddingFreeCollator,
    allowed_by,
    asked_for,
    has_own_code,
    is_dispatched,
    padding_free_collator,
)
from prefix_tuning.prefix import Prefix
from prefix_tuning.prefixed_model import PrefixedModel
from prefix_tuning.row_limits import training_length
from prefix_tuning.shapes import check_model
from prefix_tuning.stacks import sees_later_tokens
from prefix_tuning.task import Task, task_of

logger = logging.getLogger(__name__)

# What works on the model that is frozen here, or would split or upload it; refused by name rather than ignored.
_REFUSED = (
    "label_smoothing_factor", "neftune_noise_alpha", "use_liger_kernel", "bf16_full_eval", "fp16_full_eval", "fsdp",
    "deepspeed", "parallelism_config", "push_to_hub",
)  # fmt: skip


class PrefixTrainer(Trainer):
    """transformers.Trainer for a prefix. Everything Trainer does around the optimiser step works as it does there.

    Args:
        model: a causal language model, an encoder-decoder, or any served model with a loss of its own, such as one for
            classification or question answering. Its parameters no longer require gradients afterwards; it stays in eval
            mode, so no dropout is applied. A head (Prefix.for_model's modules_to_save) is trained as the prefix's own.
        prefix: attached to the model until detach(), trained in place.
        args: TrainingArguments. gradient_checkpointing recomputes the layers of the frozen model; bf16 and fp16 leave the
            prefix in its own dtype.
        train_dataset, eval_dataset: rows as data.py describes them (a sequence; tokenised here, which needs
            processing_class), or data sets, also iterable ones, of {"input_ids", "labels"}; tokens of a causal model's rows
            whose "attention_mask" is 0 are left out. The same goes for what evaluate and predict are given. Of an
            encoder-decoder the prompt is the encoder's input, the completion the decoder's. A model with its own loss takes
            tokenised rows with what its forward takes: "labels", a class or one for each token, or "start_positions" and
            "end_positions".
        processing_class: the tokenizer.
        data_collator: by default the one that pads for the model's task. One of yours gets rows that are not text as they are,
            such as rows with images, and with args.remove_unused_columns=False rows of text too, with all their columns.
        padding_free: training steps of a causal model, and evaluations without compute_metrics, read rows one behind the other
            instead of padded ones, and what several begin with once (PaddingFreeCollator): the same loss and gradients from
            fewer tokens, which is what num_input_tokens_seen then counts. None: where that was measured to be faster (on a CPU,
            where the C++ kernels serve the model; on a GPU, where steps of several rows in bfloat16 are recorded), unless there
            are a data_collator of yours, code of yours that reads batches (a loss, a step), an iterable data set, or
            dispatch_batches in several processes.
        max_length: cuts the prompts of rows of text so that a row has no more tokens, and no row that is tokenised already;
            default, and at most: what the model has positions for.
        backend, prefix_window: as for attach_prefix.
        cuda_graphs: as for PrefixedModel.
        others: as for Trainer.

    Under torchrun processes share the steps by DDP: a step is one batch of each of them. An evaluation gives what one process
    gives with batches of that size, except for rows that fill up the last batch. A model that accelerate spreads over
    devices (device_map) stays where it is, in one process. Callbacks get a PrefixedModel as `model`; what can generate is its
    attribute model.

    On a GPU the host waits for no step of a causal model whose loss is not logged (args.logging_steps), and prepares the next
    batches meanwhile. It does wait without args.dataloader_pin_memory, with code of yours that reads batches, under fp16,
    for batches with an attention mask that hides more than padding on the right, and in the rest of an epoch that is resumed.

    A checkpoint holds the prefix with its reparametrisation, and the state of optimiser, schedule and random numbers:
    train(resume_from_checkpoint=…) goes on as if never interrupted, except for the order of rows under group_by_length and
    dispatch_batches, which Trainer does not restore. save_model writes the prefix alone, for Prefix.load.

    Raises ValueError or TypeError for wrong arguments; NotImplementedError for args, and for a launcher of accelerate, that
    would change, split or upload the model.
    """

    _filters = False  # what args.logging_nan_inf_filter says, during training

    def __init__(
        self,
        model: PreTrainedModel,
        prefix: Prefix,
        args: TrainingArguments | None = None,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        data_collator: DataCollator | None = None,
        padding_free: bool | None = None,
        max_length: int | None = None,
        backend: str | None = None,
        prefix_window: str = "pinned",
        cuda_graphs: bool = True,
        **others: Any,
    ):
        check_model(model)
        args = copy.copy(args) if args is not None else TrainingArguments(output_dir="prefix-trainer")
        _check_args(model, args, others)
        if not isinstance(prefix, Prefix):
            raise TypeError(f"prefix: expected a Prefix, got {type(prefix).__name__}")
        self.task = task_of(model)
        # In the backward pass every parameter of the prefix gets a gradient, and no buffer of the model ever changes.
        args.ddp_find_unused_parameters = bool(args.ddp_find_unused_parameters)
        args.ddp_broadcast_buffers = bool(args.ddp_broadcast_buffers)
        args.dataloader_pin_memory &= args.device.type != "cpu"  # where it only warns
        if args.dataloader_pin_memory and args.device.type == "cuda":
            # Else each batch's copying waits until the steps before are done.
            args.accelerator_config = dataclasses.replace(args.accelerator_config, non_blocking=True)
        self._padding_free_wanted = asked_for(padding_free, data_collator)
        if processing_class is not None and not callable(processing_class):
            raise TypeError(f"processing_class: expected a tokenizer, got {type(processing_class).__name__}")
        own_collator = data_collator is not None
        if not own_collator:
            if processing_class is None:
                raise ValueError("processing_class: expected the tokenizer, or a data_collator in its place, got neither")
            data_collator = default_collator(model, self.task, processing_class)

        self.attachment: Attachment = attach_prefix(model, prefix, backend=backend, prefix_window=prefix_window)
        try:
            if train_dataset is not None and not any(p.requires_grad for p in prefix.parameters()):
                raise ValueError(
                    "prefix: expected parameters that require a gradient, got none; prefix.requires_grad_() lets them"
                )
            self.prefix = prefix
            self.max_length = training_length(model, prefix, max_length)
            self._tokenized = partial(
                tokenized, task=self.task, max_length=self.max_length, own_collator=own_collator,
                all_columns=not args.remove_unused_columns,
            )  # fmt: skip
            if args.label_names is None:
                args.label_names = find_labels(type(self.attachment.model))
            super().__init__(
                PrefixedModel(model, prefix, cuda_graphs),
                args,
                data_collator=self._collator(data_collator, model, args),
                train_dataset=self._tokenized("train_dataset", train_dataset, processing_class),
                eval_dataset=self._tokenized("eval_dataset", eval_dataset, processing_class),
                processing_class=processing_class,
                **others,
            )
            self._check_launcher()
            dynamo = getattr(self.accelerator.state, "dynamo_plugin", None)
            self._compiled = args.torch_compile or getattr(dynamo, "backend", DynamoBackend.NO) != DynamoBackend.NO
            self._padded_collator = self.data_collator
            self._padding_free_collator = partial(
                padding_free_collator, model, compiled=self._compiled, slides=prefix_window == "peft", backend=backend,
                rows=args.per_device_train_batch_size,
            )  # fmt: skip
            if padding_free:
                self._padding_free()  # where it cannot be, the constructor says so
        except BaseException:
            self.attachment.detach()
            raise

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As Trainer.train. With resume_from_checkpoint=True the run goes on from its last whole checkpoint: one that was being
        written when the run was killed is passed over.

        Parameters of the model that require gradients again, as PEFT lets adapters that it switches on, no longer do.

        Raises ValueError while the prefix is switched off, which would train nothing.
        """
        if self.attachment.switched_off:
            raise ValueError("attachment: the prefix is switched off; enable(True) comes before training")
        self.attachment.model.requires_grad_(False)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(Path(self.args.output_dir))
        self._forget_evaluation()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def detach(self) -> None:
        """Ends the attachment and gradient checkpointing: the model is the plain model again, still frozen and in eval mode."""
        self.attachment.detach()
        if self.model.graphs is not None:
            self.model.graphs.clear()
        if self.model.checkpointing is not None:
            self.model.checkpointing.undo()
            self.model.checkpointing = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the prefix to `output_dir`; in Trainer's own checkpoints (_internal_call) with its reparametrisation."""
        if self.args.should_save:
            self.prefix.save(output_dir or self.args.output_dir, keep_reparametrization=_internal_call)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("push_to_hub: upload the prefix alone, by prefix.push_to_hub")

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("create_model_card: Trainer's would describe the frozen model; a prefix has none")

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("hyperparameter_search: make a prefix and a PrefixTrainer for each trial")

    def get_train_dataloader(self) -> DataLoader:
        with self._collating(lambda: self._padding_free() or self._counting(self.data_collator)):
            return super().get_train_dataloader()

    @contextmanager
    def _collating(self, collator: Callable[[], DataCollator]) -> Iterator[None]:
        """Within, data_collator is another one, if nobody has set one of theirs."""
        padded = self.data_collator
        if padded is self._padded_collator:
            self.data_collator = collator()
        try:
            yield
        finally:
            self.data_collator = padded

    def _padding_free(self) -> PaddingFreeCollator | None:
        """What makes batches without padding, None for padded ones; by what holds when it is asked, as training begins."""
        return self._padding_free_collator(allowed_by(self, self._padding_free_wanted), recorded=self._is_recorded())

    def _is_recorded(self) -> bool:
        """Whether training steps on a GPU are to be recorded as CUDA graphs."""
        recomputes = any(getattr(self.args, name, False) for name in ("activation_checkpointing", "gradient_checkpointing"))
        return self.model.graphs is not None and not (self.args.fp16 or recomputes)

    def _counting(self, data_collator: DataCollator) -> DataCollator:
        """One that counts the targets of a causal model's batches before they go to a GPU, where the host would wait for it."""
        counts = self.args.device.type != "cpu" and self.task is Task.CAUSAL
        plain = not (self._compiled or is_dispatched(self) or has_own_code(self))
        return partial(_counted, data_collator) if counts and plain else data_collator

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        dataset = self._tokenized("eval_dataset", eval_dataset, self.processing_class)
        with self._collating(lambda: self._padding_free_evaluation(dataset) or self.data_collator):
            return super().get_eval_dataloader(dataset)

    def _padding_free_evaluation(self, dataset: Any) -> PaddingFreeCollator | None:
        """As _padding_free, for an evaluation: of the loss alone, where Trainer does not count rows by the batches."""
        dataset = self.eval_dataset if dataset is None else dataset
        dataset = self.eval_dataset[dataset] if isinstance(dataset, str) else dataset
        reads = self.compute_metrics is not None or has_own_code(self, EVALUATION_METHODS)
        if reads or isinstance(dataset, IterableDataset) or is_dispatched(self):
            return None
        return self._padding_free_collator(self._padding_free_wanted, recorded=False)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        return super().get_test_dataloader(self._tokenized("test_dataset", test_dataset, self.processing_class))

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        if not prediction_loss_only:
            inputs = {**inputs, "return_logits": True}
        # A batch is averaged by itself: beside the last another process may hold rows that only fill up.
        with _changed(self.args, average_tokens_across_devices=False):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As Trainer.training_step. What args.logging_nan_inf_filter asks for is done with the loss where it lies: to do it
        Trainer waits for each step before the prefix is updated."""
        loss = super().training_step(*args, **kwargs)
        if not self._filters_itself():
            return loss
        so_far = self._tr_loss / (1 + self.state.global_step - self._globalstep_last_logged)
        return torch.where(loss.isfinite(), loss, so_far.to(loss.device))

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not is_spread(self.attachment.model):
            super()._move_model_to_device(model, device)

    def _check_launcher(self) -> None:
        """What `accelerate launch` asks for reaches Trainer beside its arguments."""
        asked = {
            "FSDP": self.is_fsdp_enabled, "DeepSpeed": self.is_deepspeed_enabled,
            "parallelism_config": getattr(self.accelerator, "parallelism_config", None) is not None,
        }  # fmt: skip
        refused = ", ".join(name for name, on in asked.items() if on)
        if refused:
            raise NotImplementedError(f"accelerate: {refused} would split the model, which is not served; launch without")

    def _collator(self, data_collator: DataCollator, model: PreTrainedModel, args: TrainingArguments) -> DataCollator:
        counted = args.include_num_input_tokens_seen == "non_padding"  # by the mask
        if self.task is not Task.CAUSAL or counted or sees_later_tokens(model.config):
            return data_collator
        return partial(_collate, data_collator, training_length(model, self.prefix, None))

    def _set_signature_columns_if_needed(self) -> None:
        """What a row may hold is what the model inside takes."""
        if self._signature_columns is None:
            columns = inspect.signature(self.attachment.model.forward).parameters
            self._signature_columns = [*columns, "label", "label_ids", "teacher_ids", "teacher_probs", *self.label_names]

    def _forget_evaluation(self) -> None:
        """A model that an evaluation has prepared counts as prepared, and its training would do without DDP."""
        wrapped = getattr(self.model_wrapped, "_orig_mod", self.model_wrapped)
        if self.args.world_size > 1 and not isinstance(wrapped, DistributedDataParallel):
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)  # autocast comes around it again
            self.model_wrapped, self.model._is_accelerate_prepared = self.model, False

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        if "cu_seqlens" in inputs:  # no token is padding, also where a row's end has the id of padding
            inputs = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
        super()._track_num_input_tokens(inputs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # A finished run is resumed: Trainer takes one more step, and a stream has epochs without end.
            self.control.should_training_stop = True
            return
        self._filters = self.args.logging_nan_inf_filter
        with _changed(self.args, logging_nan_inf_filter=self._filters and not self._filters_itself()):
            super()._run_epoch(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        with _changed(self.args, logging_nan_inf_filter=self._filters):
            super()._maybe_log_save_evaluate(*args, **kwargs)

    def _filters_itself(self) -> bool:
        """Whether losses that are not finite are left out here: all that there are, unless a subclass has steps of its own."""
        return self._filters and type(self).training_step is PrefixTrainer.training_step

    # Trainer looks for gradients among all parameters of the frozen model, which takes a millisecond each time.

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return super()._clip_grad_norm(self.prefix)

    def _get_grad_norm(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return super()._get_grad_norm(self.prefix, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_checkpoint(self.prefix, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        logger.info(f"Loading the best prefix from {self.state.best_model_checkpoint} (score: {self.state.best_metric}).")
        self._load_from_checkpoint(self.state.best_model_checkpoint)


@contextmanager
def _changed(args: TrainingArguments, **values: Any) -> Iterator[None]:
    """Within, the arguments have these values."""
    before = {name: getattr(args, name) for name in values}
    try:
        for name, value in values.items():
            setattr(args, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(args, name, value)


def _collate(data_collator: DataCollator, positions: int | None, examples: list) -> dict[str, Any]:
    """A batch, without an attention mask that hides nothing where the model has positions for padding too.

    Args:
        positions: that the model has, None for any number; without a mask padding takes some too.
    """
    batch = data_collator(examples)
    fits = "input_ids" in batch and (positions is None or batch["input_ids"].shape[1] <= positions)
    return without_idle_mask(batch) if fits else batch


def _counted(data_collator: DataCollator, examples: list) -> dict[str, Any]:
    """A batch of a causal model with the number of its targets."""
    batch = data_collator(examples)
    labels = batch.get("labels")
    counts = isinstance(labels, Tensor) and labels.dim() == 2 and labels.device.type == "cpu"
    return {**batch, "num_targets": count_targets(labels)} if counts else batch


def _check_args(model: nn.Module, args: TrainingArguments, others: Mapping[str, Any]) -> None:
    if not isinstance(args, TrainingArguments):
        raise TypeError(f"args: expected TrainingArguments, got {type(args).__name__}")
    refused = [name for name in _REFUSED if getattr(args, name, None)]
    if refused:
        raise NotImplementedError(f"args: {', '.join(refused)} is not served when a prefix is trained")
    if "model_init" in others:
        raise TypeError("model_init: expected none, but a model and a prefix in its place, got one")
    if args.n_gpu > 1:
        # One process would copy the model to every GPU by nn.DataParallel, and the copies would not see the prefix.
        if not is_spread(model):
            logger.warning(f"{args.n_gpu} GPUs are visible and one is used; start one process for each with torchrun")
        args._n_gpu = 1
