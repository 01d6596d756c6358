"""Checks of lesson 02."""

import copy
import io
import math
import os
import pickle
import random
import tempfile
import traceback
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import nn
from torch.nn.functional import cross_entropy, one_hot

from course_utils.exercises import Exercise, NotYet, apart, call, indices, number


def pair(found, what: str) -> tuple:
    """An answer as two things."""
    if isinstance(found, torch.Tensor | np.ndarray) and len(found.shape) and len(found) == 2:
        found = tuple(found)
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise NotYet(f"two things are expected, {what}, not {type(found).__name__}")
    return tuple(found)


def most_suspicious(answer) -> None:
    for few_wrong in (False, False, True, False):
        while True:  # until no two pictures tie, and no mistake gives the right answer by chance
            count, size, classes = random.randint(4, 7), random.randint(25, 45), random.randint(3, 6)
            probabilities = (1.5 * torch.randn(size, classes)).softmax(dim=1)
            confidence, predicted = probabilities.max(dim=1)
            labels = predicted.clone()
            wrong = random.sample(range(size), random.randint(1, 2) if few_wrong else size // 2)
            labels[wrong] = (labels[wrong] + torch.randint(1, classes, (len(wrong),))) % classes
            own = probabilities[torch.arange(size), labels]
            ranked = own.argsort().tolist()
            wrong_ones = [picture for picture in confidence.argsort(descending=True).tolist() if picture in wrong]
            expected = ranked[:count]
            mistakes = [
                (
                    confidence.argsort().tolist()[:count],
                    "there the network is unsure of every class; ask about the picture's own label",
                ),
                (ranked[::-1][:count], "those are the pictures whose own label is most probable; the lowest must come first"),
                (ranked[:count][::-1], "those are the right pictures; the lowest must come first"),
                (wrong_ones[:count], "those are confident and wrong; rank by the probability of the picture's own label"),
            ]
            distinct = own.sort().values.diff().min() > 1e-6 and confidence.sort().values.diff().min() > 1e-6
            if distinct and len({tuple(p) for p in [expected, *(p for p, _ in mistakes)]}) == 1 + len(mistakes):
                break
        found = indices(call(answer, probabilities.clone(), labels.clone(), count), size)
        if found == expected:
            continue
        if len(found) != count:
            also = "; rank all pictures, those that are predicted right too" if set(found) <= set(wrong) else ""
            raise NotYet(f"{count} indices are expected, shape ({count},), and you gave {len(found)}{also}")
        for pictures, reason in mistakes:
            if found == pictures:
                raise NotYet(reason)
        place = next(i for i in range(count) if found[i] != expected[i])
        a, b = found[place], expected[place]
        raise NotYet(
            f"you gave {found}; in place {place} stands picture {a}, whose own label has a probability of {own[a]:.3f}, "
            f"where picture {b} with {own[b]:.3f} belongs"
        )


def split_by_group(answer) -> None:
    # the last two: so few groups that rounding leaves a side empty
    for many, share in [(True, random.uniform(0.15, 0.35)) for _ in range(3)] + [(False, 0.05), (False, 0.95)]:
        count = random.randint(20, 40) if many else random.randint(4, 6)
        names = random.sample(range(1000), count)
        members = [name for name in names for _ in range(random.randint(2, 6))]
        random.shuffle(members)
        seeds = random.sample(range(10_000), 4)
        splits = []
        for seed in [*seeds, seeds[0]]:
            held_out = held_out_of(call(answer, torch.tensor(members), share, seed), members)
            groups = len({members[picture] for picture in held_out})
            said = f"of {count} groups and with share = {share:.2f}, {groups} are held out"
            if groups in (0, count):
                raise NotYet(f"{said}; leave at least one on each side")
            if abs(groups - share * count) > 1 + 1e-6:
                turned = abs(count - groups - share * count) <= 1 + 1e-6
                raise NotYet(said + ("; rest comes first, then held_out" if turned else "; a share of the groups is asked for"))
            splits.append(held_out)
        if splits[-1] != splits[0]:
            raise NotYet("two calls with the same seed gave two splits; draw with a generator of that seed")
        if many and all(held_out == splits[0] for held_out in splits):
            raise NotYet("another seed gave the same split; let the seed decide which groups are held out")


def held_out_of(found, members: list[int]) -> set[int]:
    """The pictures that an answer holds out; `NotYet` where its two sides are no partition, or cut a group."""
    rest, held_out = (indices(part, len(members)) for part in pair(found, "rest and held_out"))
    twice = [picture for picture in set(rest + held_out) if (rest + held_out).count(picture) > 1]
    if set(rest) & set(held_out):
        raise NotYet(f"picture {min(set(rest) & set(held_out))} is in both; every picture goes to one side")
    if twice:
        raise NotYet(f"picture {twice[0]} is there twice; every index goes to one side, once")
    lost = set(range(len(members))) - set(rest) - set(held_out)
    if lost:
        raise NotYet(
            f"{len(lost)} of {len(members)} pictures are on neither side, such as {min(lost)}; return indices of them all"
        )
    cut = {members[picture] for picture in rest} & {members[picture] for picture in held_out}
    if cut:
        raise NotYet(f"group {min(cut)} has pictures on both sides, as {len(cut) - 1} other groups do; draw groups, not pictures")
    return set(held_out)


def right_step(model, pictures, labels, optimizer, train=True, zero=True, loss_of=cross_entropy) -> float:
    """A step of training, or one with a mistake."""
    model.train(train)
    loss = loss_of(model(pictures), labels)
    if zero:
        optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def on_probabilities(logits, labels):
    return cross_entropy(logits.softmax(dim=1), labels)


def summed(logits, labels):
    return cross_entropy(logits, labels, reduction="sum")


# what is wrong: the arguments of right_step that do it
WRONG_STEPS = {
    "BatchNorm's running means did not move: call model.train() first": {"train": False},
    "the gradients of earlier steps are still in it: optimizer.zero_grad() must come before loss.backward()": {"zero": False},
    "cross_entropy takes logits and does the softmax itself; give it what the model returns": {"loss_of": on_probabilities},
    "that is the sum over the pictures; cross_entropy averages unless told otherwise": {"loss_of": summed},
}


def training_step(answer) -> None:
    channels, side, classes, size = 3, random.randint(6, 9), random.randint(3, 5), random.randint(8, 16)
    first = nn.Sequential(
        nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, classes)
    ).eval()
    # pictures away from BatchNorm's first means, so that train and evaluation mode differ
    data = [(2 * torch.randn(size, channels, side, side) + 1, torch.randint(classes, (size,))) for _ in range(4)]
    rate = random.uniform(0.05, 0.2)

    def run(step):
        model = copy.deepcopy(first)
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
        losses = [step(model, pictures.clone(), labels.clone(), optimizer) for pictures, labels in data]
        return losses, dict(model.named_parameters()), dict(model.named_buffers())

    def loss_of_answer(*arguments) -> float:
        try:
            found = call(answer, *arguments)
        except NotYet as reason:
            if "inplace" not in str(reason):
                raise
            raise NotYet(
                "optimizer.step() changed the weights before loss.backward() had used them: backward, then step"
            ) from reason
        if isinstance(found, torch.Tensor) and found.requires_grad:
            raise NotYet("that loss still holds its graph, and memory with it; loss.item() is the number alone")
        return number(found)

    def alike(ours, theirs) -> bool:
        return all(torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6) for name in ours)

    def same(ours, theirs) -> bool:
        return np.allclose(ours, theirs, rtol=1e-4, atol=1e-6)

    losses, weights, buffers = run(loss_of_answer)
    expected, right, means = run(right_step)
    if same(losses, expected) and alike(weights, right) and alike(buffers, means):
        return
    if alike(weights, dict(first.named_parameters())):
        raise NotYet("after four steps no weight has moved: zero_grad(), backward() and step(), in this order, make one step")
    for reason, arguments in WRONG_STEPS.items():
        wrong, moved, _ = run(lambda *a, arguments=arguments: right_step(*a, **arguments))
        if alike(weights, moved) and same(losses, wrong):
            raise NotYet(reason)
    if not alike(weights, right):
        raise NotYet(
            "after four steps the weights are not those of supervised training with cross_entropy; "
            f"your losses were {', '.join(f'{loss:.3f}' for loss in losses)}, expected were "
            f"{', '.join(f'{loss:.3f}' for loss in expected)}"
        )
    if not alike(buffers, means):
        raise NotYet("the weights are right, BatchNorm's running means are not: let the pictures through once, in train mode")
    raise NotYet(f"the weights are right, the loss is not: you gave {losses[0]:.3f}, the first step's loss was {expected[0]:.3f}")


def precision_recall(answer) -> None:
    for case in ("drawn", "drawn", "drawn", "never predicted", "no such picture"):
        while True:  # until every mistake shows
            size, classes = random.randint(30, 60), random.randint(4, 6)
            positive = random.choice([c for c in range(classes) if c != 1])
            labels = torch.randint(classes, (size,))
            labels[torch.rand(size) < 0.3] = positive
            predicted = torch.where(torch.rand(size) < 0.6, labels, torch.randint(classes, (size,)))
            if case == "never predicted":
                predicted[predicted == positive] = (positive + 1) % classes
            if case == "no such picture":
                labels[labels == positive] = (positive + 1) % classes
            precision, recall = shares(predicted, labels, positive)
            agree = (predicted == labels).double().mean().item()
            hits = ((predicted == positive) & (labels == positive)).sum().item()
            mistakes = [
                ((recall, precision), "precision comes first, then recall; yours are swapped"),
                ((agree, agree), "that is accuracy, over all classes; only the positive class counts here"),
                (shares(predicted, labels, 1), "you counted class 1; count class `positive`"),
                (
                    (hits / size, hits / size),
                    "you divided by all pictures; divide by those predicted positive, and by those that are",
                ),
                ((1 - precision, 1 - recall), "those are the shares of errors; take the shares that are right"),
            ]
            if case != "drawn":
                if (predicted == positive).any() or (labels == positive).any():
                    break
            elif agree not in (precision, recall) and len({(precision, recall), *(values for values, _ in mistakes)}) == 1 + len(
                mistakes
            ):
                break
        try:
            found = call(answer, predicted.clone(), labels.clone(), positive)
        except NotYet as reason:
            if case == "drawn":
                raise
            raise NotYet(f"{reason}; {WHERE[case]}") from reason
        found = tuple(number(value) for value in pair(found, "precision and recall"))
        if all(math.isclose(a, b, abs_tol=1e-5) for a, b in zip(found, (precision, recall), strict=True)):
            continue
        if case != "drawn":
            raise NotYet(f"{WHERE[case]}; you gave {found[0]:.3f} and {found[1]:.3f}")
        for values, reason in mistakes:
            if all(math.isclose(a, b, abs_tol=1e-5) for a, b in zip(found, values, strict=True)):
                raise NotYet(reason)
        raise NotYet(
            f"{(predicted == positive).sum()} pictures were predicted positive, {(labels == positive).sum()} are positive, "
            f"{hits} are both; you gave {found[0]:.3f} and {found[1]:.3f}"
        )


WHERE = {
    "never predicted": "where no picture was predicted positive, precision is 0.0, and recall is too",
    "no such picture": "where there is no positive picture, recall is 0.0, and precision is too",
}


def shares(predicted, labels, positive) -> tuple[float, float]:
    """Precision and recall."""
    hits = ((predicted == positive) & (labels == positive)).sum().item()
    return tuple(hits / max(1, int((values == positive).sum())) for values in (predicted, labels))


def expected_calibration_error(answer) -> None:
    for _ in range(5):
        while True:  # until no confidence lies on an edge of a bin, and every mistake shows
            size, classes, bins = random.randint(60, 99), random.randint(3, 5), random.randint(6, 9)
            probabilities = (1.5 * torch.randn(size, classes)).softmax(dim=1)
            confidence, predicted = probabilities.double().max(dim=1)
            chance = random.uniform(0.4, 0.8)  # of being right, whatever the confidence: over- and underconfident at once
            labels = torch.where(torch.rand(size) < chance, predicted, torch.randint(classes, (size,)))
            right = (predicted == labels).double()
            weights, gaps = in_bins(confidence, right, bins)
            expected = (weights * gaps.abs()).sum().item()
            own = (probabilities.double() * one_hot(labels, classes)).sum(dim=1)
            own_weights, own_gaps = in_bins(own, right, bins)
            ten_weights, ten_gaps = in_bins(confidence, right, 10)
            signed, cancel = (
                (weights * gaps).sum().item(),
                "over- and underconfident bins cancel there; take |accuracy - confidence|",
            )
            mistakes = [
                (gaps.abs().mean().item(), "every bin counts alike there; weight it by its share of the pictures"),
                (gaps.abs().sum().item() / bins, "all bins count alike there; weight each by its share of the pictures"),
                (gaps.abs().max().item(), "that is the worst bin; take the mean over the pictures"),
                (signed, cancel),
                (-signed, cancel),
                ((own_weights * own_gaps.abs()).sum().item(), "that bins the label's probability; confidence is the largest one"),
                ((ten_weights * ten_gaps.abs()).sum().item(), "that is with 10 bins; use as many as `bins` says"),
                (expected * size, "that is a sum over pictures; divide by their number"),
                (expected * 100, "that is in per cent; a share lies between 0 and 1"),
            ]
            edges = [abs(confidence * parts - (confidence * parts).round()).min() > 1e-4 for parts in (bins, 10)]
            if all(edges) and apart([expected, *(mistake for mistake, _ in mistakes)]):
                break
        value = number(call(answer, probabilities.clone(), labels.clone(), bins))
        if math.isclose(value, expected, abs_tol=1e-5):
            continue
        if math.isnan(value):
            raise NotYet("you gave nan: an empty bin has no mean; leave it out")
        for mistake, reason in mistakes:
            if math.isclose(value, mistake, abs_tol=1e-5):
                raise NotYet(reason)
        raise NotYet(f"for {size} pictures and {bins} bins you gave {value:.4f}, and {expected:.4f} was expected")


def in_bins(confidence, right, bins: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the bins that are not empty: their shares of the pictures, and accuracy minus confidence."""
    members = [(confidence > b / bins) & (confidence <= (b + 1) / bins) for b in range(bins)]
    gaps = [(right[inside] - confidence[inside]).mean() for inside in members if inside.any()]
    return torch.stack([inside.double().mean() for inside in members if inside.any()]), torch.stack(gaps)


class Stranger:
    """Where it is unpickled, code runs: it makes the folder `mark`, and no more."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.makedirs, (str(self.mark), 0o777, True)


def saved(content) -> bytes:
    """What torch.save writes."""
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def opened(answer, path: Path) -> tuple:
    """What an answer returns for a file, and the exception that it raised."""
    try:
        return call(answer, str(path)), None
    except NotYet as reason:
        if reason.__cause__ is None:  # it is no function
            raise
        return None, reason.__cause__


def differs(found, tensors: dict[str, torch.Tensor]) -> str:
    """What is wrong with the tensors that were read; nothing where they are those of the file."""
    if not isinstance(found, dict):
        return f"you gave {type(found).__name__}; a dict is expected, name to tensor"
    if found.keys() != tensors.keys():
        names = ", ".join(map(repr, found)) if found else "an empty dict"
        return f"you gave {names}; the names in it are {', '.join(map(repr, tensors))}"
    for name, value in tensors.items():
        if not isinstance(found[name], torch.Tensor):
            return f"{name!r} came as {type(found[name]).__name__}; a tensor is expected"
        mine, its = ((t.dtype, tuple(t.shape)) for t in (found[name], value))
        if mine != its:
            return f"{name!r} came as {mine[0]} of shape {mine[1]}; in the file it is {its[0]} of shape {its[1]}"
        if not torch.equal(found[name].cpu(), value):
            return f"the numbers of {name!r} are not those in the file"
    return ""


def in_a_line(error: Exception) -> str:
    """An exception's kind and the beginning of what it says."""
    first = str(error).partition("\n")[0][:120]
    return type(error).__name__ + (f" ({first})" if first else "")


def by_torch(error: BaseException | None) -> bool:
    """Whether torch.load raised an exception, or the one in whose handling it was raised."""
    if error is None:
        return False
    names = [frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return "torch.serialization" in names or by_torch(error.__context__)


def load_safely(answer) -> None:
    layers = random.sample(range(100), random.randint(2, 4))
    tensors = {f"{n}.weight": torch.randn(random.randint(2, 5), random.randint(2, 5)) for n in layers}
    tensors |= {f"{layers[0]}.bias": torch.randn(3).half(), "steps": torch.tensor(random.randint(1, 999))}
    whole = save(tensors, metadata={"format": "pt"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        mark = Path(folder) / "ran"
        code = {"weight": Stranger(mark)}
        name = str(random.randrange(10**6))
        files = [  # name, content, and what it is if it is not good
            (f"{name}.safetensors", whole, ""),
            ("weights.pt", whole, ""),
            (name, whole, ""),
            ("weights.safetensors", pickle.dumps(code, protocol=2), "a pickle"),
            ("weights.pt", pickle.dumps(code, protocol=2), "a pickle"),
            ("model.pt", saved(code), "a file of torch.save, which holds a pickle"),
            ("tensors.pt", saved(tensors), "a file of torch.save, harmless this time, but not a safetensors file"),
            ("cut.safetensors", whole[: -random.randint(1, 8)], "a safetensors file cut short"),
        ]
        good, bad = {}, []
        for number, (name, content, what) in enumerate(files):
            path = Path(folder) / str(number) / name
            path.parent.mkdir()
            path.write_bytes(content)
            found, error = opened(answer, path)
            if mark.exists():
                raise NotYet(
                    f"opening {name} RAN the code in it. It was {what}; pickle.load and torch.load(weights_only=False) do what "
                    "such a file says, load from safetensors.torch reads numbers and nothing else"
                )
            if what:
                bad.append((name, what, found, error))
            else:
                good[name] = (f"your function stopped with {in_a_line(error)}" if error else differs(found, tensors)), error
    # only now, since code that ran is the worst of all
    for name, (problem, error) in good.items():
        if not problem:
            continue
        more = [f"; {other} has the same bytes, and you read it: a name says nothing" for other in good if not good[other][0]][:1]
        if by_torch(error):
            more.append("; torch.load reads such a file by its name, if at all, load from safetensors.torch by its bytes")
        raise NotYet(f"{name} is a good safetensors file, and {problem}{''.join(more)}")
    for name, what, found, error in bad:
        if isinstance(found, Exception):
            raise NotYet(f"{name} is {what}, and you returned a {type(found).__name__}: raise it")
        if error is None:
            empty = isinstance(found, dict) and not found
            gave = "None" if found is None else "an empty dict" if empty else f"a {type(found).__name__}"
            raise NotYet(f"{name} is {what}. You gave {gave}, and whoever called goes on with it; raise ValueError")
        if not isinstance(error, ValueError):
            more = "; a SafetensorError is none: catch it" if type(error).__name__ == "SafetensorError" else ""
            raise NotYet(f"{name} is {what}; a ValueError is asked for, and {in_a_line(error)} came{more}")


EXERCISES = {
    "02.1": Exercise(
        most_suspicious,
        "probabilities[torch.arange(len(labels)), labels] is, for each picture, the probability of its own label. "
        "argsort sorts from low to high.",
    ),
    "02.2": Exercise(
        split_by_group,
        "Draw among groups.unique(), with torch.Generator().manual_seed(seed); torch.isin then finds the pictures of the "
        "groups that were drawn. Mind the smallest case: each side needs a group.",
    ),
    "02.3": Exercise(
        training_step,
        "Five things in a row: train mode, the loss of the model's logits, old gradients away, new gradients, one step of "
        "the optimizer. Then loss.item().",
    ),
    "02.4": Exercise(
        precision_recall,
        "Count three things: pictures predicted positive, pictures that are positive, pictures that are both. Which two "
        "make precision, which two recall? And what if you would divide by 0?",
    ),
    "02.5": Exercise(
        expected_calibration_error,
        "probabilities.max(dim=1) gives confidence and prediction. For each bin, the pictures inside have a mean confidence "
        "and an accuracy; weight the distance of the two by the bin's share of all pictures. Skip empty bins.",
    ),
    "02.6": Exercise(
        load_safely,
        "load takes the bytes of a file, whatever its name, and runs nothing. What is no safetensors file it refuses with an "
        "exception of its own, SafetensorError. Is that a ValueError?",
    ),
}
