"""The loss curve: a real PNG with the right curves, or a clear error and no file."""

import struct
import sys

import pytest
from matplotlib.figure import Figure

from prefix_tuning.plot import save_loss_curve

LOSSES = [4.0, 3.0, 2.5, 2.25]


@pytest.mark.parametrize("eval_losses", ((), [(2, 3.1), (4, 2.4)]), ids=("training", "evaluated"))
@pytest.mark.parametrize("name", ("loss.png", "new/folder/picture"))
def test_a_png_of_the_size_asked_for(name, eval_losses, tmp_path):
    path = tmp_path / name
    save_loss_curve(LOSSES, path, eval_losses=eval_losses, title="run")
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82")
    assert struct.unpack(">II", content[16:24]) == (840, 480)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_what_is_drawn(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    save_loss_curve(LOSSES, str(tmp_path / "loss.png"), eval_losses=[(2, 3.1), (4, 2.4)], title="run")
    save_loss_curve(LOSSES, tmp_path / "loss.png")
    (axes,), (plain,) = (figure.axes for figure in drawn)
    training, evaluation = axes.lines
    assert (list(training.get_xdata()), list(training.get_ydata())) == ([1, 2, 3, 4], LOSSES)
    assert (list(evaluation.get_xdata()), list(evaluation.get_ydata())) == ([2, 4], [3.1, 2.4])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["training", "evaluation"]
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == ("run", "optimiser step", "loss per target token")
    assert axes.get_ylim()[0] == 0
    assert len(plain.lines) == 1 and plain.get_legend() is None and plain.get_title() == ""


def test_no_losses_are_refused(tmp_path):
    with pytest.raises(ValueError, match="losses: expected at least one"):
        save_loss_curve([], tmp_path / "loss.png")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_it_is_named(tmp_path, monkeypatch):
    for name in ("matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"drawing the loss needs matplotlib: pip install matplotlib"):
        save_loss_curve(LOSSES, tmp_path / "loss.png")
    assert not list(tmp_path.iterdir())


def test_an_error_while_drawing_leaves_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "loss.png"
    path.write_bytes(b"old")

    def half(figure, file, **_):
        file.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="no space left"):
        save_loss_curve(LOSSES, path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
