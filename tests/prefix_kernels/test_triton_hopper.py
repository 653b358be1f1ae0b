"""The forward kernel for Hopper: its code on an emulator, what it refuses, when it is chosen; on a GPU where there is one."""

import importlib.util

import pytest
import torch

from prefix_kernels import api
from prefix_kernels.backends import triton as triton_backend
from support.cases import Case
from support.compare import DTYPES, expectation
from support.hopper_cases import CASES, CASES_BY_NAME, ROWS, call_of, machine_code
from support.inputs import make_inputs
from support.tolerance import assert_close
from support.trial import shared_folder, trial_of

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton, which is not installed", allow_module_level=True)

from prefix_kernels.backends.triton import forward_kernel, hopper, hopper_forward, tile_sizes
from prefix_kernels.backends.triton.tile_sizes import Regime
from support.gluon_emulator import EmulatedKernel

SIXTEEN_BIT = ("bfloat16", "float16", "float32 prefix")


pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")


def check(case, dtype, device="cpu"):
    """out and lse are as good as eager attention's."""
    inputs = call_of(make_inputs(case, *DTYPES[dtype], device=device))
    assert hopper.why_not_on_hopper(inputs) is None
    out, lse = hopper_forward.forward(inputs)
    _, _, wide, eager = expectation(case, *DTYPES[dtype])
    assert out.dtype == inputs.q.dtype and lse.dtype == torch.float32
    assert_close(out, wide[0], eager[0], "out")
    assert_close(lse, wide[1], eager[1], "lse")


def emulate(monkeypatch, **options):
    kernel = EmulatedKernel(hopper_forward, "hopper_kernel", **options)
    monkeypatch.setattr(hopper_forward, "hopper_kernel", kernel)
    monkeypatch.setattr(tile_sizes, "find", lambda *key: tile_sizes.TABLE["hopper", 90, 16, key[3]])
    return kernel


@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_the_emulator(monkeypatch, case):
    kernel = emulate(monkeypatch)
    check(case, SIXTEEN_BIT[CASES.index(case) % 3])
    assert kernel.programs > 0 or case.batch == 0


@pytest.mark.parametrize("seed", range(1, 4))
def test_other_orders_of_events(monkeypatch, seed):
    emulate(monkeypatch, seed=seed)
    check(CASES_BY_NAME["long prefix"], "bfloat16")


def test_sections_of_heads(monkeypatch):
    """Programs in an order by sections of two heads, the last of one."""
    emulate(monkeypatch)
    monkeypatch.setattr(hopper_forward, "section_of", lambda *_: 2)
    check(Case("", **ROWS | {"heads": 5, "kv_heads": 5}, q_len=300, kv_len=300, prefix_len=20), "bfloat16")


def test_a_section_is_what_l2_holds():
    problem = inputs_of(batch=3, heads=8, kv_heads=8, q_len=2**14, kv_len=2**14).problem()  # 4 MiB of keys and values a head
    assert hopper.section_of(problem, problem.kv_len * 8, 24) == hopper.SECTION_BYTES // 2**22
    assert hopper.section_of(problem, problem.kv_len * 8 * 2**10, 24) == 1
    assert hopper.section_of(problem, 8, 24) == 24 and hopper.section_of(problem, 0, 24) == 24


INDEX_VALUES = [  # on the left what a device may hold, on the right what it acts as
    ("bank", {"prefix_ids": (3, -7, 2**32 + 1, 0)}, {"prefix_ids": (-1, -1, -1, 0)}),
    ("pack, no prefix", {"cu_seqlens_q": (-5, 129, 999)}, {"cu_seqlens_q": (0, 129, 169)}),
    ("pack, no prefix", {"cu_seqlens_k": (0, 2**32 + 1, 20)}, {"cu_seqlens_k": (0, 169, 169)}),
]


@pytest.mark.parametrize(("case", "outside", "inside"), INDEX_VALUES)
def test_index_values_out_of_range(monkeypatch, case, outside, inside):
    """As on a device, where they are not checked: ids out of range are none, ends of sequences are clamped."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    emulate(monkeypatch)
    inputs, outcomes = make_inputs(CASES_BY_NAME[case], torch.bfloat16), []
    for values in (outside, inside):
        inputs.options |= {name: torch.tensor(value, dtype=torch.int64) for name, value in values.items()}
        outcomes.append(hopper_forward.forward(call_of(inputs)))
    for value, other in zip(*outcomes, strict=True):
        assert value.isfinite().sum() > 0
        assert torch.equal(value, other)


BROKEN = {  # the case that must not survive a change of the source, and the change
    "a barrier counts too few": ("long prefix", "v_empty.index(i), count=2", "v_empty.index(i), count=1"),
    "a barrier counts too many": ("long prefix", "k_empty.index(i), count=2", "k_empty.index(i), count=3"),
    "keys are not waited for": ("long prefix", "    wait_for_keys(k_ring, j + 1, blocks, STAGES)\n", ""),
    "values are not waited for": ("long prefix", "    mbarrier.wait(full.index(j % STAGES), (j // STAGES) & 1)\n", ""),
    "the producer does not wait": ("long prefix", "mbarrier.wait(empty.index(j % STAGES), ((j // STAGES) & 1) ^ 1)", "pass"),
    "a block past the last is waited for": ("long prefix", "pred=j < blocks", "pred=j < blocks + 1"),
    "scores are not waited for": ("long prefix", "warpgroup_mma_wait(1,", "warpgroup_mma_wait(2,"),
    "keys are given back too early": ("long prefix", "    scores = warpgroup_mma_wait(1, deps=(scores,))\n", ""),
    "a turn is not handed on": ("long prefix", "    mbarrier.arrive(turns.index(1 - WARPGROUP), count=1)\n", ""),
    "no fence": ("short", "    fence_async_shared()\n", ""),
    "a query sees the next key": ("odd lengths", "gl.minimum(query + shift + 1, own", "gl.minimum(query + shift + 2, own"),
    "no mask": ("odd lengths", "    if MASKED:\n        column", "    if False:\n        column"),
    "a full block too many": ("odd lengths", "(prefix_len // BLOCK_N, 1), prefix", "(prefix_blocks, 1), prefix"),
    "the prefix of another row": ("bank", "prefix = gl.where(exists, wanted, 0)", "prefix = gl.where(exists, 0, 0)"),
    "a head of another group": ("head_dim 128", "head // (heads // kv_heads)", "head % kv_heads"),
    "a sequence ends elsewhere": ("pack", "stop, RAGGED - number)", "stop, RAGGED - length)"),
}  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN)
def test_the_emulator_notices(monkeypatch, broken):
    case, *change = BROKEN[broken]
    emulate(monkeypatch, change=tuple(change))
    with pytest.raises(AssertionError):
        check(CASES_BY_NAME[case], "bfloat16")


EXPONENTIALS, SUMS = "MUFU.EX2\n" * 66, "WARPGROUP.DEPBAR.LE gsb0, 0x0\n"
SOFTMAX = "HGMMA\nHGMMA\nWARPGROUP.DEPBAR.LE gsb0, 0x1\n" + EXPONENTIALS + SUMS
CONSUMER = "HGMMA\n" + SUMS + (".L_x_1:\n" + SOFTMAX + "@P0 BRA `(.L_x_1) ;\n") * 4 + "HGMMA\n" + SUMS + "UTMASTG\n"
SASS = "USETMAXREG\n" * 2 + "SYNCS\n" * 20 + CONSUMER * 2 + "UTMALDG.5D\n" * 6
PTX = ".maxnreg 168 .reqntid 384 setmaxnreg.inc.sync.aligned.u32 240; setmaxnreg.dec.sync.aligned.u32 24;"
WRONG_CODE = [
    ("", "", []),
    ("u32 240", "u32 160", ["setmaxnreg gives [24, 160]"]),
    ("384", "256", ["not 384 threads of 168 registers"]),
    ("UTMALDG.5D", "LDGSTS", ["0 UTMALDG"]),
    (EXPONENTIALS + SUMS, SUMS + EXPONENTIALS,
     ["66 of 66 exponentials wait for the sums"] * 8 + ["0 exponentials in a softmax"] * 8),
    ("HGMMA\nHGMMA\n", "HGMMA\n" + SUMS + "HGMMA\n", ["wgmma is serialised: more waits than the source has"]),
    ("MUFU.EX2\nWARPGROUP", "MUFU.EX2\nLDL R1\nLDL R2\nWARPGROUP", ["2 reads and 0 writes of local memory in a loop"] * 8),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "said"), WRONG_CODE)
def test_what_is_wrong_with_the_machine_code(monkeypatch, old, new, said):
    hopper_code, compiled = machine_code(monkeypatch, *(text.replace(old, new) if old else text for text in (PTX, SASS)))
    assert hopper_code.missing_in(compiled, tile_sizes.TABLE["hopper", 90, 16, 128]) == said


def inputs_of(dtype="bfloat16", **options):
    return call_of(make_inputs(Case("", **ROWS | {"q_len": 8, "kv_len": 8, "prefix_len": 4} | options), *DTYPES[dtype]))


REFUSED = [
    ({"window": 3}, "it knows no window"),
    ({"softcap": 2.0, "padding": "left"}, "it knows no softcap and no key_mask"),
    ({"key_lens": (3,)}, "it knows no key_lens"),
    ({"bias": (1, 1, 1, 0)}, "it knows no bias"),
    ({"prefixes": 2, "prefix_ids": (1,), "prefix_lens": (4, 3)}, "it knows no prefix_lens"),
    ({"seqlens_q": (5, 3), "parent": (-1, 0)}, "it knows no parent"),
    ({"dtype": "float32"}, "it computes in bfloat16 and float16, not in float32"),
    ({"head_dim": 96}, "heads and values have 64, 128 or 256 dimensions alike, not 96 and 96"),
    ({"value_dim": 128}, "heads and values have 64, 128 or 256 dimensions alike, not 64 and 128"),
    ({"scale": 0.0}, "scale is positive, not 0.0"),
]


@pytest.mark.parametrize(("options", "reason"), REFUSED)
def test_refusals(options, reason):
    assert hopper.why_not_on_hopper(inputs_of(**options)) == reason


def test_strides_that_tma_cannot_take():
    inputs = inputs_of()
    for name in ("q", "k", "v", "prefix_k", "prefix_v"):
        tensor = getattr(inputs, name)
        odd = tensor.new_zeros(*tensor.shape[:-1], 68)[..., :64]
        shifted = tensor.new_zeros(*tensor.shape[:-1], 72)[..., 1:65]
        every_second = tensor.new_zeros(*tensor.shape[:-1], 128)[..., ::2]
        expanded = tensor.new_zeros(*tensor.shape[:1], 1, *tensor.shape[2:]).expand(-1, 2, -1, -1)
        for other in (odd, shifted, every_second, expanded):
            assert hopper.why_not_on_hopper(inputs._replace(**{name: other})).startswith(f"{name}'s address and strides")
    wide = torch.zeros(1, 1, 4, 68)[..., :64]  # float32: the kernel reads a copy of it
    assert hopper.why_not_on_hopper(inputs._replace(prefix_k=wide, prefix_v=wide)) is None


def test_it_serves_no_cpu():
    assert hopper.why_not(inputs_of()) == "it is for GPUs of compute capability 9.0"


def test_only_a_measured_regime_chooses_it(monkeypatch):
    inputs, served = inputs_of(q_len=9, kv_len=9), []
    monkeypatch.setattr(forward_kernel, "forward", lambda inputs: "portable")
    monkeypatch.setattr(hopper_forward, "forward", lambda inputs: "hopper")
    monkeypatch.setattr(hopper, "why_not", lambda inputs: served.append(inputs) or (None if len(served) == 1 else "no"))
    monkeypatch.setattr(tile_sizes, "HOPPER_REGIMES", ())
    assert triton_backend._forward(inputs) == "portable" and not served
    for regime, kernel in (
        (Regime(128, 1, 1), "portable"), (Regime(64, 10, 1), "portable"), (Regime(64, 1, 3), "portable"),
        (Regime(64, 9, 2), "hopper"), (Regime(64, 9, 2), "portable"),
    ):  # fmt: skip
        monkeypatch.setattr(tile_sizes, "HOPPER_REGIMES", (regime,))
        assert triton_backend._forward(inputs) == kernel
    assert len(served) == 2


TRIAL = """
import torch
from prefix_kernels import api
from prefix_kernels.backends.triton import hopper_forward

for dim, q_len, kv_len, prefix_len, causal in (
    (64, 300, 300, 200, True), (64, 1, 1, 0, True), (64, 70, 90, 900, True), (64, 200, 0, 0, False), (64, 130, 260, 1, False),
    (128, 300, 300, 600, True), (256, 300, 300, 600, True), (256, 70, 130, 3, False),
):
    q, k, v = (
        torch.randn(2, heads, length, dim, device="cuda", dtype=torch.bfloat16)
        for heads, length in ((4, q_len), (2, kv_len), (2, kv_len))
    )
    prefix = torch.randn(2, prefix_len, dim, device="cuda", dtype=torch.bfloat16)
    hopper_forward.forward(api._dense_inputs(q, k, v, prefix, prefix, causal=causal))[0].cpu()
"""


@pytest.fixture(scope="session")
def survived(tmp_path_factory):
    """A kernel that hangs or crashes does so here, in a process of its own, and takes no other test with it."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    return trial_of([TRIAL], shared_folder(tmp_path_factory), 50)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_the_gpu(survived, case, dtype):
    assert survived.returncode == 0, survived.stderr
    check(case, dtype, "cuda")


@pytest.mark.gpu
def test_the_same_bits_on_the_gpu(survived):
    assert survived.returncode == 0, survived.stderr
    case = Case("many rows", batch=8, heads=8, q_len=512, kv_len=512, prefix_len=256, head_dim=64)
    inputs = call_of(make_inputs(case, *DTYPES["bfloat16"], device="cuda"))
    for value, other in zip(hopper_forward.forward(inputs), hopper_forward.forward(inputs), strict=True):
        assert torch.equal(value, other)


@pytest.mark.gpu
def test_another_length_compiles_nothing_again(survived):
    assert survived.returncode == 0, survived.stderr
    counts = []
    for length, prefix_len in ((48, 32), (33, 7), (1, 1), (1024, 100), (128, 0)):
        q, k, v = (torch.randn(2, heads, length, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2))
        prefix = torch.randn(2, prefix_len, 64, device="cuda", dtype=torch.bfloat16)
        hopper_forward.forward(api._dense_inputs(q, k, v, prefix, prefix))
        counts.append(sum(len(cache[0]) for cache in hopper_forward.hopper_kernel.device_caches.values()))
    assert len(set(counts)) == 1
