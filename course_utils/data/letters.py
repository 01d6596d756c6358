"""The source task: 52 letters, drawn in the fonts that matplotlib ships, on photographs.

A letter is stored as two maps of distances: to the edge of the printed glyph, and to its skeleton. Cutting the
first at a level gives print, thin or bold; cutting the second gives a pen stroke of any width. Distance fields
survive rotation and bending without steps (Green 2007, "Improved alpha-tested magnification").
"""

import string
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from skimage.morphology import skeletonize

from course_utils.data.photos import patch
from course_utils.data.splits import SIZE, Split, generator, stack

LETTERS = tuple(string.ascii_uppercase + string.ascii_lowercase)
FACES = (
    *(f"DejaVu{face}{style}" for face in ("Sans", "SansMono") for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmb10", "cmr10", "cmss10", "cmti10", "cmtt10"),
)
VARIANTS = ("far", "near")
CANVAS = 64  # pixels: the side of a distance map
GLYPH = 52  # pixels: the font size on that canvas


@cache
def distance_maps() -> tuple[np.ndarray, np.ndarray]:
    """Signed distance to the glyph's edge (inside is positive) and distance to its skeleton.

    Two float32 arrays `(letters, faces, CANVAS, CANVAS)`, in pixels of the canvas.
    """
    shape = (len(LETTERS), len(FACES), CANVAS, CANVAS)
    edge, skeleton = np.empty(shape, np.float32), np.empty(shape, np.float32)
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    for column, face in enumerate(FACES):
        font = ImageFont.truetype(str(folder / f"{face}.ttf"), GLYPH)
        for row, letter in enumerate(LETTERS):
            canvas = Image.new("L", (CANVAS, CANVAS))
            ImageDraw.Draw(canvas).text((CANVAS / 2, CANVAS / 2), letter, fill=255, font=font, anchor="mm")
            ink = np.asarray(canvas) > 127
            edge[row, column] = ndimage.distance_transform_edt(ink) - ndimage.distance_transform_edt(~ink)
            skeleton[row, column] = ndimage.distance_transform_edt(~skeletonize(ink))
    return edge, skeleton


@cache
def _bending_basis(knots: int = 4) -> np.ndarray:
    """Cubic-spline weights `(SIZE, knots)` that turn a few random displacements into a smooth field."""
    spread = np.eye(knots)
    return np.stack([ndimage.zoom(row, SIZE / knots, order=3, mode="nearest", grid_mode=True) for row in spread], axis=1)


def draw_ink(letter: int, rng: np.random.Generator) -> np.ndarray:
    """One letter as a mask of ink, float32 `(SIZE, SIZE)` in [0, 1]: print or pen, turned, sheared, scaled and bent."""
    edge, skeleton = distance_maps()
    face = rng.integers(len(FACES))
    angle, shear = np.deg2rad(rng.uniform(-25, 25)), rng.uniform(-0.3, 0.3)
    stretch = CANVAS / SIZE / rng.uniform(0.75, 1.25, size=2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = turn @ np.array([[1, 0], [shear, 1]]) * stretch[:, None]
    centre = CANVAS / 2 + rng.uniform(-6, 6, size=2)
    steps = np.arange(SIZE) - (SIZE - 1) / 2
    grid = np.stack(np.meshgrid(steps, steps, indexing="ij"))
    basis = _bending_basis()
    bend = basis @ rng.normal(0, rng.uniform(0, 4), size=(2, basis.shape[1], basis.shape[1])) @ basis.T
    where = np.einsum("ab,bij->aij", matrix, grid) + centre[:, None, None] - 0.5 + bend
    pen = rng.random() < 0.5
    level = rng.uniform(1.2, 5.0) if pen else rng.uniform(-0.8, 1.6)
    field = skeleton[letter, face] if pen else edge[letter, face]
    distance = ndimage.map_coordinates(field, where, order=1, mode="nearest")
    softness = rng.uniform(1.0, 2.5)  # canvas pixels from full ink to none
    inside = (level - distance) if pen else (distance + level)
    return np.clip(inside / softness + 0.5, 0, 1).astype(np.float32)


def draw_letter(variant: str, split: str, index: int, seed: int = 0) -> tuple[np.ndarray, int]:
    """Picture `index` of a source task: uint8 `(SIZE, SIZE, 3)` and its class.

    *far*: an opaque letter on a photograph. *near*: half of them are |photograph − letter| instead, which is
    how MNIST-M is drawn. The same arguments give the same bytes, in any order and in any process.
    """
    rng = generator("letters", split, index, seed)
    letter = int(rng.integers(len(LETTERS)))
    ink = draw_ink(letter, rng)[..., None]
    ground = patch("letters", rng, SIZE, crop=(SIZE, 4 * SIZE)).astype(np.float32)
    if rng.random() < 0.7:
        paint = np.broadcast_to(rng.uniform(0, 255, size=3).astype(np.float32), ground.shape)
    else:
        paint = patch("letters", rng, SIZE, crop=(SIZE, 4 * SIZE)).astype(np.float32)
    strength = rng.uniform(0.6, 1.0)
    if variant == "near" and rng.random() < 0.5:
        picture = np.abs(ground - 255 * strength * ink)
    else:
        picture = ground + strength * ink * (paint - ground)
    return picture.round().astype(np.uint8), letter


def letters(variant: str, split: str, count: int, seed: int = 0) -> Split:
    """The first `count` pictures of a source task, `variant` "far" or "near", `split` "train" or "valid".

    Raises `ValueError` for another variant or split.
    """
    if variant not in VARIANTS:
        raise ValueError(f"no letters {variant!r}; there are {', '.join(VARIANTS)}")
    return stack([draw_letter(variant, split, index, seed) for index in range(count)], LETTERS)
