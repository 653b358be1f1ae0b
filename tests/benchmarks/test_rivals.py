"""The ways that are compared compute the same thing, on small shapes; a wrong one is never timed."""

import dataclasses
import sys
import types

import pytest
import torch

import attention_row
import prefix_kernels
import rivals
from attention_row import measure_on_cpu, prepare
from cases import Case, tiny_op_cases

CASES = [
    Case("small", 3, 4, kv_heads, 16, length, kv_len, prefix_len, dtype, backward, seqlens, bias)
    for length, kv_len, prefix_len, backward, seqlens, bias in (
        (6, 6, 5, False, None, False), (6, 6, 5, True, None, False), (3, 3, 9, True, None, False),
        (1, 7, 4, False, None, False), (1, 7, 0, False, None, False), (5, 5, 3, True, (5, 2, 4), False),
        (6, 6, 5, False, None, True), (6, 6, 5, True, None, True),
    )
    for kv_heads in (4, 2)
    for dtype in ("float32", "bfloat16")
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.key)
def test_every_way_is_right_or_says_why_it_cannot_run(case):
    prepared = prepare(case, "cpu")
    for name, way in prepared.row["ways"].items():
        assert ("not_available" in way) != (name in prepared.calls), f"{name}: {way}"
    assert {"peft", "sdpa"} <= prepared.calls.keys()
    expected = {"out"} | (set(attention_row.GRADIENTS) if case.backward else set())
    assert all(prepared.row["ways"][name]["errors"].keys() == expected for name in prepared.calls)


def legal(case):
    own_kernels = set(prefix_kernels.available_backends()) - {"sdpa"}
    return prepare(case, "cpu").calls.keys() - own_kernels


def test_what_is_legal_on_a_cpu():
    assert legal(CASES[0]) == {"peft", "concat_mask", "concat_square", "sdpa"}
    assert legal(CASES[8]) == {"peft", "concat_mask", "sdpa"}  # more prefix than queries: no square
    assert legal(CASES[24]) == {"peft", "concat_mask", "sdpa"}  # a bias
    assert legal(CASES[12]) == {"peft", "concat", "sdpa"}  # decoding: nothing is hidden, so no mask


@pytest.mark.parametrize("broken", ["out", "gradient", "nan"])
def test_a_wrong_way_is_recorded_and_not_timed(monkeypatch, broken):
    right = rivals.prepare_concat_mask

    def prepare_wrong(case, device):
        attend = right(case, device)

        class Doubled(torch.autograd.Function):
            @staticmethod
            def forward(ctx, tensor):
                return tensor * {"out": 1.01, "gradient": 1, "nan": torch.nan}[broken]

            @staticmethod
            def backward(ctx, grad):
                return grad * (1.01 if broken == "gradient" else 1)

        return lambda inputs: Doubled.apply(attend(inputs))

    wrong = tuple(
        dataclasses.replace(way, prepare=prepare_wrong) if way.name == "concat_mask" else way for way in rivals.RIVALS
    )
    monkeypatch.setattr(rivals, "RIVALS", wrong)
    row = measure_on_cpu(CASES[4], seconds=0, rounds=1)
    assert row["ways"]["concat_mask"]["failed"].startswith("wrong: relative error")
    assert "median" not in row["ways"]["concat_mask"] and "median" in row["ways"]["peft"]


def test_only_decoding_finds_its_cache_concatenated():
    for case, ready in ((CASES[4], False), (CASES[12], True)):
        inputs = rivals.make_inputs(case, "cpu", torch.Generator().manual_seed(0))
        first, second = rivals.concatenated(inputs), rivals.concatenated(inputs)
        assert (first[0] is second[0]) == ready
        assert first[1].shape == (3, 4, case.prefix_len + case.kv_len, 16)


def test_a_way_that_raises_leaves_the_others(monkeypatch):
    def prepare_broken(case, device):
        raise RuntimeError("no such kernel\nand a long trace")

    broken = tuple(dataclasses.replace(way, prepare=prepare_broken) if way.name == "peft" else way for way in rivals.RIVALS)
    monkeypatch.setattr(rivals, "RIVALS", broken)
    row = measure_on_cpu(CASES[0], seconds=0, rounds=1)
    assert row["ways"]["peft"]["failed"] == "RuntimeError: no such kernel"
    assert row["ratio"] is not None and row["best_rival"].startswith("concat")


def test_ratio_is_the_best_rivals_median_over_the_chosen_ones():
    names = ("peft", "sdpa", "cpu", "other", "flex")
    row = {"device": "cuda", "chosen": "cpu", "ways": {name: {"ours": name in ("cpu", "sdpa", "other")} for name in names}}
    timings = {name: {"median": seconds} for name, seconds in (("peft", 4.0), ("sdpa", 3.0), ("cpu", 2.0), ("other", 1.0))}
    assert attention_row.finish(row, timings)["best_rival"] == "sdpa" and row["ratio"] == 1.5
    row["chosen"] = "sdpa"
    assert attention_row.finish(row, timings)["best_rival"] == "peft" and row["ratio"] == 1.3333
    row |= {"device": "cpu", "chosen": "cpu"}
    assert attention_row.finish(row, timings)["best_rival"] == "peft" and row["ratio"] == 2


def test_packed_sequences_reach_dense_rivals_as_padded_rows():
    packed = next(case for case in tiny_op_cases() if case.seqlens and case.backward)
    inputs = rivals.make_inputs(packed, "cpu", torch.Generator().manual_seed(0))
    padded = inputs.padded()
    start = 0
    for row, length in enumerate(packed.seqlens):
        own = inputs.k[start : start + length].transpose(0, 1)
        assert torch.equal(padded.k[row, :, :length], own) and not padded.k[row, :, length:].any()
        start += length
    assert padded.prefix_k is inputs.prefix_k and padded.case.seqlens is None


def test_varlen_rival_gathers_the_prefix_in_front_of_each_sequence(monkeypatch):
    from torch.nn.attention import varlen

    def by_hand(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size):
        assert window_size == (-1, 0) and max_k == 7 + 5
        outs = []
        for i in range(len(cu_q) - 1):
            queries, keys = slice(int(cu_q[i]), int(cu_q[i + 1])), slice(int(cu_k[i]), int(cu_k[i + 1]))
            mask = torch.ones(cu_q[i + 1] - cu_q[i], cu_k[i + 1] - cu_k[i], dtype=torch.bool).tril(5)
            args = (t.transpose(0, 1)[None] for t in (q[queries], k[keys], v[keys]))
            outs.append(torch.nn.functional.scaled_dot_product_attention(*args, attn_mask=mask)[0].transpose(0, 1))
        return torch.cat(outs)

    monkeypatch.setattr(varlen, "varlen_attn", by_hand)
    packed = next(case for case in tiny_op_cases() if case.seqlens)
    packed = dataclasses.replace(packed, kv_heads=packed.heads, dtype="float32")
    inputs = rivals.make_inputs(packed, "cpu", torch.Generator().manual_seed(0))
    out = rivals.prepare_concat_varlen(packed, "cpu")(inputs)
    torch.testing.assert_close(out[:10], attention_row.reference(inputs)[0].float())


def on_the_cpu(name, case, monkeypatch):
    """Errors of a way that is for CUDA, run on the CPU."""
    inputs = rivals.make_inputs(case, "cpu", torch.Generator().manual_seed(0))
    way = next(way for way in (*rivals.RIVALS, rivals.HOPPER_KERNEL) if way.name == name)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, dynamic: function)
        attend = way.prepare(case, "cpu")
    return attention_row._errors(attend, inputs, case, attention_row.reference(inputs))


@pytest.mark.parametrize("name, case", [
    ("flex", Case("", 2, 4, 2, 16, 6, 6, 5, "float32")), ("flex", Case("", 2, 4, 2, 16, 6, 6, 5, "float32", bias=True)),
    ("flex", Case("", 2, 4, 4, 16, 6, 6, 3, "float32")),
    ("concat_flash", Case("", 2, 4, 4, 16, 6, 6, 5, backward=True)), ("concat_flash", Case("", 2, 4, 2, 16, 1, 6, 5)),
])  # fmt: skip
def test_rivals_for_cuda(name, case, monkeypatch):
    errors = on_the_cpu(name, case, monkeypatch)
    assert all(error[2] <= attention_row.LIMITS[case.dtype] for error in errors.values()), errors


@pytest.mark.parametrize("case", [Case("", 2, 4, 2, 16, 1, 6, 5), Case("", 2, 4, 2, 16, 4, 6, 5)], ids=lambda case: case.key)
def test_flash_attention_3(case, monkeypatch):
    def flash_attn_func(q, k, v, causal):  # [batch, len, heads, head_dim], causal means bottom-right
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1]) if causal else None
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return out.transpose(1, 2)

    monkeypatch.setattr(rivals.importlib.util, "find_spec", lambda name: name == "flash_attn_interface")
    monkeypatch.setitem(sys.modules, "flash_attn_interface", types.SimpleNamespace(flash_attn_func=flash_attn_func))
    assert on_the_cpu("fa3", case, monkeypatch)["out"][2] < 0.01


@pytest.mark.parametrize("seqlens", [None, (20, 3, 130)])
def test_hopper_kernel(monkeypatch, seqlens):
    pytest.importorskip("triton")
    from prefix_kernels.backends.triton import hopper_forward, tile_sizes
    from support.gluon_emulator import EmulatedKernel

    monkeypatch.setattr(hopper_forward, "hopper_kernel", EmulatedKernel(hopper_forward, "hopper_kernel"))
    monkeypatch.setattr(tile_sizes, "find", lambda *key: tile_sizes.TABLE["hopper", 90, 16, 64])
    longest = max(seqlens or (20,))
    case = Case("", 3, 4, 2, 64, longest, longest, 5, seqlens=seqlens)
    assert on_the_cpu("hopper", case, monkeypatch)["out"][2] < 0.01


class FakeCascade:
    """FlashInfer's cascade as its documentation describes it: pages [pages, kv_heads, page, head_dim] and index pointers."""

    def __init__(self, levels, workspace, layout):
        assert levels == 2 and layout == "HND"

    def plan(self, queries, pointers, pages, last_lens, heads, kv_heads, head_dim, page, *, q_data_type):
        assert all(pointer[-1] == len(index) for pointer, index in zip(pointers, pages, strict=True))
        assert all(set(lens.tolist()) == {page} for lens in last_lens)
        self.queries, self.pointers, self.pages = queries, pointers, pages

    def run(self, q, cache):
        def columns(level, row, tensor):
            at = int((self.queries[level][1:] <= row).sum())
            index = self.pages[level][self.pointers[level][at] : self.pointers[level][at + 1]].long()
            return tensor[index].transpose(0, 1).flatten(1, 2)

        rows = []
        for row in range(len(q)):
            k, v = (torch.cat([columns(level, row, tensor) for level in (0, 1)], 1)[None] for tensor in cache)
            query = q[row][None, :, None]
            rows.append(torch.nn.functional.scaled_dot_product_attention(query, k, v, enable_gqa=True)[0, :, 0])
        return torch.stack(rows)


def test_flashinfer(monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", types.SimpleNamespace(MultiLevelCascadeAttentionWrapper=FakeCascade))
    assert on_the_cpu("flashinfer", Case("", 3, 4, 2, 16, 1, 32, 48), monkeypatch)["out"][2] < 0.01


def test_row_on_a_gpu_way_by_way(monkeypatch):
    """The order of events on a GPU, on the CPU: the row is put after each way, and one that fails leaves the others."""
    prepare = attention_row.prepare
    monkeypatch.setattr(attention_row, "prepare", lambda case, device, only: prepare(case, "cpu", only=only))
    monkeypatch.setattr(attention_row.measure, "with_peak", lambda call: (call(), 123))
    memory = types.SimpleNamespace(total_memory=1e9)
    monkeypatch.setattr(attention_row.torch.cuda, "get_device_properties", lambda index: memory)

    def device_timing(call, sets):
        if sets and asked[-1] == "concat":
            raise RuntimeError("out of memory")
        return {"median": 1.0}

    asked, rows = [], []
    monkeypatch.setattr(attention_row.measure, "device_timing", device_timing)
    case = Case("", 3, 4, 2, 16, 1, 8, 5, "float32")
    attention_row.measure_on_gpu(case, lambda name: asked.append(name) or name != "peft", rows.append, {})
    assert asked[:2] == ["peft", "concat_mask"] and "sdpa" in asked
    assert [row["complete"] for row in rows] == [False] * (len(asked) - 1) + [True]
    assert rows[-1]["ways"]["sdpa"]["median"] == 1 and rows[-1]["ways"]["sdpa"]["peak_bytes"] == 123
    assert rows[-1]["ways"]["concat"]["failed"] == "RuntimeError: out of memory" and "peft" not in rows[-1]["ways"]
    assert rows[-1]["best_rival"] != "peft"
    attention_row.measure_on_gpu(case, lambda name: name == "peft", rows.append, rows[-1]["ways"])
    assert rows[-1]["ways"].keys() == set(asked) and rows[-1]["complete"] and rows[-1]["ratio"] == 1
    huge = Case("", 4096, 32, 8, 128, 1, 4096, 8192)
    attention_row.measure_on_gpu(huge, lambda name: True, rows.append, {})
    assert rows[-1]["failed"] == "caches of 256 GiB"


def test_goals():
    def goal(*arguments):
        return Case("", *arguments).cpu_goal

    assert goal(32, 12, 12, 64, 1, 128, 128, "float32") == 2 and goal(32, 12, 12, 64, 1, 128, 512, "bfloat16") == 5
    assert goal(32, 12, 12, 64, 1, 128, 16, "float32") == 1 and goal(8, 12, 12, 64, 1, 128, 2048, "float32") == 1
    assert goal(8, 12, 12, 64, 64, 64, 2048, "float32") == 1
