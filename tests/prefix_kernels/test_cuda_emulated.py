"""The CUDA kernel without a GPU: its source, compiled for the host, one thread of a block after the other."""

from dataclasses import replace

import pytest
import torch

import prefix_kernels
from prefix_kernels import api
from prefix_kernels.backends import cuda
from support import decoding
from support.building import needs_compiler
from support.cases import Case
from support.cuda_cases import CUDA_CASES, aligned_inputs
from support.emulated_gpu import EmulatedGpu
from support.inputs import make_inputs

pytestmark = [needs_compiler, pytest.mark.usefixtures("uninitialized_memory_is_nan")]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return EmulatedGpu(tmp_path_factory.mktemp("emulated"))


@pytest.fixture
def gpu(built):
    with built.serving(), torch.no_grad():
        yield built


def check(case, dtype, inputs=None):
    return decoding.check(case, dtype, backend="cuda", inputs=inputs)


@pytest.mark.parametrize("case", CUDA_CASES, ids=str)
def test_bfloat16(gpu, case):
    """In orders of thread blocks and warps that differ, on devices that split differently; the same bits in any order."""
    results = []
    for multiprocessors in (132, 3):
        for order in (0, 1, 2):
            gpu.set(order, multiprocessors)
            results.append(check(case, "bfloat16"))
            for value, first in zip(results[-1], results[-1 - order], strict=True):
                assert torch.equal(value, first)


@pytest.mark.parametrize(
    "case",
    [
        Case("longest prefix", heads=2, kv_heads=1, q_len=1, kv_len=5, prefix_len=65536, head_dim=64),
        Case("256 rows", batch=256, heads=2, kv_heads=1, q_len=1, kv_len=40, prefix_len=70, head_dim=64),
    ],
    ids=str,
)
def test_sizes(gpu, case):
    check(case, "bfloat16")


@pytest.mark.parametrize("case", CUDA_CASES[::4], ids=str)
@pytest.mark.parametrize("dtype", ["float16", "float32 prefix"])
def test_other_dtypes(gpu, case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("case", CUDA_CASES, ids=str)
def test_aligned(gpu, case):
    """Tokens at multiples of 16 bytes are copied asynchronously, and of few queries read into registers; those of the other
    tests are not."""
    inputs = aligned_inputs(case, "bfloat16")
    for multiprocessors, clusters in ((132, True), (3, True), (132, False)):
        gpu.set(0, multiprocessors, clusters)
        first = check(case, "bfloat16", inputs)
        gpu.set(2, multiprocessors, clusters)
        for value, other in zip(check(case, "bfloat16", inputs), first, strict=True):
            assert torch.equal(value, other)


def test_what_a_call_takes(gpu):
    """Partial results as they are announced, and none for what is not split."""

    def stated(case):
        inputs = make_inputs(case, torch.bfloat16)
        return prefix_kernels.workspace_bytes(*inputs.tensors, **inputs.options, backend="cuda")["forward"]

    case = Case("decode", q_len=1, kv_len=60, prefix_len=300, head_dim=80, batch=3)
    assert stated(case) == 4 * (3 + 1) * 3 * 4 * (80 + 2)  # 3 splits of the prefix, 1 of the keys
    assert stated(replace(case, head_dim=64)) == 4 * 2 * 3 * 4 * (64 + 2)  # each row reads the prefix itself: 2 splits
    assert stated(replace(case, prefix_len=10)) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=("prefix of 16 bit", "float32 prefix"))
@pytest.mark.parametrize("options", [{}, {"window": 5, "first_key_position": 0}, {"softcap": 2.0}, {"key_mask": True}], ids=str)
def test_a_call_like_an_earlier_one(gpu, monkeypatch, options, dtype):
    """It reaches the kernel at once, with the prefix as it is given, and gives the same bits."""
    calls = []
    for seed in range(3):
        torch.manual_seed(seed)
        tensors = [torch.randn(shape).bfloat16() for shape in ((3, 4, 2, 64), (3, 2, 9, 64), (3, 2, 9, 64))]
        calls.append((*tensors, *(torch.randn(2, 70, 64).to(dtype) for _ in range(2))))
    calls[2] = [tensor.transpose(-1, -2).contiguous().transpose(-1, -2) for tensor in calls[2]]
    if "key_mask" in options:
        options = {"key_mask": torch.arange(9).expand(3, 9) > torch.tensor([[0], [-1], [4]])}
    expected = [prefix_kernels.prefix_attention(*tensors, **options, backend="cuda", return_lse=True)[0] for tensors in calls]
    prefix_kernels.prefix_attention(*calls[0], **options, backend="cuda")
    monkeypatch.setattr(api, "_dense_inputs", None)
    for tensors, right in zip(calls, expected, strict=True):
        value = prefix_kernels.prefix_attention(*tensors, **options, backend="cuda")
        assert torch.equal(value, right) and value.stride() == right.stride()


def test_indices_that_no_public_call_lets_through(gpu):
    """On a GPU values are not checked: an id out of range is no prefix, lengths are clamped. int64 as well as int32."""
    case = Case("indices", batch=5, q_len=1, kv_len=20, prefix_len=70, head_dim=64, prefixes=2, prefix_ids=(0, -1, 1, -1, 1),
                prefix_lens=(70, 0), key_lens=(20, 0, 7, 20, 0))  # fmt: skip
    inputs = make_inputs(case, torch.bfloat16)
    expected = inputs.call(backend="cuda", return_lse=True)
    wild = {"prefix_ids": [0, 2**40, 1, -7, 1], "prefix_lens": [2**33, -1], "key_lens": [2**35, -2, 7, 21, 0]}
    attention = api._dense_inputs(*inputs.tensors, **inputs.options)
    attention = attention._replace(**{name: torch.tensor(values) for name, values in wild.items()})
    for value, other in zip(cuda.forward(attention), expected, strict=True):
        assert torch.equal(value, other)


@pytest.mark.parametrize("head_dim", [64, 80])
def test_no_heads(gpu, head_dim):
    """Nothing is divided by the size of a group of none."""
    q, *others = (tensor.detach() for tensor in make_inputs(Case("heads", head_dim=head_dim), torch.bfloat16).tensors)
    out, lse = prefix_kernels.prefix_attention(q[:, :0, :1], *others, backend="cuda", return_lse=True)
    assert (out.shape, lse.shape) == ((2, 0, 1, head_dim), (2, 0, 1))
    assert prefix_kernels.workspace_bytes(q[:, :0, :1], *others, backend="cuda") == {"forward": 0, "backward": 0}


STRIDES = {
    "last stride not 1": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "first axis expanded": lambda t: t[:1].expand(t.shape),
    "all strides 0": lambda t: t.flatten()[0].expand(t.shape),
}


@pytest.mark.parametrize("which", range(5), ids=("q", "k", "v", "prefix_k", "prefix_v"))
@pytest.mark.parametrize("layout", STRIDES)
@pytest.mark.parametrize("head_dim", [64, 80])
def test_any_strides(gpu, head_dim, layout, which):
    inputs = make_inputs(Case("strides", q_len=2, kv_len=9, head_dim=head_dim, prefix_len=70), torch.bfloat16)
    values = [tensor.detach().contiguous() for tensor in inputs.tensors]
    values[which] = STRIDES[layout](values[which])
    calls = [prefix_kernels.prefix_attention(*each, backend="cuda") for each in (values, [t.contiguous() for t in values])]
    assert torch.equal(*calls)


@pytest.mark.parametrize("broken", range(5), ids=("q", "k", "v", "prefix_k", "prefix_v"))
@pytest.mark.parametrize("prefix_len", [10, 300])
def test_nan_that_is_seen_shows(gpu, broken, prefix_len):
    inputs = make_inputs(Case("nan", q_len=2, kv_len=9, head_dim=64, prefix_len=prefix_len), torch.bfloat16)
    tensors = [tensor.detach() for tensor in inputs.tensors]
    tensors[broken].fill_(torch.nan)
    out, lse = prefix_kernels.prefix_attention(*tensors, backend="cuda", return_lse=True)
    assert out.isnan().all() and (broken in (2, 4) or lse.isnan().all())


def test_what_it_refuses(gpu):
    def refusal(case, dtype=torch.bfloat16, **more):
        inputs = make_inputs(case, dtype)
        return prefix_kernels.explain_backends(*inputs.tensors, **inputs.options, **more)["cuda"]

    good = Case("good", q_len=8, kv_len=9, head_dim=64)
    preferred = f"not chosen: cpu is preferred ({prefix_kernels.select.REASONS['cpu']}); it would run in an emulation"
    assert refusal(good) == preferred
    assert "up to 8 queries" in refusal(replace(good, q_len=9))
    assert "got torch.float32" in refusal(good, torch.float32)
    assert "got 32 and 32" in refusal(replace(good, head_dim=32))
    assert "got 64 and 80" in refusal(replace(good, value_dim=80))
    assert "no bias" in refusal(replace(good, bias=(1, 0, 1, 0)))
    with torch.enable_grad():
        assert "no backward pass" in refusal(good)
        with pytest.raises(NotImplementedError, match="no backward pass"):
            make_inputs(good, torch.bfloat16).call(backend="cuda")


def test_inside_the_operator(gpu):
    """torch.compile calls the operator, in which autograd is off whatever is asked for: the tensors say whether it is."""
    inputs = make_inputs(Case("operator", q_len=2, kv_len=9, head_dim=64), torch.bfloat16)
    attention = api._dense_inputs(*inputs.tensors, **inputs.options)
    expected = inputs.call(backend="cuda", return_lse=True)
    with pytest.raises(NotImplementedError, match="no backward pass"):
        torch.ops.prefix_kernels.attention(*attention, "cuda", True)
    inputs.tensors = tuple(tensor.detach() for tensor in inputs.tensors)
    attention = api._dense_inputs(*inputs.tensors, **inputs.options)
    for value, other in zip(torch.ops.prefix_kernels.attention(*attention, "cuda", True), expected, strict=True):
        assert torch.equal(value, other)


THROUGH_THE_OPERATOR = {
    "compile": lambda call: torch.compile(call, backend="aot_eager"),
    "vmap": lambda call: lambda q, *others: torch.vmap(lambda q: call(q, *others))(q[None])[0],
}


@pytest.mark.parametrize("wrap", THROUGH_THE_OPERATOR)
def test_no_gradient_is_wanted_of_what_requires_one(gpu, wrap):
    """A frozen pass over a trainable prefix: what the operator runs is what explain_backends says."""
    inputs = make_inputs(Case("operator", q_len=2, kv_len=9, head_dim=64), torch.bfloat16)
    assert inputs.tensors[3].requires_grad
    torch.compiler.reset()
    call = THROUGH_THE_OPERATOR[wrap](lambda *tensors: prefix_kernels.prefix_attention(*tensors, backend="cuda"))
    assert torch.equal(call(*inputs.tensors), inputs.call(backend="cuda"))


MUTATIONS = {  # each breaks one thing that a case below must notice
    "causal mask": ("visibility.h", "clamped(position + 1, 0, keys)", "clamped(position + 2, 0, keys)"),
    "window": ("visibility.h", "- call.window + 1, 0", "- call.window, 0"),
    "sliding prefix": ("visibility.h", "call.slide + 1, 0", "call.slide, 0"),
    "key mask": ("softmax.h", " || !(shown >> key & 1)", ""),
    "splits overlap": ("schedule.h", "begin = split * size;", "begin = split * size - (split > 0);"),
    "last block of a split": ("schedule.h", "(blocks + int(splits.by) - 1) / splits", "blocks / splits"),
    "merge forgets the first split": ("merge.h", "int from = first_split;", "int from = first_split + 1;"),
    "merge without weights": ("merge.h", "weight = exp2_of(state.x - base);", "weight = 1;"),
    "merge of another query": ("merge.h", "query = number % s.by_unit_queries;", "query = number / s.by_unit_queries % 2;"),
    "merge of a prefix that is none": ("merge.h", "lacks_prefix ? s.shared_splits : 0", "0"),
    "correction of the sums": ("softmax.h", "if (any(changes))", "if (false)"),
    "a barrier less": ("decode_kernel.h", "<STAGES - 1>();\n    sync_threads();", "<STAGES - 1>();"),
    "copies not waited for": ("decode_kernel.h", "wait_for_copies<STAGES - 1>", "wait_for_copies<STAGES>"),
    "past the fill": ("decode_kernel.h", "left = exists - first - int(token)", "left = exists + 1 - first - int(token)"),
    "prefix of a tile": ("tile.h", "shared.prefix = chosen,", "shared.prefix = 0,"),
    "few: key mask": ("few_kernel.h", " || !(shown >> i & 1)", ""),
    "few: mask of another chunk": ("few_kernel.h", "shown_now = shown;", "shown_now = ~0u;"),
    "few: past the fill": ("few_kernel.h", "at >= seen[q].stop", "at > seen[q].stop"),
    "few: own keys as the prefix's": ("few_kernel.h", "if (turns) look(true);", ""),
    "few: correction of the sums": ("few_kernel.h", "sums[i][q + 2] *= correction", "sums[i][q + 2] *= 1"),
    "few: weights not transposed": ("few_kernel.h", "first = transposed(packed<Element>(weights[t][0], weights[t][1]));",
                                    "first = packed<Element>(weights[t][0], weights[t][1]);"),
    "few: a barrier less": ("few_kernel.h", "  }\n  sync_threads();\n  for", "  }\n  for"),
    "few: merged in a cluster without weights": ("few_kernel.h", "weight = exp2_of(states[j].x - base);", "weight = 1;"),
    "few: a barrier of the cluster less": ("few_kernel.h", "sync_cluster();\n  for", "for"),
    "few: sums overwritten by the next part": ("few_kernel.h", "sync_threads();  // the next part", "// the next part"),
    "few: a part of an item forgotten": ("few_kernel.h", "i < holders.count; ++i", "i < holders.count - 1; ++i"),
    "few: a part without its weight": ("merge.h", "of_part = exp2_of(state.x - base);", "of_part = 1;"),
    "few: sums of a part that saw nothing": ("merge.h", "if (state.y == 0) part", "if (false) part"),
    "few: a part not waited for": ("few_kernel.h", "stores && i < holders.count; i +=", "stores && i < 1; i +="),
    "few: parts of an item": ("schedule.h", "- first + 1};", "- first};"),
    "few: a share of what is there": ("few_kernel.h", "{part.begin * chunks / s.by_length,",
                                    "{part.begin * chunks / s.by_length + 1,"),
}  # fmt: skip
NOTICED_BY = (
    Case("all at once", batch=5, heads=6, kv_heads=2, q_len=3, kv_len=300, prefix_len=170, head_dim=64, window=280,
         first_key_position=0, key_lens=(300, 290, 7, 0, 131)),
    Case("holes", batch=2, heads=6, kv_heads=2, q_len=2, kv_len=300, prefix_len=70, head_dim=64, padding="holes"),
    Case("equal shares", batch=5, heads=6, kv_heads=2, q_len=1, kv_len=700, prefix_len=20, head_dim=64,
         key_lens=(700, 3, 650, 0, 129)),
    Case("cluster", batch=1, heads=2, kv_heads=1, q_len=1, kv_len=700, prefix_len=20, head_dim=64),
    Case("bank", batch=40, heads=9, kv_heads=1, q_len=1, kv_len=9, prefix_len=70, head_dim=64, prefixes=2,
         prefix_ids=tuple(i % 3 - 1 for i in range(40))),
)  # fmt: skip


def noticed():
    for case in NOTICED_BY:
        check(case, "bfloat16")  # tokens that lie anywhere: not for the kernel for few queries
        check(case, "bfloat16", aligned_inputs(case, "bfloat16"))


def test_nothing_is_noticed_without_a_mutation(gpu):
    for order in range(3):
        for multiprocessors in (3, 9):
            gpu.set(order, multiprocessors)
            noticed()


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_noticed(built, name):
    kernels = built.build_kernels(name.replace(" ", "_"), (64,), MUTATIONS[name])
    with built.serving(kernels), torch.no_grad(), pytest.raises((AssertionError, RuntimeError)):
        for order in range(3):
            for multiprocessors in (3, 9):  # shares of a row: two at most, more
                built.set(order, multiprocessors)
                noticed()
