"""Checks of lesson 03."""

import copy
import random
from unittest import mock

import torch
from torch import nn
from torch.nn.functional import normalize

from course_utils.exercises import Exercise, NotYet, call, indices, near, values_of


class Network(nn.Module):
    """A small network with what trips people up: nested parts, in-place ReLUs, a sum, a bare parameter, two batch norms."""

    def __init__(self) -> None:
        super().__init__()
        a, b, c, classes = random.sample(range(4, 10), 4)  # so that a wrong place is seen by its number of channels
        self.stem = nn.Sequential(nn.Conv2d(3, a, 3, padding=1), nn.BatchNorm2d(a), nn.ReLU(inplace=True))
        middle = [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True), nn.Conv2d(b, a, 3, padding=1)]
        self.block = nn.Sequential(*middle)
        self.top = nn.Sequential(nn.Conv2d(a, c, 3), nn.ReLU(inplace=True))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, classes), nn.BatchNorm1d(classes))
        self.scale = nn.Parameter(torch.rand(classes) + 0.5)

    def forward(self, pictures):
        maps = self.stem(pictures)
        maps = self.top(maps + self.block(maps))
        return self.head(maps) * self.scale


def pictures_of(count: int) -> torch.Tensor:
    """Pictures of any size, away from batch norm's first means."""
    return 2 * torch.randn(count, 3, random.randint(6, 8), random.randint(9, 11)) + 1


def drawn_network() -> Network:
    """A network in evaluation mode that has seen pictures, so that evaluation and training mode differ."""
    network = Network().train()
    with torch.no_grad():
        for _ in range(3):
            network(pictures_of(9))
    return network.eval()


def state_of(network: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every number in a network."""
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def altered(network: nn.Module, before: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are not what they were, counters last."""
    now = network.state_dict()
    same = {n for n, v in before.items() if n in now and now[n].dtype == v.dtype and torch.equal(now[n].cpu(), v)}
    return sorted((before.keys() | now.keys()) - same, key=lambda name: (name.endswith("num_batches_tracked"), name))


def call_alone(function, *arguments):
    """As `call`, and `NotYet` where gradients are off afterwards for everything."""
    enabled = torch.is_grad_enabled()
    try:
        found = call(function, *arguments)
        left_off = enabled and not torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(enabled)
    if left_off:
        raise NotYet("torch.set_grad_enabled(False) stays: nothing in the notebook gets a gradient from then on, in any network")
    return found


def freeze(answer) -> None:
    for training, partly in ((True, False), (False, False), (True, True)):
        network = drawn_network()
        reference, before = copy.deepcopy(network), state_of(network)
        network.train(training)
        if partly:
            network.stem.requires_grad_(False)
        found = call_alone(answer, network)
        if found is None:
            raise NotYet("nothing came back; return the network")
        if not isinstance(found, nn.Module):
            raise NotYet(f"the network is expected back, not {type(found).__name__}")
        if found is not network:
            raise NotYet("another network came back; change the one that you got, and return that")
        if names := altered(network, before):
            raise NotYet(f"{names[0]!r} is not what it was; freezing changes no number, and takes none away")

        parameters = dict(network.named_parameters())
        learning = [name for name, parameter in parameters.items() if parameter.requires_grad]
        if learning:
            said = f"{len(learning)} of {len(parameters)} parameters would get a gradient, such as {learning[0]!r}"
            if "requires_grad" in vars(network):
                raise NotYet(f"{said}: network.requires_grad = ... makes a new attribute, requires_grad_(False) is the method")
            if training and not network.training and len(learning) == len(parameters):
                raise NotYet(f"{said}: eval() does not change that, requires_grad_(False) does")
            raise NotYet(f"{said}; network.parameters() has them all, however deep")

        pictures = pictures_of(7)
        with torch.no_grad():
            expected = reference(pictures)
            try:
                given = [network(pictures.clone()) for _ in range(2)]
            except Exception as error:
                raise NotYet(f"pictures do not go through it any more: {type(error).__name__}: {error}") from error
        names = altered(network, before)
        if names and not names[0].endswith("num_batches_tracked"):
            said = f"no parameter gets a gradient, but {names[0]!r} moved when pictures went through"
            if not network.training and training:
                raise NotYet(f"{said}: the network is in evaluation mode, a part of it is not; network.eval() reaches every part")
            if not training:
                raise NotYet(f"{said}; the network came in evaluation mode, and needs to be in it afterwards too")
            raise NotYet(f"{said}: in training mode batch norm measures anew, whatever requires_grad says")
        if not all(near(values.double(), expected, 1e-4) for values in given):
            raise NotYet(
                "what comes out is not what it was: batch norm still divides by what it measures in the pictures at hand; "
                "in evaluation mode it takes its running means and variances"
            )
        if names:
            raise NotYet(f"{names[0]!r} moved when pictures went through: batch norm is still in training mode")


def scaled(table, source=None, deviation=None) -> torch.Tensor:
    """A table standardised by the mean of a source, which is itself unless given, and its deviation or another one."""
    source = table if source is None else source
    deviation = source.std(dim=0, correction=0) if deviation is None else deviation
    return (table - source.mean(dim=0)) / torch.where(deviation == 0, 1.0, deviation)


def standardise(answer) -> None:
    for constant in (None, None, 0.0, random.choice([-1, 1]) * random.randint(2, 20) / 4):  # exact, so the deviation is 0
        n, m, width = random.randint(20, 40), random.randint(8, 15), random.randint(4, 7)
        scale = 10 ** torch.empty(width).uniform_(-1, 2)
        centre = torch.empty(width).uniform_(1, 3) * scale
        train = torch.randn(n, width) * scale + centre
        other = torch.randn(m, width) * 2 * scale + 2 * centre
        column = random.randrange(width)
        if constant is not None:
            train[:, column] = constant
        a, b = train.double(), other.double()
        both, over = torch.cat([a, b]), a.std(dim=0, correction=0)

        given = train.clone(), other.clone()
        found = call(answer, *given)
        for name, mine, its in zip(("train_features", "other_features"), given, (train, other), strict=True):
            if not torch.equal(mine, its):
                raise NotYet(f"your function changed {name} itself, and whoever gave it needs it; make a new tensor")
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise NotYet(f"two tables are expected, train_features and other_features, not {type(found).__name__}")
        first, second = (values_of(table, "a table of features") for table in found)
        shapes, wanted = [tuple(first.shape), tuple(second.shape)], [(n, width), (m, width)]
        if shapes == wanted[::-1]:
            raise NotYet("train_features come first, then other_features; yours are swapped")
        if shapes != wanted:
            raise NotYet(f"tables of shape {wanted[0]} and {wanted[1]} are expected, and you gave {shapes[0]} and {shapes[1]}")
        right = scaled(a), scaled(b, a)
        if near(first, right[0], 1e-3) and near(second, right[1], 1e-3):
            continue

        if constant is not None:
            which = next((name for name, t in (("training", first), ("other", second)) if not t[:, column].isfinite().all()), "")
            said = f"column {column} is {constant} in every training row, so its deviation is 0"
            if which:
                raise NotYet(f"{said}; you gave nan or inf there in the {which} table: divide that column by 1")
            if not near(second[:, column], right[1][:, column], 1e-3):
                raise NotYet(
                    f"{said}; divide it by 1: {other[0, column]:.3f} in the other table becomes {right[1][0, column]:.3f}, "
                    f"and you gave {second[0, column]:.3f}"
                )
        mistakes = [
            ((right[0], scaled(b)), "you took the other table's own mean or deviation; both come from training, for both tables"),
            ((right[0], b), "the other table came back as it was; it goes through the same two steps"),
            ((scaled(a, both), scaled(b, both)), "you measured both tables together; measure the training features alone"),
            ((scaled(a, b), scaled(b, b)), "you measured the other table; measure the training features"),
            (
                (scaled(a, None, a.std(dim=0)), scaled(b, a, a.std(dim=0))),
                "that deviation is over n - 1; correction=0 makes it over n",
            ),
            ((a - a.mean(dim=0), b - a.mean(dim=0)), "the means are off, the deviations are not 1: divide by them too"),
            ((scaled(a, None, over**2), scaled(b, a, over**2)), "you divided by the variance; its square root is the deviation"),
            ((a / over, b / over), "you divided, and did not subtract the mean"),
            (
                (scaled(a.T).T, scaled(b.T).T),
                "you measured every row; a feature is a column, and dim=0 goes along the pictures",
            ),
            (
                ((a - a.mean()) / a.std(correction=0), (b - a.mean()) / a.std(correction=0)),
                "that is one mean and one deviation for the whole table; every feature has its own, with dim=0",
            ),
        ]
        for tables, reason in mistakes:
            if near(first, tables[0], 1e-3) and near(second, tables[1], 1e-3):
                raise NotYet(reason)
        for name, table, expected in (("training", first, right[0]), ("other", second, right[1])):
            if not near(table, expected, 1e-3):
                row, place = divmod(int(((table - expected).abs().nan_to_num(torch.inf)).argmax()), width)
                raise NotYet(
                    f"in the {name} table, row {row} and column {place}, you gave {table[row, place]:.3f} where "
                    f"{expected[row, place]:.3f} belongs"
                )


def drawn_features(labels, corners, centre, scale) -> torch.Tensor:
    """Features of classes that lie in balls around their corners, of radius 1, and of others that say nothing."""
    ball = normalize(torch.randn(len(labels), len(corners)), dim=1) * torch.rand(len(labels), 1)
    rest = torch.randn(len(labels), len(centre) - len(corners))
    return (torch.cat([corners[labels] + ball, rest], dim=1) + centre) * scale


def predictions(answer, features, labels, new) -> torch.Tensor:
    """The classes that an answer gives to new rows."""
    classes, old, m = int(labels.max()) + 1, len(labels), len(new)
    found = call(answer, features.clone(), labels.clone(), new.clone())
    shape = tuple(getattr(found, "shape", ()))
    if shape == (m, classes):
        raise NotYet(f"those are scores, one a class; the class itself is asked for, shape ({m},): argmax(dim=1)")
    if shape == (old,):
        raise NotYet(f"you gave {old} classes, as many as there are old rows; predict those of the {m} new ones")
    try:
        return torch.tensor(indices(found, classes, m, "classes"))
    except NotYet as reason:
        raise NotYet(str(reason).split("; you gave")[0]) from None  # a hundred numbers help nobody


def linear_probe(answer) -> None:
    classes = random.randint(3, 5)
    order = random.sample(range(classes), classes)
    for mixed in (True, False, False):
        width, m = classes + random.randint(3, 6), random.randint(97, 120)
        corners = 4 * torch.linalg.qr(torch.randn(classes, classes)).Q  # each two 5.6 apart: straight lines keep 1 from all balls
        centre = torch.empty(width).uniform_(3, 6)
        scale = 10 ** random.uniform(-2.5, -1.5) * torch.empty(width).uniform_(0.5, 2)
        scale[classes:] *= 1000  # the features that say nothing
        common = random.randrange(1, classes)
        labels = torch.cat([torch.arange(classes).repeat(15), torch.full((10,), common)])
        labels = labels[torch.randperm(len(labels))]
        wanted = torch.randint(classes, (m,)) if mixed else torch.full((m,), order.pop())
        columns = torch.randperm(width)
        features, new = (drawn_features(rows, corners, centre, scale)[:, columns] for rows in (labels, wanted))

        predicted = predictions(answer, features, labels, new)
        right = (predicted == wanted).double().mean().item()
        if right >= 0.9:
            continue
        said = f"{right:.0%} of the new rows are right, and 90 % is asked for"
        further = "fit longer, in larger steps, or with less of a penalty"
        if not mixed:
            said = f"where all {m} new rows are of one class, {said}"
            in_company = predictions(answer, features, labels, torch.cat([new[:10], features.repeat(5, 1)]))[:10]
            if (in_company == wanted[:10]).double().mean() < 0.9:
                raise NotYet(f"{said}; {further}")
            raise NotYet(f"{said}, in other company they are: standardise them by `features`, not by their own mean")
        means = torch.stack([features[labels == number].mean(dim=0) for number in range(classes)])
        if (torch.cdist(new, means).argmin(dim=1) == predicted).double().mean() > 0.98:
            raise NotYet(f"{said}: to the nearest class mean, the largest features alone decide; standardise first")
        eased = predictions(answer, scaled(features), labels, scaled(new, features))
        if (eased == wanted).double().mean() >= 0.9:
            raise NotYet(
                f"{said}: the largest features are a thousand times the smallest; standardise both tables by the mean and "
                "deviation of `features`"
            )
        if (predicted == common).all():
            raise NotYet(
                f"{said}: you say {common} for every row, the commonest class, so no feature has a say, "
                "or a penalty too much of it"
            )
        if (predicted == predicted[0]).all():
            raise NotYet(f"{said}: you say {predicted[0]} for every row, so no feature has a say")
        raise NotYet(f"{said}; had they come standardised, it would be {(eased == wanted).double().mean():.0%}: {further}")


def outputs_of(network: nn.Module, pictures: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What stands after every part of a network, and what goes into it, as they were at that moment."""
    network, after, into = copy.deepcopy(network), {}, {}

    def reader(name):
        def read(module, inputs, output):
            after[name], into[name] = output.clone(), inputs[0].clone()

        return read

    for name, module in network.named_modules():
        module.register_forward_pre_hook(lambda module, inputs: (inputs[0].clone(),))
        module.register_forward_hook(reader(name))
    with torch.no_grad():
        network(pictures)
    return after, into


def pooled(maps: torch.Tensor) -> torch.Tensor:
    return maps.flatten(2).mean(dim=2) if maps.dim() == 4 else maps


def after_layer(answer) -> None:
    network = drawn_network()
    before = state_of(network)
    overwritten = ["stem.1", "block.1", "top.0"]  # an in-place ReLU comes next
    for place in [*random.sample(overwritten, 3), "block"]:
        n = 1 if place == "block" else random.choice([2, 3, 11, 12])  # not a number of channels
        while True:  # until every mistake shows
            pictures = pictures_of(n)
            after, into = outputs_of(network, pictures)
            maps = after[place]
            expected, channels = pooled(maps), maps.shape[1]
            late = "the tensor that you kept was overwritten: an in-place ReLU comes next; average in the hook, or clone there"
            mistakes = [
                (pooled(maps.relu()), late if place in overwritten else "you put a ReLU on it"),
                (maps.amax(dim=(2, 3)), "that is the largest pixel of every map; take their mean"),
                (maps.sum(dim=(2, 3)), "that is the sum over a map's pixels; divide by their number"),
                (after[""], "that is what the whole network gives; stop at the layer"),
                (pooled(into[place]), "that is what goes into the layer; its output is asked for"),
                *((pooled(other), f"that stands after {name!r}; {place!r} was asked for") for name, other in after.items()),
            ]
            elsewhere = [pooled(other) for name, other in after.items() if not f"{name}.".startswith(f"{place}.")]
            others = [mistake for mistake, _ in mistakes[:5]] + elsewhere
            if not any(near(other.double(), expected, 1e-3) for other in others):
                break
        found = call_alone(answer, network, network.get_submodule(place), pictures.clone())
        if names := altered(network, before):
            raise NotYet(f"{names[0]!r} moved: the network came in evaluation mode; leave it there, or go back to it first")
        if any(module.training for module in network.modules()):
            raise NotYet("the network came in evaluation mode, and is in training mode now")

        values = values_of(found, f"shape ({n}, {channels})")
        shape = tuple(values.shape)
        if not near(values, expected, 1e-4):
            said = f"{n} picture{'s' * (n > 1)} and {channels} channels after {place!r} make shape ({n}, {channels})"
            if values.dim() == 4:
                raise NotYet(f"{said}, and you gave maps, {shape}: average each over its pixels, dim=(2, 3)")
            if values.numel() == 1 and n * channels > 1:
                raise NotYet(f"{said}, and you averaged everything: name the dimensions of the pixels, dim=(2, 3)")
            for mistake, reason in mistakes:
                if near(values, mistake, 1e-4):
                    raise NotYet(reason)
            if shape != (n, channels):
                raise NotYet(f"{said}, and you gave {shape}")
            picture, channel = divmod(int((values - expected).abs().nan_to_num(torch.inf).argmax()), channels)
            raise NotYet(
                f"after {place!r}, picture {picture}, channel {channel}, you gave {values[picture, channel]:.3f}; "
                f"the mean over the pixels is {expected[picture, channel]:.3f}"
            )
        for name, module in network.named_modules():
            if module._forward_hooks or module._forward_pre_hooks:
                raise NotYet(f"right, but a hook is still on {name!r}; register_forward_hook gives a handle: handle.remove()")
            if "forward" in vars(module):
                raise NotYet(f"right, but the forward of {name!r} is still yours; put the old one back")


def transform_by(centre: float, scale: float):
    """A transform of uint8 pictures, a new object at every call."""
    return lambda pictures: (pictures.float() / 255 - centre) / scale


def changed(values: torch.Tensor) -> torch.Tensor:
    """The same numbers but one, which is another in its fifth digit."""
    values = values.clone()
    values.view(-1)[random.randrange(values.numel())] *= 1 + 1e-5
    return values


def note(answer) -> None:
    network, n = drawn_network(), random.randint(11, 14)
    pictures = torch.randint(256, (n, 3, 9, 8)).to(torch.uint8)
    centre, scale = random.uniform(0.3, 0.6), random.uniform(0.2, 0.4)
    original, alive = hash, []  # an object that is gone may leave its address to the next

    def noted(state, pictures, centre=centre, scale=scale, session=0) -> str:
        mine = copy.deepcopy(network)
        mine.load_state_dict(state)
        transform, given = transform_by(centre, scale), pictures.clone()
        alive.append((mine, transform))
        runs: list[int] = []
        for module in mine.modules():
            module.register_forward_pre_hook(lambda module, inputs: runs.append(1))
        # As in another session, in which `hash` gives other numbers.
        with mock.patch("builtins.hash", lambda thing: original(thing) ^ session):
            found = call_alone(answer, mine, transform, given)
        if not isinstance(found, str):
            raise NotYet(f"a text is expected, a str, not {type(found).__name__}")
        if runs:
            raise NotYet("pictures went through the network: that is the cost which a cache saves")
        if names := altered(mine, state):
            raise NotYet(f"{names[0]!r} is not what it was; a note changes nothing")
        if not torch.equal(given, pictures):
            raise NotYet("your function changed the pictures themselves, and whoever gave them needs them")
        return found

    state = state_of(network)
    first = noted(state, pictures)
    if noted(state, pictures, session=random.getrandbits(30)) != first:
        raise NotYet(
            "the same weights, transform and pictures got another note, in other objects as after a restart: "
            "go by the numbers, not by id, hash or repr of an object"
        )
    other = pictures.clone()
    other[-1, random.randrange(3), -1, -1] ^= 1
    weights = [name for name, _ in network.named_parameters()]
    ones = [("block.1.running_mean", "a running mean of batch norm"), ("scale", "a parameter that belongs to no layer")]
    ones += [(name, "a weight") for name in (weights[0], "block.3.weight")]
    cases = [
        ({"pictures": pictures.flip(0)}, "the pictures came in another order"),
        ({"pictures": other}, "one pixel of the last picture was another"),
        ({"pictures": pictures[:-1]}, "the last picture was missing"),
        ({"centre": centre * 1.01}, "the transform subtracted another number"),
        ({"scale": scale * 1.01}, "the transform divided by another number"),
        ({"state": state | {"block.0.weight": state["block.0.weight"].flip(0)}}, "the filters of a layer had changed places"),
        *(
            ({"state": state | {name: changed(state[name])}}, f"{what}, in {name!r}, was another in its fifth digit")
            for name, what in ones
        ),
    ]
    for change, what in cases:
        if noted(**({"state": state, "pictures": pictures} | change)) == first:
            raise NotYet(f"{what}, and the note was the same: a stale cache would be used")


EXERCISES = {
    "03.1": Exercise(
        freeze,
        "There are two switches. requires_grad_(False), with an underscore at its end, ends gradients for every parameter. "
        "What batch norm does hangs on the other one, the mode.",
    ),
    "03.2": Exercise(
        standardise,
        "mean(dim=0) and std(dim=0, correction=0) of train_features have one number a column. Put 1 where a deviation is 0, "
        "then use these two rows of numbers for both tables.",
    ),
    "03.3": Exercise(
        linear_probe,
        "Standardise both tables by the training features, as in 03.2. Then LogisticRegression fits and predicts; or train "
        "torch.nn.Linear for a few hundred steps of AdamW at lr=0.01, and take the class of the largest logit.",
    ),
    "03.4": Exercise(
        after_layer,
        "layer.register_forward_hook(f) has f(module, inputs, output) called, and gives a handle, whose remove() takes it off. "
        "Average inside f: the layer after may write into the same memory. What f keeps in a list outlives it.",
    ),
    "03.5": Exercise(
        note,
        "network.state_dict() has every number, running means too. value.numpy().tobytes() makes bytes of a tensor, and "
        "digest.update(bytes) takes them in. transform(pictures) follows from transform and pictures: one more tensor.",
    ),
}
