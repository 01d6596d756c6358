"""Pictures: what they show, and the pad of lesson 00 on which a learner draws."""

import builtins
import io
import re

import ipywidgets
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from course_utils import plots
from course_utils.data import Split
from course_utils.plots import COLOURS, START_COLOURS, as_png, chooser, picture_grid, show, show_table
from tests.test_lessons import cells


def shade(grey: float) -> Figure:
    """A figure of one grey, from 0 to 1."""
    figure = Figure(figsize=(2, 2))
    figure.add_axes((0, 0, 1, 1)).imshow([[grey]], vmin=0, vmax=1)
    return figure


def small_split(side: int) -> Split:
    pictures = torch.randint(0, 255, (4, 3, side, side), dtype=torch.uint8)
    return Split(pictures, torch.tensor([0, 1, 0, 1]), ("a", "b"))


@pytest.fixture
def displayed(monkeypatch) -> list[tuple]:
    """What was displayed: the object and its metadata."""
    seen: list[tuple] = []
    monkeypatch.setattr(plots, "display", lambda shown, metadata=None: seen.append((shown, metadata)))
    return seen


def test_a_shown_figure_carries_its_text(displayed):
    figure = shade(0.5)
    show(figure, alt="what is to be seen")
    assert displayed == [(figure, {"image/png": {"alt": "what is to be seen"}})]


def test_a_shown_table_has_no_index_and_no_random_names(displayed):
    show_table(pd.DataFrame({"a": [1, 2]}, index=["first", "second"]))
    html = displayed[0][0].data
    assert "first" not in html and "<th>a</th>" in html and not re.search(r'id="', html)


def test_a_grid_shows_the_pictures_of_each_set_whatever_their_size():
    figure = picture_grid({"large": small_split(48), "small": small_split(8)}, columns=3)
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert titles == ["large", "small"]
    assert [axis.images[0].get_array().shape for axis in figure.axes] == [(64, 192, 3), (64, 192, 3)]


def test_the_colours_are_distinct_also_without_colour():
    """Lines that differ in lightness can be told apart in print and by every reader."""
    lightness = sorted(
        np.dot([int(colour[i : i + 2], 16) for i in (1, 3, 5)], [0.3, 0.59, 0.11]) for colour in START_COLOURS.values()
    )
    assert np.diff(lightness).min() > 40
    assert set(START_COLOURS.values()) <= set(COLOURS.values())


def drawing_pad(respond):
    return cells("00", "pad", ipywidgets=ipywidgets, np=np, as_png=as_png)["drawing_pad"](respond)


class Pad:
    """A drawing pad with what its callback was given."""

    def __init__(self) -> None:
        self.seen: list[np.ndarray] = []
        self.widget = drawing_pad(self.respond)
        self.canvas = self.widget.children[0].children[0]
        self.answer = self.widget.children[1]

    def respond(self, drawing):
        self.seen.append(drawing)
        if drawing.mean() > 200:
            raise ValueError("too much ink")
        return shade(float(drawing.mean()) / 255)

    def draw(self, grey: int) -> None:
        """What the browser sends when the pen is lifted: the canvas as a PNG."""
        with io.BytesIO() as file:
            Image.new("RGBA", (224, 224), (grey, grey, grey, 255)).save(file, format="PNG")
            self.canvas.set_state({"image_data": memoryview(file.getvalue())})


def test_the_pad_answers_what_is_drawn():
    pytest.importorskip("ipycanvas", reason="the pad is for readers who have ipycanvas")
    pad = Pad()
    before = pad.answer.value
    assert Image.open(io.BytesIO(before)).format == "PNG", "an empty pad has an answer, so that there is a picture at once"
    pad.draw(grey=100)
    assert pad.seen[-1].shape == (224, 224, 3) and (pad.seen[-1] == 100).all()
    assert pad.answer.value != before


def test_the_pad_waits_until_the_pen_is_lifted():
    pytest.importorskip("ipycanvas", reason="the pad is for readers who have ipycanvas")
    pad = Pad()
    asked = len(pad.seen)
    pad.canvas._mouse_down_callbacks(5, 5)
    pad.canvas._mouse_move_callbacks(9, 9)
    pad.draw(grey=50)
    assert len(pad.seen) == asked
    pad.canvas._mouse_up_callbacks(9, 9)
    pad.draw(grey=60)
    assert len(pad.seen) == asked + 1


def test_an_error_inside_the_pad_is_raised():
    pytest.importorskip("ipycanvas", reason="the pad is for readers who have ipycanvas")
    with pytest.raises(ValueError, match="too much ink"):
        Pad().draw(grey=250)


def test_without_ipycanvas_there_is_no_pad(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name == "ipycanvas":
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    assert drawing_pad(lambda drawing: None) is None


def test_as_png_is_a_png():
    figure = shade(1.0)
    assert Image.open(io.BytesIO(as_png(figure))).size > (100, 100)


def test_a_chooser_shows_the_last_option_first_and_follows_the_slider():
    drawn = []

    def draw(option):
        drawn.append(option)
        if option == 3:
            raise ValueError("three cannot be drawn")
        return shade(option / 10)

    slider, image = chooser("option", [1, 3, 5], draw).children
    first = image.value
    assert drawn == [5]
    slider.value = 1
    assert drawn == [5, 1] and image.value != first
    with pytest.raises(ValueError, match="three cannot be drawn"):
        slider.value = 3
