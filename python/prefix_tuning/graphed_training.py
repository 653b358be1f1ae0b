"""Training steps as CUDA graphs: the loss of a batch and the prefix's gradients in one replay.

A frozen model of ordinary size computes a step on a few dozen tokens a row faster than the host can issue its kernels. So the
forward and the backward pass of each shape of batch are recorded together; what is left of backward() is to hand out gradients.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prefix_tuning import cuda_graphs
from prefix_tuning.attention import LayerPrefix
from prefix_tuning.data import IGNORED
from prefix_tuning.devices import is_spread
from prefix_tuning.loss import check_teacher, count_targets, divergences, logits_at, loss_at, targets_of
from prefix_tuning.masks import idle_mask
from prefix_tuning.packs import Pack, packed
from prefix_tuning.stacks import sees_later_tokens

MOST_GRAPHS = 32  # shapes that come later run as they are

logger = logging.getLogger(__name__)


class GraphedSteps:
    """The recorded steps of a causal model with a prefix attached, one for each shape of batch.

    A shape is recorded when it comes for the second time. Its lengths are rounded up, so that there are few: causal attention
    keeps padding on the right from every token, and no label stands there. Rows with a mask are shapes of their own.

    Args:
        most_tokens: of a row, that the model has positions for; None for any number.
    """

    def __init__(self, model: nn.Module, prefix: nn.Module, most_tokens: int | None = None):
        self.prefix, self._model, self._most_tokens = prefix, model, most_tokens
        self._attention: list[nn.Module] = []  # the modules that hold the prefix
        self._held: list[LayerPrefix] = []  # what they hold
        self._modules: list[nn.Module] = []
        self._parameters: list[nn.Parameter] = []
        self._checkpointed: list[nn.Module] = []  # modules that may be, by their attribute gradient_checkpointing
        self._adapted: list[nn.Module] = []  # modules with adapters of PEFT
        self._read: tuple = ()  # what the recorded steps read: where the prefix and the model are
        self._steps: dict[tuple, _Step] = {}
        self._seen: Counter[tuple] = Counter()
        self._refused = sees_later_tokens(model.config)

    def __reduce__(self) -> tuple:
        """A copy of the model, in memory or in a file, records steps of its own, if anything asks it to."""
        return type(None), ()

    def clear(self) -> None:
        """Frees the graphs and their memory."""
        self._steps.clear()
        self._seen.clear()

    def serves(self, inputs: Mapping[str, Any], pack: Pack | None = None) -> bool:
        """Whether a step on these arguments of the model, beside labels, may be recorded.

        Args:
            inputs: input_ids, and attention_mask, of their shape, where there is one.
            pack: of the sequences in a row, whose positions are among the arguments.
        """
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        wanted = {"input_ids"} | ({"attention_mask"} & inputs.keys() if pack is None else {"position_ids"})
        if self._refused or inputs.keys() != wanted or not isinstance(ids, Tensor) or not self._on_device(ids):
            return False
        masked = isinstance(mask, Tensor) and mask.shape == ids.shape and mask.device == ids.device
        if "attention_mask" in wanted and not masked:
            return False
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        if pack is None and self._most_tokens is not None and ids.shape[-1] > self._most_tokens:
            return False
        # The gradients inside are not scaled, so those of float16 could vanish.
        dtypes = self._model.dtype, cuda_graphs.autocast_dtype(ids.device)
        return not is_spread(self._model) and torch.float16 not in dtypes and ids.dim() == 2

    def loss(
        self, labels: Tensor, *teacher: Tensor, num_targets: int | None = None, pack: Pack | None = None, **inputs: Tensor
    ) -> tuple[Tensor, int] | None:
        """As target_loss, or with a teacher's ids and probabilities as distillation_loss; None where it has to run as it is.

        Args:
            num_targets: how many labelled tokens are predicted; None: it waits for their number.
            pack, inputs: as serves() takes them.
        """
        device, (rows, length), modes = inputs["input_ids"].device, labels.shape, self._modes()
        if modes is None:
            return None
        length = self._padded(length) if pack is None else rounded(length)
        if num_targets is None:
            num_targets = count_targets(labels)
        if not num_targets:
            return None
        shape, masked, most = (rows, length), "attention_mask" in inputs, rounded(num_targets, least=8 if pack is None else 64)
        make_rows = partial(Rows, shape, device, masked)
        if pack is not None:
            longest = 1 << (pack.max_seqlen - 1).bit_length()
            sequences = len(pack.cu_seqlens) - 1 + -(-(length - labels.shape[1]) // longest)  # and those of the unused rest
            shape += rounded(sequences, 4, least=16), longest, pack.parent is not None
            make_rows, inputs = partial(_PackedRow, *shape[1:], device), {**inputs, "pack": pack}
        kept, what = 0, partial(_TargetLoss, (rows, length), most, device)
        if teacher:
            check_teacher(num_targets, *teacher)
            kept = teacher[0].shape[1]
            what = partial(_Divergence, (rows, length), most, kept, device)
        step = self._step((*shape, masked, most, kept, modes), make_rows, what)
        if step is None:
            return None
        step.load(inputs, labels, *teacher)
        return step.replay()[0], num_targets

    def _padded(self, length: int) -> int:
        """The length of the step that serves rows of this one."""
        longer = rounded(length)
        return length if self._most_tokens is not None and longer > self._most_tokens else longer

    def _step(self, shape: tuple, make_rows: Callable[[], Rows], what: Callable[[], Any]) -> _Step | None:
        """The step of this shape, recorded if it is time; None where it has to run as it is.

        Args:
            make_rows: makes the tokens that it reads.
            what: makes what it computes: run(model, **inputs) gives the loss and what comes with it, load() its further inputs.
        """
        trained = [parameter for parameter in self.prefix.parameters() if parameter.requires_grad]
        layers = self._layers()
        if not (trained and any(layer.key.shape[-2] for layer in layers)):
            return None
        read = (*(tensor.data_ptr() for tensor in (*trained, next(self._model.parameters()))), *map(id, layers))
        if read != self._read:
            self.clear()
            self._read = read
        autocast = cuda_graphs.autocast_dtype(trained[0].device)
        key = shape, autocast
        self._seen[key] += 1
        if key not in self._steps:
            if self._seen[key] < 2 or len(self._steps) >= MOST_GRAPHS:
                return None
            try:
                pool = next(iter(self._steps.values())).graph.pool if self._steps else None
                self._steps[key] = _Step(self._model, self.prefix, trained, layers, make_rows(), what(), autocast, pool)
            except cuda_graphs.CaptureError as error:
                self._refused = True
                logger.warning(f"training steps run without CUDA graphs: {error}")
                return None
        step = self._steps[key]
        step.trained = trained
        return step

    def _layers(self) -> list[LayerPrefix]:
        """What the attention modules hold; a walk through a large model takes a millisecond."""
        layers = [getattr(module, "layer_prefix", None) for module in self._attention]
        if not layers or layers != self._held:  # attached anew, maybe to a model that has got adapters since
            self._modules, self._parameters = list(self._model.modules()), list(self._model.parameters())
            self._attention, self._checkpointed, self._adapted = (
                [module for module in self._modules if hasattr(module, name)]
                for name in ("layer_prefix", "gradient_checkpointing", "merged_adapters")
            )
            self._held = layers = [module.layer_prefix for module in self._attention]
        return layers

    def _modes(self) -> tuple | None:
        """What a step does that its arguments do not say: which modules train and so may drop out, which adapters are in use,
        where positions start. None where it would do more than a recorded one."""
        self._layers()
        others = any(parameter.requires_grad for parameter in self._parameters)
        checkpointed = any(module.gradient_checkpointing and module.training for module in self._checkpointed)
        if others or checkpointed or cuda_graphs.has_hooks(self._modules):
            return None
        adapters = (
            (m._disable_adapters, *m._active_adapter, *m.merged_adapters, *vars(m).get("scaling", {}).items())
            for m in self._adapted
        )
        offset = getattr(self.prefix, "position_offset", None)
        return offset, tuple(module.training for module in self._modules), tuple(adapters)

    @staticmethod
    def _on_device(ids: Tensor) -> bool:
        return ids.is_cuda


class Rows:
    """The tokens of padded rows.

    Args:
        masked: whether they come with a mask, which hides more than padding on the right.
    """

    def __init__(self, shape: tuple[int, int], device: torch.device, masked: bool = False):
        self.input_ids = torch.zeros(shape, dtype=torch.long, device=device)
        self.attention_mask = torch.zeros_like(self.input_ids) if masked else None

    @contextmanager
    def inputs(self) -> Iterator[dict[str, Tensor]]:
        """What the model takes, within the block."""
        if self.attention_mask is not None:
            yield {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
            return
        with idle_mask(self.input_ids) as mask:
            yield {"input_ids": self.input_ids, "attention_mask": mask}

    def load(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """What an earlier, longer batch left stays on the right, where no target attends to it."""
        self.input_ids[:, : input_ids.shape[1]] = input_ids
        if self.attention_mask is not None:
            self.attention_mask[:, : input_ids.shape[1]] = attention_mask


class _PackedRow(Rows):
    """The tokens of one row of at most that many sequences, each of at most `longest` tokens. The unused rest of the row is cut
    into sequences of that length: as one sequence its attention would take as long as that of all others."""

    def __init__(self, length: int, sequences: int, longest: int, shared: bool, device: torch.device):
        super().__init__((1, length), device)
        self.position_ids = torch.zeros_like(self.input_ids)
        self._steps = torch.arange(sequences + 1, device=device, dtype=torch.int32) * longest
        cu_seqlens = self._steps.clamp(max=length)
        parent = torch.full((sequences,), -1, dtype=torch.int32, device=device) if shared else None
        self.pack = Pack(cu_seqlens, longest, 1, length, parent)

    @contextmanager
    def inputs(self) -> Iterator[dict[str, Tensor]]:
        with packed(self.pack), super().inputs() as inputs:
            yield {**inputs, "position_ids": self.position_ids}

    def load(self, input_ids: Tensor, position_ids: Tensor, pack: Pack) -> None:
        super().load(input_ids)
        pack.taken = self.pack.taken
        self.position_ids[:, : position_ids.shape[1]] = position_ids
        ends, left = len(pack.cu_seqlens), self._steps[1 : len(self._steps) + 1 - len(pack.cu_seqlens)]
        self.pack.cu_seqlens[:ends] = pack.cu_seqlens
        self.pack.cu_seqlens[ends:] = (left + input_ids.shape[1]).clamp(max=self.pack.length)
        if pack.parent is not None:
            self.pack.parent[: ends - 1], self.pack.parent[ends - 1 :] = pack.parent, -1


class _TargetLoss:
    """The summed loss of at most that many labelled tokens of rows of this shape."""

    def __init__(self, shape: tuple[int, int], targets: int, device: torch.device):
        self.labels = torch.full(shape, IGNORED, device=device)
        self.most = targets

    def run(self, model: nn.Module, **inputs: Tensor) -> tuple[Tensor]:
        return (loss_at(model, *targets_of(self.labels, self.most), **inputs),)

    def load(self, labels: Tensor) -> None:
        load_labels(self.labels, labels)


class _Divergence(_TargetLoss):
    """The summed divergence of at most that many labelled tokens from a teacher that names `kept` tokens for each."""

    def __init__(self, shape: tuple[int, int], targets: int, kept: int, device: torch.device):
        super().__init__(shape, targets, device)
        self.ids = torch.zeros(targets, kept, dtype=torch.long, device=device)
        self.probs = torch.zeros(targets, kept, device=device)

    def run(self, model: nn.Module, **inputs: Tensor) -> tuple[Tensor]:
        index, targets = targets_of(self.labels, self.most)
        found = divergences(logits_at(model, index, **inputs), self.ids, self.probs)
        return (found.where(targets != IGNORED, 0).sum(),)

    def load(self, labels: Tensor, teacher_ids: Tensor, teacher_probs: Tensor) -> None:
        super().load(labels)
        self.ids[: len(teacher_ids)], self.probs[: len(teacher_ids)] = teacher_ids, teacher_probs


def load_labels(place: Tensor, labels: Tensor) -> None:
    """Labels [rows, length] into a tensor for longer rows."""
    place[:, : labels.shape[1]] = labels
    place[:, labels.shape[1] :] = IGNORED


class _Step:
    """The recorded step on `rows`.

    Args:
        autocast: the dtype of torch.autocast, where that is on.
    """

    def __init__(
        self, model: nn.Module, prefix: nn.Module, trained: list[nn.Parameter], layers: list[LayerPrefix],
        rows: Rows, what: Any, autocast: torch.dtype | None, pool: cuda_graphs.Pool,
    ):  # fmt: skip
        device = trained[0].device
        self.model, self.rows, self.what, self.trained = model, rows, what, trained  # trained: whom the gradients are handed to
        self.autocast = partial(cuda_graphs.autocast, device, autocast)
        # Leaves of the graph's own over the same memory: the parameters may still be part of a step that ran as it was.
        self.leaves = {parameter: nn.Parameter(parameter.detach()) for parameter in trained}
        self.stand_in = partial(_standing_in, self.leaves, (*prefix.modules(), *model.modules()), layers)
        with torch.cuda.device_of(trained[0]):  # which need not be the current one
            self.graph = cuda_graphs.Graph(self._run, pool)

    @torch.enable_grad()
    def _run(self) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        with self.stand_in():
            with self.autocast(), self.rows.inputs() as inputs:
                loss, *others = self.what.run(self.model, **inputs)
            with torch.autocast(loss.device.type, enabled=False):  # as backward() is called
                grads = torch.autograd.grad(loss, list(self.leaves.values()), allow_unused=True)
        return tuple(tensor.detach() for tensor in (loss, *others)), grads

    def load(self, rows: Mapping[str, Any], *inputs: Any) -> None:
        """The batch of the next replay: its tokens, and what else the loss is computed from."""
        self.rows.load(**rows)
        self.what.load(*inputs)

    def replay(self) -> tuple[Tensor, ...]:
        """The loss, with a gradient, and what comes with it, without one."""
        return _Replayed.apply(self, *self.trained)


class _Replayed(torch.autograd.Function):
    """What a replayed step gives, with the gradients of the loss that were computed beside it."""

    @staticmethod
    def forward(ctx, step: _Step, *trained: Tensor) -> tuple[Tensor, ...]:
        with cuda_graphs.one_at_a_time:
            step.graph.replay()
            outputs, grads = step.graph.outputs
            ctx.used = [grad is not None for grad in grads]
            ctx.grads = torch._foreach_mul([g for g in grads if g is not None], 1.0)  # the next replay writes them anew
            ctx.set_materialize_grads(False)
            return tuple(tensor.clone() for tensor in outputs)

    @staticmethod
    def backward(ctx, grad_loss: Tensor | None, *grad_others: Tensor | None) -> tuple[Tensor | None, ...]:
        if any(grad is not None for grad in grad_others):
            raise NotImplementedError(
                "logits: of a training step that is replayed the loss alone has a gradient; cuda_graphs=False runs each step "
                "as it is"
            )
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "create_graph: the gradients of a training step that is replayed have none themselves; cuda_graphs=False runs "
                "each step as it is"
            )
        if grad_loss is None:
            return None, *[None] * len(ctx.used)
        if ctx.grads is None:
            raise RuntimeError("backward(): the gradients of this step were handed out; the first call needs retain_graph=True")
        if torch._C._autograd._get_current_graph_task_keep_graph():  # another backward pass may come
            scaled = torch._foreach_mul(ctx.grads, grad_loss)
        else:
            scaled, ctx.grads = ctx.grads, None  # of a long prefix another copy would be much
            torch._foreach_mul_(scaled, grad_loss)
        handed = iter(scaled)
        return None, *(next(handed) if used else None for used in ctx.used)


def rounded(length: int, parts: int = 8, least: int = 8) -> int:
    """`length` rounded up to a multiple of 1 / parts of the next power of two, or of `least` where that is more.

    By default at most a fifth of lengths above 32 is padding. Rows without padding come in more shapes than padded ones, so
    callers round what costs little there more coarsely.
    """
    unit = max(least, (1 << (length - 1).bit_length()) // parts)
    return -(-length // unit) * unit


@contextmanager
def _standing_in(
    leaves: Mapping[nn.Parameter, nn.Parameter], modules: Iterable[nn.Module], layers: list[LayerPrefix]
) -> Iterator[None]:
    """Within, the leaves are the prefix's parameters, those of a head also where they cover the model's (AttachedHeads)."""
    places = [
        (where, name, parameter)
        for module in modules
        for where in (module._parameters, vars(module))
        for name, parameter in where.items()
        if isinstance(parameter, nn.Parameter) and parameter in leaves
    ]
    held = [(layer, layer.key, layer.value) for layer in layers]
    try:
        for where, name, parameter in places:
            where[name] = leaves[parameter]
        for layer, key, value in held:
            layer.key, layer.value = leaves.get(key, key), leaves.get(value, value)
        yield
    finally:
        for where, name, parameter in places:
            where[name] = parameter
        for layer, key, value in held:
            layer.key, layer.value = key, value
