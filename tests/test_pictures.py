"""A picture of the learner's own, and the choice of world and device."""

import numpy as np
import pytest
import torch
from PIL import Image

from course_utils.data import PictureError, load_target, read_picture
from course_utils.profile import PROFILES, get_profile, pick_device


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


@pytest.mark.parametrize(
    "content", [b"", b"I am a text", b"\x89PNG\r\n\x1a\n" + b"\0" * 40], ids=["empty", "text", "broken header"]
)
def test_what_is_no_picture_is_said_in_one_line(tmp_path, content):
    path = tmp_path / "digit.png"
    path.write_bytes(content)
    with pytest.raises(PictureError, match=r"digit\.png cannot be read as a picture .*save it again") as caught:
        read_picture(path)
    assert "\n" not in str(caught.value)


def test_a_picture_cut_short_is_refused(tmp_path):
    path = tmp_path / "cut.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(PictureError, match="cannot be read as a picture"):
        read_picture(path)


def test_a_missing_file_or_a_folder_is_named(tmp_path):
    with pytest.raises(PictureError, match=r"none\.png does not exist"):
        read_picture(tmp_path / "none.png")
    with pytest.raises(PictureError, match="cannot be read as a picture"):
        read_picture(tmp_path)


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
