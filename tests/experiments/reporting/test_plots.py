"""Pictures that several commands draw."""

import numpy as np
import pytest
from PIL import Image

from experiments.reporting import plots

# DejaVu Sans, the usual font, lacks the script A that the STIX fonts have, which come with
# Matplotlib too; of what is for private use no font has this.
NAMES = ("cat", "\U0001d49c", "\U00102345 dog")


def test_names_are_drawn_with_fonts_that_have_them(tmp_path):
    labels, families = plots.drawable(NAMES)
    assert labels == ["cat", "\U0001d49c", "class 2"]
    assert families[0] == "sans-serif" and len(families) == 2
    # A character without a glyph would be warned of.
    picture = plots.confusion_matrices({"any": np.eye(3, dtype=int)}, NAMES)
    plots.save(picture, tmp_path / "confusion.png")
    with Image.open(tmp_path / "confusion.png") as image:
        assert image.format == "PNG"


def test_long_names_leave_room_for_the_picture(tmp_path):
    picture = plots.confusion_matrices({"any": np.eye(2, dtype=int)}, ("a" * 200, "b" * 24))
    plots.save(picture, tmp_path / "confusion.png")  # or it warns
    labels = [tick.get_text() for tick in picture.axes[0].get_yticklabels()]
    assert labels == ["a" * 23 + "…", "b" * 24]


def test_networks_are_drawn_on_one_axis_beside_what_was_published():
    def run(losses):
        names = "train_loss", "val_loss", "train_accuracy", "val_accuracy"
        return [{"epoch": i, **dict.fromkeys(names, loss)} for i, loss in enumerate(losses, 1)]

    picture = plots.curves({"a": [run([3, 1]), run([1, 1])], "b": [run([4, 5])]}, {"other": 0.75})
    for axes, others in zip(picture.axes, (0, 1), strict=True):
        assert len(axes.lines) == 4 + others and len(axes.collections) == 4
        assert [list(line.get_ydata()) for line in axes.lines[:3:2]] == [[2, 1], [4, 5]]
        colours = [line.get_color() for line in axes.lines]
        assert colours[:4] == ["C0", "C0", "C1", "C1"]
    assert list(picture.axes[1].lines[-1].get_ydata()) == [0.75, 0.75]
    (legend,) = picture.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        *("a, train", "a, validation", "b, train", "b, validation", "other, published")
    ]


@pytest.mark.parametrize("name", ["$a_$", "$", "a_b^c", "\\alpha"])
def test_names_are_no_formulas(tmp_path, name):
    picture = plots.confusion_matrices({"any": np.eye(2, dtype=int)}, (name, "b$"))
    plots.save(picture, tmp_path / "confusion.png")
    (axes,) = picture.axes
    for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [tick.get_text() for tick in ticks] == [name, "b$"]
        assert not any(tick.get_parse_math() for tick in ticks)
