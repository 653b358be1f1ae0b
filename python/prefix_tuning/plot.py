"""The loss curve of a training run as a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence

from prefix_tuning.files import replacing


def save_loss_curve(
    losses: Sequence[float],
    path: str | os.PathLike,
    *,
    eval_losses: Sequence[tuple[int, float]] = (),
    title: str | None = None,
) -> None:
    """Draws the loss of each optimiser step, and (step, loss) pairs of evaluations, to a PNG file.

    Raises ImportError that says what to install where matplotlib is missing, ValueError for no losses at all.
    """
    if not losses:
        raise ValueError("losses: expected at least one, got none")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing the loss needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="optimiser step", ylabel="loss per target token", title=title or "")
    axes.plot(range(1, len(losses) + 1), losses, color="tab:blue", linewidth=1.2, label="training")
    if eval_losses:
        axes.plot(*zip(*eval_losses, strict=True), "o-", color="tab:orange", markersize=4, label="evaluation")
        axes.legend(frameon=False)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
