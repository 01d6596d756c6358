"""Checks of lesson 01."""

import math
import random

import numpy as np
import torch
from torch import nn
from torch.nn.functional import normalize

from course_utils.exercises import Exercise, NotAttempted, NotYet, apart, call, indices, number

# situation: (what differs, the question that a wrong answer is sent back with)
SITUATIONS = {
    "plain digits -> digits on photographs": (
        "domain",
        "would a picture from the right be a likely one on the left? And is the list of classes another one?",
    ),
    "cat or dog -> which breed, same photographs": (
        "task",
        "take one photograph: could it lie on either side? And may it get the same labels there?",
    ),
    "letters on photographs -> digits on photographs": (
        "both",
        "is a picture of a 7 a likely one among the letters? And is there a class for it?",
    ),
    "photographs by day -> photographs by night, same classes": (
        "domain",
        "is a dark street a likely picture by day? And is anything else asked of it at night?",
    ),
    "X-rays: which bone -> the same X-rays: broken or not": (
        "task",
        "lay the two piles of pictures side by side, then the two lists of classes. Which of them are alike?",
    ),
}


def what_differs(answer) -> None:
    if not isinstance(answer, dict):
        raise NotYet(f"a dict is expected, situation: what differs, not {type(answer).__name__}")
    missing = [situation for situation in SITUATIONS if situation not in answer]
    if missing:
        raise NotYet(f"{missing[0]!r} is missing; leave the situations as they stand and replace the dots")
    left = sum(answer[situation] is ... for situation in SITUATIONS)
    if left == len(SITUATIONS):
        raise NotAttempted
    if left:
        raise NotYet(f"{left} of the {len(SITUATIONS)} situations still {'have' if left > 1 else 'has'} dots")
    for situation, (expected, question) in SITUATIONS.items():
        found = answer[situation]
        if not isinstance(found, str) or found not in ("domain", "task", "both"):
            raise NotYet(f'{situation!r}: write "domain", "task" or "both", not {found!r}')
        if found != expected:
            raise NotYet(f"{situation!r}: you say {found}; {question}")


def similarities(features: torch.Tensor) -> dict[str, torch.Tensor]:
    """Similarity of every row with every other, float (n, n): by cosine under "", then mistaken ones by their reasons."""
    rows = features.double()
    cosine, centred = (normalize(values, dim=1) for values in (rows, rows - rows.mean(dim=0)))
    far = "that is the distance, to which length counts too; cosine similarity asks for the direction alone"
    return {
        "": cosine @ cosine.T,
        "that is the dot product, in which long rows win; divide each row by its length first": rows @ rows.T,
        far: -torch.cdist(rows, rows),
        "you took the mean off the features; here take the rows as they are": centred @ centred.T,
    }


def nearest(answer) -> None:
    for everyone in (False, False, False, True):
        while True:  # until no two rows are equally similar, and no mistake gives the right answer by chance
            count, channels = 8 if everyone else random.randint(15, 30), random.randint(4, 8)
            query, k = random.randrange(count), count - 1 if everyone else random.randint(3, 5)
            features = torch.randn(count, channels) * torch.empty(count, 1).uniform_(-1.5, 1.5).exp() + torch.randn(channels)
            scores = {reason: values[query] for reason, values in similarities(features).items()}
            ranked = {}
            for reason, score in scores.items():
                ranked[reason] = [row for row in score.argsort(descending=True).tolist() if row != query]
            expected = ranked.pop("")[:k]
            least = [row for row in scores[""].argsort().tolist() if row != query][:k]
            cosine = scores[""].sort(descending=True).values
            distinct = (cosine[:-1] - cosine[1:]).min() > 1e-4 and (not everyone or cosine[-1] < -0.1)
            told_apart = {tuple(rows[:k]) for rows in [expected, expected[::-1], *ranked.values()]}
            if distinct and len(told_apart) == 1 + len(scores):
                break
        found = indices(call(answer, features.clone(), query, k), count, k, "rows")
        if found == expected:
            continue
        if query in found:
            raise NotYet(f"row {query} is the query itself: leave it out, also where the other similarities are negative")
        if found == expected[::-1]:
            raise NotYet("those are the right rows; the most similar one must come first")
        if found == least:
            raise NotYet("those are the least similar rows; sort from high to low")
        for reason, rows in ranked.items():
            if found == rows[:k]:
                raise NotYet(reason)
        place = next(i for i in range(k) if found[i] != expected[i])
        a, b = found[place], expected[place]
        raise NotYet(
            f"for row {query} and k = {k} you gave {found}; in place {place} stands row {a} with a similarity "
            f"of {scores[''][a]:.3f}, where row {b} with {scores[''][b]:.3f} belongs"
        )


def neighbour_accuracy(answer) -> None:
    for _ in range(5):
        while True:  # as above
            count, classes, channels = random.randint(30, 50), random.randint(3, 5), random.randint(4, 6)
            labels = torch.randint(classes, (count,))
            features = torch.randn(classes, channels)[labels] + random.uniform(0.4, 0.9) * torch.randn(count, channels)
            features = (features + torch.randn(channels)) * torch.empty(count, 1).uniform_(-1, 1).exp()
            tables = similarities(features)
            without = {reason: values.clone().fill_diagonal_(-math.inf) for reason, values in tables.items()}
            best = without[""].topk(2, dim=1).values
            shares = {}
            for reason, values in without.items():
                shares[reason] = (labels[values.argmax(dim=1)] == labels).double().mean().item()
            expected = shares.pop("")
            shares |= {
                "that is how many agree; divide by the number of rows": expected * count,
                "that is in per cent; a share lies between 0 and 1": expected * 100,
                "that is the share of rows that disagree": 1 - expected,
                "every row found itself as its own nearest neighbour; leave it out": 1.0,
            }
            distinct = (best[:, 0] - best[:, 1]).min() > 1e-5 and 0.2 < expected < 0.95
            if distinct and apart([expected, *shares.values()]):
                break
        value = number(call(answer, features.clone(), labels.clone()), ": average over the pictures")
        if math.isclose(value, expected, abs_tol=1e-5):
            continue
        for reason, share in reversed(shares.items()):
            if math.isclose(value, share, abs_tol=1e-5):
                raise NotYet(reason)
        raise NotYet(f"of {count} rows, {round(expected * count)} have a nearest neighbour of their class; you gave {value:.3f}")


def verdict(answer) -> None:
    for _ in range(4):
        scale = 10 ** random.uniform(-3, 0)
        near, far = scale * random.uniform(0.02, 0.1), scale * random.uniform(0.2, 0.9)
        intervals = [(near, far, "helps"), (-far, -near, "harms"), (-near, far, "cannot tell"), (-far, near, "cannot tell")]
        for low, high, expected in [*intervals, (0.0, far, "cannot tell"), (-far, 0.0, "cannot tell")]:
            found = call(answer, low, high)
            if not isinstance(found, str) or found not in ("helps", "harms", "cannot tell"):
                raise NotYet(f'return "helps", "harms" or "cannot tell", not {found!r}')
            if found == expected:
                continue
            said = f"for a gain between {low:+.5f} and {high:+.5f} you say {found!r}"
            if expected != "cannot tell" and found != "cannot tell":
                raise NotYet(f"{said}: that is turned round; a gain above 0 is help")
            if expected != "cannot tell":
                raise NotYet(f"{said}: the whole interval lies on one side of 0, however near")
            if low < 0 < high:
                raise NotYet(f"{said}: 0 lies inside, so the gain may have either sign, whatever the middle of the interval")
            raise NotYet(f"{said}: it touches 0, so no gain at all is still possible")


def network(norm: bool = True) -> nn.Sequential:
    """A small untrained network, with buffers where it has a BatchNorm."""
    a, b, c = (random.randint(3, 6) for _ in range(3))
    return nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b) if norm else nn.Tanh(), nn.ReLU(), nn.Linear(b, c))


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """A state that fits a model and differs from its own in every number."""
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return {n: v + torch.rand_like(v) + 0.1 if v.is_floating_point() else v + random.randint(5, 99) for n, v in state.items()}


def weights_arrived(answer) -> None:
    def loaded(norm: bool = True):
        model = network(norm)
        state = trained(model)
        model.load_state_dict(state)
        return model, state

    cases = [(*loaded(), True, "every tensor of state stands in the model")]

    model = network()
    state = {f"module.{name}": value for name, value in trained(model).items()}
    model.load_state_dict(state, strict=False)
    cases.append((model, state, False, "every name in state begins with 'module.', so not one tensor was loaded"))

    model, state = loaded()
    state = {f"module.{name}": value for name, value in state.items()}
    cases.append((model, state, False, "the values are the same, but no name is; compare by name"))

    model = network()
    state = {name: value for name, value in trained(model).items() if not name.startswith("3.")}
    model.load_state_dict(state, strict=False)
    cases.append((model, state, False, "state has nothing for layer 3 of the model, which is as untrained as before"))

    model, state = loaded()
    state["4.weight"] = torch.randn(2, 2)
    cases.append((model, state, False, "state holds '4.weight', for which the model has no place"))

    model, state = loaded()
    name = random.choice([name for name, _ in model.named_parameters()])
    state[name].view(-1)[random.randrange(state[name].numel())] += 0.5
    cases.append((model, state, False, f"names and shapes agree, but one number of {name!r} differs; compare the values"))

    model, state = loaded()
    name = random.choice(["1.running_mean", "1.running_var"])
    state[name] = state[name] + 0.5
    cases.append((model, state, False, f"{name!r} differs; it is a buffer, no parameter, and state_dict() holds both"))

    model, state = loaded()
    state["3.bias"] = torch.cat([state["3.bias"], torch.rand(1)])
    cases.append((model, state, False, "'3.bias' has one number more in state than in the model; compare the shapes too"))

    cases.append((*loaded(norm=False), True, "every tensor of state stands in the model, which has no buffers"))
    for model, state, expected, what in cases:
        found = call(answer, model, state)
        if isinstance(found, torch.Tensor | np.ndarray) and math.prod(found.shape) == 1:
            found = found.item()
        if not isinstance(found, bool | np.bool_):
            raise NotYet(f"True or False is expected, not {type(found).__name__}: one answer for the whole model")
        if found != expected:
            raise NotYet(f"you say {bool(found)}, but {what}")


EXERCISES = {
    "01.1": Exercise(
        what_differs,
        "Ask two things. Would a picture of one side be a likely one on the other? If not, the domain differs. "
        "Is the list of labels another one? Then the task differs.",
    ),
    "01.2": Exercise(
        nearest,
        "torch.nn.functional.normalize(features, dim=1) makes every row 1 long; the dot product of two such rows is their "
        "cosine. Make the query's own similarity worse than any other before you sort.",
    ),
    "01.3": Exercise(
        neighbour_accuracy,
        "With rows of length 1, directions @ directions.T has all similarities, (n, n). Each row is most similar to itself: "
        "that is the diagonal, and it must not win.",
    ),
    "01.4": Exercise(verdict, "Where must both ends lie for every gain in the interval to be above 0? And below 0?"),
    "01.5": Exercise(
        weights_arrived,
        "model.state_dict() is a dict of tensors, like state. First compare the two sets of names, then tensor by tensor; "
        "torch.equal says False for other shapes.",
    ),
}
