"""A picture of the learner's own."""

from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor


class PictureError(ValueError):
    """A file that is no picture, or cannot be read as one."""


def read_picture(path: str | Path, side: int = 0) -> Tensor:
    """A picture file as RGB, uint8 `(3, height, width)`, turned as its camera was held.

    With `side`, the middle square is cut out and resized to `side` × `side` pixels. Raises `PictureError` for a file
    that is missing, no picture, cut short or too large.
    """
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened).convert("RGB")
    except FileNotFoundError as error:
        raise PictureError(f"{path} does not exist: give the path of a picture, such as a PNG or JPEG file") from error
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise PictureError(f"{path} cannot be read as a picture ({error}): save it again as PNG or JPEG") from error
    if side:
        picture = ImageOps.fit(picture, (side, side), Image.Resampling.BILINEAR)
    return pil_to_tensor(picture).to(torch.uint8)
