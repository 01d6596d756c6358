"""Frozen features, computed once: a backbone goes over the pictures, and any number of heads learn from what came out."""

import hashlib
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from course_utils.backbones import Backbone
from course_utils.data.splits import PictureSet
from course_utils.evaluate import predict
from course_utils.paths import write_whole
from course_utils.training.freezing import stages


class CacheError(RuntimeError):
    """A cache of features that was made from something else, or is damaged."""


def cached_features(backbone: Backbone, split: PictureSet, path: str | Path) -> Tensor:
    """Features `(n, width)` of every picture in order, on the CPU: computed at the first call, read from `path` afterwards.

    The file notes the SHA-256 of all that they follow from: the layers and their weights, the transform, the pictures.
    Raises `CacheError` where one of them is another now, or the file is damaged. Every picture is read for this, none
    goes through the backbone.
    """
    path, made_from = Path(path), _made_from(backbone, split)
    if not path.exists():
        found = predict(backbone, split).contiguous()
        write_whole(path, lambda file: file.write(save({"features": found}, made_from | {"values": _digest([_bytes(found)])})))
        return found
    try:
        with safe_open(path, framework="pt") as file:
            noted, found = file.metadata() or {}, file.get_tensor("features")
    except (OSError, SafetensorError) as error:
        raise CacheError(f"{path} is no cache of features, or damaged: remove it") from error
    for what, digest in (made_from | {"values": _digest([_bytes(found)])}).items():
        if noted.get(what) != digest:
            why = "was altered after it was written" if what == "values" else f"was made with other {what}"
            raise CacheError(f"{path} {why}: remove it, or name another file")
    return found


def stage_features(backbone: Backbone, split: PictureSet) -> list[Tensor]:
    """What stands after each of a backbone's `stages`: maps averaged over their pixels, `(n, channels)` each, on the CPU.

    Raises `ValueError` where a stage ends in a layer that runs several times a picture.
    """
    ends = [part[-1] for part in stages(backbone)]
    found: list[list[Tensor]] = [[] for _ in ends]
    # Averaged in the hook: an in-place ReLU may come next.
    hooks = [layer.register_forward_hook(partial(_keep_means, kept)) for layer, kept in zip(ends, found, strict=True)]
    try:
        predict(backbone, split)
    finally:
        for hook in hooks:
            hook.remove()
    if any(sum(map(len, kept)) != len(split) for kept in found):
        raise ValueError(f"{backbone.name} does not run the last layer of a stage once a picture")
    return [torch.cat(kept).float() for kept in found]


def _keep_means(kept: list[Tensor], module: nn.Module, inputs: Any, maps: Tensor) -> None:
    kept.append(maps.flatten(2).mean(dim=2).cpu() if maps.dim() == 4 else maps.cpu())


def _made_from(backbone: Backbone, split: PictureSet) -> dict[str, str]:
    sample = torch.randint(256, (3, 48, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    named = (part for name, value in backbone.layers.state_dict().items() for part in (name.encode(), _bytes(value)))
    return {
        "layers": _digest([str(backbone.layers).encode()]),
        "weights": _digest(named),
        "transform": _digest([_bytes(backbone.transform(sample))]),
        "pictures": _digest(_bytes(split[index][0]) for index in range(len(split))),
    }


def _bytes(values: Tensor) -> bytes:
    return f"{values.dtype} {tuple(values.shape)} ".encode() + values.detach().cpu().contiguous().numpy().tobytes()


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
