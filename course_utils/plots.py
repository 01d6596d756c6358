"""Pictures for the lessons: in colours that everybody can tell apart, with text for those who cannot see them."""

import io
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import HTML, display
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torchvision.transforms.v2.functional import to_pil_image

from course_utils.data.splits import PictureSet

# Okabe and Ito's palette, which people with every kind of colour vision can tell apart.
COLOURS = {"black": "#000000", "orange": "#E69F00", "sky": "#56B4E9", "green": "#009E73", "blue": "#0072B2", "red": "#D55E00"}
START_COLOURS = {"scratch": COLOURS["black"], "far": COLOURS["orange"], "near": COLOURS["blue"]}


def show(figure: Figure, alt: str) -> None:
    """Display a figure with a text that says what is to be seen in it."""
    display(figure, metadata={"image/png": {"alt": alt}})
    plt.close(figure)


def show_table(table: pd.DataFrame) -> None:
    """Display a table without its index."""
    display(HTML(table.to_html(index=False)))


def picture_grid(rows: dict[str, PictureSet], columns: int = 10, scale: int = 2) -> Figure:
    """A row of pictures for each set, under its name; pictures of any size are cut to squares of one size."""
    side = 32 * scale
    figure, axes = plt.subplots(len(rows), 1, figsize=(8, 1.35 * len(rows)), squeeze=False, layout="constrained")
    for axis, (name, pictures) in zip(axes[:, 0], rows.items(), strict=True):
        shown = [to_pil_image(pictures[index][0]) for index in range(min(columns, len(pictures)))]
        squares = [np.asarray(ImageOps.fit(picture, (side, side), Image.Resampling.BILINEAR)) for picture in shown]
        axis.imshow(np.hstack(squares))
        axis.set_title(name, loc="left", fontsize=10)
        axis.set_axis_off()
    return figure


def as_png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG, for a widget."""
    with io.BytesIO() as file:
        figure.savefig(file, format="png", dpi=90)
        plt.close(figure)
        return file.getvalue()


def chooser(label: str, options: Sequence, draw: Callable[[Any], Figure]) -> ipywidgets.Widget:
    """A slider over `options`, and below it the figure that `draw` makes of the one chosen. What `draw` raises is raised."""
    slider = ipywidgets.SelectionSlider(options=list(options), value=options[-1], description=label, continuous_update=False)
    slider.style.description_width = "initial"
    answer = ipywidgets.Image(format="png", value=as_png(draw(options[-1])))
    slider.observe(lambda change: setattr(answer, "value", as_png(draw(change["new"]))), "value")
    return ipywidgets.VBox([slider, answer])
