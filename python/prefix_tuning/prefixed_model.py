"""A frozen model and its prefix as one module: what a training step calls, for a loss whose gradients are the prefix's."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefix_tuning.checkpointing import LayerCheckpointing
from prefix_tuning.data import IGNORED, without_idle_mask
from prefix_tuning.graphed_training import GraphedSteps
from prefix_tuning.loss import (
    count_targets,
    distillation_loss,
    divergences,
    encoder_decoder_loss,
    sum_loss,
    target_loss,
)
from prefix_tuning.masks import idle_mask
from prefix_tuning.packs import NEEDS_PADDING, Pack, current_pack, packed
from prefix_tuning.padding_free import why_padded
from prefix_tuning.positions import new_tokens
from prefix_tuning.prefix import Prefix
from prefix_tuning.row_limits import training_length
from prefix_tuning.shapes import checked_int
from prefix_tuning.task import Task, task_of


class PrefixedModel(nn.Module):
    """A frozen model and the prefix attached to it, as one module whose only trainable parameters are the prefix's.

    PrefixTrainer makes one of its own; around it stands a training loop of yours:

        with attach_prefix(model, prefix):
            trained = PrefixedModel(model, prefix)
            for batch in batches:  # input_ids, labels (−100 where no loss is), and attention_mask where rows are padded
                trained(**batch)["loss"].backward()

    train() puts the prefix alone in training mode. forward returns {"loss"}. For a model that writes text, causal or
    encoder-decoder, that is the mean cross-entropy of the target tokens, or their sum divided by num_items_in_batch, and
    with return_logits there are also "logits" [batch, length, vocabulary]. Any other model has its own loss, and its logits
    come with it: "logits", or "start_logits" and "end_logits".

    Args:
        cuda_graphs: on a GPU a training step of a causal model is replayed as a CUDA graph where it can be (GraphedSteps). The
            model's own code then runs for new shapes of batches alone; with forward hooks of others it always does.

    Raises ValueError, when made and when called, for a model that this prefix is not attached to.
    """

    def __init__(self, model: PreTrainedModel, prefix: Prefix, cuda_graphs: bool = True):
        super().__init__()
        self._attention = [module for module in model.modules() if hasattr(module, "layer_prefix")][:1]  # no submodule here
        self._check_attached(prefix)
        self.task = task_of(model)
        # Trainer passes num_items_in_batch: accumulated steps then add up to one big batch.
        self.accepts_loss_kwargs = self.task is not Task.OWN_LOSS
        if self.task is Task.CAUSAL:
            self.loss_type = "ForCausalLM"  # Trainer counts labels from the second token on
        self.model = model.requires_grad_(False).eval()
        self.prefix = prefix
        self.checkpointing: LayerCheckpointing | None = None
        self._needs_padding: str | None = None  # why, "" if it does not; None before it is asked
        self.graphs = None
        if cuda_graphs and self.task is Task.CAUSAL:
            self.graphs = GraphedSteps(model, prefix, training_length(model, prefix, None))
        self.train(self.training)

    def train(self, mode: bool = True) -> PrefixedModel:
        self.training = mode
        self.prefix.train(mode)
        if self.model.training:  # Trainer asks before each step, and a walk through a large model takes a millisecond
            self.model.eval()
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of the prefix: nothing else has gradients."""
        self.prefix.zero_grad(set_to_none)

    def _check_attached(self, prefix: Prefix) -> None:
        attached = [module.layer_prefix.prefix for module in self._attention if hasattr(module, "layer_prefix")]
        if not attached or attached[0] is not prefix:
            found = "another prefix" if attached else "no prefix"
            raise ValueError(
                f"model: expected the prefix to be attached, got {found}; attach_prefix(model, prefix) comes first"
            )

    def forward(
        self,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_logits: bool = False,
        teacher_ids: Tensor | None = None,
        teacher_probs: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        parent: Tensor | None = None,
        num_targets: int | None = None,
        **inputs: Any,
    ) -> dict[str, Tensor]:
        """The loss of a batch, and its logits where the class says so.

        With teacher_ids and teacher_probs the loss of a causal model is the mean divergence from the teacher that has these
        probabilities (`distillation_loss`).

        Args:
            labels: int [batch, length], of a causal model one for each token; or what the model takes.
            cu_seqlens, max_seqlen, parent: of a batch that is one row of several sequences, as PaddingFreeCollator makes it.
            num_targets: how many labelled tokens of a causal model are predicted: all but those that begin a row. With it no
                step waits for the labels on a GPU, where a wrong number is not noticed and the loss is wrong.
            inputs: further arguments, input_ids among them, which go to the model.
        """
        self._check_attached(self.prefix)
        num_targets = self._check_targets(labels, num_targets, inputs)
        outputs = partial(self._outputs, labels, num_targets, num_items_in_batch, return_logits, teacher_ids, teacher_probs)
        if cu_seqlens is None and max_seqlen is None and parent is None:
            return outputs(inputs)
        if torch.compiler.is_compiling():
            raise NotImplementedError(f"cu_seqlens: a PrefixedModel that is compiled {NEEDS_PADDING}")
        if self._needs_padding is None:
            self._needs_padding = why_padded(self.model) or ""
        if self._needs_padding:
            raise NotImplementedError(f"cu_seqlens: {type(self.model).__name__} {NEEDS_PADDING}: {self._needs_padding}")
        pack = Pack.of_batch(cu_seqlens, max_seqlen, parent, inputs)
        with packed(pack), idle_mask(inputs["input_ids"]) as mask:
            found = outputs({**inputs, "attention_mask": mask})
        pack.check_taken()
        return found

    def _check_targets(self, labels: Tensor | None, num_targets: int | None, inputs: dict[str, Any]) -> int | None:
        given = [name for name in ("use_cache", "return_dict") if name in inputs and self.task is not Task.OWN_LOSS]
        if given:
            raise ValueError(f"{given[0]}: expected none, as a training step says it itself, got {inputs[given[0]]!r}")
        if num_targets is None:
            return None
        if self.task is not Task.CAUSAL or labels is None:
            found = "no labels" if labels is None else f"a {type(self.model).__name__}"
            raise ValueError(f"num_targets: expected labels beside it, and a causal model, got {found}")
        num_targets = checked_int("num_targets", num_targets, at_least=0)
        if labels.device.type == "cpu" and (found := count_targets(labels)) != num_targets:
            raise ValueError(f"num_targets: expected {found}, the labels from each row's second token on, got {num_targets}")
        return num_targets

    def _outputs(
        self, labels: Tensor | None, num_targets: int | None, num_items_in_batch: Tensor | int | None, return_logits: bool,
        teacher_ids: Tensor | None, teacher_probs: Tensor | None, inputs: dict[str, Any],
    ) -> dict[str, Tensor]:  # fmt: skip
        teacher = () if teacher_ids is None else (teacher_ids, teacher_probs)
        if (teacher_ids is None) != (teacher_probs is None) or (teacher and self.task is not Task.CAUSAL):
            raise ValueError(
                "teacher_ids, teacher_probs: expected both or neither, and both for a causal model alone, got "
                f"{type(teacher_ids).__name__} and {type(teacher_probs).__name__} for a {type(self.model).__name__}"
            )
        if self.task is Task.CAUSAL and labels is not None:
            rows, length = new_tokens(inputs).shape[:2]
            kept = inputs.get("logits_to_keep", 0)  # how many of the last tokens, 0: all; or the indices of some
            shape = (rows, len(kept) if isinstance(kept, Tensor) else min(kept or length, length))
            if labels.shape != shape:
                raise ValueError(f"labels: expected one for each token, {list(shape)}, got {list(labels.shape)}")
        with nullcontext() if self.checkpointing is None else self.checkpointing.active():
            if self.task is Task.OWN_LOSS:
                outputs = self.model(**inputs, labels=labels) if labels is not None else self.model(**inputs)
                return {name: outputs[name] for name in ("loss", "logits", "start_logits", "end_logits") if name in outputs}
            if labels is None:
                return {"logits": self.model(**inputs, use_cache=False, return_dict=True).logits}
            if self.task is Task.ENCODER_DECODER:
                loss, count, logits = encoder_decoder_loss(self.model, labels=labels, **inputs)
                outputs = {"logits": logits} if return_logits else {}
            elif not return_logits:
                loss, count = self._target_loss(labels, num_targets, inputs, teacher)
                outputs = {}
            else:
                logits = self.model(**inputs, use_cache=False, return_dict=True).logits
                wanted = labels[:, 1:] != IGNORED
                predicted, count = logits[:, :-1][wanted], int(wanted.sum())
                loss = divergences(predicted, *teacher).sum() if teacher else sum_loss(predicted, labels[:, 1:][wanted])
                outputs = {"logits": logits}
        items = count if num_items_in_batch is None else num_items_in_batch
        # Without any target the loss is 0, and so are its gradients.
        return {"loss": loss / (items.clamp(min=1) if isinstance(items, Tensor) else max(items, 1)), **outputs}

    def _target_loss(
        self, labels: Tensor, num_targets: int | None, inputs: dict[str, Any], teacher: tuple[Tensor, ...]
    ) -> tuple[Tensor, int]:
        pack, unmasked = current_pack(), {name: value for name, value in inputs.items() if name != "attention_mask"}
        given = unmasked if pack is not None or inputs.get("attention_mask") is None else inputs
        if self.graphs is not None and self.checkpointing is None and self.graphs.serves(given, pack):
            if given is inputs and "attention_mask" not in without_idle_mask({**inputs, "labels": labels}, wait=True):
                inputs = given = unmasked  # the labels are waited for as well
            replayed = self.graphs.loss(labels, *teacher, num_targets=num_targets, pack=pack, **given)
            if replayed is not None:
                return replayed
        loss = partial(distillation_loss if teacher else target_loss, self.model, labels, *teacher, num_targets=num_targets)
        ids = inputs.get("input_ids")
        if inputs.keys() != {"input_ids"} or not ids.is_cuda or torch.compiler.is_compiling():
            return loss(**inputs)
        with idle_mask(ids) as mask:
            return loss(input_ids=ids, attention_mask=mask)

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
