"""Batches without padding: all rows behind one another in a single row, and what several of them begin with only once.

Each row attends to the prefix and to itself alone (`packs.Pack`), so the loss and its gradients are those of padded rows, from
fewer tokens. Rows that begin alike, as with one system prompt or several references for one input, share that beginning: it is
a sequence of its own, the parent of what follows in each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.utils.data import IterableDataset
from transformers import Trainer

from prefix_tuning.data import IGNORED, teacher_targets, tokens_and_labels
from prefix_tuning.devices import is_spread
from prefix_tuning.explain import explain_training
from prefix_tuning.graphed_training import rounded
from prefix_tuning.multimodal_families import unwrapped_config
from prefix_tuning.stacks import attention_kinds, sees_later_tokens, stacks
from prefix_tuning.task import Task, task_of

LEAST_SHARED = 8  # tokens that are worth a sequence of their own; assumed
# Methods of Trainer that read batches.
TRAINING_METHODS = ("compute_loss", "training_step", "_prepare_inputs", "get_batch_samples")
EVALUATION_METHODS = ("compute_loss", "prediction_step", "_prepare_inputs", "evaluation_loop")
_COMPILED = "it is compiled, and traced code cannot ask where its rows begin"


class PaddingFreeCollator:
    """Examples of `tokenize_example` -> a batch of one row without padding, for PrefixedModel.

    Tokens whose attention_mask is 0 in an example are left out.

    Args:
        share: whether examples that begin alike share that.
        first_position: what the position of a row's first token is.
        padded: the number of tokens that a batch of so many is computed with. Examples share only what makes it smaller.

    Returns input_ids, labels and position_ids, int64 [1, tokens], position_ids starting anew with each example; cu_seqlens,
    int32 [1, sequences + 1], where the sequences begin, and the end; the ints max_seqlen, the length of the longest, and
    num_targets, how many labels are not −100; where examples share anything parent, int32 [1, sequences], the sequence that
    one goes on from, or −1; and `teacher_targets`.

    Raises ValueError as `tokens_and_labels`.
    """

    def __init__(self, share: bool = True, first_position: int = 0, padded: Callable[[int], int] = int):
        self.share, self.first_position, self.padded = share, first_position, padded

    def __call__(self, examples: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Any]:
        # The row before does not predict the first token.
        rows = [(ids.tolist(), [IGNORED, *labels[1:].tolist()]) for ids, labels in tokens_and_labels(examples)]
        alone = [([index], 0) for index in range(len(rows))]
        groups = shared_beginnings(rows) if self.share else alone
        tokens, saved = sum(len(ids) for ids, _ in rows), sum((len(members) - 1) * shared for members, shared in groups)
        if saved and self.padded(tokens - saved) == self.padded(tokens):
            groups = alone
        sequences: list[tuple[list[int], list[int], int, int]] = []  # ids, labels, first position, parent
        for members, shared in groups:
            parent = -1
            if shared:
                parent, ids = len(sequences), rows[members[0]][0][:shared]
                sequences.append((ids, [IGNORED] * shared, 0, -1))
            sequences += [(rows[index][0][shared:], rows[index][1][shared:], shared, parent) for index in members]
        lengths = [len(ids) for ids, *_ in sequences]
        positions = [range(start, start + length) for length, (_, _, start, _) in zip(lengths, sequences, strict=True)]
        learnt = [label for _, labels, *_ in sequences for label in labels]
        return {
            "input_ids": _row([token for ids, *_ in sequences for token in ids]),
            "labels": _row(learnt),
            "position_ids": _row([position for span in positions for position in span]) + self.first_position,
            "cu_seqlens": _row([0, *accumulate(lengths)], torch.int32),
            "max_seqlen": max(lengths),
            "num_targets": len(learnt) - learnt.count(IGNORED),
            **({"parent": _row([parent for *_, parent in sequences], torch.int32)} if len(sequences) > len(rows) else {}),
            **teacher_targets([examples[index] for members, _ in groups for index in members]),
        }


def shared_beginnings(rows: Sequence[tuple[list[int], list[int]]]) -> list[tuple[list[int], int]]:
    """Rows in groups, and how many tokens the rows of each group begin with together and compute once: of all ways to do this
    with neighbours in the order of their tokens the one that computes the fewest.

    What is shared ends before the token that predicts a row's first target.

    Args:
        rows: (input_ids, labels).
    """
    order = sorted(range(len(rows)), key=lambda index: rows[index][0])
    most = [next((i for i, label in enumerate(rows[index][1]) if label != IGNORED), len(rows[index][0])) - 1 for index in order]
    alike = [0, *(_common(rows[a][0], rows[b][0]) for a, b in zip(order, order[1:], strict=False))]
    best: list[tuple[int, int, int]] = [(0, 0, 0)]  # after so many rows: tokens saved, where the last group begins, its tokens
    for stop in range(1, len(rows) + 1):
        best.append((best[-1][0], stop - 1, 0))
        shared = most[stop - 1]
        for start in range(stop - 2, -1, -1):
            shared = min(shared, alike[start + 1], most[start])
            if shared < LEAST_SHARED:
                break
            saved = best[start][0] + shared * (stop - start - 1)
            if saved > best[stop][0]:
                best[stop] = saved, start, shared
    groups, stop = [], len(rows)
    while stop:
        _, start, shared = best[stop]
        groups.append(([order[index] for index in range(start, stop)], shared))
        stop = start
    return groups[::-1]


def asked_for(wanted: bool | None, data_collator: Any) -> bool | None:
    """A trainer's argument padding_free as given, but False instead of None where the user passed a data_collator."""
    if wanted is not None and not isinstance(wanted, bool):
        raise TypeError(f"padding_free: expected True, False or None, got {wanted!r}")
    if wanted and data_collator is not None:
        raise ValueError("padding_free: expected no data_collator, whose place it takes in training, got one")
    return wanted if data_collator is None else False


def allowed_by(trainer: Trainer, wanted: bool | None) -> bool | None:
    """The argument as given, but False instead of None where rows are streamed, where one process makes the batches of all, or
    where code of the user's own reads them.

    NotImplementedError where several processes cannot share the batches that are wanted.
    """
    if wanted and is_dispatched(trainer):
        raise NotImplementedError(
            "padding_free: several processes need a train_dataset that has a length, and args without dispatch_batches"
        )
    streamed = isinstance(trainer.train_dataset, IterableDataset)
    return False if wanted is None and (streamed or is_dispatched(trainer) or has_own_code(trainer)) else wanted


def is_dispatched(trainer: Trainer) -> bool:
    """Whether one process makes the training batches of all, and cuts them into theirs."""
    streamed = isinstance(trainer.train_dataset, IterableDataset)
    return trainer.args.world_size > 1 and (streamed or bool(trainer.args.accelerator_config.dispatch_batches))


def has_own_code(trainer: Trainer, methods: Sequence[str] = TRAINING_METHODS) -> bool:
    """Whether code of the user's own reads the batches: a loss, or one of these methods."""
    modules = (getattr(getattr(trainer, name), "__module__", "") for name in methods)
    return trainer.compute_loss_func is not None or any(
        module.partition(".")[0] not in ("transformers", "prefix_tuning") for module in modules
    )


def padding_free_collator(
    model: nn.Module, wanted: bool | None = True, *, compiled: bool = False, slides: bool = False, backend: str | None = None,
    rows: int = 2, recorded: bool = True,
) -> PaddingFreeCollator | None:  # fmt: skip
    """What makes the batches of a model's training, None for padded ones.

    Args:
        wanted: None is wherever it can be and was measured to be faster, see `_is_faster`.
        compiled: the model will be.
        slides: the prefix slides out of windows, which in such rows takes a mask over all pairs of tokens.
        backend: as for attach_prefix.
        rows: of a batch.
        recorded: on a GPU, steps are recorded as CUDA graphs.

    Raises NotImplementedError for a model that needs padded rows, where others are wanted.
    """
    reason = _COMPILED if compiled else why_padded(model)
    if wanted and reason is not None:
        raise NotImplementedError(f"padding_free: {type(model).__name__} needs padded rows: {reason}")
    if wanted is False or reason is not None:
        return None
    windows = any(kind.get("window") for kind in attention_kinds(model.config).values())
    if wanted is None and ((windows and slides) or not _is_faster(model, backend, rows, recorded)):
        return None
    # A window would have to reach into what is shared.
    padded = rounded if recorded and model.device.type == "cuda" else int
    return PaddingFreeCollator(share=not windows, first_position=stacks(model)[0].first_position, padded=padded)


def why_padded(model: nn.Module) -> str | None:
    """Why a model's rows must be batched with padding, None where they need not."""
    if task_of(model) is not Task.CAUSAL:
        return "it is no causal language model"
    kinds = attention_kinds(model.config)
    if any(kind.get("bias") for kind in kinds.values()):
        return f"its attention has {', '.join(kinds)}, which is not served in rows of several sequences"
    config, (stack, *_) = unwrapped_config(model.config), stacks(model)
    attending = len(stack.attention["decoder"]) + len(stack.shared)
    if attending != config.num_hidden_layers or "hybrid" in (getattr(config, "layer_types", None) or ()):
        return "it has layers with a state, which runs on from one row to the next"
    if stack.wrapper is not None:
        return "it makes positions and masks of its own"
    if sees_later_tokens(config):
        return "its tokens see later ones"
    if hasattr(model.forward, "_torchdynamo_orig_callable") or any(map(_is_compiled, model.modules())):
        return _COMPILED
    return None


def _is_compiled(module: nn.Module) -> bool:
    return isinstance(module, OptimizedModule) or module._compiled_call_impl is not None


def _is_faster(model: nn.Module, backend: str | None, rows: int, recorded: bool) -> bool:
    """Whether a model's training was measured to be faster without padding.

    On a CPU by the C++ kernels; torch's run sequence by sequence, and lose what the padding costs. On a GPU by the Triton
    kernels in bfloat16, in recorded steps of several rows.
    """
    if model.device.type == "cpu":
        ours, length = "cpu", 8
    elif model.device.type == "cuda" and rows > 1 and recorded and model.dtype == torch.bfloat16 and not is_spread(model):
        ours, length = "triton", 64
    else:
        return False
    return explain_training(model, model.dtype, batch=2, length=length, prefix_len=8, backend=backend)[ours] == "chosen"


def _common(one: list[int], other: list[int]) -> int:
    """How many tokens two rows begin with together."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _row(values: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([values], dtype=dtype)
