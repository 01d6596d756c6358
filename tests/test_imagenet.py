"""The imagenet world: torchvision's networks and data sets, through the loading code that a learner's machine runs."""

import pickle
import re
import shutil
import tarfile
from collections.abc import Iterator
from hashlib import md5
from pathlib import Path

import pytest
import torch
import torchvision.models as zoo
from PIL import Image
from scipy.io import savemat
from torch import nn
from torchvision import datasets
from torchvision.datasets.utils import extract_archive
from torchvision.transforms.functional import pil_to_tensor

from course_utils import backbones, download
from course_utils.backbones import NAMES, Backbone, WeightsError, torchvision_backbone
from course_utils.data import vision
from course_utils.data.batches import batches
from course_utils.data.pictures import PictureError
from course_utils.data.splits import few_shot
from course_utils.data.vision import PictureDataset, cut, picture_folder, vision_data
from course_utils.download import DownloadError, OfflineError
from tests.mirror import BREEDS, Mirror, pack, serve_handful

NETWORK = "mobilenet_v3_small"
PETS = "pets"


@pytest.fixture(scope="module")
def handful(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("handful")
    serve_handful(folder, networks=(NETWORK, "resnet18"))
    return folder


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, handful: Path) -> Iterator[Mirror]:
    with Mirror() as serving:
        serving.put_folder(handful)
        monkeypatch.setattr(download, "PAUSE", 0)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setenv("COURSE_MIRROR", serving.url)
        monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "cache"))
        yield serving


def pictures(count: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 70, 90), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", [NETWORK, "resnet18"])
def test_served_backbone_is_the_network_without_its_head(mirror: Mirror, handful: Path, name: str) -> None:
    backbone = torchvision_backbone(name).eval()
    original = zoo.get_model(name, weights=None).eval()
    original.load_state_dict(torch.load(handful / f"{name}.pth", weights_only=True))
    head = [module for module in original.modules() if isinstance(module, nn.Linear)][-1]
    batch = backbone.transform(pictures())
    with torch.no_grad():
        features = backbone(batch)
        assert features.shape == (2, backbone.width)
        torch.testing.assert_close(head(features), original(batch))
    assert isinstance(backbone, Backbone)
    assert backbone.name == name


WIDTHS = {"vgg16_bn": 4096, "resnet18": 512, "resnet50": 2048, "densenet121": 1024, "efficientnet_b0": 1280}
WIDTHS |= {"convnext_tiny": 768, "vit_b_16": 768, "swin_t": 768, "mnasnet0_5": 1280, "mobilenet_v3_small": 1024}


@pytest.mark.parametrize(("name", "width"), WIDTHS.items())
def test_width(name: str, width: int) -> None:
    with torch.device("meta"):  # shapes alone: nothing is computed
        backbone = torchvision_backbone(name, pretrained=False).eval()
        assert backbone.width == width
        assert backbone(torch.empty(2, 3, 224, 224)).shape == (2, width)


def test_untrained_backbone_fetches_nothing(mirror: Mirror) -> None:
    backbone = torchvision_backbone(NETWORK, pretrained=False)
    assert not mirror.requests
    assert "none" in backbone.card["weights"]
    assert "accuracy" not in backbone.card


def test_second_load_comes_from_the_cache(mirror: Mirror) -> None:
    first, second = torchvision_backbone(NETWORK).state_dict(), torchvision_backbone(NETWORK).state_dict()
    assert mirror.requests.count(f"/{NETWORK}.pth") == 1
    for key in first:
        assert torch.equal(first[key], second[key])


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
def test_transform_is_the_weights_own(name: str) -> None:
    with torch.device("meta"):
        transform = torchvision_backbone(name, pretrained=False).transform
    preset = zoo.get_model_weights(name).DEFAULT.transforms()
    batch = pictures()
    torch.testing.assert_close(transform(batch), preset(batch), rtol=0, atol=0)
    torch.testing.assert_close(transform(batch[0]), preset(batch)[0])
    assert transform(batch).shape == (2, 3, 224, 224)
    assert transform(batch).dtype == torch.float32


def test_card_says_what_torchvision_says(mirror: Mirror) -> None:
    card, weights = torchvision_backbone(NETWORK).card, zoo.get_model_weights(NETWORK).DEFAULT
    assert card["weights"] == str(weights)
    assert card["recipe"] == weights.meta["recipe"]
    assert card["accuracy"] == weights.meta["_metrics"]
    assert card["url"] == f"{mirror.url}/{NETWORK}.pth"


@pytest.mark.parametrize("name", ["resnet18", "vgg16_bn"])
def test_without_a_mirror_torchvision_is_asked(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, str]] = []

    def offline(url: str, digest: str, folder: Path) -> Path:
        asked.append((url, digest))
        raise OfflineError

    monkeypatch.delenv("COURSE_MIRROR", raising=False)
    monkeypatch.setattr(backbones, "fetch", offline)
    with pytest.raises(OfflineError), torch.device("meta"):
        torchvision_backbone(name)
    url = zoo.get_model_weights(name).DEFAULT.url
    assert asked == [(url, f"sha256:{Path(url).stem.rpartition('-')[2]}")]


def test_every_name_has_a_hash_and_a_stated_accuracy() -> None:
    for name in NAMES:
        weights = zoo.get_model_weights(name).DEFAULT
        assert re.search(r"-[0-9a-f]{8,}\.pth$", weights.url), name
        assert weights.meta["_metrics"]["ImageNet-1K"]["acc@1"] > 0, name


@pytest.mark.parametrize(("name", "near"), [("resnet_18", "resnet18"), ("vgg16bn", "vgg16_bn"), ("ResNet50", "resnet50")])
def test_unknown_name(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}.*\b{near}\b"):
        torchvision_backbone(name)


@pytest.mark.parametrize("kind", ["another network", "no state", "no weights", "code"])
def test_wrong_weights_are_refused_in_one_line(mirror: Mirror, handful: Path, tmp_path: Path, kind: str) -> None:
    ran = tmp_path / "ran"

    class Code:
        def __reduce__(self) -> tuple:
            return Path.touch, (ran,)

    torch.save([1, 2], tmp_path / "list.pth")
    contents: dict[str, bytes | Path] = {
        "another network": handful / f"{NETWORK}.pth",
        "no state": tmp_path / "list.pth",
        "no weights": b"<html>welcome to our network</html>",
        "code": pickle.dumps(Code(), protocol=2),
    }
    mirror.put("other.pth", contents[kind])
    mirror.put_index({"resnet18": "other.pth"})
    with pytest.raises(WeightsError, match=r"other\.pth does not hold the weights of resnet18") as error:
        torchvision_backbone("resnet18")
    assert "\n" not in str(error.value)
    assert not ran.exists()


def test_old_layer_names_of_densenets(mirror: Mirror, tmp_path: Path) -> None:
    state = zoo.get_model("densenet121", weights=None).state_dict()
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", key): value for key, value in state.items()}
    assert old.keys() != state.keys()
    torch.save(old, tmp_path / "densenet.pth")
    mirror.put("densenet.pth", tmp_path / "densenet.pth")
    mirror.put_index({"densenet121": "densenet.pth"})
    loaded = torchvision_backbone("densenet121").layers.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in loaded.items())
    assert len(loaded) == len(state) - 2  # the head's weight and bias


@pytest.mark.parametrize("key", [NETWORK, PETS])
def test_offline_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, key: str) -> None:
    with Mirror() as stopped:
        monkeypatch.setenv("COURSE_MIRROR", stopped.url)
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path))
    with pytest.raises(OfflineError, match=r'cannot be reached.*PROFILE = "embedded"') as error:
        vision_data(PETS, "train") if key == PETS else torchvision_backbone(key)
    assert "\n" not in str(error.value)


def test_pets_are_split_once_and_by_class(mirror: Mirror) -> None:
    splits = {name: vision_data(PETS, name) for name in ("train", "valid", "test")}
    names = {name: {file.stem for file in split.files} for name, split in splits.items()}
    assert {name: len(split) for name, split in splits.items()} == {"train": 40, "valid": 8, "test": 24}
    assert len(set.union(*names.values())) == 72
    for name, split in splits.items():
        assert split.classes == tuple(breed.replace("_", " ").title() for breed in BREEDS)
        assert torch.bincount(split.labels).tolist() == [len(split) // 4] * 4
        assert split.labels.dtype == torch.int64
        for file, label in zip(split.files, split.labels.tolist(), strict=True):
            assert file.stem.rpartition("_")[0] == BREEDS[label]
        again = vision_data(PETS, name)
        assert again.files == split.files
        assert torch.equal(again.labels, split.labels)
    assert mirror.requests.count("/images.tar.gz") == 1


def test_pictures_come_as_they_are(mirror: Mirror) -> None:
    split = vision_data(PETS, "valid")
    shapes = set()
    for index, (file, label) in enumerate(zip(split.files, split.labels.tolist(), strict=True)):
        picture, given = split[index]
        assert picture.dtype == torch.uint8
        assert given == label
        assert torch.equal(picture, pil_to_tensor(Image.open(file)))
        shapes.add(tuple(picture.shape))
    assert len(shapes) > 1
    few = split.subset(torch.tensor([3, 0]))
    assert few.files == (split.files[3], split.files[0])
    assert few.labels.tolist() == [int(split.labels[3]), int(split.labels[0])]
    assert torch.equal(few[0][0], split[3][0])


def test_an_interrupted_data_set_is_completed(mirror: Mirror) -> None:
    mirror.faults["/annotations.tar.gz"] = [404]
    with pytest.raises(DownloadError, match=r"annotations\.tar\.gz"):
        vision_data(PETS, "train")
    assert len(vision_data(PETS, "train")) == 40
    assert mirror.requests.count("/images.tar.gz") == 1


def test_a_failed_unpacking_leaves_nothing(mirror: Mirror, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(vision, "extract_archive", full)
        with pytest.raises(DownloadError, match="full"):
            vision_data(PETS, "train")
    assert not list((tmp_path / "cache" / "data").iterdir())
    assert len(vision_data(PETS, "train")) == 40


def test_another_mirrors_pictures_are_not_mistaken(mirror: Mirror, tmp_path: Path) -> None:
    vision_data(PETS, "train")
    (tmp_path / "larger").mkdir()
    serve_handful(tmp_path / "larger", networks=(), trainval=20)
    mirror.put_folder(tmp_path / "larger")
    assert len(vision_data(PETS, "train")) == 64


@pytest.mark.parametrize("name", [PETS, "flowers102"])
def test_without_a_mirror_the_data_set_s_own_files_are_asked(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, str]] = []

    def record(url: str, digest: str, folder: Path) -> Path:
        asked.append((url, digest))
        return tmp_path / "broken.zip"

    monkeypatch.delenv("COURSE_MIRROR", raising=False)
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path))
    monkeypatch.setattr(vision, "fetch", record)
    with pytest.raises(FileNotFoundError):
        vision_data(name, "train")
    expected = datasets.OxfordIIITPet._RESOURCES if name == PETS else vision._FLOWERS
    assert asked == [(url, f"md5:{md5}") for url, md5 in expected]
    assert all(url.startswith("https://") and len(md5) == 32 for url, md5 in expected)


def test_flowers(mirror: Mirror, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, handful: Path) -> None:
    with tarfile.open(handful / "images.tar.gz") as archive:
        contents = [file.read() for member in archive if (file := archive.extractfile(member))]
    ids = list(range(1, len(contents) + 1))
    kinds = [1 + number % 3 for number in range(len(ids))]
    savemat(tmp_path / "imagelabels.mat", {"labels": kinds})
    savemat(tmp_path / "setid.mat", {"trnid": ids[:30], "valid": ids[30:60], "tstid": ids[60:]})
    pack(
        tmp_path / "102flowers.tgz",
        {f"jpg/image_{number:05d}.jpg": content for number, content in zip(ids, contents, strict=True)},
    )
    served = {name: tmp_path / name for name in ("102flowers.tgz", "imagelabels.mat", "setid.mat")}
    for name, path in served.items():
        mirror.put(name, path)
    mirror.put_index({f"flowers-102/{name}": name for name in served})
    digests = {
        part: (name, md5(served[name].read_bytes()).hexdigest()) for part, (name, _) in datasets.Flowers102._file_dict.items()
    }
    monkeypatch.setattr(datasets.Flowers102, "_file_dict", digests)
    monkeypatch.setattr(datasets.Flowers102, "classes", ["rose", "tulip", "daisy"])
    splits = {name: vision_data("flowers102", name) for name in ("train", "valid", "test")}
    assert {name: len(split) for name, split in splits.items()} == {"train": 48, "valid": 12, "test": len(ids) - 60}
    for split in splits.values():
        assert split.labels.tolist() == [(int(file.stem[-5:]) - 1) % 3 for file in split.files]


@pytest.mark.parametrize("arguments", [("cats", "train"), (PETS, "trainval")])
def test_unknown_data_set_or_split(arguments: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match=f"{arguments[arguments[1] == 'trainval']!r}; there are"):
        vision_data(*arguments)


@pytest.fixture
def own(tmp_path: Path, handful: Path) -> Path:
    """Two classes of five pictures, and what operating systems leave lying about."""
    extract_archive(handful / "images.tar.gz", tmp_path / "unpacked")
    home = tmp_path / "own"
    for breed in BREEDS[:2]:
        (home / breed).mkdir(parents=True)
        for file in sorted((tmp_path / "unpacked" / "images").glob(f"{breed}_*.jpg"))[:5]:
            file.rename(home / breed / file.name.upper())
    (home / ".ipynb_checkpoints").mkdir()
    (home / BREEDS[0] / "._ghost.jpg").write_bytes(b"")
    (home / BREEDS[0] / "notes.txt").write_text("mine")
    return home


def test_own_folder(own: Path) -> None:
    mine = picture_folder(str(own))
    assert mine.classes == BREEDS[:2]
    assert mine.labels.tolist() == [0] * 5 + [1] * 5
    assert all(file.parent.name == mine.classes[label] for file, label in zip(mine.files, mine.labels.tolist(), strict=True))
    assert mine[9][1] == 1


def test_own_folder_with_an_empty_class(own: Path) -> None:
    (own / "cow").mkdir()
    with pytest.raises(ValueError, match="class 'cow' has no pictures"):
        picture_folder(own)


@pytest.mark.parametrize("count", [0, 1])
def test_own_folder_with_too_few_classes(own: Path, count: int) -> None:
    for breed in BREEDS[count:2]:
        shutil.rmtree(own / breed)
    with pytest.raises(ValueError, match=f"holds {('no', 'one')[count]} class.* two or more classes"):
        picture_folder(own)


def test_own_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere is no folder"):
        picture_folder(tmp_path / "nowhere")


@pytest.mark.parametrize("content", [b"not a picture", b"", None], ids=["text", "empty", "cut short"])
def test_unreadable_picture_is_named(own: Path, content: bytes | None) -> None:
    mine = picture_folder(own)
    bad = mine.files[7]
    bad.write_bytes(bad.read_bytes()[:300] if content is None else content)
    with pytest.raises(PictureError, match=f"1 of 10 pictures .*{bad.name}"):
        picture_folder(own)
    with pytest.raises(PictureError, match=f"{bad.name} cannot be read as a picture"):
        mine[7]
    assert mine[6][0].shape[0] == 3


def test_own_folder_in_which_no_picture_can_be_read(own: Path) -> None:
    for file in picture_folder(own).files:
        file.write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=f"class '{BREEDS[0]}' has no picture that can be read"):
        picture_folder(own, skip_unreadable=True)


@pytest.mark.parametrize(("count", "share", "expected"), [(10, 0.2, 2), (2, 0.2, 1), (3, 0.9, 2), (5, 0.5, 2)])
def test_cut(count: int, share: float, expected: int) -> None:
    whole = PictureDataset(tuple(Path(f"{index}") for index in range(2 * count)), torch.arange(2 * count) % 2, ("a", "b"))
    rest, part = cut(whole, share)
    assert torch.bincount(part.labels).tolist() == [expected] * 2
    assert torch.bincount(rest.labels).tolist() == [count - expected] * 2
    assert set(rest.files) | set(part.files) == set(whole.files)
    for half in (rest, part):
        assert [int(file.name) % 2 for file in half.files] == half.labels.tolist()


def test_cut_of_a_class_with_one_picture() -> None:
    with pytest.raises(ValueError, match="class 'b' has 1 pictures"):
        cut(PictureDataset((Path("0"), Path("1"), Path("2")), torch.tensor([0, 0, 1]), ("a", "b")))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_pictures_of_many_sizes(mirror: Mirror, workers: int) -> None:
    backbone = torchvision_backbone(NETWORK, pretrained=False)
    few = few_shot(vision_data(PETS, "train"), 3, seed=0)
    feed = batches(few, backbone.transform, size=4, steps=2, device="cpu", workers=workers)
    seen = list(feed.epoch(0))
    assert [tuple(batch.shape) for batch, _ in seen] == [(4, 3, 224, 224)] * 2
    expected = {
        (int(label), round(float(backbone.transform(picture).sum()), 0)) for picture, label in (few[i] for i in range(len(few)))
    }
    got = {
        (int(label), round(float(picture.sum()), 0))
        for batch, labels in seen
        for picture, label in zip(batch, labels, strict=True)
    }
    assert got <= expected
    assert len(got) == 8
