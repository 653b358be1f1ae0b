"""The ways to compute attention over a shared prefix that are compared: our backends, and what others do or could do.

    peft           as PEFT under transformers: prefix expanded over the batch and concatenated, a dense mask for every row, kv
                   heads repeated, scaled_dot_product_attention. Charitable: it copies the prefix once, PEFT two or three times
    concat_mask    the same with one mask for all rows and kv heads not repeated
    concat_square  the same without a mask: P dummy queries in front make torch's top-left causal flag right. CPU
    concat         decoding: a single query sees everything, so no mask; the heads of a kv head are folded into query rows. CPU
    concat_flash   without a mask, by flash attention, whose causal flag on CUDA means bottom-right
    concat_cudnn   the same by cuDNN; its causal flag means top-left, so that training shapes need a mask
    concat_varlen  packed sequences: the prefix gathered in front of each, torch's varlen attention. CUDA
    flex           FlexAttention, compiled: the prefix with key batch 1 and the sequence with a causal block mask, merged. CUDA
    fa3            concatenation and FlashAttention-3's forward pass. Hopper, bfloat16, where the package is installed
    flashinfer     FlashInfer's cascade over a paged cache: decoding, where the package is installed
    hopper         our forward kernel for Hopper by itself, also where the triton backend takes another of its kernels
    sdpa, cpu, triton, …    our backends, `sdpa` being the exact composition of stock kernels

What is legal where: on the CPU no torch kernel takes the bottom-right causal flag that a prefix needs (causal_lower_right
becomes a dense mask there), hence concat_mask and concat_square. In decoding a rival's cache holds the prefix already, expanded
for every row; filling it is not timed. Packed sequences reach the dense rivals as padded rows; padding them is not timed.
A bias is a mask in the dtype of q to torch's kernels; PEFT's way has one for every row, as T5 adds its padding mask to it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

import prefix_kernels
from cases import Case
from prefix_kernels import api
from prefix_kernels.problem import AttentionInputs

FA3_MODULES = ("fa3_fwd_interface", "flash_attn_interface")
STOCK_BACKENDS = ("sdpa",)  # of ours, but torch's kernels alone
PAGE = 16  # of FlashInfer's cache


@dataclass
class InputSet:
    """A case's tensors: q, k, v in memory token by token, as projections give them (a cache: head by head); grad_out as q."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    prefix_k: Tensor
    prefix_v: Tensor
    grad_out: Tensor
    ready: dict[str, Any] = field(default_factory=dict)  # what a rival has lying ready before it is timed

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.v, self.prefix_k, self.prefix_v

    @property
    def device(self) -> str:
        return self.q.device.type

    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.leaves)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self.ready:
            self.ready[name] = make()
        return self.ready[name]

    def padded(self) -> InputSet:
        """Packed sequences as rows padded on the right: a set of its own."""
        return self.once("padded", lambda: _pad_rows(self))


def make_inputs(case: Case, device: str, generator: torch.Generator) -> InputSet:
    """Normal random values."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=case.torch_dtype)

    def tokens(heads: int, length: int) -> Tensor:
        if case.seqlens is not None:
            return random(sum(case.seqlens), heads, case.head_dim)
        if case.decode and length == case.kv_len:
            return random(case.batch, heads, length, case.head_dim)
        return random(case.batch, length, heads, case.head_dim).transpose(1, 2)

    heads = case.heads, case.kv_heads, case.kv_heads, case.heads
    lengths = case.q_len, case.kv_len, case.kv_len, case.q_len
    q, k, v, grad_out = (tokens(*sizes) for sizes in zip(heads, lengths, strict=True))
    prefix_k, prefix_v = (random(case.kv_heads, case.prefix_len, case.head_dim) for _ in range(2))
    inputs = InputSet(case, q, k, v, prefix_k, prefix_v, grad_out)
    for leaf in inputs.leaves if case.backward else ():
        leaf.requires_grad_()
    return inputs


def _pad_rows(inputs: InputSet) -> InputSet:
    case = inputs.case
    dense = Case(**{**vars(case), "seqlens": None})
    place = row_and_column(case, inputs.device)

    def pad(tensor: Tensor) -> Tensor:
        rows = tensor.new_zeros(dense.batch, dense.kv_len, *tensor.shape[1:])
        rows[place] = tensor.detach()
        return rows.transpose(1, 2)

    q, k, v = (pad(tensor).requires_grad_(case.backward) for tensor in (inputs.q, inputs.k, inputs.v))
    return InputSet(dense, q, k, v, inputs.prefix_k, inputs.prefix_v, pad(inputs.grad_out))


def row_and_column(case: Case, device: str) -> tuple[Tensor, Tensor]:
    """Where each packed token lies in padded rows: two int [tokens]."""
    lengths = torch.tensor(case.seqlens, device=device)
    starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    rows = torch.arange(case.batch, device=device).repeat_interleave(lengths)
    return rows, torch.arange(len(rows), device=device) - starts


Attend = Callable[[InputSet], Tensor]
Needs = Callable[[InputSet], str | None]  # the reason why a case cannot be run, or None


@dataclass(frozen=True)
class Way:
    """prepare: makes the function to time, which gives out in q's shape. pads: packed sequences reach it as padded rows."""

    name: str
    prepare: Callable[[Case, str], Attend]
    device: str | None = None  # the only one it is for
    needs: tuple[Needs, ...] = ()
    pads: bool = True
    ours: bool = False

    def why_not(self, inputs: InputSet) -> str | None:
        """The reason why it cannot run these inputs, or None."""
        return next((reason for need in self.needs if (reason := need(inputs)) is not None), None)


def ways(inputs: InputSet, only: Sequence[str] | None = None) -> list[Way]:
    """The rivals for this device, then our backends but the reference, which says what is right; only: those of these names."""
    backends = [name for name in prefix_kernels.available_backends() if name != "reference"]
    found = [*RIVALS, HOPPER_KERNEL, *map(our_way, reversed(backends))]
    return [way for way in found if way.device in (None, inputs.device) and (only is None or way.name in only)]


def expanded(prefix: Tensor, own: Tensor) -> Tensor:
    """[batch, kv_heads, prefix_len + kv_len, head_dim]"""
    return torch.cat([prefix.expand(own.shape[0], -1, -1, -1), own], dim=2)


def concatenated(inputs: InputSet) -> tuple[Tensor, Tensor]:
    """Keys and values with the prefix in front of every row; in decoding the cache that has them already."""

    def make() -> tuple[Tensor, Tensor]:
        return expanded(inputs.prefix_k, inputs.k), expanded(inputs.prefix_v, inputs.v)

    return inputs.once("concatenated", make) if inputs.case.decode else make()


def repeat_kv(heads: int, tensor: Tensor) -> Tensor:
    """As transformers does where the kernel gets a dense mask."""
    batch, kv_heads, length, dim = tensor.shape
    if kv_heads == heads:
        return tensor
    return tensor[:, :, None].expand(batch, kv_heads, heads // kv_heads, length, dim).reshape(batch, heads, length, dim)


def visible(case: Case, device: str) -> Tensor:
    """Bool [q_len, prefix_len + kv_len]"""
    columns = case.prefix_len + case.kv_len
    return torch.ones(case.q_len, columns, dtype=torch.bool, device=device).tril(columns - case.q_len)


def score_bias(case: Case, device: str) -> Tensor:
    """Float32 [1, heads, q_len, prefix_len + kv_len]"""
    shape = 1, case.heads, case.q_len, case.prefix_len + case.kv_len
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(1), device=device)


def dense_mask(case: Case, device: str) -> Tensor:
    """What torch's kernels take for all rows: the bias in the dtype of q, or which keys are visible, bool [1, 1, q_len, …]."""
    return score_bias(case, device).to(case.torch_dtype) if case.bias else visible(case, device)[None, None]


def prepare_peft(case: Case, device: str) -> Attend:
    mask = dense_mask(case, device).repeat(case.batch, 1, 1, 1)

    def attend(inputs: InputSet) -> Tensor:
        k, v = (repeat_kv(case.heads, tensor) for tensor in concatenated(inputs))
        return scaled_dot_product_attention(inputs.q, k, v, attn_mask=mask)

    return attend


def prepare_concat_mask(case: Case, device: str) -> Attend:
    mask = dense_mask(case, device)
    if not case.bias:
        mask = torch.zeros_like(mask, dtype=case.torch_dtype).masked_fill_(~mask, -torch.inf)
    return lambda inputs: _sdpa(inputs, attn_mask=mask)


def prepare_concat_square(case: Case, device: str) -> Attend:
    def attend(inputs: InputSet) -> Tensor:
        q = torch.nn.functional.pad(inputs.q, (0, 0, case.prefix_len, 0))
        out = scaled_dot_product_attention(q, *concatenated(inputs), is_causal=True, enable_gqa=case.heads != case.kv_heads)
        return out[:, :, case.prefix_len :]

    return attend


def prepare_concat(case: Case, device: str) -> Attend:
    folded, shape = (case.batch, case.kv_heads, -1, case.head_dim), (case.batch, case.heads, 1, case.head_dim)
    return lambda inputs: scaled_dot_product_attention(inputs.q.reshape(folded), *concatenated(inputs)).reshape(shape)


def prepare_concat_flash(case: Case, device: str) -> Attend:
    mask = None if case.decode else causal_lower_right(case.q_len, case.prefix_len + case.kv_len)

    def attend(inputs: InputSet) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return _sdpa(inputs, attn_mask=mask)

    return attend


def prepare_concat_cudnn(case: Case, device: str) -> Attend:
    mask = None if case.decode else dense_mask(case, device)

    def attend(inputs: InputSet) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return _sdpa(inputs, attn_mask=mask)

    return attend


def _sdpa(inputs: InputSet, **options: Tensor | None) -> Tensor:
    gqa = inputs.case.heads != inputs.case.kv_heads
    return scaled_dot_product_attention(inputs.q, *concatenated(inputs), enable_gqa=gqa, **options)


def prepare_concat_varlen(case: Case, device: str) -> Attend:
    from torch.nn.attention.varlen import varlen_attn

    lengths = torch.tensor(case.seqlens, device=device)
    total = case.prefix_len + lengths
    ends = [torch.nn.functional.pad(n.cumsum(0), (1, 0)).int() for n in (lengths, total)]
    column = torch.arange(int(total.sum()), device=device) - ends[1][:-1].repeat_interleave(total)
    start = ends[0][:-1].repeat_interleave(total)
    index = torch.where(column < case.prefix_len, column, column + start)  # of [prefix ; tokens]
    named = inspect.signature(varlen_attn).parameters
    causal = {"window_size": (-1, 0)} if "window_size" in named else {"is_causal": True}
    gqa = {"enable_gqa": True} if case.heads != case.kv_heads else {}

    def attend(inputs: InputSet) -> Tensor:
        pairs = (inputs.prefix_k, inputs.k), (inputs.prefix_v, inputs.v)
        k, v = (torch.cat([prefix.transpose(0, 1), own]).index_select(0, index) for prefix, own in pairs)
        return varlen_attn(inputs.q, k, v, *ends, case.q_len, case.prefix_len + case.kv_len, **causal, **gqa)

    return attend


def prepare_flex(case: Case, device: str) -> Attend:
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    def block_mask(rule: Callable, batch: int | None, columns: int):
        return create_block_mask(rule, batch, None, case.q_len, columns, device=device)

    causal = block_mask(lambda b, h, i, j: i + case.kv_len - case.q_len >= j, None, case.kv_len)
    everything = block_mask(lambda b, h, i, j: j >= 0, case.batch, case.prefix_len)  # a key batch of 1 demands it batch-wide
    score, prefix_score = {"block_mask": causal}, {"block_mask": everything}
    if case.bias:
        bias = score_bias(case, device)[0]
        score = {"score_mod": lambda score, b, h, i, j: score + bias[h, i, case.prefix_len + j]}
        prefix_score |= {"score_mod": lambda score, b, h, i, j: score + bias[h, i, j]}
    attend = functools.partial(flex_attention, enable_gqa=case.heads != case.kv_heads, return_aux=AuxRequest(lse=True))

    def merged(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
        own, own_aux = attend(q, k, v, **score)
        prefix, prefix_aux = attend(q, prefix_k[None], prefix_v[None], **prefix_score)
        weight = torch.sigmoid(prefix_aux.lse - own_aux.lse)[..., None]
        return torch.lerp(own.float(), prefix.float(), weight).to(q.dtype)

    compiled = torch.compile(merged, dynamic=False)
    return lambda inputs: compiled(*inputs.leaves)


def prepare_fa3(case: Case, device: str) -> Attend:
    module = importlib.import_module(next(name for name in FA3_MODULES if importlib.util.find_spec(name)))

    def attend(inputs: InputSet) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (inputs.q, *concatenated(inputs)))
        out = module.flash_attn_func(q, k, v, causal=not case.decode)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return attend


def prepare_flashinfer(case: Case, device: str) -> Attend:
    import flashinfer

    shared, own = case.prefix_len // PAGE, case.kv_len // PAGE
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(
        2, torch.empty(2**28, dtype=torch.uint8, device=device), "HND"
    )  # 256 MiB of workspace

    def index(*values: int | Tensor) -> Tensor:
        return torch.as_tensor(values, dtype=torch.int32, device=device)

    rows = torch.arange(case.batch + 1, dtype=torch.int32, device=device)
    pages = torch.arange(shared + case.batch * own, dtype=torch.int32, device=device)
    wrapper.plan(
        [index(0, case.batch), rows], [index(0, shared), rows * own], [pages[:shared], pages[shared:]],
        [index(PAGE), torch.full_like(rows[1:], PAGE)], case.heads, case.kv_heads, case.head_dim, PAGE,
        q_data_type=case.torch_dtype,
    )  # fmt: skip

    def paged(prefix: Tensor, cache: Tensor) -> Tensor:  # [pages, kv_heads, PAGE, head_dim]
        parts = prefix.unflatten(1, (-1, PAGE)).transpose(0, 1), cache.unflatten(2, (-1, PAGE)).transpose(1, 2).flatten(0, 1)
        return torch.cat(parts)

    def attend(inputs: InputSet) -> Tensor:
        pairs = (inputs.prefix_k, inputs.k), (inputs.prefix_v, inputs.v)
        cache = inputs.once("paged", lambda: tuple(paged(*pair) for pair in pairs))
        return wrapper.run(inputs.q[:, :, 0], cache)[:, :, None]

    return attend


def prepare_hopper(case: Case, device: str) -> Attend:
    from prefix_kernels.backends.triton import hopper_forward

    return lambda inputs: hopper_forward.forward(attention_inputs(inputs))[0]


def _hopper_refuses(inputs: InputSet) -> str | None:
    from prefix_kernels.backends.triton import hopper

    return hopper.why_not(attention_inputs(inputs))


def attention_inputs(inputs: InputSet) -> AttentionInputs:
    """What a kernel receives of the public call."""
    make = api._dense_inputs if inputs.case.seqlens is None else api._varlen_inputs
    return make(*inputs.leaves, **inputs.once("options", lambda: options(inputs.case, inputs.device)))


def our_way(backend: str) -> Way:
    """One of our backends through the public call."""

    def prepare(case: Case, device: str) -> Attend:
        attend, given = public_function(case), options(case, device)
        return lambda inputs: attend(*inputs.leaves, **given, backend=backend)

    def serves(inputs: InputSet) -> str | None:
        said = explain(inputs)[backend]
        return said.removeprefix("refused: ") if said.startswith("refused: ") else None

    return Way(backend, prepare, needs=(serves,), pads=False, ours=True)


def public_function(case: Case) -> Callable[..., Tensor]:
    return prefix_kernels.prefix_attention if case.seqlens is None else prefix_kernels.prefix_attention_varlen


def options(case: Case, device: str) -> dict[str, Tensor | int]:
    """The arguments of the public call beside its tensors: those that describe packed sequences, or a bias."""
    if case.bias:
        return {"causal": False, "bias": score_bias(case, device)}
    if case.seqlens is None:
        return {}
    ends = torch.nn.functional.pad(torch.tensor(case.seqlens).cumsum(0), (1, 0)).int().to(device)
    return {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": case.q_len, "max_seqlen_k": case.kv_len}


def explain(inputs: InputSet, backend: str | None = None) -> dict[str, str]:
    """Of each of our backends: "chosen", "not chosen: …" or "refused: …"; backend: as if that one were asked for."""
    return prefix_kernels.explain_backends(*inputs.leaves, **options(inputs.case, inputs.device), backend=backend)


def _need(wanted: Callable[[InputSet], bool], reason: str) -> Needs:
    return lambda inputs: None if wanted(inputs) else reason


def _installed(*modules: str) -> Needs:
    return _need(lambda inputs: any(importlib.util.find_spec(name) for name in modules), f"{modules[0]} is not installed")


HOPPER = _need(lambda inputs: torch.cuda.get_device_capability()[0] == 9, "for Hopper alone")
DECODING = _need(lambda inputs: inputs.case.decode, "for decoding alone")
NOT_DECODING = _need(lambda inputs: not inputs.case.decode, "decoding needs no mask")
TRAINING = _need(lambda inputs: not inputs.case.decode, "blocks of 128 queries: not for decoding")
FORWARD = _need(lambda inputs: not inputs.case.backward, "no backward pass")
PACKED = _need(lambda inputs: inputs.case.seqlens is not None, "for packed sequences alone")
NOT_PACKED = _need(lambda inputs: inputs.case.seqlens is None, "not for packed sequences")
HALF = _need(lambda inputs: inputs.case.torch_dtype.itemsize == 2, "16 bit alone")
BFLOAT16 = _need(lambda inputs: inputs.case.dtype == "bfloat16", "bfloat16 alone")
NO_BIAS = _need(lambda inputs: not inputs.case.bias, "no bias")
FEW_DUMMIES = _need(lambda inputs: inputs.case.prefix_len <= inputs.case.q_len, "more dummy queries than queries")
HAS_PREFIX = _need(lambda inputs: inputs.case.prefix_len > 0, "no prefix")
WHOLE_PAGES = _need(lambda i: i.case.prefix_len % PAGE == i.case.kv_len % PAGE == 0, f"pages of {PAGE} positions")

RIVALS = (
    Way("peft", prepare_peft),
    Way("concat_mask", prepare_concat_mask, None, (NOT_DECODING,)),
    Way("concat_square", prepare_concat_square, "cpu", (NOT_DECODING, NO_BIAS, FEW_DUMMIES)),
    Way("concat", prepare_concat, "cpu", (DECODING,)),
    Way("concat_flash", prepare_concat_flash, "cuda", (HALF, NO_BIAS)),
    Way("concat_cudnn", prepare_concat_cudnn, "cuda", (HALF,)),
    Way("concat_varlen", prepare_concat_varlen, "cuda", (PACKED, HALF), pads=False),
    Way("flex", prepare_flex, "cuda", (NOT_DECODING, NOT_PACKED)),
    Way("fa3", prepare_fa3, "cuda", (HOPPER, FORWARD, BFLOAT16, NO_BIAS, _installed(*FA3_MODULES))),
    Way("flashinfer", prepare_flashinfer, "cuda", (DECODING, HALF, HAS_PREFIX, WHOLE_PAGES, _installed("flashinfer"))),
)
HOPPER_KERNEL = Way(
    "hopper", prepare_hopper, "cuda", (HOPPER, TRAINING, FORWARD, _installed("triton"), _hopper_refuses), pads=False, ours=True
)
