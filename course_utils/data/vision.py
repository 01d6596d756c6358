"""Larger data sets: torchvision's, and a learner's own folder. Pictures differ in size and stay on the disk."""

import hashlib
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import extract_archive

from course_utils.data.pictures import PictureError, read_picture
from course_utils.download import cache_folder, disk_space, fetch, locate

CUT_SEED = 20261121  # cuts validation pictures off once; no experiment's seed moves it


@dataclass(frozen=True, eq=False)
class PictureDataset(Dataset):
    """Picture files, labels int64 `(n,)`, and the names of the classes; a file is read when its picture is asked for.

    `dataset[i]` gives uint8 `(3, height, width)` and the label, and raises `PictureError` for a file that is no picture.
    """

    files: tuple[Path, ...]
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return read_picture(self.files[index]), int(self.labels[index])

    def subset(self, indices: Sequence[int] | Tensor) -> "PictureDataset":
        """The pictures at `indices`, in that order."""
        chosen = torch.as_tensor(indices, dtype=torch.long)
        return PictureDataset(tuple(self.files[index] for index in chosen.tolist()), self.labels[chosen], self.classes)


def cut(dataset: PictureDataset, share: float = 0.2) -> tuple[PictureDataset, PictureDataset]:
    """A data set in two, the second with `share` of every class: stratified, and the same at every call.

    Raises `ValueError` where a class has fewer than two pictures.
    """
    rng, rest, part = np.random.default_rng(CUT_SEED), [], []
    for label, name in enumerate(dataset.classes):
        indices = rng.permutation(np.flatnonzero(dataset.labels.numpy() == label))
        if len(indices) < 2:
            raise ValueError(f"class {name!r} has {len(indices)} pictures; two or more are needed to cut it in two")
        count = min(max(1, round(share * len(indices))), len(indices) - 1)
        part += indices[:count].tolist()
        rest += indices[count:].tolist()
    return dataset.subset(sorted(rest)), dataset.subset(sorted(part))


def _pets(root: Path, test: bool) -> PictureDataset:
    raw = datasets.OxfordIIITPet(root, split="test" if test else "trainval")
    return PictureDataset(tuple(raw._images), torch.tensor(raw._labels), tuple(raw.classes))


def _flowers(root: Path, test: bool) -> PictureDataset:
    parts = [datasets.Flowers102(root, split=split) for split in (["test"] if test else ["train", "val"])]
    files, labels = [file for raw in parts for file in raw._image_files], [label for raw in parts for label in raw._labels]
    return PictureDataset(tuple(files), torch.tensor(labels), tuple(datasets.Flowers102.classes))


_FLOWERS = tuple((datasets.Flowers102._download_url_prefix + file, md5) for file, md5 in datasets.Flowers102._file_dict.values())
# As torchvision states them: the folder, the files with their MD5, and how to open what is unpacked.
SOURCES = {
    "pets": ("oxford-iiit-pet", datasets.OxfordIIITPet._RESOURCES, _pets),
    "flowers102": ("flowers-102", _FLOWERS, _flowers),
}


def _unpacked(folder: str, files: Sequence[tuple[str, str]]) -> Path:
    """The root in which torchvision finds the data set: fetched and unpacked at the first call, whole or not at all."""
    origins = [locate(f"{folder}/{url.rsplit('/', 1)[1]}", url, f"md5:{md5}") for url, md5 in files]
    # Named by the digests, so that what a mirror served never passes for the original.
    digests = repr(sorted(digest for _, digest in origins)).encode()
    root = cache_folder() / "data" / f"{folder}-{hashlib.sha256(digests).hexdigest()[:8]}"
    if root.exists():
        return root
    fetched = [fetch(url, digest, cache_folder() / "archives" / folder) for url, digest in origins]
    with disk_space(root):
        root.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=root.parent) as building:
            home = Path(building) / "root" / folder
            home.mkdir(parents=True)
            for file in fetched:
                if file.suffix == ".mat":
                    shutil.copy(file, home)
                else:
                    extract_archive(file, home)
            return home.parent.rename(root)


def vision_data(name: str, split: str) -> PictureDataset:
    """A torchvision data set, "pets" or "flowers102", split "train", "valid" (cut from the training pictures) or "test".

    Raises `ValueError` for another name or split, and what `fetch` raises.
    """
    if name not in SOURCES:
        raise ValueError(f"no data set {name!r}; there are {', '.join(SOURCES)}")
    if split not in ("train", "valid", "test"):
        raise ValueError(f"no split {split!r}; there are train, valid, test")
    folder, files, open_in = SOURCES[name]
    pictures = open_in(_unpacked(folder, files), split == "test")
    pictures = pictures.subset(np.random.default_rng(CUT_SEED).permutation(len(pictures)).tolist())  # they come sorted by class
    return pictures if split == "test" else cut(pictures)[split == "valid"]


def picture_folder(path: str | Path, skip_unreadable: bool = False) -> PictureDataset:
    """A learner's own pictures, one folder a class: `path/<class>/<picture>`. Files of other kinds are passed over.

    Every picture is read once, lest a broken one stop a training half-way; with `skip_unreadable` those are left out with
    a warning. Raises `PictureError` for pictures that cannot be read, and `ValueError` where the folder is missing, has
    fewer than two classes, a class without pictures, or a class with folders in it.
    """
    home = Path(path).expanduser()
    if not home.is_dir():
        raise ValueError(f"{home} is no folder: give the one that holds a folder of pictures for each class")
    classes = _folders(home)
    for folder in classes:
        if inner := _folders(folder):
            advice = f"give {folder} if they are the classes, or else move their pictures up into it"
            raise ValueError(f"{folder} holds folders, such as {inner[0].name!r}, where pictures should be: {advice}")
    if len(classes) < 2:
        there = f"one class, {classes[0].name!r}" if classes else "no class"
        raise ValueError(f"{home} holds {there}: put the pictures into a folder for each of two or more classes")
    files: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(classes):
        found = sorted(file for file in folder.glob("[!.]*") if file.suffix.lower() in IMG_EXTENSIONS)
        if not found:
            raise ValueError(f"class {folder.name!r} has no pictures: put some into {folder}, or remove it")
        files += found
        labels += [label] * len(found)
    mine = PictureDataset(tuple(files), torch.tensor(labels), tuple(folder.name for folder in classes))
    reasons = [_why_unreadable(file) for file in files]
    broken = [f"{file.relative_to(home)} ({reason})" for file, reason in zip(files, reasons, strict=True) if reason]
    if not broken:
        return mine
    named = ", ".join(broken[:3]) + (f" and {len(broken) - 3} more" if len(broken) > 3 else "")
    said = f"{len(broken)} of {len(files)} pictures in {home} cannot be read, {named}"
    if not skip_unreadable:
        raise PictureError(f"{said}: save them again as PNG or JPEG, or leave them out with skip_unreadable=True")
    mine = mine.subset([index for index, reason in enumerate(reasons) if not reason])
    for label, folder in enumerate(classes):
        if label not in mine.labels:
            raise ValueError(f"class {folder.name!r} has no picture that can be read: put some into {folder}, or remove it")
    warnings.warn(f"{said}: they are left out", stacklevel=2)
    return mine


def _folders(home: Path) -> list[Path]:
    return sorted(folder for folder in home.iterdir() if folder.is_dir() and not folder.name.startswith("."))


def _why_unreadable(file: Path) -> str:
    try:
        read_picture(file)
    except PictureError as error:
        return error.reason
    return ""
