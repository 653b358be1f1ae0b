"""The benchmarks' workloads as data: attention calls, and whole models with random weights."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from prefix_kernels.problem import AttentionInputs, AttentionProblem

BACKWARD_FLOPS = 2.5  # times the forward pass's


@dataclass(frozen=True)
class Case:
    """One attention call over a prefix shared by the batch. A q_len of 1 is a decoding step over a cache of kv_len."""

    model: str  # whose heads these are
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    q_len: int
    kv_len: int
    prefix_len: int
    dtype: str = "bfloat16"
    backward: bool = False  # forward and the gradients of q, k, v, prefix_k and prefix_v
    seqlens: tuple[int, ...] | None = None  # packed sequences of these lengths; q_len and kv_len are the longest
    bias: bool = False  # an encoder's: not causal, one float32 bias [1, heads, q_len, prefix_len + kv_len] for all rows

    @property
    def decode(self) -> bool:
        return self.q_len == 1

    @property
    def direction(self) -> str:
        return "decode" if self.decode else "forward+backward" if self.backward else "forward"

    @property
    def key(self) -> str:
        """The row's name in a results file; two cases never share one."""
        batch = f"B{self.batch} S{self.kv_len}" if self.seqlens is None else f"packed {len(self.seqlens)}×{self.kv_len}"
        heads = f"H{self.heads}/{self.kv_heads} D{self.head_dim}"
        return f"{self.direction} {batch} {heads} P{self.prefix_len} {self.dtype}" + (" bias" if self.bias else "")

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def cpu_goal(self) -> float:
        """How many times faster than the best rival this point is meant to be on a CPU."""
        if self.decode and self.batch >= 32 and self.prefix_len >= 128 and self.kv_len <= 128:
            return {"float32": 2.0, "bfloat16": 5.0}[self.dtype]
        return 1.0

    def problem(self, seqlen: int | None = None) -> AttentionProblem:
        """The call as the package sees it; seqlen: only one packed sequence, of this length."""
        batch, q_len, kv_len = (self.batch, self.q_len, self.kv_len) if seqlen is None else (1, seqlen, seqlen)

        def shape(*sizes: int) -> torch.Tensor:
            return torch.empty(*sizes, dtype=self.torch_dtype, device="meta")

        q, k = (shape(batch, heads, n, self.head_dim) for heads, n in ((self.heads, q_len), (self.kv_heads, kv_len)))
        prefix = shape(1, self.kv_heads, self.prefix_len, self.head_dim)
        given = dict.fromkeys(AttentionInputs._fields)
        given |= {"q": q, "k": k, "v": k, "prefix_k": prefix, "prefix_v": prefix, "causal": not self.bias}
        return AttentionInputs(**given).problem()

    def flops(self) -> int:
        """Floating point operations, of both passes where there is a backward pass."""
        lengths = [None] if self.seqlens is None else self.seqlens
        forward = sum(self.problem(length).flops() for length in lengths)
        return int(forward * (1 + BACKWARD_FLOPS)) if self.backward else forward

    def bytes_moved(self) -> int | None:
        """Least memory traffic of a forward pass; None with a backward pass."""
        if self.backward:
            return None
        if self.seqlens is None:
            bias = 4 * self.heads * self.q_len * (self.prefix_len + self.kv_len) if self.bias else 0
            return self.problem().bytes_moved() + bias
        prefix = self.problem(0).bytes_moved()
        return prefix + sum(self.problem(length).bytes_moved() - prefix for length in self.seqlens)


@dataclass(frozen=True)
class Model:
    """The shape of a published model, for random weights; family: transformers' name of the configuration."""

    name: str
    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int


@dataclass(frozen=True)
class Run:
    """One end-to-end measurement: a training step on E2E-length rows, or greedy generation from prompts of one length."""

    model: Model
    what: str  # "train" or "generate"
    batch: int
    prefix_len: int
    prompt_len: int = 32
    new_tokens: int = 128

    @property
    def key(self) -> str:
        return f"{self.what} {self.model.name} B{self.batch} P{self.prefix_len}"


def cpu_cases() -> list[Case]:
    """12 heads of 64, with 12 and 4 kv heads: training shapes in both directions; decoding over a cache of 128, then of single
    rows and over a longer cache, where sharing saves least; at last float16, and heads that fill no whole vectors."""
    kinds = list(itertools.product((12, 4), (16, 128, 512, 2048), ("float32", "bfloat16")))
    train = [
        Case("12 heads", 8, 12, kv_heads, 64, length, length, prefix_len, dtype, backward)
        for backward in (False, True)
        for length in (64, 256)
        for kv_heads, prefix_len, dtype in kinds
    ]
    decode = [
        Case("12 heads", batch, 12, kv_heads, 64, 1, 128, prefix_len, dtype)
        for batch in (8, 32)
        for kv_heads, prefix_len, dtype in kinds
    ]
    least = [
        Case("12 heads", batch, 12, kv_heads, 64, 1, cache, prefix_len, dtype)
        for dtype, kv_heads, batches in (("float32", 4, (1, 8, 32)), ("bfloat16", 4, (1,)), ("bfloat16", 12, (1,)))
        for batch, cache in itertools.product(batches, (128, 1024))
        if (batch, cache) not in ((8, 128), (32, 128))
        for prefix_len in (16, 128, 512, 2048)
    ]
    others = [
        Case(model, batch, *heads, q_len, 128, prefix_len, dtype, backward)
        for dtype, model, heads in (
            ("float16", "12 heads", (12, 4, 64)), ("float32", "heads of 100", (32, 32, 100)),
            ("bfloat16", "heads of 100", (32, 32, 100)),
        )
        for batch, q_len, backward in ((4, 128, False), (4, 128, True), (1, 1, False), (8, 1, False))
        for prefix_len in (16, 512)
    ]  # fmt: skip
    return train + decode + least + others


GPT2_MEDIUM = ("GPT-2 medium", 16, 16, 64)  # model, heads, kv heads, head_dim
SMOLLM2 = ("SmolLM2-135M", 9, 3, 64)
LLAMA_8B = ("Llama-3.1-8B", 32, 8, 128)
WIDE = ("head_dim 256", 8, 4, 256)
T5_BASE = ("T5-base", 12, 12, 64)

# Tokens (SmolLM2's tokenizer) of 288 rows of E2E's training set, drawn with seed 0: source, target, end of text.
E2E_LENGTHS = (
    60, 42, 71, 62, 53, 55, 47, 54, 56, 51, 56, 50, 77, 39, 60, 68, 28, 47, 52, 80, 50, 61, 62, 48, 42, 51, 56, 76, 44, 36,
    60, 51, 49, 45, 83, 49, 60, 68, 56, 70, 67, 58, 38, 51, 40, 80, 51, 51, 60, 44, 44, 39, 37, 48, 43, 37, 49, 78, 64, 59,
    31, 68, 37, 49, 77, 35, 71, 35, 66, 62, 57, 55, 63, 36, 46, 88, 64, 36, 68, 51, 59, 32, 49, 53, 76, 41, 69, 71, 76, 68,
    74, 39, 49, 80, 57, 80, 67, 58, 55, 61, 50, 63, 55, 37, 80, 63, 76, 69, 38, 65, 81, 85, 64, 44, 54, 77, 86, 47, 55, 75,
    50, 64, 77, 49, 45, 53, 42, 88, 54, 70, 76, 93, 71, 67, 54, 50, 46, 37, 53, 85, 86, 48, 35, 48, 41, 34, 46, 37, 69, 48,
    35, 58, 45, 81, 62, 81, 40, 47, 50, 42, 52, 44, 65, 59, 55, 62, 46, 54, 55, 54, 66, 90, 58, 42, 45, 42, 95, 61, 49, 81,
    59, 52, 75, 39, 50, 69, 66, 61, 64, 38, 51, 47, 44, 76, 48, 36, 44, 42, 61, 64, 86, 70, 72, 68, 82, 81, 61, 27, 56, 60,
    47, 64, 76, 81, 77, 65, 51, 63, 38, 55, 56, 59, 71, 71, 62, 57, 37, 68, 53, 48, 83, 53, 59, 75, 45, 71, 56, 69, 61, 70,
    61, 64, 38, 77, 60, 68, 57, 88, 42, 31, 62, 64, 38, 53, 36, 78, 73, 93, 66, 70, 46, 73, 46, 50, 41, 47, 29, 70, 40, 40,
    53, 39, 57, 55, 42, 46, 38, 75, 35, 37, 30, 46, 54, 45, 60, 37, 66, 52,
)  # fmt: skip


def _dense(heads: tuple, batch: int, length: int, prefix_lens: tuple[int, ...], bias: bool = False) -> list[Case]:
    return [Case(*heads[:1], batch, *heads[1:], length, length, prefix_len, bias=bias) for prefix_len in prefix_lens]


def _packed(heads: tuple, prefix_len: int, dtype: str = "bfloat16", lengths: tuple[int, ...] = E2E_LENGTHS) -> Case:
    longest = max(lengths)
    return Case(*heads[:1], len(lengths), *heads[1:], longest, longest, prefix_len, dtype, seqlens=lengths)


def _both(cases: list[Case]) -> Iterator[Case]:
    """Each case without and with its backward pass."""
    for case in cases:
        yield case
        yield Case(**{**vars(case), "backward": True})


def gpu_op_cases() -> list[Case]:
    """Training shapes, the ones that say most first."""
    first = [
        *_dense(LLAMA_8B, 8, 512, (512,)), *_dense(GPT2_MEDIUM, 32, 128, (200, 10)), _packed(GPT2_MEDIUM, 16),
        *_dense(LLAMA_8B, 8, 512, (2048,)), *_dense(SMOLLM2, 64, 96, (16,)), *_dense(LLAMA_8B, 4, 2048, (512,)),
    ]  # fmt: skip
    then = [
        *_dense(GPT2_MEDIUM, 16, 512, (200, 10)), *_dense(LLAMA_8B, 8, 512, (32, 8192)), *_dense(WIDE, 8, 1024, (512,)),
        *_dense(T5_BASE, 8, 512, (200, 16), bias=True), *_dense(GPT2_MEDIUM, 32, 128, (50,)),
        *_dense(LLAMA_8B, 4, 2048, (2048,)), _packed(GPT2_MEDIUM, 200),
        _packed(GPT2_MEDIUM, 16, "float16"), Case("GPT-2 medium", 32, 16, 16, 64, 128, 128, 200, "float32"),
    ]  # fmt: skip
    return list(_both(first + then))


def gpu_decode_cases() -> list[Case]:
    """One new token a row over each row's own cache: every batch × cache × prefix of three models, what says most first."""
    batches, caches, prefix_lens = (64, 8, 256, 1), (128, 1024, 4096), (512, 2048, 16, 0, 8192)

    def grid(heads: tuple, batches: tuple, caches: tuple, prefix_lens: tuple = prefix_lens) -> list[Case]:
        return [
            Case(*heads[:1], batch, *heads[1:], 1, cache, prefix_len)
            for batch, cache, prefix_len in itertools.product(batches, caches, prefix_lens)
        ]

    first = grid(LLAMA_8B, batches[:2], caches[:2])
    first += [case for heads in (GPT2_MEDIUM, SMOLLM2) for case in grid(heads, batches[:2], caches[:1], (16, 512, 2048))]
    first += grid(WIDE, (64,), (1024,), (512, 16))
    every = [case for heads in (LLAMA_8B, GPT2_MEDIUM, SMOLLM2) for case in grid(heads, batches, caches)]
    return list(dict.fromkeys(first + every))


SMOLLM2_MODEL = Model("SmolLM2-135M", "llama", 30, 576, 9, 3, 64, 1536, 49152)
GPT2_MEDIUM_MODEL = Model("GPT-2 medium", "gpt2", 24, 1024, 16, 16, 64, 4096, 50257)
LLAMA_1B_MODEL = Model("Llama-3.2-1B", "llama", 16, 2048, 32, 8, 64, 8192, 128256)
LLAMA_8B_MODEL = Model("Llama-3.1-8B", "llama", 32, 4096, 32, 8, 128, 14336, 128256)
PREFIX_LENS = {"train": (16, 200, 2048), "generate": (16, 512, 2048)}


def gpu_runs() -> list[Run]:
    """Whole models, by how much a row says; neighbours share a model, which takes seconds to make."""

    def of(model: Model, sizes: Iterable[tuple[int, int]], what: str) -> list[Run]:  # batch, index of the prefix length
        return [Run(model, what, batch, PREFIX_LENS[what][index]) for batch, index in sizes]

    models = (GPT2_MEDIUM_MODEL, LLAMA_1B_MODEL, LLAMA_8B_MODEL, SMOLLM2_MODEL)
    first = [run for model in models for run in of(model, ((8, 1), (8, 0), (8, 2)), "train")]
    first += [run for model in (*models[1:], models[0]) for run in of(model, ((64, 1), (8, 1)), "generate")]
    sizes = [(64, 1), (64, 0), (64, 2), (1, 1), (1, 2), (1, 0), (8, 1), (8, 2), (8, 0)]
    then = [run for model in models for run in of(model, sizes, "train") + of(model, sizes, "generate")]
    return list({run.key: run for run in first + then}.values())


def tiny_op_cases() -> list[Case]:
    """For trying the control flow without a GPU."""
    heads = ("tiny", 4, 2, 16)
    packed = _packed(heads, 5, lengths=(3, 7, 4))
    return list(_both([*_dense(heads, 3, 8, (5,)), packed, *_dense(heads, 3, 8, (5,), bias=True)]))


def tiny_decode_cases() -> list[Case]:
    return [Case("tiny", batch, 4, 2, 16, 1, 12, prefix_len) for batch, prefix_len in ((3, 8), (1, 0))]


def tiny_runs() -> list[Run]:
    model = Model("tiny", "llama", 2, 32, 4, 2, 8, 32, 64)
    return [Run(model, "train", 2, 4), Run(model, "generate", 2, 4, prompt_len=3, new_tokens=4)]
