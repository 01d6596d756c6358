"""One registry for the backbones of both worlds. A backbone is its layers, its feature width, the transform that its
weights need, and a card that says where the weights come from.
"""

import hashlib
import json
import pickle
import re
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

import torch
import torchvision.models as zoo
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn
from torch.hub import HASH_REGEX
from torchvision.models.resnet import BasicBlock
from torchvision.models.vgg import make_layers

from course_utils.download import cache_folder, fetch, locate
from course_utils.paths import WEIGHTS

Transform = Callable[[Tensor], Tensor]


class WeightsError(RuntimeError):
    """Weights that are missing, altered, or made for another network."""


class Backbone(nn.Module):
    """Pictures `(n, 3, height, width)`, already transformed, to features `(n, width)`.

    Raises `ValueError` for pictures that cannot have been through the transform: whole numbers, or not three channels.
    """

    def __init__(self, name: str, layers: nn.Module, width: int, transform: Transform, card: dict | None = None) -> None:
        super().__init__()
        self.name, self.width, self.transform, self.card = name, width, transform, card or {}
        self.layers = layers

    def forward(self, pictures: Tensor) -> Tensor:
        if not pictures.is_floating_point() or pictures.dim() != 4 or pictures.shape[1] != 3:
            got = f"{pictures.dtype} of shape {tuple(pictures.shape)}"
            raise ValueError(f"{self.name} takes float pictures (n, 3, height, width) from its own transform, not {got}")
        return self.layers(pictures)


class Classifier(nn.Module):
    """A backbone with a linear head: pictures `(n, 3, height, width)` to logits `(n, classes)`.

    Raises `ValueError` for fewer than two classes.
    """

    def __init__(self, backbone: Backbone, classes: int) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(f"a classifier needs two classes or more, not {classes}")
        self.backbone = backbone
        self.head = nn.Linear(backbone.width, classes)

    @property
    def transform(self) -> Transform:
        """The transform of the backbone's weights: what pictures go through before they come here."""
        return self.backbone.transform

    def forward(self, pictures: Tensor) -> Tensor:
        return self.head(self.backbone(pictures))


def centred(pictures: Tensor) -> Tensor:
    """The transform of the embedded backbones: uint8 or float in [0, 1] to float, mid-grey at 0, black at −2, white at 2."""
    scaled = pictures.float() / 255 if pictures.dtype == torch.uint8 else pictures
    return (scaled - 0.5) / 0.25


def _shortcut(before: int, after: int, stride: int) -> nn.Module | None:
    if stride == 1 and before == after:
        return None
    return nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))


def small_vgg() -> nn.Sequential:
    """A VGG for 32 × 32 pictures: seven convolutions in four stages, of torchvision's own layers, 128 features."""
    stages: list[str | int] = [32, "M", 48, 48, "M", 96, 96, "M", 128, 128, "M"]
    return nn.Sequential(make_layers(stages, batch_norm=True), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def small_resnet() -> nn.Sequential:
    """A ResNet for 32 × 32 pictures: a stem and four of torchvision's basic blocks, 128 features."""
    stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True), nn.MaxPool2d(2))
    plan = [(32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2)]
    blocks = [BasicBlock(before, after, stride, _shortcut(before, after, stride)) for before, after, stride in plan]
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())


EMBEDDED = dict.fromkeys(("vgg_near", "vgg_far"), small_vgg)
EMBEDDED |= dict.fromkeys(("resnet_near", "resnet_far", "resnet_photos", "resnet_shuffled"), small_resnet)
WIDTH = 128
# Left out: squeezenet has no linear head, googlenet and inception have three, vit_h_14's weights want larger pictures.
NAMES = tuple(zoo.list_models(zoo, exclude=["squeezenet*", "googlenet", "inception_v3", "vit_h_14"]))


def load_backbone(name: str, pretrained: bool = True) -> Backbone:
    """A backbone of either world, with its weights, or with random ones drawn from torch's global state.

    Raises `ValueError` for a name that does not exist; `WeightsError` for weights that are missing, altered or made
    for another network; `OfflineError` or `DownloadError` where torchvision's weights cannot be fetched.
    """
    if name not in EMBEDDED:
        return torchvision_backbone(name, pretrained)
    layers = EMBEDDED[name]()
    card = {}
    if pretrained:
        card = read_card(name)
        load_weights(layers, WEIGHTS / f"{name}.safetensors", card["sha256"])
    return Backbone(name, layers, WIDTH, centred, card)


def read_card(name: str) -> dict:
    """What is known of embedded weights: command, seed, held-out accuracy, licence, SHA-256. Raises `WeightsError`."""
    path = WEIGHTS / f"{name}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"the card {path.name} of the weights is missing or broken: {_restore(path)}") from error


def load_weights(layers: nn.Module, path: Path, sha256: str) -> None:
    """Load a safetensors file into `layers`, after its SHA-256 has been checked. Raises `WeightsError`."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise WeightsError(f"the weights {path.name} are missing: {_restore(path)}") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise WeightsError(f"the weights {path.name} were altered (their SHA-256 is not the card's): {_restore(path)}")
    try:
        layers.load_state_dict(load(content))
    except (SafetensorError, RuntimeError) as error:
        raise WeightsError(f"the weights {path.name} are of another network: {_restore(path)}") from error


def _restore(path: Path) -> str:
    return f"bring it back with `git checkout data/weights`, or train it with `python tools/pretrain.py {path.stem}`"


def torchvision_backbone(name: str, pretrained: bool = True) -> Backbone:
    """A torchvision network without its classification head, with the transform and the card of its default weights.

    The transform takes uint8 `(3, height, width)` or `(n, 3, height, width)`. Without `pretrained` nothing is fetched.
    Raises `ValueError` for a name that torchvision does not have, `WeightsError` where a file holds another network,
    and what `fetch` raises.
    """
    if name not in NAMES:
        near = ", ".join(get_close_matches(name, NAMES, cutoff=0))
        raise ValueError(f"no torchvision backbone {name!r}; the nearest names are {near}")
    weights = zoo.get_model_weights(name).DEFAULT
    found = HASH_REGEX.search(weights.url)
    network = zoo.get_model(name, weights=None)
    card = {"name": name, "weights": "none: randomly initialised"}
    if pretrained:
        url, digest = locate(name, weights.url, f"sha256:{found[1] if found else ''}")
        _load_state(network, name, fetch(url, digest, cache_folder() / "weights"))
        card |= {"weights": str(weights), "url": url, "digest": digest}
        card |= {key: weights.meta.get(key) for key in ("recipe", "license")} | {"accuracy": weights.meta["_metrics"]}
    place, head = [(place, module) for place, module in network.named_modules() if isinstance(module, nn.Linear)][-1]
    network.set_submodule(place, nn.Identity())
    return Backbone(name, network, head.in_features, weights.transforms(), card)


def _load_state(network: nn.Module, name: str, path: Path) -> None:
    """Copy a stored state into a network, strictly. Raises `WeightsError` where it does not fit."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for key in list(state):  # the densenets' files are older than the names of their layers
            renamed = re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", key)
            state[renamed] = state.pop(key)
        network.load_state_dict(state)
    except (RuntimeError, pickle.UnpicklingError, EOFError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(f"{path} does not hold the weights of {name}: {reason}") from None
