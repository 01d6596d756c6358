"""Picture files, a learner's own among them: read right, or refused with a reason."""

import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

MAX_PIXELS = 50_000_000  # 150 MB as RGB; a few bytes of PNG can unfold into more than any memory
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")  # PIL has more, some of which start programs
STARTS = (b"\x89PNG", b"\xff\xd8", b"GIF8", b"RIFF", b"II*\0", b"MM\0*")  # what a picture cut in its header still shows


class PictureError(ValueError):
    """A file that is no picture, or cannot be read as one; `reason` is why, in a few words without the path."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


def read_picture(path: str | Path, side: int = 0) -> Tensor:
    """A picture file as RGB, uint8 `(3, height, width)`, turned as its camera was held.

    What is transparent becomes white, 16 bits become 8, and of an animation the first frame is taken. With `side`, the
    middle square is cut out and resized to `side` × `side` pixels. Raises `PictureError` for a file that is missing,
    empty, no picture, cut short, or of more than `MAX_PIXELS` pixels, the last before any of them is decoded.
    """
    try:
        with Image.open(path, formats=FORMATS) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{opened.width * opened.height} pixels")
            picture = _as_rgb(ImageOps.exif_transpose(opened))
    except FileNotFoundError as error:
        message = f"{path} does not exist: give the path of a picture, such as a PNG or JPEG file"
        raise PictureError(message, "missing") from error
    except Exception as error:  # PIL lets out whatever a broken file makes it stumble over
        reason = _reason(Path(path), error)
        raise PictureError(f"{path} cannot be read as a picture ({reason}): save it again as PNG or JPEG", reason) from error
    if side:
        picture = ImageOps.fit(picture, (side, side), Image.Resampling.BILINEAR)
    return pil_to_tensor(picture).to(torch.uint8)


def _as_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode in ("I", "F", "LAB"):
        raise NotImplementedError(f"uncommon pixel values, of mode {picture.mode}")  # no telling what is white
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))  # PIL itself would clip at 255
    if picture.has_transparency_data:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
    return picture.convert("RGB")


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):  # PIL's own names another limit
        return f"{int(re.findall(r'[0-9]+', str(error))[0]):,} pixels, more than the {MAX_PIXELS:,} that are read"
    if isinstance(error, NotImplementedError):
        return str(error)
    with path.open("rb") as file:
        start = file.read(4)
    if isinstance(error, UnidentifiedImageError) and not start.startswith(STARTS):
        return "no picture" if start else "empty"
    return "cut short or damaged"
