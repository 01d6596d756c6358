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
from PIL import Image
from torch import Tensor

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
    figure, axes = plt.subplots(len(rows), 1, figsize=(8, 1.35 * len(rows)), squeeze=False, layout="constrained")
    for axis, (name, pictures) in zip(axes[:, 0], rows.items(), strict=True):
        squares = [_square(pictures[index][0], 32 * scale) for index in range(min(columns, len(pictures)))]
        axis.imshow(np.hstack(squares))
        axis.set_title(name, loc="left", fontsize=10)
        axis.set_axis_off()
    return figure


def _square(picture: Tensor, side: int) -> np.ndarray:
    whole = Image.fromarray(picture.permute(1, 2, 0).numpy())
    edge = min(whole.size)
    left, top = (whole.width - edge) // 2, (whole.height - edge) // 2
    return np.asarray(whole.resize((side, side), Image.Resampling.BILINEAR, box=(left, top, left + edge, top + edge)))


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
