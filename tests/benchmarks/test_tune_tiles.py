"""What is compiled and timed on a GPU beforehand: that nothing is left out, without a GPU."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
import tune_tiles
import warm_up
from cases import gpu_decode_cases, gpu_op_cases
from prefix_kernels.backends.triton import tile_sizes


def test_candidates_hold_the_table_and_use_what_wgmma_takes(monkeypatch):
    monkeypatch.setattr(tile_sizes, "architecture_of", lambda device: 90)
    found = tune_tiles.candidates()
    assert len(set(found)) == len(found)
    for kernel in tune_tiles.KERNELS:
        for dim in (64, 128, 256):
            tile = tile_sizes.TABLE[kernel, 90, 16, dim]
            assert (kernel, dim, tile.BLOCK_M, tile.BLOCK_N, tile.num_warps, tile.num_stages) in found
            tile = tile_sizes.BIASED.get((kernel, 90, 16, dim), tile)
            assert (f"biased {kernel}", dim, tile.BLOCK_M, tile.BLOCK_N, tile.num_warps, tile.num_stages) in found
    table = tile_sizes.TABLE["forward", 90, 16, 64]
    for name, values in (("TABLE", tile_sizes.TABLE), ("BIASED", tile_sizes.BIASED)):
        monkeypatch.setattr(tile_sizes, name, dict(values))
    tune_tiles.use(("biased forward", 64, 32, 32, 2, 1))
    assert tile_sizes.TABLE["forward", 90, 16, 64] == table
    tune_tiles.use(("forward", 64, 16, 32, 2, 1))
    for used, rows in ((tile_sizes.TABLE, 16), (tile_sizes.BIASED, 32)):
        tile = used["forward", 90, 16, 64]
        assert (tile.BLOCK_M, tile.BLOCK_N, tile.num_warps, tile.num_stages) == (rows, 32, 2, 1)


@pytest.mark.parametrize("regimes", [(), (tile_sizes.Regime(64, 1, 1),)])
def test_which_kernels_are_timed(monkeypatch, regimes):
    """The plain one and the one for Hopper by their names, whatever the regimes choose."""
    names = ("dq", "dkeys", "dprefix")
    monkeypatch.setattr(tile_sizes, "HOPPER_BACKWARD_REGIMES", dict.fromkeys(names, regimes))
    chosen, inputs = [], SimpleNamespace(q=torch.zeros(1, 1, 1, 64))

    def backward(inputs, out, lse, grad_out, grad_lse, wanted):
        chosen.append([name for name in names if tile_sizes.HOPPER_BACKWARD_REGIMES[name]])
        return (None,) * 5

    monkeypatch.setattr(tune_tiles.backward_kernels, "backward", backward)
    for name in names:
        for kernel in (name, f"hopper_{name}"):
            tune_tiles.run(kernel, inputs, (None,) * 3)
    assert chosen == [[], ["dq"], [], ["dkeys"], [], ["dprefix"]]


def test_difference():
    one, other = torch.ones(4), torch.ones(4)
    other[0] = 3.0
    assert tune_tiles.difference((one,), (one,)) == 0 and tune_tiles.difference((one, other), (one, one)) == 1


def test_every_kind_of_call_is_compiled_beforehand():
    cases = gpu_op_cases() + gpu_decode_cases()
    kinds = warm_up.kinds_of(cases).values()
    assert len(kinds) < 50
    for case in cases:
        alike = [k for k in kinds if (k.head_dim, k.dtype, k.decode, k.seqlens is None) == (
            case.head_dim, case.dtype, case.decode, case.seqlens is None)]  # fmt: skip
        assert alike, case.key
