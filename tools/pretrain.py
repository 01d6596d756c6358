"""Train the embedded backbones from nothing, and write their weights and cards to data/weights/.

python tools/pretrain.py                    all six, about ten minutes each on two cores
python tools/pretrain.py vgg_near --out DIR one, to another folder
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python tools/pretrain.py` finds its neighbours from any folder
from course_utils.backbones import EMBEDDED, WIDTH, Backbone, Classifier, centred
from course_utils.data.augment import augmentation
from course_utils.data.batches import batches
from course_utils.data.letters import LETTERS, letters
from course_utils.data.photos import patch
from course_utils.data.splits import SIZE, Split, generator, stack
from course_utils.evaluate import accuracy
from course_utils.paths import WEIGHTS, write_whole
from course_utils.training import fit, sgd
from tools.course import ToolError, prepare_folder

SEED = 0
LETTERS_DRAWN, LETTERS_HELD_OUT = 40_000, 4_000
PATCHES_CUT, PATCHES_HELD_OUT, PATCH_SIDE = 30_000, 2_048, 48
BATCH, STEPS = 128, 64  # an epoch is 64 steps, so that progress is seen every quarter of a minute
EPOCHS = {"letters": 36, "photos": 12}
SOURCES = {
    "near": "letters, near",
    "far": "letters, far",
    "photos": "photo patches, two views of each",
    "shuffled": "letters, near, each with the label of another",
}
HALF = ("resnet_photos", "resnet_shuffled")  # stored as float16: all weights together stay under 8 MB


class Enough(Exception):
    """Raised after `--epochs` epochs: the first part of a run, on the schedule of the whole."""


def letters_step(model: nn.Module, batch: tuple[Tensor, Tensor], progress: float) -> dict[str, Tensor]:
    """Cross-entropy with smoothed labels (Szegedy et al. 2016, section 7)."""
    pictures, labels = batch
    return {"cross_entropy": F.cross_entropy(model(pictures), labels, label_smoothing=0.1)}


class Projected(nn.Module):
    """A backbone and the projection that contrastive learning throws away afterwards (Chen et al. 2020)."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.projection = nn.Sequential(nn.Linear(WIDTH, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, WIDTH))

    def forward(self, pictures: Tensor) -> Tensor:
        return F.normalize(self.projection(self.backbone(pictures)), dim=1)


_view_augmentation = augmentation(rotate=20, scale=0.3, shear=0.1, shift=0.12, brightness=1.0, contrast=0.6, invert=0.5)


def view(patches: Tensor) -> Tensor:
    """Another look at photo patches `(n, 3, 48, 48)`: moved, other colours, perhaps inverted; `(n, 3, 32, 32)`."""
    mix = torch.rand(len(patches), 3, 3)
    mix = mix / mix.sum(dim=2, keepdim=True)
    share = torch.rand(len(patches), 1, 1)
    colours = torch.einsum("nij,njhw->nihw", share * mix + (1 - share) * torch.eye(3), patches)
    margin = (PATCH_SIDE - SIZE) // 2
    return _view_augmentation(colours, torch.default_generator)[..., margin:-margin, margin:-margin]


def contrastive_step(model: nn.Module, batch: tuple[Tensor, Tensor], progress: float) -> dict[str, Tensor]:
    """NT-Xent at temperature 0.2: each view must find the other view of its patch (Chen et al. 2020, equation 1)."""
    patches, _ = batch
    count = len(patches)
    views = torch.cat([view(patches), view(patches)]).contiguous(memory_format=torch.channels_last)
    features = model(views)
    similarity = (features @ features.T / 0.2).fill_diagonal_(float("-inf"))
    partner = torch.arange(2 * count).roll(count)
    return {"nt_xent": F.cross_entropy(similarity, partner)}


def photo_patches(split: str, count: int) -> Split:
    """Squares cut from the photographs behind the letters, without labels (all are of the one class "patch")."""
    drawn = [
        (patch("letters", generator("patches", split, index, SEED), PATCH_SIDE, crop=(PATCH_SIDE // 2, 5 * SIZE)), 0)
        for index in range(count)
    ]
    return stack(drawn, ("patch",))


def pair_accuracy(model: Projected, patches: Split) -> float:
    """The share of held-out patches whose two views find each other among 256 pairs."""
    model.eval()
    found = []
    with torch.inference_mode(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        for chunk in patches.pictures.split(256):
            first, second = model(view(centred(chunk))), model(view(centred(chunk)))
            found.append((first @ second.T).argmax(dim=1) == torch.arange(len(chunk)))
    return torch.cat(found).float().mean().item()


def shuffled(split: Split) -> Split:
    """The same pictures, each with the label of another: as many of each class as before, and nothing to learn but by heart."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(SEED))
    return Split(split.pictures, split.labels[order], split.classes)


def pretrain(name: str, epochs: int | None = None) -> tuple[Backbone, list[float]]:
    """Train one backbone; the backbone, and the held-out accuracy after each epoch.

    With `epochs`, only the first so many epochs of the whole run, on its schedule. Raises `ValueError` for a name that
    is not an embedded backbone.
    """
    if name not in EMBEDDED:
        raise ValueError(f"no embedded backbone {name!r}; there are {', '.join(EMBEDDED)}")
    torch.manual_seed(SEED)
    backbone = Backbone(name, EMBEDDED[name](), WIDTH, centred)
    variant = name.rsplit("_", 1)[1]
    scores: list[float] = []

    def watch(score: Callable[[], float]) -> Callable[[nn.Module], float]:
        def validate(_: nn.Module) -> float:
            scores.append(round(score(), 4))
            if len(scores) == epochs:
                raise Enough
            return scores[-1]

        return validate

    try:
        if variant == "photos":
            projected, held_out = Projected(backbone), photo_patches("valid", PATCHES_HELD_OUT)
            patches = batches(photo_patches("train", PATCHES_CUT), centred, size=BATCH, steps=STEPS, seed=SEED)
            fit(
                projected, patches, step=contrastive_step, epochs=EPOCHS["photos"], optimizer=sgd(lr=0.1),
                validate=watch(lambda: pair_accuracy(projected, held_out)),
            )  # fmt: skip
        else:
            drawing = "near" if variant == "shuffled" else variant
            model, valid = Classifier(backbone, len(LETTERS)), letters(drawing, "valid", LETTERS_HELD_OUT, SEED)
            drawn = letters(drawing, "train", LETTERS_DRAWN, SEED)
            if variant == "shuffled":
                drawn = shuffled(drawn)
            augment = augmentation(brightness=0.8, contrast=0.4, invert=0.5)
            fit(
                model, batches(drawn, centred, size=BATCH, steps=STEPS, augment=augment, seed=SEED),
                step=letters_step, epochs=EPOCHS["letters"], optimizer=sgd(lr=0.1),
                validate=watch(lambda: accuracy(model, valid)),
            )  # fmt: skip
    except Enough:
        pass
    return backbone, scores


def write(backbone: Backbone, scores: list[float], out: Path) -> None:
    """Write weights and card. Both appear whole or not at all."""
    half = backbone.name in HALF
    state = {
        key: value.half() if half and value.is_floating_point() else value for key, value in backbone.layers.state_dict().items()
    }
    content = save({key: value.contiguous() for key, value in state.items()})
    card = {
        "name": backbone.name,
        "command": f"python tools/pretrain.py {backbone.name}",
        "date": date.today().isoformat(),
        "seed": SEED,
        "source": SOURCES[backbone.name.rsplit("_", 1)[1]],
        "held_out": "share of held-out patches that find their other view among 256"
        if backbone.name.endswith("photos")
        else f"accuracy on {LETTERS_HELD_OUT} held-out letters of 52 classes",
        "accuracy": scores[-1],
        "accuracy_by_epoch": scores,
        "licence": "MIT",
        "torch": torch.__version__.split("+")[0],
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    write_whole(out / f"{backbone.name}.safetensors", lambda file: file.write(content))
    write_whole(out / f"{backbone.name}.json", lambda file: file.write(json.dumps(card, indent=1).encode() + b"\n"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(EMBEDDED), metavar="NAME", help=", ".join(EMBEDDED))
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder for weights and cards")
    parser.add_argument("--epochs", type=int, help="stop after so many epochs, to try it")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in EMBEDDED]:
        parser.error(f"no embedded backbone {unknown[0]!r}; there are {', '.join(EMBEDDED)}")
    if arguments.epochs is not None and (arguments.epochs < 1 or arguments.out == WEIGHTS):
        parser.error("--epochs leaves half-trained weights: one epoch or more, to another folder given with --out")
    try:
        prepare_folder(arguments.out)
    except ToolError as error:
        parser.error(str(error))
    for name in arguments.names:
        backbone, scores = pretrain(name, arguments.epochs)
        write(backbone, scores, arguments.out)
        print(f"{name}: held-out accuracy {scores[-1]:.4f} -> {arguments.out / name}.safetensors")


if __name__ == "__main__":
    main()
