"""A picture of the learner's own, and the choice of world and device."""

import hashlib
import os
import struct
import subprocess
import sys
import zlib
from io import BytesIO

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from course_utils.data import PictureError, load_target, picture_folder, read_picture
from course_utils.data.pictures import MAX_PIXELS
from course_utils.paths import ROOT
from course_utils.profile import PROFILES, get_profile, pick_device
from tests.test_lessons import cells


def test_a_picture_is_read_as_rgb_at_its_size(tmp_path):
    Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4)).save(tmp_path / "grey.png")
    picture = read_picture(tmp_path / "grey.png")
    assert picture.dtype == torch.uint8 and picture.shape == (3, 3, 4)
    assert torch.equal(picture[0], picture[2]) and picture[0, 0].tolist() == [0, 1, 2, 3]


def test_the_middle_square_is_cut_out(tmp_path):
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 40:80] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    picture = read_picture(tmp_path / "wide.png", side=32)
    assert picture.shape == (3, 32, 32) and (picture > 200).all(), "black stood left and right of the middle"


def test_a_picture_is_turned_as_its_camera_was_held(tmp_path):
    half = np.zeros((16, 32, 3), np.uint8)
    half[:, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # held upright: to be turned a quarter clockwise
    Image.fromarray(half).save(tmp_path / "phone.png", exif=exif)
    picture = read_picture(tmp_path / "phone.png")
    assert picture.shape == (3, 32, 16)
    assert (picture[:, :16] == 255).all() and (picture[:, 16:] == 0).all()


def encoded(picture: Image.Image, kind: str, **settings) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, kind, **settings)
    return buffer.getvalue()


def noise(side: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8))


def flat(mode: str, colour, side: int = 8) -> Image.Image:
    return Image.new(mode, (side, side), colour)


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG written by hand, for what PIL reads but does not write."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def palette() -> bytes:
    picture = Image.new("P", (8, 8), 1)
    picture.putpalette([0, 0, 0, 255, 0, 0])
    picture.putpixel((0, 0), 0)
    return encoded(picture, "PNG", transparency=0)


HALF_RED = (255, 127, 127)
GOOD = {
    "1 x 1": (encoded(flat("RGB", (1, 2, 3), 1), "PNG"), (1, 2, 3)),
    "CMYK JPEG": (encoded(flat("CMYK", (0, 255, 255, 0)), "JPEG", quality=95), (254, 0, 0)),
    "16-bit grey": (encoded(Image.fromarray(np.full((8, 8), 0x4080, np.uint16)), "PNG"), (0x40,) * 3),
    "16-bit RGB": (png(1, 1, 16, 2, b"\0" + bytes.fromhex("10ff20ff30ff")), (0x10, 0x20, 0x30)),
    "black and white": (encoded(flat("1", 1), "PNG"), (255, 255, 255)),
    "RGBA, clear": (encoded(flat("RGBA", (0, 0, 0, 0)), "PNG"), (255, 255, 255)),
    "RGBA, half": (encoded(flat("RGBA", (255, 0, 0, 128)), "PNG"), HALF_RED),
    "LA, clear": (encoded(flat("LA", (0, 0)), "PNG"), (255, 255, 255)),
    "GIF": (encoded(flat("RGB", (255, 0, 0)), "GIF", save_all=True, append_images=[flat("RGB", (0, 255, 0))]), (255, 0, 0)),
    "moving PNG": (encoded(flat("RGB", (9, 8, 7)), "PNG", save_all=True, append_images=[flat("RGB", (0, 9, 0))]), (9, 8, 7)),
    "palette with a clear colour": (palette(), (255, 255, 255)),
}


@pytest.mark.parametrize("kind", GOOD)
def test_uncommon_pictures_have_their_colours(tmp_path, kind):
    content, colour = GOOD[kind]
    (tmp_path / "picture").write_bytes(content)
    picture = read_picture(tmp_path / "picture")
    assert picture.shape[0] == 3 and picture.dtype == torch.uint8
    assert (picture[:, 0, 0].int() - torch.tensor(colour)).abs().max() <= (3 if "JPEG" in kind else 1)


def test_only_the_clear_colour_of_a_palette_is_white(tmp_path):
    (tmp_path / "palette.png").write_bytes(palette())
    assert read_picture(tmp_path / "palette.png")[:, 3, 3].tolist() == [255, 0, 0]


PNG, JPEG = encoded(noise(), "PNG"), encoded(noise(), "JPEG")
BAD = {
    "empty": (b"", "empty"),
    "text": (b"I am a text", "no picture"),
    "a script": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no picture"),
    "broken header": (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "cut short or damaged"),
    **{f"PNG cut at {n}": (PNG[:n], "cut short or damaged") for n in (5, 20, 100, 4000, len(PNG) - 60)},
    **{f"JPEG cut at {n}": (JPEG[:n], "cut short or damaged") for n in (5, 100, 1500, len(JPEG) - 3)},
    "GIF cut": (encoded(noise(), "GIF")[:100], "cut short or damaged"),
    "not numbers": (encoded(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"), "uncommon pixel values, of mode F"),
    "32 bits": (encoded(Image.fromarray(np.full((4, 4), 70000, np.int32)), "TIFF"), "uncommon pixel values, of mode I"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_picture_is_said_in_one_line(tmp_path, kind):
    path, (content, reason) = tmp_path / "digit.png", BAD[kind]
    path.write_bytes(content)
    with pytest.raises(PictureError, match=r"digit\.png cannot be read as a picture .*save it again") as caught:
        read_picture(path)
    assert caught.value.reason == reason and f"({reason})" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_or_a_folder_is_named(tmp_path):
    with pytest.raises(PictureError, match=r"none\.png does not exist"):
        read_picture(tmp_path / "none.png")
    (tmp_path / "x.png").mkdir()
    with pytest.raises(PictureError, match=r"cannot be read as a picture .*(directory|denied)"):
        read_picture(tmp_path / "x.png")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_said_to_be_one(tmp_path):
    (tmp_path / "mine.png").write_bytes(PNG)
    (tmp_path / "mine.png").chmod(0)
    with pytest.raises(PictureError, match="permission denied"):
        read_picture(tmp_path / "mine.png")


READ_IT = """
import resource, sys
from PIL import ImageFile
from course_utils.data import PictureError, read_picture
ImageFile.ImageFile.load = lambda *_: print("decoded")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        read_picture(path)
    except PictureError as error:
        print(error.reason)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000 * (1024 if sys.platform == "darwin" else 1))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not report the memory of a process in this way")
def test_a_picture_too_large_for_the_memory_is_refused_before_it_is_decoded(tmp_path):
    """PIL's own guard speaks from 180 million pixels on and warns from 90; ours is below both."""
    sides = (20_000, 10_000, 8_000)
    assert min(sides) ** 2 > MAX_PIXELS
    paths = [tmp_path / f"{side}.png" for side in sides]
    for side, path in zip(sides, paths, strict=True):
        path.write_bytes(png(side, side, 1, 0, bytes(side * (1 + side // 8))))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", READ_IT, *paths], cwd=ROOT, capture_output=True, text=True)
    said = [f"{side**2:,} pixels, more than the 50,000,000 that are read" for side in sides]
    assert done.stdout.splitlines() == [*said, "True"], done.stderr


def test_files_are_examined_in_lesson_02_and_equal_pictures_found(tmp_path):
    names = {"hashlib": hashlib, "pd": pd, "read_picture": read_picture, "PictureError": PictureError}
    examine = cells("02", "examine", **names)["examine"]
    turned = encoded(noise().transpose(Image.Transpose.ROTATE_90), "PNG")
    wide = encoded(Image.new("RGB", (20, 10)), "PNG")
    high = encoded(Image.new("RGB", (10, 20)), "PNG")
    contents = {
        "a.png": PNG,
        "b.bmp": encoded(noise(), "BMP"),
        "c.png": turned,
        "d.png": PNG[:4000],
        "e.png": wide,
        "f.png": high,
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    report = examine(tmp_path / name for name in [*contents, "g.png"])
    assert report.columns.tolist() == ["file", "width", "height", "reason", "digest"]
    assert report["file"].tolist() == [tmp_path / name for name in [*contents, "g.png"]]
    assert report["reason"].tolist() == ["", "", "", "cut short or damaged", "", "", "missing"]
    assert report["width"].tolist() == [64, 64, 64, 0, 20, 10, 0] and report["height"].tolist() == [64, 64, 64, 0, 10, 20, 0]
    a, b, c, d, e, f, g = report["digest"]
    assert a == b and len({a, c, e, f}) == 4 and d == g == "" and len(a) == 64
    assert examine([]).columns.tolist() == report.columns.tolist()


@pytest.fixture
def own(tmp_path):
    """Two classes of four pictures, and what operating systems leave lying about."""
    for label in ("cat", "dog"):
        (tmp_path / "own" / label).mkdir(parents=True)
        for number in range(4):
            (tmp_path / "own" / label / f"{number}.PNG").write_bytes(PNG)
        for junk in ("README.txt", ".DS_Store", "Thumbs.db", "._0.png"):
            (tmp_path / "own" / label / junk).write_bytes(b"junk")
    return tmp_path / "own"


def refusal(*arguments, **settings) -> str:
    with pytest.raises(ValueError) as caught:
        picture_folder(*arguments, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_of_pictures_and_nothing_else(own, recwarn):
    mine = picture_folder(own)
    assert mine.classes == ("cat", "dog") and mine.labels.tolist() == [0] * 4 + [1] * 4
    assert not recwarn.list


def test_a_folder_that_is_no_data_set_is_refused_by_name(own):
    assert f"{own}x is no folder: give" in refusal(f"{own}x")
    assert "cat holds no class: put" in refusal(own / "cat")
    assert f"{own.parent} holds folders" not in refusal(own.parent)
    assert f"{own} holds folders, such as 'cat'" in refusal(own.parent) and f"give {own} if" in refusal(own.parent)
    (own / "cow").mkdir()
    assert "class 'cow' has no pictures" in refusal(own)
    (own / "cow").rmdir()
    (own / "dog").rename(own.parent / "dog")
    assert "holds one class, 'cat': put" in refusal(own)


def test_pictures_that_cannot_be_read_are_named_or_left_out(own):
    (own / "cat" / "1.PNG").write_bytes(PNG[:4000])
    (own / "dog" / "2.PNG").write_bytes(b"")
    said = "2 of 8 pictures in .*own cannot be read, cat.1.PNG .cut short or damaged., dog.2.PNG .empty.: "
    with pytest.raises(PictureError, match=said + "save them again .*skip_unreadable=True$"):
        picture_folder(own)
    with pytest.warns(UserWarning, match=said + "they are left out$") as caught:
        mine = picture_folder(own, skip_unreadable=True)
    assert caught[0].filename == __file__
    assert [(file.parent.name, file.stem, label) for file, label in zip(mine.files, mine.labels.tolist(), strict=True)] == [
        (name, number, label) for label, (name, rest) in enumerate((("cat", "023"), ("dog", "013"))) for number in rest
    ]
    for file in (own / "cat").glob("*.PNG"):
        file.write_bytes(b"text")
    assert refusal(own).count("(") == 3 and " and 2 more: save" in refusal(own)
    assert "class 'cat' has no picture that can be read" in refusal(own, skip_unreadable=True)


def test_the_two_worlds():
    assert set(PROFILES) == {"embedded", "imagenet"}
    with pytest.raises(ValueError, match="no profile 'imagenett'; choose one of embedded, imagenet"):
        get_profile("imagenett")
    for profile in PROFILES.values():
        assert {"vgg", "resnet"} <= set(profile.backbones)


def test_the_target_of_the_embedded_world_is_mnist_m():
    test = load_target(get_profile("embedded"), "test")
    assert len(test) == 1000 and test.classes == tuple("0123456789")


def test_a_device_is_chosen_or_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto").type == pick_device("cpu").type == "cpu"
    with pytest.raises(RuntimeError, match="this machine has no cuda"):
        pick_device("cuda")
    with pytest.raises(ValueError, match="no device 'tpu'; choose auto, cuda, mps, cpu"):
        pick_device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto").type == "cuda"
