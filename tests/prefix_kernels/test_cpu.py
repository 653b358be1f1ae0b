"""The C++ kernels: every instruction set on every case, sizes that cross tiles, threads, and what the backend refuses."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import prefix_kernels
from prefix_kernels.backends import cpu
from support.cases import CASES, Case
from support.compare import DTYPES, compare, gradients, serves
from support.inputs import Inputs, make_inputs

pytestmark = pytest.mark.skipif("cpu" not in prefix_kernels.available_backends(), reason="the C++ kernels are not built")
CPUINFO = Path("/proc/cpuinfo")
ISAS = ("baseline", "avx2", "avx512", "amx")


def has_isa(name):
    try:
        torch.ops.prefix_kernels_cpu.isa(name)
    except RuntimeError:
        return False
    return True


@pytest.fixture
def isa(request):
    """The test runs with the instruction set named by its parameter, if this processor has it."""
    best = torch.ops.prefix_kernels_cpu.isa()
    if not has_isa(request.param):
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    torch.ops.prefix_kernels_cpu.isa(best)


# Tiles hold 8, 16 or 32 query rows, four go together; 64 keys; a decode step cuts a long prefix in ranges of 256 columns.
TILES = (
    Case("several tiles", batch=1, q_len=75, kv_len=140, prefix_len=130),
    Case("several tiles, head_dim 80", q_len=150, kv_len=170, prefix_len=70, head_dim=80, value_dim=112),
    Case("several tiles, head_dim 100", q_len=150, kv_len=170, prefix_len=70, head_dim=100, value_dim=9),
    Case("several tiles, window", batch=1, q_len=150, kv_len=150, prefix_len=70, window=40),
    Case("several tiles, sliding prefix", batch=1, q_len=90, kv_len=150, prefix_len=140, window=130, first_key_position=0),
    Case("several tiles, not causal window", batch=1, q_len=150, kv_len=130, window=33, causal=False),
    Case("several tiles, holes, softcap", q_len=70, kv_len=140, padding="holes", softcap=4.0),
    Case("several tiles, fill", q_len=40, kv_len=200, key_lens=(77, 190)),
    Case("several tiles, varlen", seqlens_q=(70, 1, 33, 64), seqlens_k=(70, 90, 33, 130), prefix_len=66),
    Case("several tiles, parent", seqlens_q=(70, 40, 33, 20, 50), parent=(-1, 0, 0, -1, 3), prefix_len=66),
    Case("many sequences", batch=21, q_len=17, kv_len=17, kv_heads=1, prefix_len=40),
    Case("decode, ranges", batch=5, q_len=1, kv_len=70, prefix_len=600, kv_heads=1),
    Case("decode, head_dim 72", batch=5, q_len=1, kv_len=70, prefix_len=600, head_dim=72, value_dim=70),
    Case("decode, many queries", batch=3, q_len=15, kv_len=200, prefix_len=100, head_dim=40, heads=2, kv_heads=2),
    Case("decode, many heads", batch=3, q_len=1, kv_len=200, prefix_len=100, heads=15, kv_heads=1, window=120),
    Case("decode, full tiles", batch=37, q_len=1, kv_len=9, prefix_len=70, heads=2, kv_heads=1),
    Case("decode, bank", batch=21, q_len=1, kv_len=70, prefix_len=300, prefixes=3, prefix_lens=(300, 257, 0),
         prefix_ids=(0, 1, 2, -1, 0, 1, 2) * 3, padding="left"),
    Case("several tiles, bias", q_len=70, kv_len=140, prefix_len=130, bias=(0, 0, 0, 0), bias_hides=True),
    Case("several tiles, bias of heads", q_len=70, kv_len=150, prefix_len=37, window=60, bias=(1, 0, 1, 0), softcap=4.0),
    Case("decode, bias", batch=9, heads=4, kv_heads=2, q_len=1, kv_len=77, prefix_len=300, bias=(0, 0, 0, 0)),
    Case("decode, bias, one row", batch=1, heads=3, kv_heads=3, q_len=1, kv_len=77, prefix_len=70, bias=(1, 0, 0, 0)),
    Case("decode, bias, bank", batch=5, q_len=2, kv_len=70, prefix_len=90, prefixes=3, prefix_lens=(90, 57, 0),
         prefix_ids=(0, 1, 2, -1, 1), bias=(0, 0, 0, 0), padding="left"),
    Case("decode, four queries", batch=9, heads=2, q_len=4, kv_len=80, prefix_len=100, window=30),
    Case("decode, single queries", q_len=1, kv_len=77, prefix_len=70, heads=3, kv_heads=3, head_dim=72, value_dim=70),
    Case("decode, single queries, ranges", batch=1, q_len=1, kv_len=39, prefix_len=530, heads=2, kv_heads=2, window=20),
    Case("decode, packed", seqlens_q=(1, 2, 1, 3), seqlens_k=(70, 5, 1, 90), prefix_len=80, heads=2),
)  # fmt: skip


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float32 prefix"])
@pytest.mark.parametrize("case", CASES + TILES, ids=str)
def test_every_instruction_set(isa, case, dtype):
    # With a bias of ±6 over many keys the log-sum-exp is some 10, and its last bit is what gradients err by.
    compare(case, *DTYPES[dtype], "cpu", slack=1.5 if case in TILES and case.bias is not None else 1.0)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [Case("plain"), TILES[1], TILES[2], TILES[-5]], ids=str)
def test_16_bit_is_widened_and_rounded_once(isa, case, dtype):
    """The result in float32 for the same values, rounded to nearest even; NaN stays NaN."""
    if isa == "amx" and dtype == torch.bfloat16:
        pytest.skip("a matrix unit multiplies bfloat16 as it is")
    narrow = make_inputs(case, dtype)
    for inputs in (narrow, Inputs((narrow.tensors[0] * torch.nan, *narrow.tensors[1:]), narrow.options)):
        out, lse = inputs.call(backend="cpu", return_lse=True)
        wide_out, wide_lse = inputs.to(torch.float32).call(backend="cpu", return_lse=True)
        assert torch.equal(out.nan_to_num(7.0), wide_out.to(dtype).nan_to_num(7.0))
        assert torch.equal(lse.nan_to_num(7.0), wide_lse.nan_to_num(7.0))


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*TILES[1:3], *TILES[-4:-2]], ids=str)
def test_nothing_is_read_between_rows(isa, case, dtype):
    inputs = make_inputs(case, dtype)
    apart = [torch.full((*t.shape[:-1], 160), torch.nan, dtype=dtype) for t in inputs.tensors]
    for wide, tensor in zip(apart, inputs.tensors, strict=True):
        wide[..., : tensor.shape[-1]] = tensor
    views = tuple(wide[..., : tensor.shape[-1]] for wide, tensor in zip(apart, inputs.tensors, strict=True))
    assert torch.equal(Inputs(views, inputs.options).call(backend="cpu"), inputs.call(backend="cpu"))


@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_every_number_of_float16(isa):
    """Alone as it is, and halfway between any two, subnormal ones too; infinities and NaN."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.float16).reshape(256, 1, 1, 256)
    other = every.flatten()[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))].reshape(every.shape)
    q, k, prefix = torch.zeros(256, 1, 1, 16).half(), torch.zeros(256, 1, 2, 16).half(), torch.zeros(1, 0, 16).half()
    for v in (every, torch.cat([every, other], dim=2)):
        options = {"prefix_v": torch.zeros(1, 0, 256).half(), "causal": False, "backend": "cpu"}
        out = prefix_kernels.prefix_attention(q, k[:, :, : v.shape[2]], v, prefix, **options)
        torch.testing.assert_close(out, v.double().mean(2, keepdim=True).half(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 5e-2)], ids=str)
def test_scores_that_grow_by_hundreds_from_key_to_key(isa, dtype, tolerance):
    """Their maximum is followed in steps, which must not be too large."""
    inputs = make_inputs(Case("growing", q_len=70, kv_len=150, prefix_len=130, scale=40.0), dtype)
    out, expected = inputs.call(backend="cpu"), inputs.to(torch.float64).call(backend="reference")
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("isa", ["amx"], indirect=True)
@pytest.mark.parametrize("case", [Case("plain"), Case("many rows", q_len=150, kv_len=150, prefix_len=70)], ids=str)
def test_nan_stays_in_its_row_of_a_matrix_product(isa, case):
    inputs = make_inputs(case, torch.bfloat16)
    q = inputs.tensors[0].detach().clone()
    q[0, 0, 3] = torch.nan
    expected, out = inputs.call(backend="cpu"), Inputs((q, *inputs.tensors[1:]), inputs.options).call(backend="cpu")
    assert out[0, 0, 3].isnan().all()
    out[0, 0, 3] = expected[0, 0, 3]
    assert torch.equal(out, expected)


@pytest.mark.skipif(not CPUINFO.exists(), reason="Linux says what the processor has, this system does not")
def test_the_widest_instruction_set_is_in_use():
    """What the build leaves out, as for an old compiler, would be missed by its speed alone."""
    flags = {flag for line in CPUINFO.read_text().splitlines() if line.startswith("flags") for flag in line.split()}
    avx2 = {"avx2", "fma", "bmi2"}
    avx512 = avx2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
    needed = {"amx": avx512 | {"avx512_bf16", "amx_tile", "amx_bf16"}, "avx512": avx512, "avx2": avx2, "baseline": set()}
    assert torch.ops.prefix_kernels_cpu.isa() == next(name for name, of_it in needed.items() if of_it <= flags)


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(RuntimeError, match="this processor cannot run mmx"):
        torch.ops.prefix_kernels_cpu.isa("mmx")


def run(inputs):
    out, lse = inputs.call(backend="cpu", return_lse=True)
    generator = torch.Generator().manual_seed(2)
    grads = (torch.randn(out.shape, generator=generator), torch.randn(lse.shape, generator=generator))
    return (out, lse, *gradients(inputs, out, lse, *grads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", TILES, ids=str)
def test_any_number_of_threads(case, dtype):
    """Every result has one owner: forward bits do not depend on the threads, and gradients only on how the prefix's are cut."""
    inputs, threads = make_inputs(case, dtype), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(inputs)
        torch.set_num_threads(3)
        three, again = run(inputs), run(inputs)
    finally:
        torch.set_num_threads(threads)
    for index, (first, other, repeated) in enumerate(zip(one, three, again, strict=True)):
        assert torch.equal(other, repeated)
        if index < 5:
            assert torch.equal(first, other)
        else:
            tolerance = max(1e-5, torch.finfo(dtype).eps)
            torch.testing.assert_close(first, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("prefixes", [None, 2])
def test_a_gradient_keeps_alive_nothing_but_itself(prefixes):
    """Parts of a batch add up the prefix's gradient apart, the more the more threads there are."""
    ids = None if prefixes is None else (0, 1) * 8
    inputs, threads = (
        make_inputs(Case("parts", batch=16, kv_heads=1, prefixes=prefixes, prefix_ids=ids)),
        torch.get_num_threads(),
    )
    try:
        torch.set_num_threads(16)
        grads = run(inputs)[2:]
    finally:
        torch.set_num_threads(threads)
    assert all(grad.untyped_storage().nbytes() == grad.nbytes for grad in grads)


ON_A_SMALL_STACK = """
import threading, torch
from prefix_kernels import prefix_attention

def calls():
    for dtype in (torch.float32, torch.bfloat16):
        for q_len in (1, 4, 128):
            q = torch.randn(2, 4, q_len, 256, dtype=dtype, requires_grad=True)
            k, prefix = torch.randn(2, 2, 128, 256, dtype=dtype), torch.randn(2, 64, 256, dtype=dtype, requires_grad=True)
            bias = torch.randn(1, 4, q_len, 192)
            prefix_attention(q, k, k, prefix, prefix, softcap=3.0, bias=bias, backend="cpu").sum().backward()

torch.set_num_threads(1)
threading.stack_size(128 * 1024)
thread = threading.Thread(target=calls)
thread.start()
thread.join()
"""


def test_on_a_thread_with_a_small_stack():
    subprocess.run([sys.executable, "-c", ON_A_SMALL_STACK], check=True, timeout=120)


def test_no_heads():
    q, k, prefix = torch.ones(2, 0, 3, 16), torch.ones(2, 2, 3, 16), torch.ones(2, 4, 16)
    assert prefix_kernels.prefix_attention(q, k, k, prefix, prefix, backend="cpu").shape == q.shape


@pytest.mark.parametrize("softcap", [1e-30, 1e30])
def test_a_scale_and_a_softcap_whose_ratio_is_beyond_float32(softcap):
    inputs = make_inputs(Case("extreme", scale=1e30, softcap=softcap), torch.bfloat16)
    out = inputs.call(backend="cpu")
    assert all(tensor.isfinite().all() for tensor in (out, *torch.autograd.grad(out.sum(), inputs.tensors)))


def test_what_is_not_finite_spreads_alike_with_any_number_of_threads():
    """Tiles of queries go together as a thread's share of them allows, and read the same keys."""
    inputs = make_inputs(Case("one head", batch=1, heads=3, kv_heads=1, q_len=120, kv_len=120), torch.bfloat16)
    tensors = [tensor.detach().clone() for tensor in inputs.tensors]
    tensors[2][0, 0, 30] = torch.nan
    outs, threads = [], torch.get_num_threads()
    try:
        for count in (1, 8, 16):
            torch.set_num_threads(count)
            outs.append(Inputs(tuple(tensors), inputs.options).call(backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert outs[0].isnan().any() and all(torch.equal(out.nan_to_num(7.0), outs[0].nan_to_num(7.0)) for out in outs)


@pytest.mark.parametrize(
    ("case", "dtype", "reason"),
    [
        (Case("plain"), torch.float64, "it serves float32, bfloat16 and float16, got torch.float64"),
        (Case("large", head_dim=257), torch.float32, "it serves up to 256 as head_dim, got 257"),
        (Case("large", value_dim=272), torch.float32, "it serves up to 256 as value_dim, got 272"),
    ],
)
def test_refusals(case, dtype, reason):
    inputs = make_inputs(case, dtype)
    assert prefix_kernels.explain_backends(*inputs.tensors, **inputs.options)["cpu"] == f"refused: {reason}"
    with pytest.raises(NotImplementedError, match=reason):
        inputs.call(backend="cpu")


def test_it_is_preferred_where_it_serves():
    assert serves("cpu", make_inputs(Case("plain")))
    inputs = make_inputs(Case("plain"))
    assert prefix_kernels.explain_backends(*inputs.tensors)["cpu"] == "chosen"


@pytest.mark.parametrize("built", [False, True])
def test_a_package_that_hides_an_installed_one_says_so(tmp_path, monkeypatch, built):
    """As a clone does, for a Python that is started in it."""
    (tmp_path / "prefix_kernels").mkdir()
    if built:
        (tmp_path / "prefix_kernels" / "_C.so").write_text("")
    installed = SimpleNamespace(locate_file=lambda name: tmp_path / name)
    monkeypatch.setattr(cpu.importlib.metadata, "distribution", lambda name: installed)
    monkeypatch.setattr(cpu, "LIBRARY", tmp_path / "clone" / "_C.so")
    hides = f"those of {tmp_path / 'prefix_kernels'}, which {tmp_path / 'clone'} hides: start Python in another folder"
    assert (hides if built else "are not built") in cpu._missing.__wrapped__()


@pytest.mark.parametrize(("content", "reason"), [(None, "are not built"), (b"no library", "cannot be loaded")])
def test_a_missing_or_broken_library_is_a_reason(tmp_path, monkeypatch, content, reason):
    library = tmp_path / "_C.so"
    if content is not None:
        library.write_bytes(content)
    monkeypatch.setattr(cpu, "LIBRARY", library)
    cpu._missing.cache_clear()
    inputs = make_inputs(Case("plain"))
    try:
        explained = prefix_kernels.explain_backends(*inputs.tensors)
        assert reason in explained["cpu"] and explained["sdpa"] == "chosen"
        assert "cpu" not in prefix_kernels.available_backends()
    finally:
        cpu._missing.cache_clear()
