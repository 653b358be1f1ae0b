"""The one comparison: as good as eager attention in the same dtype, measured against float64."""

from __future__ import annotations

import torch
from torch import Tensor

FACTOR = 2.0  # times eager's own error
FLOOR = 4.0  # times eps(output dtype) · max|expected|; docs/numerics.md says why not 2
FLOOR_FLOAT64 = 100.0  # float64 is compared with another float64 computation, whose own error the yardstick cannot show


def assert_close(actual: Tensor, expected: Tensor, eager: Tensor, what: str = "", slack: float = 1.0) -> None:
    """Non-finite values agree; maximum and mean error ≤ 2 × eager's + 4 · eps · max|expected|.

    Args:
        actual: the result; expected: the same in float64; eager: the same by eager attention in the result's dtype.
        slack: times the allowed errors.
    """
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    actual, expected, dtype = actual.detach().cpu().double(), expected.detach().cpu().double(), actual.dtype
    eager = eager.detach().cpu().double()
    finite = expected.isfinite()
    assert torch.equal(actual.isfinite(), finite), f"{what}: finite where it should not be, or the reverse"
    assert torch.equal(actual[~finite], expected[~finite]), f"{what}: other infinities than expected"
    if not finite.any():
        return
    error, yardstick = (actual - expected)[finite].abs(), (eager - expected)[finite].abs()
    floor = (FLOOR_FLOAT64 if dtype == torch.float64 else FLOOR) * torch.finfo(dtype).eps * expected[finite].abs().max().item()
    for name, of in (("max", torch.max), ("mean", torch.mean)):
        got, allowed = of(error).item(), slack * (FACTOR * of(yardstick).item() + floor)
        assert got <= allowed, f"{what}: {name} error {got:.3e}, allowed {allowed:.3e} (eager has {of(yardstick).item():.3e})"
