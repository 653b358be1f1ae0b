"""Training a prefix with transformers.Trainer: the model stays frozen, the prefix alone is trained and saved."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import DataCollator, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from prefix_tuning.attach import Attachment, attach_prefix
from prefix_tuning.checkpointing import LayerCheckpointing
from prefix_tuning.data import IGNORED, PromptCompletionCollator, tokenize_rows, without_idle_mask
from prefix_tuning.loss import sum_loss, target_loss
from prefix_tuning.prefix import Prefix

logger = logging.getLogger(__name__)

# What works on the model that is frozen here, or would split or upload it; refused by name rather than ignored.
_REFUSED = (
    "label_smoothing_factor", "neftune_noise_alpha", "use_liger_kernel", "bf16_full_eval", "fp16_full_eval", "fsdp",
    "deepspeed", "push_to_hub",
)  # fmt: skip


class PrefixedModel(nn.Module):
    """A frozen model and the prefix attached to it, as one module whose only trainable parameters are the prefix's.

    train() puts the prefix alone in training mode. forward returns {"loss"}: the mean cross-entropy of the target tokens,
    or their sum divided by num_items_in_batch; with return_logits also "logits" [batch, length, vocabulary].
    """

    accepts_loss_kwargs = True  # Trainer passes num_items_in_batch: accumulated steps then add up to one big batch
    loss_type = "ForCausalLM"  # Trainer counts labels from the second token on

    def __init__(self, model: PreTrainedModel, prefix: Prefix):
        super().__init__()
        self.model = model.requires_grad_(False)
        self.prefix = prefix
        self.checkpointing: LayerCheckpointing | None = None
        self.train(self.training)

    def train(self, mode: bool = True) -> PrefixedModel:
        self.training = mode
        self.prefix.train(mode)
        self.model.eval()
        return self

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_logits: bool = False,
        **inputs: Any,
    ) -> dict[str, Tensor]:
        """input_ids, attention_mask, labels: int [batch, length]; further arguments go to the model."""
        with nullcontext() if self.checkpointing is None else self.checkpointing.active():
            if labels is not None and not return_logits:
                loss, count = target_loss(self.model, input_ids, labels, attention_mask, **inputs)
                outputs = {}
            else:
                logits = self.model(
                    input_ids=input_ids, attention_mask=attention_mask, use_cache=False, return_dict=True, **inputs
                ).logits
                outputs = {"logits": logits}
                if labels is None:
                    return outputs
                wanted = labels[:, 1:] != IGNORED
                loss, count = sum_loss(logits[:, :-1][wanted], labels[:, 1:][wanted]), int(wanted.sum())
        return {"loss": loss / (max(count, 1) if num_items_in_batch is None else num_items_in_batch), **outputs}

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """What Trainer calls for args.gradient_checkpointing; see LayerCheckpointing."""
        if offload:
            raise NotImplementedError("offload: saved activations cannot be moved off the device")
        if self.checkpointing is not None:
            self.checkpointing.undo()
        self.checkpointing = LayerCheckpointing(self.model, every_n_layers, **activation_checkpointing_kwargs or {})

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """The name by which older versions of transformers (5.17) call activation_checkpointing_enable."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)


class PrefixTrainer(Trainer):
    """transformers.Trainer for a prefix. Everything Trainer does around the optimiser step works as it does there.

    Args:
        model: a causal language model. Its parameters no longer require gradients afterwards; it stays in eval mode, so no
            dropout is applied.
        prefix: attached to the model until detach(), trained in place.
        args: TrainingArguments. gradient_checkpointing recomputes the layers of the frozen model; bf16 and fp16 leave the
            prefix in its own dtype.
        train_dataset, eval_dataset: rows as data.py describes them (a sequence; tokenised here, which needs
            processing_class), or datasets of {"input_ids", "labels"}. The same goes for what evaluate and predict are given.
        processing_class: the tokenizer.
        max_length: cuts prompts so that a row has no more tokens; default, and at most: what the model has positions for.
        backend, prefix_window: as for attach_prefix.
        others: as for Trainer.

    A checkpoint holds the prefix with its reparametrisation, and the state of optimiser, schedule and random numbers:
    train(resume_from_checkpoint=…) goes on as if never interrupted. save_model writes the prefix alone, for Prefix.load.

    Raises ValueError or TypeError for wrong arguments; NotImplementedError for args that would change, split or upload the
    model.
    """

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
        max_length: int | None = None,
        backend: str | None = None,
        prefix_window: str = "pinned",
        **others: Any,
    ):
        args = copy.copy(args) if args is not None else TrainingArguments(output_dir="prefix-trainer")
        _check_args(args, others)
        # In the backward pass every parameter of the prefix gets a gradient, and no buffer of the model ever changes.
        args.ddp_find_unused_parameters = bool(args.ddp_find_unused_parameters)
        args.ddp_broadcast_buffers = bool(args.ddp_broadcast_buffers)
        if data_collator is None:
            if processing_class is None:
                raise ValueError("processing_class: expected the tokenizer, or a data_collator in its place")
            data_collator = PromptCompletionCollator(processing_class)

        self.attachment: Attachment = attach_prefix(model, prefix, backend=backend, prefix_window=prefix_window)
        try:
            if train_dataset is not None and not any(p.requires_grad for p in prefix.parameters()):
                raise ValueError("prefix: none of its parameters requires a gradient; prefix.requires_grad_() lets them")
            self.prefix = prefix
            self.max_length = _max_length(model, prefix, max_length)
            super().__init__(
                PrefixedModel(model, prefix),
                args,
                data_collator=functools.partial(_collate, data_collator, _max_length(model, prefix, None)),
                train_dataset=_tokenized("train_dataset", train_dataset, processing_class, self.max_length),
                eval_dataset=_tokenized("eval_dataset", eval_dataset, processing_class, self.max_length),
                processing_class=processing_class,
                **others,
            )
        except BaseException:
            self.attachment.detach()
            raise

    def detach(self) -> None:
        """Ends the attachment and gradient checkpointing: the model is the plain model again, still frozen and in eval mode."""
        self.attachment.detach()
        if self.model.checkpointing is not None:
            self.model.checkpointing.undo()
            self.model.checkpointing = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the prefix to `output_dir`; in Trainer's own checkpoints (_internal_call) with its reparametrisation."""
        if self.args.should_save:
            self.prefix.save(output_dir or self.args.output_dir, keep_reparametrization=_internal_call)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("push_to_hub: upload the prefix alone, by prefix.push_to_hub")

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        return super().get_eval_dataloader(_tokenized("eval_dataset", eval_dataset, self.processing_class, self.max_length))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        return super().get_test_dataloader(_tokenized("test_dataset", test_dataset, self.processing_class, self.max_length))

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        if not prediction_loss_only:
            inputs = {**inputs, "return_logits": True}
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps:  # Trainer takes one more step where it resumes a finished run
            super()._run_epoch(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        saved = Prefix.load(resume_from_checkpoint)
        kinds = ["with" if p.reparametrization is not None else "without" for p in (self.prefix, saved)]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"resume_from_checkpoint: the prefix is trained {kinds[0]} a reparametrisation, the one in "
                f"{resume_from_checkpoint} was saved {kinds[1]}"
            )
        expected, found = _sizes(self.prefix), _sizes(saved)
        wrong = next((name for name in expected | found if expected.get(name) != found.get(name)), None)
        if wrong is not None:
            raise ValueError(
                f"resume_from_checkpoint: {wrong} is {found.get(wrong, 'missing')} in {resume_from_checkpoint}, expected "
                f"{expected.get(wrong, 'no such tensor')} as in the prefix that is trained"
            )
        self.prefix.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        logger.info(f"Loading the best prefix from {self.state.best_model_checkpoint} (score: {self.state.best_metric}).")
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def _collate(data_collator: DataCollator, positions: int, examples: list) -> dict[str, Any]:
    """positions: that the model has; without a mask padding takes some too."""
    batch = data_collator(examples)
    fits = "input_ids" in batch and batch["input_ids"].shape[1] <= positions
    return without_idle_mask(batch) if fits else batch


def _check_args(args: TrainingArguments, others: Mapping[str, Any]) -> None:
    refused = [name for name in _REFUSED if getattr(args, name, None)]
    if refused:
        raise NotImplementedError(f"args: {', '.join(refused)} is not served when a prefix is trained")
    if "model_init" in others:
        raise TypeError("model_init: expected a model and a prefix in its place")
    if args.n_gpu > 1:
        # One process would copy the model to every GPU by nn.DataParallel, and the copies would not see the prefix.
        logger.warning(f"{args.n_gpu} GPUs are visible and one is used; start one process for each with torchrun")
        args._n_gpu = 1


def _sizes(prefix: Prefix) -> dict[str, Any]:
    """What two prefixes must agree on for one to be loaded into the other."""
    sizes = {"prefix_len": prefix.prefix_len, "position_offset": prefix.position_offset}
    return sizes | {name: list(tensor.shape) for name, tensor in prefix.state_dict().items()}


def _max_length(model: PreTrainedModel, prefix: Prefix, max_length: int | None) -> int:
    """max_length, or the tokens that the model has positions for behind the prefix where that is less."""
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length: expected at least 1, got {max_length}")
    positions = model.config.max_position_embeddings
    left = positions - prefix.position_offset
    if left < 1:
        raise ValueError(f"prefix: it takes {prefix.position_offset} of the model's {positions} positions, which leaves none")
    return left if max_length is None else min(max_length, left)


def _tokenized(name: str, dataset: Any, tokenizer: PreTrainedTokenizerBase | None, max_length: int) -> Any:
    """Rows of text as examples; what is tokenised already, is no map-style data set or is a name goes on as it is."""
    if isinstance(dataset, Mapping):
        return {part: _tokenized(f"{name}[{part!r}]", rows, tokenizer, max_length) for part, rows in dataset.items()}
    if dataset is None or isinstance(dataset, str | torch.utils.data.IterableDataset):
        return dataset
    if len(dataset) == 0:
        raise ValueError(f"{name}: expected at least one row, got none")
    if isinstance(dataset[0], Mapping) and "input_ids" in dataset[0]:
        return dataset
    if tokenizer is None:
        raise ValueError("processing_class: expected the tokenizer, which rows of text need")
    try:
        return tokenize_rows(dataset, tokenizer, max_length)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
