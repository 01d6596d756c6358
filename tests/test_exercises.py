"""The engine of the exercises, and every check against answers that are right, wrong and missing."""

import ast
import json
import math
import pickle
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, load_file
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

from course_utils.exercises import (
    CORRECT,
    NOT_ATTEMPTED,
    NotYet,
    apart,
    check,
    checks_of,
    grade,
    hint,
    near,
    solution,
    values_of,
)
from course_utils.paths import ROOT
from tests.exercise_tests import (  # noqa: F401
    each,
    pytest_generate_tests,
    test_a_right_answer_is_correct,
    test_a_wrong_answer_is_not_yet_correct_and_learns_why,
)

DIFFERS = {
    "plain digits -> digits on photographs": "domain",
    "cat or dog -> which breed, same photographs": "task",
    "letters on photographs -> digits on photographs": "both",
    "photographs by day -> photographs by night, same classes": "domain",
    "X-rays: which bone -> the same X-rays: broken or not": "task",
}
DIGITS, PETS, LETTERS, NIGHT, BONES = DIFFERS


def ranked(measure, mine=-math.inf, largest=True):
    """An answer to 01.2 with a measure of one's own, (n, channels) and (channels,) to (n,)."""

    def nearest(features, query, k):
        scores = measure(features, features[query])
        scores[query] = mine
        return scores.topk(k, largest=largest).indices

    return nearest


def nearest_in_numpy(features, query, k):
    rows = features.numpy() / np.linalg.norm(features.numpy(), axis=1, keepdims=True)
    return [row for row in np.argsort(-rows @ rows[query]) if row != query][:k]


def agreement(table, diagonal=-math.inf):
    """An answer to 01.3 with a table of similarities of one's own, (n, channels) to (n, n)."""

    def neighbour_accuracy(features, labels):
        scores = table(features)
        if diagonal is not None:
            scores = scores.fill_diagonal_(diagonal)
        return (labels[scores.argmax(dim=1)] == labels).float().mean().item()

    return neighbour_accuracy


def cosines(rows):
    return normalize(rows, dim=1) @ normalize(rows, dim=1).T


def agreement_in_loops(features, labels):
    agree, rows = 0, features.numpy() / np.linalg.norm(features.numpy(), axis=1)[:, None]
    for i in range(len(rows)):
        best = max((j for j in range(len(rows)) if j != i), key=lambda j: rows[i] @ rows[j])
        agree += int(labels[i] == labels[best])
    return torch.tensor(agree / len(features))


def verdict(low, high):
    return "helps" if low > 0 else "harms" if high < 0 else "cannot tell"


def weights_arrived(model, state):
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[name], state[name]) for name in own)


def weights_arrived_in_numpy(model, state):
    for name, value in model.state_dict().items():
        if name not in state or not np.array_equal(value.numpy(), state[name].numpy()):
            return np.False_
    return np.bool_(len(state) == len(model.state_dict()))


def loads_without_error(model, state):
    model.load_state_dict(state, strict=False)
    return True


def split_by_group(groups, share, seed):
    numbers = groups.unique()
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed))
    held_out = torch.isin(groups, numbers[order[: min(max(1, round(share * len(numbers))), len(numbers) - 1)]])
    return (~held_out).nonzero().flatten(), held_out.nonzero().flatten()


def split_in_loops(groups, share, seed):
    numbers = sorted(set(groups.tolist()))
    drawn = set(random.Random(seed).sample(numbers, max(1, int(share * len(numbers)))))
    rest = [i for i, group in enumerate(groups.tolist()) if group not in drawn]
    return rest, np.array([i for i, group in enumerate(groups.tolist()) if group in drawn])


def split_pictures(groups, share, seed):
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))
    return order[round(share * len(groups)) :], order[: round(share * len(groups))]


def split_first_groups(groups, share, seed):
    numbers = groups.unique()
    held_out = torch.isin(groups, numbers[: max(1, int(share * len(numbers)))])
    return (~held_out).nonzero().flatten(), held_out.nonzero().flatten()


def split_rounded(groups, share, seed):
    numbers = groups.unique()[torch.randperm(len(groups.unique()), generator=torch.Generator().manual_seed(seed))]
    held_out = torch.isin(groups, numbers[: round(share * len(numbers))])
    return (~held_out).nonzero().flatten(), held_out.nonzero().flatten()


def split_group_numbers(groups, share, seed):
    numbers = groups.unique()[torch.randperm(len(groups.unique()), generator=torch.Generator().manual_seed(seed))]
    count = max(1, int(share * len(numbers)))
    return numbers[count:], numbers[:count]


def split_one_of_each(groups, share, seed):
    rest, held_out = split_by_group(groups, share, seed)
    return [next(i for i in rest.tolist() if groups[i] == g) for g in groups[rest].unique()], held_out


def split_overlapping(groups, share, seed):
    return torch.arange(len(groups)), split_by_group(groups, share, seed)[1]


def step(mode=True, before=(), after=(), loss_of=cross_entropy, back=lambda loss: loss.item()):
    """An answer to 02.3: what is done before loss.backward(), and after it."""

    def training_step(model, pictures, labels, optimizer):
        if mode is not None:
            model.train(mode)
        loss = loss_of(model(pictures), labels)
        for name in before:
            getattr(optimizer, name)()
        loss.backward()
        for name in after:
            getattr(optimizer, name)()
        return back(loss)

    return training_step


def step_by_hand(model, pictures, labels, optimizer):
    for parameter in model.train().parameters():
        parameter.grad = None
    loss = -model(pictures).log_softmax(dim=1)[np.arange(len(labels)), labels].mean()
    loss.backward()
    optimizer.step()
    return loss.detach().numpy()


def step_and_look_again(model, pictures, labels, optimizer):
    loss = step(before=["zero_grad"], after=["step"])(model, pictures, labels, optimizer)
    model(pictures)
    return loss


def loss_afterwards(model, pictures, labels, optimizer):
    step(before=["zero_grad"], after=["step"])(model, pictures, labels, optimizer)
    return cross_entropy(model.eval()(pictures), labels).item()


def no_step(model, pictures, labels, optimizer):
    return cross_entropy(model.train()(pictures), labels).item()


def other_optimizer(model, pictures, labels, optimizer):
    return step(before=["zero_grad"], after=["step"])(model, pictures, labels, torch.optim.SGD(model.parameters(), lr=0.1))


def precision_recall(predicted, labels, positive):
    both = ((predicted == positive) & (labels == positive)).sum().item()
    return tuple(both / max(1, (values == positive).sum().item()) for values in (predicted, labels))


def precision_recall_in_loops(predicted, labels, positive):
    counts = {"both": 0, "found": 0, "wanted": 0}
    for p, y in zip(predicted.tolist(), labels.tolist(), strict=True):
        counts["both"] += p == y == positive
        counts["found"] += p == positive
        counts["wanted"] += y == positive
    return [counts["both"] / counts[part] if counts[part] else 0.0 for part in ("found", "wanted")]


def divided_by_what_there_is(predicted, labels, positive):
    both = ((predicted == positive) & (labels == positive)).sum()
    return both / (predicted == positive).sum(), both / (labels == positive).sum()


def one_at_nothing(predicted, labels, positive):
    found, wanted = predicted == positive, labels == positive
    both = (found & wanted).sum().item()
    return both / found.sum().item() if found.any() else 1.0, both / wanted.sum().item() if wanted.any() else 0.0


def calibration(parts=None, whole=lambda n, gaps: (n * abs(gaps)).sum(), confidence_of=None):
    """An answer to 02.5: `whole` gets the bins' shares of the pictures and their accuracy minus confidence, numpy both."""

    def expected_calibration_error(probabilities, labels, bins):
        confidence = probabilities.max(dim=1).values if confidence_of is None else confidence_of(probabilities, labels)
        right = (probabilities.argmax(dim=1) == labels).numpy().astype(float)
        number = np.ceil(confidence.numpy() * (parts or bins)).astype(int)
        n = np.array([np.mean(number == b) for b in np.unique(number)])
        gaps = np.array([(right - confidence.numpy())[number == b].mean() for b in np.unique(number)])
        return whole(n, gaps)

    return expected_calibration_error


def calibration_in_loops(probabilities, labels, bins):
    total = torch.zeros(())
    confidence, predicted = probabilities.max(dim=1)
    for b in range(bins):
        inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
        if inside.any():
            total += inside.sum() / len(labels) * ((predicted == labels)[inside].float().mean() - confidence[inside].mean()).abs()
    return total


def with_empty_bins(probabilities, labels, bins):
    confidence, predicted = probabilities.max(dim=1)
    inside = [(confidence > b / bins) & (confidence <= (b + 1) / bins) for b in range(bins)]
    return sum(i.float().mean() * abs((predicted == labels)[i].float().mean() - confidence[i].mean()) for i in inside)


def own_label(probabilities, labels):
    return probabilities[torch.arange(len(labels)), labels]


def wrong_and_confident(probabilities, labels, count):
    confidence, predicted = probabilities.max(dim=1)
    return torch.where(predicted != labels, confidence, -1).argsort(descending=True)[:count]


def wrong_only(probabilities, labels, count):
    wrong = (probabilities.argmax(dim=1) != labels).nonzero().flatten()
    return wrong[own_label(probabilities, labels)[wrong].argsort()][:count]


def load_safely(path):
    try:
        return load(Path(path).read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file") from error


def load_one_by_one(path):
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError:
        raise ValueError from None


def load_or(otherwise, read=load_file, refused=Exception):
    """An answer to 02.6: what it does with a path that cannot be read."""

    def load_safely(path):
        try:
            return read(path)
        except refused:
            return otherwise(path)

    return load_safely


def refuse(path, error=ValueError):
    raise error("not a safetensors file")


def load_by_ending(endings, otherwise, read=load_safely):
    """An answer to 02.6 that believes a file's name."""
    return lambda path: (read if Path(path).suffix in endings else otherwise)(path)


def load_by_first_bytes(pickles, otherwise):
    """An answer to 02.6 that refuses what begins as pickles do."""
    return lambda path: (refuse if Path(path).read_bytes().startswith(pickles) else otherwise)(path)


def unpickle(path):
    with open(path, "rb") as file:
        return pickle.load(file)


def run_torch(path):
    return torch.load(path, weights_only=False)


def load_by_hand(path, skip="__metadata__"):
    content, tensors = Path(path).read_bytes(), {}
    start = 8 + int.from_bytes(content[:8], "little")
    for name, entry in json.loads(content[8:start]).items():
        if name != skip:
            kind = {"F32": torch.float32, "F16": torch.float16, "I64": torch.int64}[entry["dtype"]]
            first, last = entry["data_offsets"]
            numbers = torch.frombuffer(bytearray(content[start + first : start + last]), dtype=kind)
            if numbers.numel() != math.prod(entry["shape"]):
                raise ValueError("cut short")
            tensors[name] = numbers.reshape(entry["shape"])
    return tensors


def load_in_part(path):
    """Reads on where the last bytes of a file are missing."""
    content = Path(path).read_bytes()
    for missing in range(9):
        try:
            return load(content + bytes(missing))
        except SafetensorError:
            continue
    raise ValueError("not a safetensors file")


def changed(change):
    """An answer to 02.6 whose tensors, name and value, are changed."""
    return lambda path: dict(change(name, value) for name, value in load_safely(path).items())


# exercise: answers that are right, in several styles
RIGHT = {
    "00.1": [
        lambda logits, labels: (logits.argmax(dim=1) == labels).float().mean().item(),
        lambda logits, labels: (logits.argmax(dim=1) == labels).float().mean(),
    ],
    "00.2": [lambda s, t: (t - s) / (1 - s) if s < 1 else float("nan")],
    "01.1": [DIFFERS],
    "01.2": [
        ranked(lambda rows, row: normalize(rows, dim=1) @ normalize(row, dim=0)),
        ranked(lambda rows, row: cosine_similarity(rows, row[None])),
        nearest_in_numpy,
    ],
    "01.3": [agreement(cosines), agreement(cosines, -2), agreement_in_loops],
    "01.4": [verdict, lambda low, high: "cannot tell" if low <= 0 <= high else ("harms", "helps")[low > 0]],
    "01.5": [weights_arrived, weights_arrived_in_numpy],
    "02.1": [
        lambda p, y, count: own_label(p, y).argsort()[:count],
        lambda p, y, count: cross_entropy(p.log(), y, reduction="none").numpy().argsort()[::-1][:count],
        lambda p, y, count: sorted(range(len(y)), key=lambda i: p[i, y[i]])[:count],
    ],
    "02.2": [split_by_group, split_in_loops, lambda *a: [part.numpy() for part in split_by_group(*a)]],
    "02.3": [
        step(before=["zero_grad"], after=["step"]),
        step(after=["step", "zero_grad"], back=lambda loss: loss.detach()),
        step_by_hand,
    ],
    "02.4": [
        precision_recall,
        precision_recall_in_loops,
        lambda *a: np.array(precision_recall(*a)),
        lambda *a: torch.tensor(precision_recall(*a)),
    ],
    "02.5": [calibration(), calibration_in_loops],
    "02.6": [load_safely, load_one_by_one, load_by_hand, load_or(refuse)],
}
# exercise: [(a plausible wrong answer, a word of the reason that must help)]
WRONG = {
    "00.1": [
        (lambda logits, labels: 0.9, "you gave 0.900"),
        (lambda logits, labels: (logits.argmax(dim=1) == labels).sum().item(), "divide by the number"),
        (lambda logits, labels: 100 * (logits.argmax(dim=1) == labels).float().mean().item(), "per cent"),
        (lambda logits, labels: (logits.argmax(dim=1) != labels).float().mean().item(), "share of errors"),
        (lambda logits, labels: (logits.argmin(dim=1) == labels).float().mean().item(), "you gave"),
        (lambda logits, labels: logits.argmax(dim=1) == labels, "one number is expected"),
        (lambda logits, labels: (logits.argmax(dim=0) == labels).float().mean().item(), "stopped with RuntimeError"),
        (lambda logits, labels: "0.9 or so", "a number is expected, not str"),
        (0.9, "a function is expected here, not float"),
    ],
    "00.2": [
        (lambda s, t: 0.2, "you gave 0.200"),
        (lambda s, t: t - s, "gain in accuracy"),
        (lambda s, t: (s - t) / (1 - s), "sign is turned round"),
        (lambda s, t: (t - s) / s, "divided by the accuracy"),
        (lambda s, t: (t - s) / (1 - s), "ZeroDivisionError"),
        (lambda s, t: max(0.0, (t - s) / (1 - s)), "harm"),
        (lambda s, t: (t - s) / (1 - s) if s < 1 else 0.0, "no errors to remove"),
        (lambda s, t: None, "a number is expected, not NoneType"),
    ],
    "01.1": [
        (dict.fromkeys(DIFFERS, "both"), "plain digits -> digits on photographs': you say both; would a picture"),
        (DIFFERS | {PETS: "domain"}, "you say domain; take one photograph"),
        (DIFFERS | {LETTERS: "domain"}, "is a picture of a 7"),
        (DIFFERS | {NIGHT: "both"}, "anything else asked"),
        (DIFFERS | {BONES: "both"}, "two piles of pictures"),
        (DIFFERS | {DIGITS: ..., BONES: ...}, "2 of the 5 situations still have dots"),
        (DIFFERS | {DIGITS: ...}, "1 of the 5 situations still has dots"),
        (DIFFERS | {DIGITS: "domains"}, "not 'domains'"),
        (DIFFERS | {DIGITS: torch.ones(3)}, 'write "domain", "task" or "both"'),
        ({DIGITS: "domain"}, "same photographs' is missing"),
        (["domain", "task", "both", "domain", "task"], "a dict is expected"),
        (lambda: DIFFERS, "not function"),
    ],
    "01.2": [
        (lambda features, query, k: torch.arange(k), "row "),
        (ranked(cosine_similarity, mine=1), "is the query itself"),
        (ranked(cosine_similarity, mine=0), "also where the other similarities are negative"),
        (ranked(lambda rows, row: rows @ row), "the dot product"),
        (ranked(lambda rows, row: -(rows - row).norm(dim=1)), "the distance"),
        (lambda f, query, k: ranked(cosine_similarity)(f - f.mean(dim=0), query, k), "took the mean off"),
        (ranked(cosine_similarity, mine=math.inf, largest=False), "least similar rows"),
        (lambda *a: ranked(cosine_similarity)(*a).flip(0), "most similar one must come first"),
        (lambda *a: ranked(cosine_similarity)(*a)[None], "one row of indices"),
        (lambda f, query, k: ranked(cosine_similarity)(f, query, k - 1), "you gave shape"),
        (lambda f, query, k: ranked(cosine_similarity)(f, query, k) + len(f), "indices lie between 0 and"),
        (lambda f, query, k: cosine_similarity(f, f[query]).topk(k), "indices are expected, whole numbers"),
        (lambda f, query, k: cosine_similarity(f, f[query]) > 0.5, "not a mask"),
        (lambda f, query, k: [[0], [1, 2]], "this list is none"),
        (lambda f, query, k: None, "not NoneType"),
        (lambda f, query, k: f.topk(k, dim=2), "stopped with IndexError"),
        (torch.arange(3), "a function is expected here, not Tensor"),
    ],
    "01.3": [
        (lambda features, labels: 0.77, "you gave 0.770"),
        (agreement(cosines, None), "every row found itself"),
        (agreement(lambda rows: rows @ rows.T), "the dot product"),
        (agreement(lambda rows: -torch.cdist(rows, rows)), "the distance"),
        (agreement(lambda rows: cosines(rows - rows.mean(dim=0))), "took the mean off"),
        (lambda *a: 100 * agreement(cosines)(*a), "per cent"),
        (lambda features, labels: len(labels) * agreement(cosines)(features, labels), "divide by the number of rows"),
        (lambda *a: 1 - agreement(cosines)(*a), "disagree"),
        (lambda features, labels: labels == labels, "average over the pictures"),
        (lambda features, labels: "0.8", "a number is expected, not str"),
        (lambda features, labels: None, "a number is expected, not NoneType"),
    ],
    "01.4": [
        (lambda low, high: "helps", "turned round"),
        (lambda low, high: "cannot tell", "one side of 0"),
        (lambda low, high: "helps" if low + high > 0 else "harms", "0 lies inside"),
        (lambda low, high: "helps" if abs(low) < abs(high) else "harms", "0 lies inside"),
        (lambda low, high: "harms" if low > 0 else "helps" if high < 0 else "cannot tell", "turned round"),
        (lambda low, high: "helps" if low >= 0 else "harms" if high <= 0 else "cannot tell", "touches 0"),
        (lambda low, high: "helps" if low > 0 else "harms", "0 lies inside"),
        (lambda low, high: "helps" if low > 0 else "harms" if high <= 0 else "cannot tell", "touches 0"),
        (lambda low, high: low > 0, 'return "helps"'),
        (lambda low, high: "it helps", "not 'it helps'"),
    ],
    "01.5": [
        (lambda model, state: True, "begins with 'module.'"),
        (lambda model, state: False, "you say False, but every tensor"),
        (loads_without_error, "begins with 'module.'"),
        (lambda model, state: model.state_dict().keys() == state.keys(), "compare the values"),
        (
            lambda model, state: {n: v.shape for n, v in model.state_dict().items()} == {n: v.shape for n, v in state.items()},
            "compare the values",
        ),
        (
            lambda model, state: (
                all(n in state and torch.equal(p, state[n]) for n, p in model.named_parameters())
                and model.state_dict().keys() == state.keys()
            ),
            "it is a buffer",
        ),
        (
            lambda model, state: all(torch.equal(v, state[n]) for n, v in model.state_dict().items() if n in state),
            "begins with 'module.'",
        ),
        (
            lambda model, state: all(n in model.state_dict() and torch.equal(model.state_dict()[n], v) for n, v in state.items()),
            "nothing for layer 3",
        ),
        (
            lambda model, state: all(n in state and torch.equal(v, state[n]) for n, v in model.state_dict().items()),
            "no place",
        ),
        (
            lambda model, state: (
                len(state) == len(model.state_dict())
                and all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))
            ),
            "compare by name",
        ),
        (lambda model, state: all((v == state[n]).all() for n, v in model.state_dict().items()), "stopped with KeyError"),
        (
            lambda model, state: (
                model.state_dict().keys() == state.keys()
                and all(
                    a == b for n, v in model.state_dict().items() for a, b in zip(v.flatten(), state[n].flatten(), strict=False)
                )
            ),
            "compare the shapes too",
        ),
        (lambda model, state: "yes", "True or False is expected, not str"),
        (lambda model, state: {n: True for n in state}, "True or False is expected, not dict"),
    ],
    "02.1": [
        (lambda p, y, count: list(range(count)), "belongs"),
        (lambda p, y, count: p.max(dim=1).values.argsort()[:count], "unsure of every class"),
        (lambda p, y, count: own_label(p, y).argsort(descending=True)[:count], "most probable"),
        (lambda p, y, count: own_label(p, y).argsort()[:count].flip(0), "right pictures; the lowest must come first"),
        (wrong_only, "those that are predicted right too"),
        (wrong_and_confident, "confident and wrong"),
        (lambda p, y, count: own_label(p, y).sort().values[:count], "whole numbers"),
        (lambda p, y, count: own_label(p, y) < 0.1, "not a mask"),
        (lambda p, y, count: own_label(p, y).argsort(), "indices are expected, shape ("),
        (lambda p, y, count: own_label(p, y).argsort()[None, :count], "one row of indices"),
        (lambda p, y, count: [len(y)] * count, "indices lie between"),
        (lambda p, y, count: [[0], [1, 2]], "this list is none"),
        (lambda p, y, count: None, "not NoneType"),
    ],
    "02.2": [
        (lambda groups, share, seed: ([0, 1, 2], [3, 4]), "on neither side"),
        (split_pictures, "draw groups, not pictures"),
        (split_first_groups, "another seed gave the same split"),
        (lambda groups, share, seed: split_by_group(groups, 0.5, seed), "a share of the groups is asked for"),
        (lambda groups, share, seed: split_by_group(groups, share, 0), "another seed gave the same split"),
        (lambda groups, share, seed: split_by_group(groups, share, random.randrange(10**6)), "gave two splits"),
        (lambda *a: split_by_group(*a)[::-1], "rest comes first"),
        (split_rounded, "at least one on each side"),
        (split_group_numbers, "pictures"),
        (split_one_of_each, "on neither side"),
        (split_overlapping, "is in both"),
        (lambda *a: [torch.cat([part, part]) for part in split_by_group(*a)], "is there twice"),
        (lambda *a: split_by_group(*a)[1], "two things are expected, rest and held_out"),
        (lambda groups, share, seed: (groups >= 500, groups < 500), "not a mask"),
        (lambda groups, share, seed: (torch.arange(len(groups)), []), "at least one on each side"),
        (lambda groups, share, seed: None, "not NoneType"),
    ],
    "02.3": [
        (lambda model, pictures, labels, optimizer: 0.5, "no weight has moved"),
        (no_step, "no weight has moved"),
        (step(after=["step"]), "optimizer.zero_grad() must come before"),
        (step(mode=None, before=["zero_grad"], after=["step"]), "call model.train()"),
        (step(mode=False, before=["zero_grad"], after=["step"]), "call model.train()"),
        (step(before=["step", "zero_grad"]), "backward, then step"),
        (step(before=["zero_grad", "step"]), "no weight has moved"),
        (step(after=["zero_grad", "step"]), "no weight has moved"),
        (step(before=["zero_grad"]), "no weight has moved"),
        (
            step(before=["zero_grad"], after=["step"], loss_of=lambda z, y: cross_entropy(z.softmax(dim=1), y)),
            "give it what the model returns",
        ),
        (
            step(before=["zero_grad"], after=["step"], loss_of=lambda z, y: cross_entropy(z, y, reduction="sum")),
            "averages unless told otherwise",
        ),
        (step(before=["zero_grad"], after=["step"], loss_of=lambda z, y: cross_entropy(-z, y)), "your losses were"),
        (step(before=["zero_grad"], after=["step"], back=lambda loss: loss), "still holds its graph"),
        (step(before=["zero_grad"], after=["step"], back=lambda loss: None), "a number is expected, not NoneType"),
        (step(before=["zero_grad"], after=["step"], back=lambda loss: loss.detach().expand(3)), "one number is expected"),
        (step(before=["zero_grad"], after=["step"], back=lambda loss: 0.5), "the loss is not: you gave 0.500"),
        (loss_afterwards, "the weights are right, the loss is not"),
        (step_and_look_again, "through once"),
        (other_optimizer, "not those of supervised training"),
        (torch.inference_mode()(step(before=["zero_grad"], after=["step"])), "stopped with RuntimeError"),
    ],
    "02.4": [
        (lambda predicted, labels, positive: (0.8, 0.7), "you gave 0.800 and 0.700"),
        (lambda *a: precision_recall(*a)[::-1], "swapped"),
        (lambda predicted, labels, positive: ((predicted == labels).float().mean(),) * 2, "that is accuracy"),
        (
            lambda predicted, labels, positive: (((predicted == positive) & (labels == positive)).float().mean().item(),) * 2,
            "divided by all pictures",
        ),
        (lambda predicted, labels, positive: precision_recall(predicted, labels, 1), "count class `positive`"),
        (lambda *a: [1 - value for value in precision_recall(*a)], "shares of errors"),
        (lambda *a: [100 * value for value in precision_recall(*a)], "are both; you gave"),
        (lambda *a: (precision_recall(*a)[0],) * 2, "are both; you gave"),
        (
            lambda p, y, positive: [
                v / (v2 == positive).sum().item()
                for v, v2 in zip([((p == positive) & (y == positive)).sum().item()] * 2, (p, y), strict=True)
            ],
            "ZeroDivisionError: division by zero; where no picture was predicted positive, precision is 0.0",
        ),
        (divided_by_what_there_is, "where no picture was predicted positive, precision is 0.0, and recall is too; you gave nan"),
        (one_at_nothing, "precision is 0.0"),
        (
            lambda p, y, c: (precision_recall(p, y, c)[0], precision_recall(p, y, c)[1] if (y == c).any() else 1.0),
            "recall is 0.0",
        ),
        (lambda *a: precision_recall(*a)[0], "two things are expected, precision and recall, not float"),
        (lambda predicted, labels, positive: (predicted == positive, labels == positive), "one number is expected"),
        (lambda predicted, labels, positive: None, "not NoneType"),
    ],
    "02.5": [
        (lambda probabilities, labels, bins: 0.05, "you gave 0.0500"),
        (calibration(whole=lambda n, gaps: abs(gaps).mean()), "every bin counts alike"),
        (calibration(whole=lambda n, gaps: (n * gaps).sum()), "cancel"),
        (calibration(whole=lambda n, gaps: abs((n * gaps).sum())), "cancel"),
        (calibration(whole=lambda n, gaps: abs(gaps).max()), "the worst bin"),
        (calibration(confidence_of=own_label), "confidence is the largest one"),
        (calibration(parts=10), "with 10 bins"),
        (calibration(parts=1), "cancel"),
        (lambda p, y, bins: len(y) * calibration()(p, y, bins), "divide by their number"),
        (lambda *a: 100 * calibration()(*a), "per cent"),
        (calibration(whole=lambda n, gaps: (n * gaps**2).sum()), "was expected"),
        (with_empty_bins, "an empty bin"),
        (calibration(whole=lambda n, gaps: abs(gaps)), "one number is expected"),
        (lambda probabilities, labels, bins: "5 %", "a number is expected, not str"),
        (lambda probabilities, labels, bins: None, "a number is expected, not NoneType"),
    ],
    "02.6": [
        (lambda path: {}, "you gave an empty dict; the names in it are"),
        (lambda path: {"weight": torch.ones(3)}, "you gave 'weight'; the names in it are"),
        (lambda path: None, "you gave NoneType; a dict is expected"),
        (run_torch, "RAN the code in it. It was a pickle"),
        (unpickle, "opening weights.safetensors RAN the code in it. It was a pickle"),
        (load_or(refuse, run_torch), "RAN the code"),
        (load_or(run_torch), "RAN the code"),
        (load_by_ending([".safetensors"], run_torch), "opening weights.pt RAN the code"),
        (load_by_ending([".pt"], load_safely, run_torch), "opening weights.pt RAN the code"),
        (load_by_first_bytes(b"\x80", load_or(run_torch)), "opening model.pt RAN the code"),
        (lambda path: torch.load(path, weights_only=True), "torch.load reads such a file by its name, if at all"),
        (load_or(refuse, torch.load), "torch.load reads such a file by its name, if at all"),
        (load_or(lambda path: {}, torch.load), "you gave an empty dict; the names in it are"),
        (load_by_ending([".safetensors"], refuse), "weights.pt is a good safetensors file"),
        (load_by_ending([".safetensors"], refuse), "has the same bytes, and you read it: a name says nothing"),
        (load_by_ending([".safetensors"], torch.load), "has the same bytes, and you read it: a name says nothing"),
        (load_by_ending([".safetensors", ".pt", ".bin"], refuse), "a name says nothing"),
        (load_by_ending([".pt"], load_safely, lambda path: {}), "a name says nothing"),
        (load_file, "came; a SafetensorError is none: catch it"),
        (
            load_or(lambda path: refuse(path, RuntimeError)),
            "a ValueError is asked for, and RuntimeError (not a safetensors file)",
        ),
        (load_or(torch.load), "a ValueError is asked for, and "),
        (load_or(lambda path: {}), "weights.safetensors is a pickle. You gave an empty dict"),
        (load_or(lambda path: None), "You gave None"),
        (load_or(lambda path: ValueError("no")), "you returned a ValueError: raise it"),
        (load_or(load_or(refuse, torch.load)), "tensors.pt is a file of torch.save, harmless this time, but not"),
        (load_by_first_bytes((b"\x80", b"PK"), load_file), "cut.safetensors is a safetensors file cut short; a ValueError"),
        (load_in_part, "a safetensors file cut short. You gave a dict"),
        (
            changed(lambda name, value: (name, value.float())),
            "came as torch.float32 of shape (3,); in the file it is torch.float16",
        ),
        (changed(lambda name, value: (name, value.flatten())), "of shape"),
        (changed(lambda name, value: (name, torch.zeros_like(value))), "are not those in the file"),
        (changed(lambda name, value: (name, value.numpy())), "came as ndarray; a tensor is expected"),
        (changed(lambda name, value: (f"model.{name}", value)), "the names in it are"),
        (lambda path: list(load_safely(path)), "you gave list; a dict is expected"),
        (load_or(refuse, lambda path: load(path), SafetensorError), "stopped with"),
        (lambda path: load_by_hand(path, skip=None), "stopped with KeyError ('dtype')"),
        (lambda path: load(path.read_bytes()), "stopped with AttributeError ('str' object has no attribute 'read_bytes')"),
        ({}, "a function is expected here, not dict"),
    ],
}
STUBS = {exercise: [..., lambda *arguments: ...] for exercise in RIGHT} | {"01.1": [..., dict.fromkeys(DIFFERS, ...)]}


def test_every_exercise_has_its_answers_here():
    lessons = [path.stem for path in sorted((ROOT / "notebooks/checks").glob("*.py"))]
    lessons = [lesson for lesson in lessons if not (ROOT / f"tests/test_exercises_{lesson}.py").exists()]  # have their own
    assert {id for lesson in lessons for id in checks_of(lesson)} == set(RIGHT) == set(WRONG)
    assert min(len(cases) for cases in WRONG.values()) >= 3


@pytest.mark.parametrize(("exercise", "stub"), each(STUBS))
def test_a_stub_is_not_attempted(exercise, stub):
    outcome = grade(exercise, stub)
    assert outcome.status == NOT_ATTEMPTED and f'hint("{exercise}")' in outcome.message


def test_what_runs_in_02_6_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert "RAN the code" in grade("02.6", unpickle).message
    assert grade("02.6", load_safely).status == CORRECT
    assert list(tmp_path.iterdir()) == []


def test_check_prints_one_line(capsys):
    check("00.2", RIGHT["00.2"][0])
    check("00.2", lambda s, t: 0.2)
    check("00.2", ...)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["✓ 00.2", "✗ 00.2", "… 00.2"]


@pytest.mark.parametrize("exercise", RIGHT)
def test_a_hint_is_not_the_solution_and_the_solution_is_right(exercise, capsys):
    hint(exercise)
    nudge = capsys.readouterr().out
    solution(exercise)
    code = capsys.readouterr().out
    assert len(nudge) > 20 and "return" not in nudge and "<stub>" not in code
    names: dict = {"torch": torch, "np": np, "Path": Path, "load": load, "SafetensorError": SafetensorError}
    exec(code, names)
    last = ast.parse(code).body[-1]  # the function, or the assignment, that the cell is about
    name = last.name if isinstance(last, ast.FunctionDef) else last.targets[0].id
    assert grade(exercise, names[name]).status == CORRECT


def test_an_exercise_that_does_not_exist_is_named():
    with pytest.raises(KeyError, match=r"no exercise '00\.9'; lesson 00 has 00\.1, 00\.2"):
        check("00.9", 1)
    with pytest.raises(KeyError, match="no exercises for lesson '77'"):
        check("77.1", 1)


@pytest.mark.parametrize(
    "answer",
    [[[1.0, 2.0]], np.array([[1, 2]]), torch.tensor([[1.0, 2.0]], dtype=torch.float16), torch.ones(1, 2, requires_grad=True)],
    ids=["list", "array", "half", "with a gradient"],
)
def test_an_answer_comes_as_float64_whatever_held_it(answer):
    values = values_of(answer, "a row")
    assert values.dtype == torch.float64 and values.shape == (1, 2) and not values.requires_grad
    assert values[0, 0] == 1


@pytest.mark.parametrize("answer", [None, "1, 2", [[1.0], [2.0, 3.0]], [torch.ones(2), None]], ids=str)
def test_an_answer_that_holds_no_values_is_named(answer):
    with pytest.raises(NotYet, match=f"a row is expected, a tensor, not {type(answer).__name__}$"):
        values_of(answer, "a row")


def test_near_asks_for_the_shape_and_every_value():
    expected = torch.tensor([1.0, 100.0])
    found = expected.double()
    assert near(found + torch.tensor([1e-4, 0.05]), expected)  # close for its size
    assert not near(found + torch.tensor([0.05, 0.0]), expected)
    assert near(found + torch.tensor([0.05, 0.0]), expected, tolerance=0.1)
    assert not near(found[:1], expected) and not near(found[None], expected)
    assert not near(found * torch.nan, expected)


def test_apart_asks_for_a_gap_between_all():
    assert apart([3.0, 1.0, 2.0]) and not apart([3.0, 1.0, 3.0]) and not apart([1.0, 1.00005])
    assert not apart([3.0, 1.0, 2.0], gap=1.5)
