"""Data: the tasks of both worlds, few-shot subsets, batches and augmentation."""

from course_utils.data.augment import augmentation
from course_utils.data.batches import batches
from course_utils.data.digits import mnist_m
from course_utils.data.pictures import PictureError, read_picture
from course_utils.data.splits import PictureSet, Split, few_shot, stratified_folds
from course_utils.data.vision import picture_folder, vision_data
from course_utils.profile import Profile

__all__ = ["PictureError", "PictureSet", "Split", "augmentation", "batches", "few_shot"]
__all__ += ["load_target", "mnist_m", "picture_folder", "read_picture", "stratified_folds"]


def load_target(profile: Profile, split: str) -> PictureSet:
    """The target task of a world: split "train", "valid" or "test"."""
    if profile.target == "mnist_m":
        return mnist_m(split)
    return vision_data(profile.target, split)
