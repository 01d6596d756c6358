"""Backbones of the `imagenet` world: torchvision's networks, with the weights and transform of its weights API."""

import pickle
import re
from difflib import get_close_matches
from pathlib import Path

import torch
import torchvision.models as zoo
from torch import nn
from torch.hub import HASH_REGEX

from course_utils.backbones import Backbone, WeightsError
from course_utils.download import cache_folder, fetch, locate

# Left out: squeezenet has no linear head, googlenet and inception have three, vit_h_14's weights want larger pictures.
NAMES = tuple(zoo.list_models(zoo, exclude=["squeezenet*", "googlenet", "inception_v3", "vit_h_14"]))


def _load(network: nn.Module, name: str, path: Path) -> None:
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
        _load(network, name, fetch(url, digest, cache_folder() / "weights"))
        card |= {"weights": str(weights), "url": url, "digest": digest}
        card |= {key: weights.meta.get(key) for key in ("recipe", "license")} | {"accuracy": weights.meta["_metrics"]}
    place, head = [(place, module) for place, module in network.named_modules() if isinstance(module, nn.Linear)][-1]
    network.set_submodule(place, nn.Identity())
    return Backbone(name, network, head.in_features, weights.transforms(), card)
