"""The checks of lesson 03 against answers that are right, wrong and missing."""

import copy
import hashlib
import io
import random
import zlib

import numpy as np
import pytest
import torch
from safetensors.torch import save
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from torch import nn
from torch.nn.functional import cross_entropy, one_hot

from course_utils.exercises import CORRECT, NOT_YET, grade
from tests.exercise_tests import *  # noqa: F403


def freeze(network):
    network.requires_grad_(False)
    return network.eval()


def freeze_in_loops(network):
    for parameter in network.parameters():
        parameter.requires_grad = False
    for module in network.modules():
        module.training = False
    return network


def freeze_batch_norm(network, kinds=(nn.BatchNorm1d, nn.BatchNorm2d)):
    for module in network.requires_grad_(False).modules():
        if isinstance(module, kinds):
            module.eval()
    return network


def each_batch_norm(**values):
    """An answer to 03.1 that freezes the parameters, and sets something in every batch norm."""

    def freeze(network):
        for module in network.requires_grad_(False).modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                for name, value in values.items():
                    setattr(module, name, value)
        return network

    return freeze


def switch_top(network):
    network.requires_grad_(False).training = False
    return network


def new_attribute(network):
    network.requires_grad = False
    return network.eval()


def freeze_children(network):
    for child in network.eval().children():
        child.requires_grad_(False)
    return network


def freeze_weights(network):
    for name, parameter in network.eval().named_parameters():
        if name.endswith("weight"):
            parameter.requires_grad = False
    return network


def toggle(network):
    for parameter in network.eval().parameters():
        parameter.requires_grad = not parameter.requires_grad
    return network


def no_gradients_at_all(network):
    torch.set_grad_enabled(False)
    return network.eval()


def in_zeros(network):
    for parameter in freeze(network).parameters():
        parameter.zero_()
    return network


def without_norm(network):
    freeze(network).stem[1] = nn.Identity()
    return network


def without_head(network):
    freeze(network).forward = None
    return network


def standardise(train, other, by=None, correction=0, eps=None):
    by = train if by is None else by
    deviation = by.std(dim=0, correction=correction)
    deviation = torch.where(deviation == 0, 1.0, deviation) if eps is None else deviation + eps
    return (train - by.mean(dim=0)) / deviation, (other - by.mean(dim=0)) / deviation


def standardise_in_numpy(train, other):
    train, other = train.numpy(), other.numpy()
    deviation = train.std(axis=0)
    deviation[deviation == 0] = 1
    return [(table - train.mean(axis=0)) / deviation for table in (train, other)]


def standardise_in_loops(train, other):
    a, b = torch.zeros(train.shape), torch.zeros(other.shape)
    for column in range(train.shape[1]):
        values = train[:, column].tolist()
        mean = sum(values) / len(values)
        deviation = (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5 or 1.0
        a[:, column], b[:, column] = (train[:, column] - mean) / deviation, (other[:, column] - mean) / deviation
    return a, b


def standardise_in_sklearn(train, other):
    scaler = StandardScaler().fit(train)
    return scaler.transform(train), scaler.transform(other)


def in_place(train, other):
    mean, deviation = train.mean(dim=0), train.std(dim=0, correction=0)
    deviation[deviation == 0] = 1.0
    return train.sub_(mean).div_(deviation), (other - mean) / deviation


def other_in_place(train, other):
    a, b = standardise(train, other)
    return a, other.copy_(b)


def zero_where_constant(train, other):
    a, b = standardise(train, other)
    return a, b * (train.std(dim=0) > 0)


def one_where_constant_in_training(train, other):
    deviation = other.std(dim=0, correction=0)
    return standardise(train, other)[0], (other - train.mean(dim=0)) / torch.where(deviation == 0, 1.0, deviation)


def probe(head, scale=True):
    """An answer to 03.3 by scikit-learn, with a head made anew at each call."""

    def my_linear_probe(features, labels, new_features):
        return (make_pipeline(StandardScaler(), head()) if scale else head()).fit(features, labels).predict(new_features)

    return my_linear_probe


def regression(C):
    return probe(lambda: LogisticRegression(C=C, max_iter=1000))


def trained(scale=standardise, make=lambda weights: torch.optim.AdamW(weights, lr=1e-2), steps=300):
    """An answer to 03.3 by a loop."""

    def my_linear_probe(features, labels, new_features):
        features, new_features = scale(features, new_features)
        head = nn.Linear(features.shape[1], int(labels.max()) + 1)
        optimizer = make(head.parameters())
        for _ in range(steps):
            optimizer.zero_grad()
            cross_entropy(head(features), labels).backward()
            optimizer.step()
        return head(new_features).argmax(dim=1)

    return my_linear_probe


def as_they_are(features, new_features):
    return features, new_features


def each_by_itself(features, new_features):
    return standardise(features, features)[0], standardise(new_features, new_features)[0]


def only_old(features, new_features):
    return standardise(features, features)[0], new_features


def sgd(weights):
    return torch.optim.SGD(weights, lr=0.1)


def least_squares(features, labels, new_features):
    a, b = (np.c_[table, np.ones(len(table))] for table in standardise_in_numpy(features, new_features))
    return [int(row.argmax()) for row in b @ np.linalg.lstsq(a, np.eye(int(labels.max()) + 1)[labels], rcond=None)[0]]


def nearest_mean(features, labels, new_features):
    means = torch.stack([features[labels == number].mean(dim=0) for number in labels.unique()])
    return torch.cdist(new_features, means).argmin(dim=1)


def nearest_row(features, labels, new_features):
    return labels[torch.cdist(new_features, features).argmin(dim=1)]


def scores(features, labels, new_features):
    a, b = standardise(features, new_features)
    return b @ torch.linalg.pinv(a) @ one_hot(labels).float()


def read(maps_of=lambda maps: maps.mean(dim=(2, 3)), afterwards=lambda kept: kept, off=True, place=None, mode=False, back=False):
    """An answer to 03.4: what is kept in the hook, and what is made of it afterwards."""

    def features_after(network, layer, pictures):
        kept = []
        at = network.get_submodule(place) if place else layer
        handle = at.register_forward_hook(lambda module, inputs, output: kept.append(maps_of(output)))
        network.train(mode)
        with torch.no_grad():
            network(pictures)
        network.train(back)
        if off:
            handle.remove()
        return afterwards(kept[0])

    return features_after


def read_with_gradients(network, layer, pictures):
    kept = {}

    def hook(module, inputs, output):
        kept["maps"] = output.clone()

    handle = layer.register_forward_hook(hook)
    try:
        network(pictures)
    finally:
        handle.remove()
    return kept["maps"].flatten(2).mean(dim=-1)


class Enough(Exception):
    """Ends a forward pass early."""


def read_and_leave(off):
    """An answer to 03.4 that goes no farther than the layer."""

    def features_after(network, layer, pictures):
        def hook(module, inputs, output):
            raise Enough(output.detach().numpy().mean(axis=(2, 3)))

        handle = layer.register_forward_hook(hook)
        try:
            network(pictures)
        except Enough as found:
            if off:
                handle.remove()
            return found.args[0]

    return features_after


def read_in_loops(network, layer, pictures):
    rows = []
    for picture in pictures:
        means = []
        handle = layer.register_forward_hook(lambda m, i, output, to=means: to.extend(maps.mean().item() for maps in output[0]))
        network(picture[None])
        handle.remove()
        rows.append(means)
    return rows


def read_what_goes_in(network, layer, pictures):
    kept = []
    handle = layer.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0].mean(dim=(2, 3))))
    network(pictures)
    handle.remove()
    return kept[0]


def wrap_forward(off):
    """An answer to 03.4 with another forward in place of the layer's."""

    def features_after(network, layer, pictures):
        kept, old = [], layer.forward

        def forward(given):
            kept.append(old(given))
            kept.append(kept[0].mean(dim=(2, 3)))
            return kept[0]

        layer.forward = forward
        network(pictures)
        if off:
            del layer.forward
        return kept[1]

    return features_after


def read_without_gradients(network, layer, pictures):
    torch.set_grad_enabled(False)
    return read()(network, layer, pictures)


def note(of_network=lambda network: network.state_dict(), of_pictures=lambda pictures, transform: transform(pictures)):
    """An answer to 03.5: what is taken of the network, as a dict, and of the pictures."""

    def my_note(network, transform, pictures):
        digest = hashlib.sha256()
        for name, value in of_network(network).items():
            digest.update(f"{name} {value.dtype}".encode() + value.detach().numpy().tobytes())
        digest.update(of_pictures(pictures, transform).numpy().tobytes())
        return digest.hexdigest()

    return my_note


def note_in_safetensors(network, transform, pictures):
    tensors = {name: value.clone() for name, value in network.state_dict().items()}
    return hashlib.md5(save(tensors | {"pictures": transform(pictures)})).hexdigest()


def note_in_parts(network, transform, pictures):
    sample = torch.arange(192, dtype=torch.uint8).view(1, 3, 8, 8)
    parts = [value.tolist() for value in network.state_dict().values()]
    return repr(parts) + repr(transform(sample).tolist()) + repr(pictures.tolist())


def note_in_torch(network, transform, pictures):
    file = io.BytesIO()
    torch.save([network.state_dict(), transform(pictures)], file)
    return str(zlib.crc32(file.getvalue()))


def note_by_print(network, transform, pictures):
    return f"{network.state_dict()} {transform(pictures).tolist()}"


def note_by_sum(network, transform, pictures):
    return str([value.double().sum().item() for value in [*network.state_dict().values(), transform(pictures)]])


def note_by_hash(network, transform, pictures):
    return str(hash(note_in_parts(network, transform, pictures)))


def note_by_features(network, transform, pictures):
    with torch.no_grad():
        return repr(network(transform(pictures)).tolist())


def note_in_place(network, transform, pictures):
    made = note()(network, transform, pictures)
    pictures.zero_()
    return made


def note_and_reset(network, transform, pictures):
    network.stem[1].reset_running_stats()
    return note()(network, transform, pictures)


# exercise: answers that are right, in several styles
RIGHT = {
    "03.1": [freeze, freeze_in_loops, freeze_batch_norm, torch.inference_mode()(lambda network: freeze(network))],
    "03.2": [standardise, standardise_in_numpy, standardise_in_loops, standardise_in_sklearn],
    "03.3": [
        regression(1.0),
        regression(0.1),
        regression(100.0),
        probe(LinearSVC),
        trained(),
        trained(make=sgd, steps=100),
        least_squares,
    ],
    "03.4": [
        read(),
        read(lambda maps: maps.clone(), lambda maps: maps.mean(dim=(2, 3)).numpy()),
        read_with_gradients,
        read_and_leave(off=True),
        read_in_loops,
        wrap_forward(off=True),
        torch.inference_mode()(read()),
    ],
    "03.5": [
        note(),
        note(of_pictures=lambda pictures, transform: transform(pictures).double()),
        note_in_safetensors,
        note_in_parts,
        note_in_torch,
    ],
}
# exercise: [(a plausible wrong answer, a word of the reason that must help)]
WRONG = {
    "03.1": [
        (lambda network: True, "the network is expected back, not bool"),
        (lambda network: None, "nothing came back"),
        (lambda network: freeze(network).parameters(), "not generator"),
        (lambda network: network, "parameters would get a gradient, such as"),
        (lambda network: network.requires_grad_(False), "moved when pictures went through: in training mode batch norm"),
        (lambda network: network.eval(), "eval() does not change that"),
        (torch.no_grad()(lambda network: network.eval()), "eval() does not change that"),
        (new_attribute, "makes a new attribute"),
        (no_gradients_at_all, "torch.set_grad_enabled(False) stays"),
        (freeze_children, "1 of 17 parameters would get a gradient, such as 'scale'; network.parameters()"),
        (freeze_weights, "network.parameters() has them all"),
        (toggle, "4 of 17 parameters would get a gradient, such as 'stem.0.weight'"),
        (switch_top, "a part of it is not"),
        (lambda network: network.requires_grad_(False).train(not network.training), "the network came in evaluation mode"),
        (lambda network: freeze_batch_norm(network, nn.BatchNorm2d), "'head.3.running_mean' moved"),
        (lambda network: freeze(copy.deepcopy(network)), "another network came back"),
        (lambda network: nn.Sequential(freeze(network)), "another network came back"),
        (each_batch_norm(momentum=0.0), "at hand"),
        (each_batch_norm(track_running_stats=False), "at hand"),
        (each_batch_norm(running_mean=None, running_var=None), "takes none away"),
        (torch.no_grad()(in_zeros), "is not what it was"),
        (without_norm, "takes none away"),
        (without_head, "pictures do not go through it any more"),
        (lambda network: network.freeze(), "stopped with AttributeError"),
        (True, "a function is expected here, not bool"),
    ],
    "03.2": [
        (lambda train, other: (torch.zeros(30, 5), torch.zeros(10, 5)), "are expected, and you gave (30, 5) and (10, 5)"),
        (lambda train, other: (torch.zeros_like(train), torch.zeros_like(other)), "in the training table, row "),
        (each_by_itself, "the other table's own mean or deviation"),
        (lambda train, other: standardise(train, other, torch.cat([train, other])), "measured both tables together"),
        (lambda train, other: standardise(train, other, other), "you measured the other table"),
        (lambda train, other: standardise(train, other, correction=1), "over n - 1"),
        (lambda train, other: standardise(train, other)[::-1], "yours are swapped"),
        (lambda train, other: (train - train.mean(dim=0), other - train.mean(dim=0)), "the deviations are not 1"),
        (
            lambda train, other: [(t - train.mean(dim=0)) / train.var(dim=0, correction=0).clamp(1e-9) for t in (train, other)],
            "divided by the variance",
        ),
        (lambda train, other: [t / train.std(dim=0, correction=0) for t in (train, other)], "did not subtract the mean"),
        (lambda train, other: [standardise(t.T, t.T)[0].T for t in (train, other)], "a feature is a column"),
        (lambda train, other: [(t - train.mean()) / train.std(correction=0) for t in (train, other)], "for the whole table"),
        (lambda train, other: (standardise(train, other)[0], other), "came back as it was"),
        (lambda train, other: (standardise(train, other)[0], other - train.mean(dim=0)), "in the other table, row "),
        (lambda train, other: standardise(train, other, eps=0), "you gave nan or inf there in the training table"),
        (lambda train, other: standardise(train, other, eps=1e-6), "divide it by 1"),
        (zero_where_constant, "divide it by 1"),
        (lambda *tables: [table.nan_to_num(0, 0, 0) for table in standardise(*tables, eps=0)], "divide it by 1"),
        (in_place, "changed train_features itself"),
        (other_in_place, "changed other_features itself"),
        (lambda train, other: torch.cat(standardise(train, other)), "two tables are expected"),
        (lambda train, other: standardise(train, other)[0], "two tables are expected"),
        (lambda train, other: [table[0] for table in standardise(train, other)], "are expected, and you gave"),
        (lambda train, other: (None, None), "a table of features is expected, a tensor, not NoneType"),
        (lambda train, other: None, "not NoneType"),
        (one_where_constant_in_training, "in the other table, row "),
    ],
    "03.3": [
        (
            lambda features, labels, new: torch.zeros(len(new), dtype=torch.long),
            "you say 0 for every row, so no feature has a say",
        ),
        (lambda features, labels, new: [0, 1, 2, 0, 1], "one row of indices is expected"),
        (lambda features, labels, new: labels.mode().values.expand(len(new)), "the commonest class"),
        (nearest_mean, "the largest features alone decide"),
        (nearest_row, "standardise both tables by"),
        (trained(as_they_are, sgd, 20), "90 % is asked for"),
        (regression(1e-4), "or a penalty too much of it"),
        (trained(make=lambda weights: torch.optim.SGD(weights, lr=1e-4), steps=20), "had they come standardised"),
        (trained(as_they_are, steps=100), "a thousand times the smallest"),
        (trained(only_old, steps=100), "standardise both tables by"),
        (trained(each_by_itself, steps=100), "in other company they are"),
        (trained(steps=0), "fit longer"),
        (scores, "argmax(dim=1)"),
        (lambda *a: scores(*a).softmax(dim=1).max(dim=1).values, "whole numbers"),
        (lambda *a: scores(*a).argmax(dim=1, keepdim=True), "one row of indices"),
        (lambda *a: scores(*a).argmax(dim=0), "one row of indices"),
        (lambda features, labels, new: regression(1.0)(features, labels, features), "as many as there are old rows"),
        (lambda *a: regression(1.0)(*a) + 1, "indices lie between 0 and"),
        (lambda *a: regression(1.0)(*a) - 1, "indices lie between 0 and"),
        (
            lambda features, labels, new: make_pipeline(StandardScaler(), LinearSVC()).fit(features, labels),
            "not Pipeline of object",
        ),
        (lambda *a: None, "not NoneType"),
    ],
    "03.4": [
        (lambda network, layer, pictures: torch.zeros(len(pictures), 20), ", and you gave ("),
        (lambda *a: torch.zeros_like(read()(*a)), "you gave 0.000; the mean over the pixels is "),
        (read(lambda maps: maps, lambda maps: maps.mean(dim=(2, 3))), "overwritten: an in-place ReLU comes next"),
        (read(lambda maps: maps.detach(), lambda maps: maps.mean(dim=(2, 3))), "average in the hook, or clone there"),
        (read(lambda maps: maps.amax(dim=(2, 3))), "largest pixel of every map"),
        (read(lambda maps: maps.sum(dim=(2, 3))), "divide by their number"),
        (read(lambda maps: maps.mean()), "you averaged everything"),
        (read(lambda maps: maps.mean(dim=1)), ", and you gave ("),
        (read(lambda maps: maps.mean(dim=3)), ", and you gave ("),
        (read(lambda maps: maps.mean(dim=(0, 2, 3))), ", and you gave ("),
        (read(lambda maps: maps.flatten(1)), ", and you gave ("),
        (read(lambda maps: maps.mean(dim=(2, 3)).squeeze()), "1 picture and"),
        (read(lambda maps: maps.clone()), "you gave maps"),
        (read(lambda maps: maps), "you gave maps"),
        (read(lambda maps: maps.mean(dim=(2, 3), keepdim=True)), "you gave maps"),
        (read(lambda maps: maps[:, :, 0, 0].clone()), "the mean over the pixels is "),
        (lambda network, layer, pictures: network(pictures), "the whole network gives"),
        (read(place="block.3"), "that stands after 'block.3'"),
        (read(place="stem.1"), "that stands after 'stem.1'; '"),
        (read_what_goes_in, "that is what goes into the layer"),
        (read(off=False), "a hook is still on '"),
        (read_and_leave(off=False), "remove()"),
        (wrap_forward(off=False), "is still yours"),
        (read(mode=True), "moved: the network came in evaluation mode"),
        (read(back=True), "is in training mode now"),
        (read_without_gradients, "torch.set_grad_enabled(False) stays"),
        (lambda network, layer, pictures: layer(pictures), "stopped with RuntimeError"),
        (lambda network, layer, pictures: [part(pictures) for part in network], "stopped with TypeError"),
        (lambda *a: None, "a tensor, not NoneType"),
    ],
    "03.5": [
        (lambda network, transform, pictures: "features", "the pictures came in another order, and the note was the same"),
        (note(of_pictures=lambda pictures, transform: pictures), "the transform subtracted another number"),
        (note(of_pictures=lambda pictures, transform: transform(pictures)[:-1]), "one pixel of the last picture was another"),
        (note(of_pictures=lambda pictures, transform: transform(pictures).double().sum(dim=0)), "another order"),
        (note(lambda network: dict(network.named_parameters())), "a running mean of batch norm, in 'block.1.running_mean'"),
        (
            note(lambda network: {n: v for n, v in network.state_dict().items() if "." in n}),
            "a parameter that belongs to no layer",
        ),
        (note(lambda network: network.stem.state_dict()), "the filters of a layer had changed places"),
        (note(lambda network: {}), "the filters of a layer had changed places"),
        (note_by_sum, "the pictures came in another order"),
        (note_by_print, "was another in its fifth digit"),
        (note_by_hash, "in other objects as after a restart"),
        (lambda network, transform, pictures: str(id(network)), "in other objects as after a restart"),
        (lambda *given: note()(*given) + repr(given[1]), "in other objects as after a restart"),
        (lambda *given: note()(*given) + str(random.random()), "in other objects as after a restart"),
        (note_by_features, "pictures went through the network"),
        (note_in_place, "changed the pictures themselves"),
        (note_and_reset, "a note changes nothing"),
        (lambda *given: note()(*given).encode(), "a str, not bytes"),
        (lambda network, transform, pictures: None, "a str, not NoneType"),
        (lambda network, transform, pictures: hashlib.sha256(network), "stopped with TypeError"),
    ],
}


@pytest.mark.parametrize("answer", [no_gradients_at_all, lambda network: no_gradients_at_all(network).none])
def test_gradients_are_on_after_a_check_whatever_the_answer_did(answer):
    assert grade("03.1", answer).status == NOT_YET
    assert torch.is_grad_enabled()


def test_a_check_where_gradients_were_off_does_not_blame_the_answer():
    with torch.no_grad():
        assert grade("03.1", freeze).status == CORRECT
        assert grade("03.4", read()).status == CORRECT
        assert not torch.is_grad_enabled()
