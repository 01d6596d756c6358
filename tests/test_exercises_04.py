"""The checks of lesson 04 against answers that are right, wrong and missing."""

import ast
import copy

import numpy as np
import pytest
import torch
from torch import nn

from course_utils.exercises import CORRECT, NOT_ATTEMPTED, NOT_YET, checks_of, grade, hint, solution
from course_utils.paths import NOTEBOOKS
from course_utils.training.freezing import train_mode


def ladder(rate=lambda lr, head_lr, factor, after, count: lr / factor**after, head_rate=lambda lr, head_lr: head_lr, of=None):
    """An answer to 04.1: the rate of a stage that `after` others of `count` come after, the head's, and a part's parameters."""

    def my_param_groups(stages, head, lr, head_lr, factor):
        of_part = of or (lambda part: list(part.parameters()))
        count = len(stages)
        groups = []
        for n, stage in enumerate(stages):
            groups.append({"params": of_part(stage), "lr": rate(lr, head_lr, factor, count - 1 - n, count)})
        return [*groups, {"params": of_part(head), "lr": head_rate(lr, head_lr)}]

    return my_param_groups


def groups_from_the_head_down(stages, head, lr, head_lr, factor):
    groups = [{"params": head.parameters(), "lr": head_lr, "weight_decay": 0.0}]
    for stage in reversed(stages):
        groups.append({"params": stage.parameters(), "lr": torch.tensor(lr)})
        lr /= factor
    return groups


def a_group_for_each_parameter(stages, head, lr, head_lr, factor):
    for n, stage in enumerate(stages, start=1):
        yield from ({"params": p, "lr": lr * factor ** (n - len(stages))} for p in stage.parameters())
    yield from ({"params": [p], "lr": head_lr} for p in head.parameters())


def groups_with_names(stages, head, lr, head_lr, factor):
    rates = np.geomspace(lr / factor ** (len(stages) - 1), lr, len(stages))
    groups = [{"params": list(stage.named_parameters()), "lr": rate} for stage, rate in zip(stages, rates, strict=True)]
    return (*groups, {"params": list(head.named_parameters()), "lr": head_lr})


def head_with_the_last_stage(stages, head, lr, head_lr, factor):
    groups = ladder()(stages, head, lr, head_lr, factor)[:-1]
    groups[-1]["params"] += list(head.parameters())
    return groups


def groups_that_turn_the_list(stages, head, lr, head_lr, factor):
    stages.reverse()
    groups = [{"params": list(stage.parameters()), "lr": lr / factor**n} for n, stage in enumerate(stages)]
    return [*groups, {"params": list(head.parameters()), "lr": head_lr}]


def groups_that_unfreeze(stages, *rest):
    for stage in stages:
        stage.requires_grad_(True)
    return ladder()(stages, *rest)


def biases_twice_as_fast(*arguments):
    for group in ladder()(*arguments):
        for p in group["params"]:
            yield {"params": p, "lr": group["lr"] * (2 if p.dim() == 1 else 1)}


def used_up(part):
    parameters = part.parameters()
    assert sum(p.numel() for p in parameters)
    return parameters


def adamw_of(*arguments):
    return torch.optim.AdamW(ladder()(*arguments))


def steps(*names):
    """An answer to 04.2: what is called, one after the other."""
    calls = {
        "train": lambda network, frozen: network.train(),
        "learn": lambda network, frozen: network.requires_grad_(True),
        "freeze": lambda network, frozen: frozen.requires_grad_(False),
        "still": lambda network, frozen: frozen.eval(),
        "eval": lambda network, frozen: network.eval(),
        "freeze all": lambda network, frozen: network.requires_grad_(False),
        "still alone": lambda network, frozen: setattr(frozen, "training", False),
        "attribute": lambda network, frozen: setattr(frozen, "requires_grad", False),
        "still children": lambda network, frozen: [p.eval() for p in frozen.children() if isinstance(p, nn.BatchNorm2d)],
        "still norms": lambda network, frozen: [p.eval() for p in frozen.modules() if isinstance(p, nn.BatchNorm2d)],
        "still drops": lambda network, frozen: [p.eval() for p in frozen.modules() if isinstance(p, nn.Dropout)],
        "freeze convs": lambda network, frozen: [p.requires_grad_(False) for p in frozen.modules() if isinstance(p, nn.Conv2d)],
        "another way": lambda network, frozen: setattr(frozen, "forward", lambda maps: type(frozen).forward(frozen, 0.5 * maps)),
        "no momentum": lambda network, frozen: [
            setattr(p, "momentum", 0.0) for p in frozen.modules() if isinstance(p, nn.BatchNorm2d)
        ],
        "train children": lambda network, frozen: [part.train() for part in network.children() if part is not frozen],
        "learn children": lambda network, frozen: [part.requires_grad_(True) for part in network.children()],
        "no way": lambda network, frozen: setattr(frozen, "forward", None),
        "no way through": lambda network, frozen: setattr(frozen, "forward", torch.no_grad()(frozen.forward)),
        "no gradients": lambda network, frozen: torch.set_grad_enabled(False),
        "new": lambda network, frozen: [part.reset_parameters() for part in frozen.modules() if isinstance(part, nn.Conv2d)],
        "by the package": lambda network, frozen: train_mode(network),
    }

    def train_all_but(network, frozen):
        for name in names:
            calls[name](network, frozen)

    return train_all_but


def train_all_but_in_loops(network, frozen):
    inside = set(frozen.modules())
    for part in network.modules():
        part.training = part not in inside
    mine = {id(p) for p in frozen.parameters()}
    for p in network.parameters():
        p.requires_grad = id(p) not in mine
    return network


def head_in_numpy(weight, offset, mean, deviation):
    rows = weight.numpy() / deviation.numpy()[None]
    return rows, offset.numpy() - (rows * mean.numpy()).sum(axis=1)


def head_by_trying(weight, offset, mean, deviation):
    """Where f is 0, the logits are the bias; where one feature is 1 more, they are a column of weights more."""
    logits = lambda f: (f - mean) / deviation @ weight.T + offset  # noqa: E731
    nothing = logits(torch.zeros(1, len(mean)))
    return nn.Parameter((logits(torch.eye(len(mean))) - nothing).T), nothing[0]


def head(weight=lambda w, m, s: w / s, bias=lambda w, b, m, s: b - w / s @ m):
    """An answer to 04.3 with parts of one's own."""
    return lambda w, b, m, s: (weight(w, m, s), bias(w, b, m, s))


def head_in_place(weight, offset, mean, deviation):
    weight /= deviation
    return weight, offset - weight @ mean


def whole_penalty(model, start, alpha, beta, square=lambda v: (v**2).sum(), half=0.5):
    moved = sum(square(value - start[name]) for name, value in model.backbone.named_parameters())
    return half * alpha * moved + half * beta * sum(square(value) for value in model.head.parameters())


def penalty(**changes):
    """An answer to 04.4 with parts of one's own."""
    return lambda *a: whole_penalty(*a, **changes)


def parts(backbone=None, size=None):
    """An answer to 04.4 from what alpha / 2 and beta / 2 are multiplied with, both of (model, start)."""
    backbone = backbone or (lambda m, start: sum(((v - start[n]) ** 2).sum() for n, v in m.backbone.named_parameters()))
    size = size or (lambda m, start: sum((v**2).sum() for v in m.head.parameters()))
    return lambda model, start, alpha, beta: alpha / 2 * backbone(model, start) + beta / 2 * size(model, start)


def flat_penalty(model, start, alpha, beta):
    moved = torch.cat([(value - start[name]).flatten() for name, value in model.backbone.named_parameters()])
    return (alpha * moved @ moved + beta * nn.utils.parameters_to_vector(model.head.parameters()).square().sum()) / 2


def penalty_in_loops(model, start, alpha, beta):
    total = torch.zeros(1)
    own = dict(model.named_parameters())
    for name in start:
        total = total + alpha / 2 * nn.functional.mse_loss(own[f"backbone.{name}"], start[name], reduction="sum")
    return total + beta / 2 * (model.head.weight.pow(2).sum() + model.head.bias.pow(2).sum())


def penalty_in_order(model, start, alpha, beta):
    moved = sum(((a - b) ** 2).sum() for a, b in zip(model.backbone.parameters(), start.values(), strict=True))
    return alpha / 2 * moved + beta / 2 * sum((v**2).sum() for v in model.head.parameters())


def penalty_that_steps_back(model, start, alpha, beta):
    total = whole_penalty(model, start, alpha, beta)
    total.backward(retain_graph=True)
    return total


def penalty_that_looks_at_gradients(model, start, alpha, beta):
    total = whole_penalty(model, start, alpha, beta)
    assert torch.autograd.grad(total, model.head.weight)
    return total


def penalty_that_moves(model, start, alpha, beta):
    total = whole_penalty(model, start, alpha, beta)
    with torch.no_grad():
        for name, value in model.backbone.named_parameters():
            value.copy_(start[name])
    return total


def penalty_into_start(model, start, alpha, beta):
    total = whole_penalty(model, start, alpha, beta)
    for value in start.values():
        value.zero_()
    return total


def right_number_other_gradient(model, start, alpha, beta):
    total = whole_penalty(model, start, alpha, beta)
    return total.detach() * sum(p.sum() for p in model.parameters()) / sum(p.sum() for p in model.parameters()).detach()


def squares(values):
    return sum((value**2).sum() for value in values)


def counting_buffers(model, start):
    own = model.backbone.state_dict(keep_vars=True)
    return squares(value - start.get(name, 0) for name, value in own.items())


# exercise: answers that are right, in several styles
RIGHT = {
    "04.1": [ladder(), groups_from_the_head_down, a_group_for_each_parameter, groups_with_names],
    "04.2": [
        steps("train", "learn", "freeze", "still"),
        steps("learn", "freeze", "by the package"),
        steps("freeze all", "learn", "train", "still", "freeze"),
        steps("train", "learn", "freeze", "still norms", "still drops"),
        train_all_but_in_loops,
    ],
    "04.3": [head(), head_in_numpy, head_by_trying, lambda *a: list(head()(*a))],
    "04.4": [
        penalty(),
        flat_penalty,
        penalty_in_loops,
        penalty(square=lambda v: v.norm() ** 2),
        penalty(square=lambda v: torch.dist(v, torch.zeros(())) ** 2),
    ],
}
# exercise: [(a plausible wrong answer, a word of the reason that must help)]
WRONG = {
    "04.1": [
        (lambda *a: [{"params": [nn.Parameter(torch.ones(3))], "lr": 1e-3}], "no parameter of the stages or the head"),
        (lambda *a: [], "nothing of stages[0] is in any group"),
        (ladder(lambda lr, head_lr, factor, after, count: lr / factor ** (count - 1 - after)), "that is turned round"),
        (ladder(lambda lr, head_lr, factor, after, count: lr / factor ** (after + 1)), "count from 0 there"),
        (ladder(lambda lr, head_lr, factor, after, count: lr * factor**after), "you multiplied by factor"),
        (ladder(lambda lr, head_lr, factor, after, count: lr * factor ** (count - 1 - after)), "and went up"),
        (ladder(lambda lr, head_lr, factor, after, count: head_lr / factor**after), "begin with head_lr"),
        (ladder(lambda lr, head_lr, factor, after, count: lr), "all your stages have lr"),
        (ladder(lambda lr, head_lr, factor, after, count: lr / (1 + (factor - 1) * after)), "factors multiply"),
        (ladder(lambda lr, head_lr, factor, after, count: lr / max(1, factor * after)), "factors multiply"),
        (ladder(lambda lr, head_lr, factor, after, count: lr * (1 - after / count)), "divided by factor"),
        (ladder(lambda lr, head_lr, factor, after, count: lr / 2.6**after), "and factor = "),
        (ladder(lambda lr, head_lr, factor, after, count: 3 * lr / factor**after), "so its rate is lr"),
        (ladder(lambda lr, head_lr, factor, after, count: lr / factor ** (after + (count == 1))), "of 1 has the rate"),
        (
            ladder(lambda lr, head_lr, factor, after, count: lr / factor ** ((count - 1) * after / (count - 1))),
            "ZeroDivisionError",
        ),
        (lambda *a: ladder()(*a)[:-1], "the head is in no group"),
        (lambda *a: ladder()(*a)[1:], "nothing of stages[0]"),
        (biases_twice_as_fast, "stages[0] has more than one rate"),
        (head_with_the_last_stage, "it shares a group with stages["),
        (ladder(head_rate=lambda lr, head_lr: lr), "yours is lr"),
        (ladder(head_rate=lambda lr, head_lr: 10 * head_lr), "and head_lr is"),
        (ladder(of=used_up), "gave nothing for stages[0]: it runs once"),
        (ladder(of=lambda part: filter(lambda p: p.requires_grad, part.parameters())), "and you left out what is"),
        (ladder(of=lambda part: [p for p in part.parameters() if p.requires_grad]), "and you left out what is"),
        (ladder(of=lambda part: [p for n, p in part.named_parameters() if n.endswith("weight")]), "weights and biases"),
        (ladder(of=lambda part: list(part.parameters(recurse=False))), "nothing of stages[0] is in any"),
        (ladder(of=lambda part: list(part.parameters()) * 2), "is there twice"),
        (ladder(of=lambda part: list(copy.deepcopy(part).parameters())), "not copies"),
        (ladder(of=lambda part: [p.data for p in part.parameters()]), "not copies"),
        (ladder(of=lambda part: part.state_dict()), "holds a str"),
        (ladder(of=lambda part: [part.parameters()]), "holds a generator"),
        (ladder(of=lambda part: part), "is a Sequential; give it parameters"),
        (ladder(of=lambda part: part.parameters), "is a method; give it parameters"),
        (ladder(of=lambda part: set(part.parameters())), "torch.optim.AdamW stopped with TypeError"),
        (groups_that_turn_the_list, "changed the list"),
        (groups_that_unfreeze, "changed which parameters get a gradient"),
        (lambda *a: [{"params": g["params"], "learning_rate": g["lr"]} for g in ladder()(*a)], "a group has no 'lr'; its keys"),
        (lambda *a: [(g["params"], g["lr"]) for g in ladder()(*a)], "one thing in yours is a tuple"),
        (lambda *a: ladder()(*a)[0], "a list of dicts is expected, not dict"),
        (adamw_of, "a list of dicts is expected, not AdamW"),
        (ladder(lambda lr, head_lr, factor, after, count: f"{lr}"), "a number is expected, not str"),
        (lambda stages, *a: stages[0].lr, "stopped with AttributeError"),
        (lambda *a: None, "not NoneType"),
    ],
    "04.2": [
        (lambda network, frozen: None, "the mode does not change that"),
        (lambda network, frozen: True, "the mode does not change that"),
        (steps("train", "still"), "the mode does not change that"),
        (steps("train", "learn", "freeze"), "batch norm measures anew"),
        (steps("still", "freeze", "train"), "network.train() came after and undid it"),
        (steps("freeze", "still", "learn", "train"), "network.requires_grad_(True) goes first"),
        (steps("train", "learn", "attribute", "still"), "makes a new attribute"),
        (steps("learn", "freeze", "eval"), "the whole network is in evaluation mode"),
        (steps("learn", "freeze", "still"), "the rest is in evaluation mode, as it came"),
        (steps("train", "freeze all", "still"), "of `frozen` alone they are switched off"),
        (steps("train", "freeze", "still"), "needs them back"),
        (steps("train", "learn children", "freeze", "still"), "such as 'scale'"),
        (steps("train", "learn", "freeze", "still alone"), "in it is not; frozen.eval() reaches all"),
        (steps("train", "learn", "freeze", "still children"), "moved when pictures went through"),
        (steps("train", "learn", "freeze", "still norms"), "but dropout at"),
        (steps("train", "learn", "freeze", "no momentum", "still drops"), "batch norm measures anew"),
        (steps("train", "learn", "freeze", "still", "another way"), "all there is to change"),
        (steps("train", "learn", "freeze convs", "still"), "however deep"),
        (steps("learn", "freeze", "train children", "still"), "'the network itself' is outside it"),
        (steps("train", "learn", "freeze", "still", "no way through"), "gradients must pass through"),
        (steps("train", "learn", "freeze", "still", "no way"), "pictures do not go through it any more"),
        (steps("train", "learn", "freeze", "still", "no gradients"), "set_grad_enabled(False) stays"),
        (steps("train", "learn", "freeze", "still", "new"), "changes no number"),
        (lambda network, frozen: network.freeze(frozen), "stopped with AttributeError"),
        (nn.Linear(2, 2), "your function stopped with"),
        ("frozen", "a function is expected here, not str"),
    ],
    "04.3": [
        (lambda w, b, m, s: (torch.zeros_like(w), torch.zeros_like(b)), "you gave 0.000 where"),
        (lambda w, b, m, s: (w, b), "the weights came back as they were"),
        (head(bias=lambda w, b, m, s: b), "the mean's part is missing"),
        (head(bias=lambda w, b, m, s: b + w / s @ m), "the sign of its part"),
        (head(bias=lambda w, b, m, s: b - w @ m), "the mean is divided by the deviation too"),
        (head(bias=lambda w, b, m, s: b - w * s @ m), "divide the mean by the deviation, as f is"),
        (head(bias=lambda w, b, m, s: -(w / s) @ m), "own offset is missing"),
        (head(bias=lambda w, b, m, s: b / s - w / s @ m), "added after the division"),
        (head(bias=lambda w, b, m, s: (b - w @ m) / s), "added after the division"),
        (head(bias=lambda w, b, m, s: b - (w / s).T @ m), "you summed along the classes"),
        (head(bias=lambda w, b, m, s: b - m.mean()), "both heads must give the same logits"),
        (head(lambda w, m, s: w * s, lambda w, b, m, s: b - w * s @ m), "you multiplied the weights"),
        (head(lambda w, m, s: w / s**2, lambda w, b, m, s: b - w / s**2 @ m), "you divided by the variance"),
        (head(lambda w, m, s: w / s.sqrt(), lambda w, b, m, s: b - w / s.sqrt() @ m), "the root of the deviation"),
        (head(lambda w, m, s: (w - m) / s), "in the weight, at ["),
        (head(lambda w, m, s: w / s[:, None]), "you divided along the classes"),
        (head(lambda w, m, s: (w / s).T), "the weights are transposed"),
        (head(lambda w, m, s: (w / s).T if len(w) < len(m) else w / s), "the weight is transposed: you gave shape"),
        (lambda *a: head()(*a)[::-1], "yours are swapped"),
        (lambda *a: head()(*a)[0], "two tensors are expected"),
        (lambda w, b, m, s: nn.Linear(len(m), len(b)), "not Linear"),
        (head(bias=lambda w, b, m, s: (b - w / s @ m)[:, None]), "are expected, and you gave"),
        (head(bias=lambda w, b, m, s: "b"), "the bias is expected as a tensor, not str"),
        (head(bias=lambda w, b, m, s: None), "the bias is expected as a tensor, not NoneType"),
        (head_in_place, "changed weight itself"),
        (lambda w, b, m, s: (w / s, b - m @ w / s) if len(w) == len(m) else None, "you summed along the classes"),
        (lambda w, b, m, s: (w / s, b - w / s @ m[None]), "stopped with RuntimeError"),
        (lambda *a: None, "not NoneType"),
    ],
    "04.4": [
        (lambda *a: 0.5, "you gave 0.5000, and"),
        (lambda *a: torch.tensor(0.5, requires_grad=True), "you gave 0.5000, and"),
        (penalty(half=1), "the halves are missing"),
        (lambda m, s, a, b: whole_penalty(m, s, a, 2 * b), "before the head's part"),
        (lambda m, s, a, b: whole_penalty(m, s, 2 * a, b), "before the backbone's part"),
        (lambda m, s, a, b: whole_penalty(m, s, b, a), "alpha and beta are swapped"),
        (penalty(square=lambda v: v.norm()), "take no root"),
        (
            parts(
                lambda m, s: torch.cat([(v - s[n]).flatten() for n, v in m.backbone.named_parameters()]).norm(),
                lambda m, s: nn.utils.parameters_to_vector(m.head.parameters()).norm(),
            ),
            "take no root",
        ),
        (penalty(square=lambda v: v.abs().sum()), "absolute values"),
        (penalty(square=lambda v: v.sum() ** 2), "square first"),
        (penalty(square=lambda v: (v**2).mean()), "those are means"),
        (penalty(square=lambda v: v**2), "stopped with RuntimeError"),
        (parts(size=lambda m, s: 0), "the head's part is missing"),
        (parts(lambda m, s: 0), "the backbone's part is missing"),
        (lambda m, s, a, b: whole_penalty(m, s, a, a), "the head has beta"),
        (lambda m, s, a, b: whole_penalty(m, s, a, a + b), "the head has beta"),
        (parts(lambda m, s: squares(m.backbone.parameters())), "pulls the backbone towards zero"),
        (parts(size=lambda m, s: squares(m.parameters())), "beta pulls the whole model"),
        (parts(lambda m, s: squares(v - s[n] for n, v in m.backbone.state_dict().items())), "a buffer is no parameter"),
        (parts(counting_buffers), "you counted batch norm's running means"),
        (
            parts(lambda m, s: sum(((v - s[n]) ** 2).sum() for n, v in m.named_parameters())),
            "names in start are those of model.backbone",
        ),
        (
            parts(lambda m, s: squares(v - s[n.removeprefix("backbone.")] for n, v in m.named_parameters())),
            "start has nothing of the head",
        ),
        (parts(size=lambda m, s: squares([m.head.weight])), "the head's bias counts too"),
        (
            parts(lambda m, s: squares(v - s[n] for n, v in m.backbone.named_parameters() if n.endswith("weight"))),
            "the backbone's biases count too",
        ),
        (
            parts(
                lambda m, s: squares(v - s[n] for n, v in m.backbone.named_parameters() if n.endswith("weight")),
                lambda m, s: squares([m.head.weight]),
            ),
            "biases count too, the backbone's and the head's",
        ),
        (
            parts(lambda m, s: squares(v - s[n] for n, v in m.backbone.named_parameters() if n[1:4] != ".1.")),
            "batch norm's weight and bias count too",
        ),
        (lambda *a: -whole_penalty(*a), "was expected"),
        (lambda *a: whole_penalty(*a).item(), "it came as float, without a gradient"),
        (lambda *a: whole_penalty(*a).detach().numpy(), "it came as ndarray"),
        (lambda *a: whole_penalty(*a).detach(), "no gradient flows back"),
        (torch.no_grad()(whole_penalty), "no gradient flows back"),
        (lambda *a: whole_penalty(*a).detach().requires_grad_(True), "no gradient reaches the backbone"),
        (
            parts(lambda m, s: squares(m.backbone.state_dict()[n] - s[n] for n in s)),
            "no gradient reaches the backbone",
        ),
        (parts(size=lambda m, s: squares(v.data for v in m.head.parameters())), "no gradient reaches the head"),
        (right_number_other_gradient, "was something detached?"),
        (penalty(square=lambda v: (v**2).sum().sqrt() ** 2), "a root has no slope"),
        (penalty_in_order, "find its tensors by their names"),
        (penalty_that_steps_back, "your function called backward"),
        (penalty_that_looks_at_gradients, "but backward stopped with RuntimeError"),
        (penalty_that_moves, "of the model; it measures"),
        (penalty_into_start, "changed the tensors in start"),
        (parts(size=lambda m, s: m.head.weight**2), "sum over all numbers, and both parts"),
        (lambda *a: {"loss": whole_penalty(*a)}, "a number is expected, not dict"),
        (lambda *a: None, "a number is expected, not NoneType"),
    ],
}
STUBS = {exercise: [..., lambda *arguments: ...] for exercise in RIGHT}


def each(answers):
    return [pytest.param(id, answer, id=f"{id}-{n}") for id, found in answers.items() for n, answer in enumerate(found)]


def test_every_exercise_has_its_answers_here():
    assert set(checks_of("04")) == set(RIGHT) == set(WRONG)
    assert min(map(len, RIGHT.values())) >= 2 and min(map(len, WRONG.values())) >= 4


@pytest.mark.parametrize(("exercise", "answer"), each(RIGHT))
def test_a_right_answer_is_correct(exercise, answer):
    for _ in range(5):
        outcome = grade(exercise, answer)
        assert outcome.status == CORRECT, outcome.message


@pytest.mark.parametrize(("exercise", "case"), each(WRONG))
def test_a_wrong_answer_is_not_yet_correct_and_learns_why(exercise, case):
    answer, reason = case
    for seed in range(5):
        torch.manual_seed(seed)
        outcome = grade(exercise, answer)
        assert outcome.status == NOT_YET
        assert reason in outcome.message
        assert torch.is_grad_enabled()


@pytest.mark.parametrize(("exercise", "stub"), each(STUBS))
def test_a_stub_is_not_attempted(exercise, stub):
    outcome = grade(exercise, stub)
    assert outcome.status == NOT_ATTEMPTED and f'hint("{exercise}")' in outcome.message


@pytest.mark.parametrize("exercise", RIGHT)
def test_a_hint_is_not_the_solution(exercise, capsys):
    hint(exercise)
    nudge = capsys.readouterr().out
    assert len(nudge) > 20 and "return" not in nudge


@pytest.mark.skipif(not list((NOTEBOOKS / "solutions").glob("04_*.ipynb")), reason="lesson 04 is not built")
@pytest.mark.parametrize("exercise", RIGHT)
def test_the_solution_is_right(exercise, capsys):
    solution(exercise)
    code = capsys.readouterr().out
    names: dict = {"torch": torch}
    exec(code, names)
    assert "<stub>" not in code and grade(exercise, names[ast.parse(code).body[-1].name]).status == CORRECT
