"""The two worlds in which every lesson runs, and the device on which it runs."""

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Profile:
    """One world: its target task, its backbones by the part that they play, and what suits its pictures.

    side: pixels of a picture of the learner's own before the backbone's transform, 0 where that transform resizes.
    """

    name: str
    target: str
    backbones: dict[str, str]
    labels: tuple[int, ...]
    side: int
    augmentation: dict[str, float] = field(default_factory=dict)


_EMBEDDED = {"vgg": "vgg_near", "resnet": "resnet_near", "vgg_far": "vgg_far", "resnet_far": "resnet_far"}
_IMAGENET = {"vgg": "vgg16_bn", "resnet": "resnet18", "photos": "resnet50"}
PROFILES = {
    "embedded": Profile("embedded", "mnist_m", _EMBEDDED | {"photos": "resnet_photos"}, labels=(5, 20, 100), side=32),
    "imagenet": Profile("imagenet", "pets", _IMAGENET, labels=(5, 20, 50), side=0, augmentation={"flip": 0.5}),
}


def get_profile(name: str) -> Profile:
    """The world of that name. Raises `ValueError` for another name."""
    if name not in PROFILES:
        raise ValueError(f"no profile {name!r}; choose one of {', '.join(PROFILES)}")
    return PROFILES[name]


def pick_device(name: str = "auto") -> torch.device:
    """ "auto" takes CUDA or Apple's MPS where there is one, else the CPU; another name is taken at its word.

    Raises `ValueError` for a name that does not exist, `RuntimeError` for a device that this machine lacks.
    """
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in present.items() if there))
    if name not in present:
        raise ValueError(f"no device {name!r}; choose auto, {', '.join(present)}")
    if not present[name]:
        raise RuntimeError(f"this machine has no {name}: choose DEVICE = 'auto' or 'cpu'")
    return torch.device(name)
