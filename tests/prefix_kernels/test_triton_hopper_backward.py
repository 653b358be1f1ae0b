"""The backward kernels for Hopper: their code on an emulator, when they are chosen; on a GPU where there is one."""

import importlib.util

import pytest
import torch

from support.cases import Case
from support.compare import DTYPES, NAMES, expectation, gradients
from support.hopper_cases import CASES, CASES_BY_NAME, ROWS, aligned, call_of, machine_code
from support.inputs import Inputs, make_inputs
from support.tolerance import assert_close
from support.trial import shared_folder, trial_of

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton, which is not installed", allow_module_level=True)

from prefix_kernels.backends.triton import backward_kernels, hopper, hopper_dkeys, hopper_dq, launch, recorded, tile_sizes
from prefix_kernels.backends.triton.rows import scalars
from prefix_kernels.backends.triton.tile_sizes import Regime
from support.gluon_emulator import EmulatedKernel

SIXTEEN_BIT = ("bfloat16", "float16", "float32 prefix")
KERNELS = {"dq": (hopper_dq, "hopper_dq_kernel"), "dkeys": (hopper_dkeys, "hopper_dkeys_kernel")}
EVERYTHING = {
    name: tuple(Regime(dim, 1, 1) for dim in hopper.HEAD_DIMS if (f"hopper_{name}", 90, 16, dim) in tile_sizes.TABLE)
    for name in ("dq", "dkeys", "dprefix")
}  # fmt: skip


def served(head_dim):
    """The kernels that there are for heads of this size."""
    return [name for name, regimes in EVERYTHING.items() if any(regime.head_dim == head_dim for regime in regimes)]


pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")


def delta_of(call, **operands):
    """What delta_kernel computes."""
    out, lse, grad_out, grad_lse = (operands[name].value.pointer for name in ("out", "lse", "grad_out", "grad_lse"))
    delta = (out.float() * grad_out.float()).sum(-1)
    delta = delta.transpose(0, 1) if call.problem.varlen else delta
    return scalars(delta - torch.where(lse == -torch.inf, 0.0, grad_lse), call.problem.varlen)


class SumSplits:
    """sum_splits_kernel."""

    arg_names = backward_kernels.sum_splits_kernel.arg_names

    def __getitem__(self, grid):
        return self.run

    def run(self, k_parts, v_parts, k_total, v_total, splits, *_, **__):
        for parts, total in ((k_parts, k_total), (v_parts, v_total)):
            if total is not None:
                total.copy_(parts.view(splits, *total.shape).sum(0))


def emulate(monkeypatch, change=(), seed=0):
    """The backward pass on CPU tensors; change: (kernel, old, new) in a kernel's source."""
    emulated = {}
    for name, (module, kernel) in KERNELS.items():
        emulated[name] = EmulatedKernel(module, kernel, change=change[1:] if name in change[:1] else None, seed=seed)
        monkeypatch.setattr(module, kernel, emulated[name])
    monkeypatch.setattr(tile_sizes, "find", lambda kernel, *key: tile_sizes.TABLE[kernel, 90, 16, key[2]])
    monkeypatch.setattr(tile_sizes, "HOPPER_BACKWARD_REGIMES", EVERYTHING)
    monkeypatch.setattr(hopper, "why_not", hopper.why_not_on_hopper)
    monkeypatch.setattr(backward_kernels, "_delta", delta_of)
    monkeypatch.setattr(backward_kernels, "FEW_BLOCKS", 0)  # so that shares are summed
    monkeypatch.setattr(backward_kernels, "sum_splits_kernel", SumSplits())
    return emulated


def check(case, dtype, wanted=(True,) * 5):
    """The gradients that are wanted are as good as eager attention's."""
    inputs = call_of(make_inputs(case, *DTYPES[dtype]))
    grad_out, grad_lse, wide, eager = expectation(case, *DTYPES[dtype])
    out, grad_out = (tensor.to(inputs.q.dtype) for tensor in (wide[0], grad_out))
    grads = backward_kernels.backward(inputs, out, wide[1].float(), grad_out, grad_lse.float(), wanted)
    for name, grad, expected, yardstick, needed in zip(NAMES[2:], grads, wide[2:], eager[2:], wanted, strict=True):
        assert (grad is not None) == needed
        if needed:
            assert_close(grad.reshape(expected.shape), expected, yardstick, name)


@pytest.mark.parametrize("case", [case for case in CASES if case.batch], ids=str)
def test_on_the_emulator(monkeypatch, case):
    emulated, dq = emulate(monkeypatch), "dq" in served(case.head_dim)
    check(case, SIXTEEN_BIT[CASES.index(case) % 3], (dq, True, True, True, True))
    assert (emulated["dq"].programs > 0) == dq and (emulated["dkeys"].programs > 0 or case.name == "nothing to see")


@pytest.mark.parametrize("seed", range(1, 4))
def test_other_orders_of_events(monkeypatch, seed):
    emulate(monkeypatch, seed=seed)
    check(CASES_BY_NAME["head_dim 128"], "bfloat16")


@pytest.mark.parametrize("wanted", [(False, True, False, False, True), (True, False, True, True, False), (False,) * 5])
def test_some_gradients(monkeypatch, wanted):
    emulate(monkeypatch)
    check(CASES_BY_NAME["bank"], "bfloat16", wanted)


@pytest.mark.parametrize("one", EVERYTHING)
def test_each_can_be_chosen_by_itself(monkeypatch, one):
    emulate(monkeypatch)
    monkeypatch.setattr(tile_sizes, "HOPPER_BACKWARD_REGIMES", dict.fromkeys(EVERYTHING, ()) | {one: EVERYTHING[one]})
    inputs = call_of(make_inputs(CASES_BY_NAME["short"], torch.bfloat16))
    assert list(backward_kernels.hopper_launches(inputs)) == [one]
    assert backward_kernels.hopper_launches(inputs._replace(softcap=1.0)) == {}


def test_only_a_measured_regime_chooses_it():
    inputs = call_of(make_inputs(CASES_BY_NAME["whole blocks"], torch.bfloat16))
    assert not any(regime.covers(inputs.problem()) for found in tile_sizes.HOPPER_BACKWARD_REGIMES.values() for regime in found)
    assert backward_kernels.hopper_launches(inputs) == {}


def test_a_gradient_that_tma_cannot_read(monkeypatch):
    """An expanded one, as out.sum() gives, is copied."""
    emulate(monkeypatch)
    inputs = call_of(make_inputs(CASES_BY_NAME["short"], torch.bfloat16))
    *_, wide, _ = expectation(CASES_BY_NAME["short"], *DTYPES["bfloat16"])
    one, grad_lse, outcomes = torch.ones((), dtype=torch.bfloat16), torch.zeros(wide[1].shape), []
    for grad_out in (one.expand(wide[0].shape), one.expand(wide[0].shape).contiguous()):
        outcomes.append(backward_kernels.backward(inputs, wide[0].bfloat16(), wide[1].float(), grad_out, grad_lse, (True,) * 5))
    for value, other in zip(*outcomes, strict=True):
        assert value.isfinite().all() and torch.equal(value, other)


BROKEN = {  # the case that must not survive a change of the source, the kernel, and the change
    "stages count too few": ("head_dim 128", "dkeys", "empty.index(i), count=2", "empty.index(i), count=1"),
    "stages count too many": ("head_dim 128", "dkeys", "empty.index(i), count=2", "empty.index(i), count=3"),
    "lse is not waited for": ("head_dim 128", "dkeys", "full.index(i), count=3", "full.index(i), count=2"),
    "keys are not waited for": ("short", "dkeys", "        mbarrier.wait(kv_full.index(WARPGROUP), 0)\n", ""),
    "queries are not waited for": (
        "whole blocks", "dkeys", "            mbarrier.wait(full.index(stage), (t // STAGES) & 1)\n", ""
    ),
    "the other phase": ("whole blocks", "dkeys", "((t // STAGES) & 1) ^ 1", "((t // STAGES) & 1)"),
    "the producer does not wait": (
        "head_dim 128", "dkeys", "mbarrier.wait(empty.index(stage), ((t // STAGES) & 1) ^ 1)", "pass"
    ),
    "a warpgroup without keys keeps a stage": (
        "not causal", "dkeys", "            mbarrier.arrive(empty.index(t % STAGES), count=1)\n", ""
    ),
    "dweights are not waited for": (
        "short", "dkeys", "warpgroup_mma_wait(0 if dv is None else 1, deps=(dweights,))", "dweights"
    ),
    "a stage is given back too early": ("head_dim 128", "dkeys", "wait(0, deps=(dk_sum", "wait(1, deps=(dk_sum"),
    "a query sees the next key": ("odd lengths", "dkeys", "(query + shift, 0) >=", "(query + shift + 1, 0) >="),
    "no mask": ("odd lengths", "dkeys", "            if MASKED:", "            if False:"),
    "a block too few": ("whole blocks", "dkeys", "(first_key - shift, 0) // BLOCK_M", "(first_key - shift, 0) // BLOCK_M + 1"),
    "the prefix of another row": ("bank", "dkeys", "own_prefix[1] == result % prefixes", "own_prefix[1] >= 0"),
    "a share too large": ("whole blocks", "dkeys", "(result // prefixes + 1) * share", "(result // prefixes + 2) * share"),
    "a head of another group": ("head_dim 128", "dkeys", "range(kv_head * group, (kv_head + 1) * group)", "range(group)"),
    "past the last key": ("pack", "dkeys", "(token < stop)", "(token < stop + 1)"),
    "another query's lse": ("odd lengths", "dkeys", "start = row.to(gl.int64) * lse_row +", "start ="),
    "dscores too early": ("long prefix", "dq", "warpgroup_mma_wait(2,", "warpgroup_mma_wait(3,"),
    "values are given back twice": (
        "long prefix", "dq", "arrive(v_ring[2].index(j % STAGES), count=1)", "arrive(v_ring[2].index(j % STAGES), count=2)"
    ),
    "keys not there": ("long prefix", "dq", "    wait_for_keys(k_ring, j + 1, blocks, STAGES)\n", ""),
    "values are given back too early": (
        "long prefix", "dq", "    dweights, weights = warpgroup_mma_wait(1, deps=(dweights, weights))\n", ""
    ),
    "other keys are given back": ("long prefix", "dq", "k_ring[2].index(before % STAGES)", "k_ring[2].index(j % STAGES)"),
    "no delta": ("short", "dq", "    gl.store(delta + query, delta_of, mask=exists)\n", ""),
    "another query's out": ("odd lengths", "dq", "    out += row.to(gl.int64) * out_row +", "    out +="),
    "lse has no gradient": ("short", "dq", "        if grad_lse is not None:", "        if False:"),
    "no mask in dq": ("odd lengths", "dq", "    if MASKED:\n", "    if False:\n"),
    "a full block too many": ("odd lengths", "dq", "(prefix_len // BLOCK_N, 1), prefix", "(prefix_blocks, 1), prefix"),
}  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN)
def test_the_emulator_notices(monkeypatch, broken):
    case, *change = BROKEN[broken]
    emulate(monkeypatch, change=change)
    with pytest.raises(AssertionError):
        check(CASES_BY_NAME[case], "bfloat16")


EXPONENTIALS = "MUFU.EX2\n" * 32
CONSUMER = (
    ".L_x_1:\nSYNCS.PHASECHK\n" + "HGMMA\n" * 2 + "WARPGROUP.DEPBAR.LE gsb0, 0x1\n" + EXPONENTIALS
    + "HGMMA\nWARPGROUP.DEPBAR.LE gsb0, 0x1\nHGMMA\nWARPGROUP.DEPBAR.LE gsb0, 0x0\n@P0 BRA `(.L_x_1) ;\n"
)  # fmt: skip
SASS = "USETMAXREG\n" * 2 + "SYNCS\n" * 20 + CONSUMER * 2 + "UTMALDG.5D\n" * 6
PTX = ".maxnreg 168 .reqntid 384 setmaxnreg.inc.sync.aligned.u32 240; setmaxnreg.dec.sync.aligned.u32 24;"
WRONG_CODE = [
    ("", "", []),
    ("u32 240", "u32 160", ["setmaxnreg gives [24, 160]"]),
    ("UTMALDG.5D", "LDGSTS", ["0 UTMALDG"]),
    ("gsb0, 0x1\nMUFU", "gsb0, 0x0\nMUFU", ["0 exponentials beside products, of 64"]),
    ("HGMMA\nHGMMA", "HGMMA\nWARPGROUP.DEPBAR.LE gsb0, 0x0\nHGMMA", ["wgmma is serialised: more waits than the source has"]),
    (EXPONENTIALS, EXPONENTIALS + "STL\n", ["0 reads and 1 writes of local memory in a loop"] * 2),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "said"), WRONG_CODE)
def test_what_is_wrong_with_the_machine_code(monkeypatch, old, new, said):
    hopper_code, compiled = machine_code(monkeypatch, *(text.replace(old, new) if old else text for text in (PTX, SASS)))
    tile = tile_sizes.TABLE["hopper_dkeys", 90, 16, 128]
    assert hopper_code.missing_in_backward(compiled, "hopper_dkeys", tile, 128) == said


TRIAL = """
import torch

import prefix_kernels
from prefix_kernels.backends.triton import tile_sizes
from prefix_kernels.backends.triton.tile_sizes import Regime

regimes = [Regime(dim, 1, 1) for dim in (64, 128, 256)]
tile_sizes.HOPPER_BACKWARD_REGIMES = {{name: regimes if name in {served} else () for name in ("dq", "dkeys", "dprefix")}}
for dim, q_len, kv_len, prefix_len, causal in {shapes}:
    q, k, v = (
        torch.randn(2, heads, length, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads, length in ((4, q_len), (2, kv_len), (2, kv_len))
    )
    prefix = torch.randn(2, prefix_len, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    out = prefix_kernels.prefix_attention(q, k, v, prefix, prefix, causal=causal, backend="triton")
    out.sum().backward()
    q.grad.cpu()
"""
NARROW = (
    (64, 300, 300, 200, True), (64, 1, 1, 0, True), (64, 70, 90, 900, True), (64, 200, 0, 0, False), (64, 130, 260, 1, False),
)  # fmt: skip
TRIALS = [
    TRIAL.format(served=served, shapes=shapes)
    for served in (("dq",), ("dkeys",), ("dprefix",), ("dq", "dkeys", "dprefix"))
    for shapes in (NARROW, ((128, 300, 300, 600, True),))
] + [TRIAL.format(served=("dkeys", "dprefix"), shapes=((256, 300, 300, 600, True),))]


@pytest.fixture(scope="session")
def survived(tmp_path_factory):
    """A kernel that hangs or crashes does so here, in a process of its own, and takes no other test with it."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    return trial_of(TRIALS, shared_folder(tmp_path_factory), 90)


@pytest.fixture
def forced(survived, monkeypatch):
    assert survived.returncode == 0, survived.stderr
    monkeypatch.setattr(tile_sizes, "HOPPER_BACKWARD_REGIMES", EVERYTHING)
    monkeypatch.setattr(recorded, "_kinds", {})


def leaves(case, dtype):
    inputs = make_inputs(case, *DTYPES[dtype], device="cuda")
    assert list(backward_kernels.hopper_launches(call_of(inputs))) == served(case.head_dim)
    return Inputs(tuple(aligned(tensor).requires_grad_() for tensor in inputs.tensors), inputs.options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("case", [case for case in CASES if case.batch], ids=str)
def test_on_the_gpu(forced, case, dtype):
    inputs = leaves(case, dtype)
    out, lse = inputs.call(backend="triton", return_lse=True)
    grad_out, grad_lse, wide, eager = expectation(case, *DTYPES[dtype])
    grads = gradients(inputs, out, lse, grad_out.cuda(), grad_lse.cuda())
    for name, grad, expected, yardstick in zip(NAMES[2:], grads, wide[2:], eager[2:], strict=True):
        assert_close(grad, expected, yardstick, name)


@pytest.mark.gpu
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("head_dim", hopper.HEAD_DIMS)
def test_the_same_bits_on_the_gpu(forced, monkeypatch, head_dim, plain):
    """Also where launches wait for each other as a whole, and with the kernels for every GPU."""
    case = Case("many rows", batch=8, heads=8, q_len=512, kv_len=512, prefix_len=256, head_dim=head_dim)
    inputs, runs = leaves(case, "bfloat16"), []
    if plain:
        monkeypatch.setattr(tile_sizes, "HOPPER_BACKWARD_REGIMES", dict.fromkeys(EVERYTHING, ()))
    for dependent in (True, True, False):
        monkeypatch.setattr(launch, "DEPENDENT_LAUNCHES", dependent)
        recorded._kinds.clear()
        out = inputs.call(backend="triton")
        runs.append(torch.autograd.grad(out.float().square().sum(), inputs.tensors))
    for values in zip(*runs, strict=True):
        assert all(torch.equal(values[0], value) for value in values[1:])


@pytest.mark.gpu
def test_another_length_compiles_nothing_again(forced, monkeypatch):
    monkeypatch.setattr(backward_kernels, "FEW_BLOCKS", 0)  # shares are float32, a sum of one block is not
    counts = []
    for length, prefix_len in ((48, 32), (33, 7), (70, 1), (1024, 100), (128, 300)):
        inputs = leaves(Case("length", **ROWS | {"batch": 2}, q_len=length, kv_len=length, prefix_len=prefix_len), "bfloat16")
        inputs.call(backend="triton").float().sum().backward()
        kernels = [getattr(module, kernel) for module, kernel in KERNELS.values()]
        counts.append([sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels])
    assert counts == [counts[0]] * 5
