"""Photographs that scikit-image and scikit-learn ship, in three sets that share no scene.

The letters of pretraining, the training digits and the test digits each get backgrounds from a set of
their own, so that a network cannot meet in the test a background that it has learned.
"""

from functools import cache
from pathlib import Path

import numpy as np
import skimage
import sklearn.datasets
from PIL import Image

# `motorcycle_right` is a second view of the scene in `motorcycle_left` and is left out. So are the pictures
# of text, whose letters would stand behind our letters, and brick, grass and gravel, kept for a texture task.
PHOTOGRAPHS = {
    "letters": ("camera.png", "china.jpg", "coffee.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png"),
    "train": ("astronaut.png", "flower.jpg", "retina.jpg"),
    "test": ("chelsea.png", "coins.png", "rocket.jpg"),
}
SHORT_SIDE = 320  # pixels: the size of the Berkeley photographs from which MNIST-M was first drawn

_FOLDERS = (Path(skimage.__file__).parent / "data", Path(sklearn.datasets.__file__).parent / "images")


@cache
def photographs(group: str) -> tuple[Image.Image, ...]:
    """The photographs of one group, as RGB pictures whose short side is `SHORT_SIDE` pixels.

    Raises `ValueError` for a group that does not exist, `FileNotFoundError` where a package no longer ships a file.
    """
    if group not in PHOTOGRAPHS:
        raise ValueError(f"no group of photographs {group!r}; there are {', '.join(PHOTOGRAPHS)}")
    pictures = []
    for name in PHOTOGRAPHS[group]:
        path = next((folder / name for folder in _FOLDERS if (folder / name).exists()), None)
        if path is None:
            raise FileNotFoundError(f"{name} is in neither scikit-image nor scikit-learn: install the floors of requirements.txt")
        with Image.open(path) as picture:
            rgb = picture.convert("RGB")
        ratio = SHORT_SIDE / min(rgb.size)
        pictures.append(rgb.resize((round(rgb.width * ratio), round(rgb.height * ratio)), Image.Resampling.LANCZOS))
    return tuple(pictures)


def patch(group: str, rng: np.random.Generator, size: int, crop: tuple[int, int]) -> np.ndarray:
    """A random square cut from a random photograph of `group`.

    The square is `crop[0]` to `crop[1]` pixels wide (both included) and comes back as uint8 `(size, size, 3)`.
    """
    pictures = photographs(group)
    picture = pictures[rng.integers(len(pictures))]
    width = int(rng.integers(crop[0], crop[1] + 1))
    left = int(rng.integers(picture.width - width + 1))
    top = int(rng.integers(picture.height - width + 1))
    box = (left, top, left + width, top + width)
    return np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR, box=box))
