"""The embedded world: real, small, the same on every run, and without leaks."""

import hashlib
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from course_utils.data import few_shot, stratified_folds
from course_utils.data.digits import SPLITS, digit_indices, handwriting, mnist, mnist_m, small_digits
from course_utils.data.letters import FACES, LETTERS, distance_maps, draw_letter, letters
from course_utils.data.photos import PHOTOGRAPHS, SHORT_SIDE, patch, photographs
from course_utils.data.splits import Split, generator


def test_no_photograph_stands_in_two_groups():
    for first, second in combinations(PHOTOGRAPHS.values(), 2):
        assert not set(first) & set(second)


def test_two_views_of_one_scene_count_as_one_photograph():
    scenes = [name.split(".")[0].removesuffix("_left").removesuffix("_right") for group in PHOTOGRAPHS.values() for name in group]
    assert len(scenes) == len(set(scenes))


def test_the_data_card_names_the_photographs_of_each_group(data_card):
    for group, names in PHOTOGRAPHS.items():
        line = next(line for line in data_card.splitlines() if line.startswith(f"| {group} |"))
        assert all(f"`{name}`" in line for name in names)
        assert line.count("`") == 2 * len(names)


@pytest.mark.parametrize("group", PHOTOGRAPHS)
def test_patches_come_from_the_photographs_of_their_group(group):
    rng = np.random.default_rng(3)
    cut = patch(group, rng, size=32, crop=(32, 32)).astype(int)
    found = []
    for picture in photographs(group):
        assert min(picture.size) == SHORT_SIDE
        windows = np.lib.stride_tricks.sliding_window_view(np.asarray(picture).astype(int)[..., 0], (32, 32))
        first = np.argwhere(windows[:, :, 0, 0] == cut[0, 0, 0])
        found.append(any((windows[y, x] == cut[..., 0]).all() for y, x in first))
    assert sum(found) == 1


def test_no_digit_stands_in_two_splits():
    chosen = {split: set(digit_indices(split)) for split in SPLITS}
    assert {split: len(indices) for split, indices in chosen.items()} == SPLITS
    assert not any(first & second for first, second in combinations(chosen.values(), 2))
    assert sum(SPLITS.values()) == 5000


def test_no_handwriting_stands_in_two_splits_under_another_index():
    """The 5,000 digits themselves hold no digit twice, so that different indices are different digits."""
    seen = [hashlib.sha256(digit.tobytes()).digest() for digit in handwriting()[0]]
    assert len(set(seen)) == len(seen) == 5000


def test_no_digit_stands_in_two_domains():
    pictures, labels = handwriting()
    chosen = list(digit_indices("source"))
    plain = mnist()
    assert np.array_equal(plain.pictures[:, 1].numpy(), pictures[chosen])
    assert np.array_equal(plain.labels.numpy(), labels[chosen])
    with pytest.raises(ValueError, match="no MNIST-M split 'source'"):
        mnist_m("source")


@pytest.mark.parametrize("split", SPLITS)
def test_splits_are_stratified(split):
    counts = np.bincount(handwriting()[1][list(digit_indices(split))])
    assert counts.tolist() == [SPLITS[split] // 10] * 10


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_mnist_m_is_the_difference_of_photograph_and_digit(split):
    blended, chosen = mnist_m(split), digit_indices(split)
    pictures, labels = handwriting()
    assert np.array_equal(blended.labels.numpy(), labels[list(chosen)])
    group = "test" if split == "test" else "train"
    for index in (0, len(chosen) - 1):
        rng = generator("mnist_m", split, chosen[index], 0)
        ground = patch(group, rng, 32, crop=(32, 64)).astype(int)
        expected = np.abs(ground - pictures[chosen[index]].astype(int)[..., None])
        assert np.array_equal(blended.pictures[index].permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("draw", [mnist, lambda: mnist_m("train"), lambda: mnist_m("test"), small_digits])
def test_the_order_of_samples_says_nothing_about_their_class(draw):
    """Neither a neighbour nor the position predicts a label better than chance (ten classes)."""
    labels = draw().labels
    assert (labels[1:] == labels[:-1]).float().mean() < 0.15
    position = np.linspace(-1, 1, len(labels))[:, None]
    features = np.hstack([position**power for power in range(1, 6)])
    even, odd = slice(0, None, 2), slice(1, None, 2)
    guess = LogisticRegression(max_iter=1000).fit(features[even], labels[even]).predict(features[odd])
    assert (guess == labels[odd].numpy()).mean() < 0.17


def test_digits_never_appear_among_the_letters():
    assert not set(LETTERS) & set("0123456789")
    assert len(LETTERS) == 52
    assert letters("near", "train", 5).classes == LETTERS


def test_a_picture_depends_on_split_index_and_seed_and_on_nothing_else():
    first, label = draw_letter("near", "train", 7)
    for _ in range(3):
        draw_letter("far", "valid", 1)
    again, same = draw_letter("near", "train", 7)
    assert np.array_equal(first, again) and label == same
    others = [draw_letter("near", "valid", 7), draw_letter("near", "train", 8), draw_letter("near", "train", 7, seed=1)]
    assert all(not np.array_equal(first, picture) for picture, _ in others)
    assert torch.equal(letters("near", "train", 8).pictures[7], torch.from_numpy(first.copy()).permute(2, 0, 1))


def test_another_process_in_another_folder_draws_the_same_bytes(tmp_path):
    code = (
        "import hashlib; from course_utils.data.letters import letters; from course_utils.data.digits import mnist_m;"
        "h = hashlib.sha256(); splits = letters('near', 'train', 20), letters('far', 'valid', 20), mnist_m('test');"
        "[h.update(split.pictures.numpy().tobytes()) for split in splits]; print(h.hexdigest())"
    )
    here = hashlib.sha256()
    for split in (letters("near", "train", 20), letters("far", "valid", 20), mnist_m("test")):
        here.update(split.pictures.numpy().tobytes())
    there = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == here.hexdigest()


def test_near_and_far_differ_in_the_blend_of_half_their_pictures():
    near, far = letters("near", "train", 200), letters("far", "train", 200)
    assert torch.equal(near.labels, far.labels)
    same = (near.pictures == far.pictures).flatten(1).all(dim=1).float().mean()
    assert 0.4 < same < 0.6


def test_every_letter_has_ink_and_a_skeleton_inside_it():
    edge, skeleton = distance_maps()
    assert edge.shape == skeleton.shape == (52, len(FACES), 64, 64)
    assert (edge.max(axis=(2, 3)) >= 1).all()
    assert ((skeleton == 0) <= (edge > 0)).all()


def test_faces_and_letters_are_told_apart():
    edge, _ = distance_maps()
    glyphs = [(edge[row, column] > 0).tobytes() for row in range(len(LETTERS)) for column in range(len(FACES))]
    assert len(set(glyphs)) > 0.98 * len(glyphs)


def test_few_shot_gives_so_many_of_each_class_and_moves_with_its_seed():
    train = mnist_m("train")
    few = few_shot(train, 5, seed=1)
    assert few.labels.bincount().tolist() == [5] * 10
    assert torch.equal(few.pictures, few_shot(train, 5, seed=1).pictures)
    assert not torch.equal(few.pictures, few_shot(train, 5, seed=2).pictures)
    assert (few.labels[1:] < few.labels[:-1]).any(), "the classes come shuffled"


def test_few_shot_refuses_what_is_not_there():
    empty = Split(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 0, 1, 1]), ("a", "b", "c"))
    with pytest.raises(ValueError, match="class 'c' is empty"):
        few_shot(empty, 1, seed=0)
    with pytest.raises(ValueError, match="5 pictures a class, but class '0' has 2"):
        few_shot(Split(empty.pictures, empty.labels, ("0", "1")), 5, seed=0)


def test_folds_hold_out_every_picture_once_and_every_class_each_time():
    labels = torch.tensor([0] * 9 + [1] * 5 + [2] * 6)[torch.randperm(20, generator=torch.Generator().manual_seed(3))]
    folds = stratified_folds(labels, 4, seed=1)
    assert len(folds) == 4
    assert sorted(torch.cat(folds).tolist()) == list(range(20))
    for held_out in folds:
        assert labels[held_out].unique().tolist() == [0, 1, 2]
    again, other = stratified_folds(labels, 4, seed=1), stratified_folds(labels, 4, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(folds, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(folds, other, strict=True))


def test_folds_that_would_be_empty_or_lack_a_class_are_refused():
    labels = torch.tensor([0, 0, 0, 2, 2])  # of a subset: class 1 has no picture, which is no fault of the folds
    assert len(stratified_folds(labels, 2, seed=0)) == 2
    with pytest.raises(ValueError, match="two folds or more, not 1"):
        stratified_folds(labels, 1, seed=0)
    with pytest.raises(ValueError, match="6 folds, but a class has 2 pictures"):
        stratified_folds(labels, 6, seed=0)
    with pytest.raises(ValueError, match="3 folds, but a class has 2 pictures: a fold would lack it"):
        stratified_folds(labels, 3, seed=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mnist_m("source"), "no MNIST-M split 'source'"),
        (lambda: digit_indices("tset"), "no split 'tset'; there are source, train, valid, test"),
        (lambda: letters("middle", "train", 1), "no letters 'middle'; there are far, near"),
        (lambda: letters("near", "tset", 1), "no split 'tset'"),
        (lambda: photographs("holiday"), "no group of photographs 'holiday'"),
        (lambda: Split(torch.zeros(2, 3, 8, 8), torch.tensor([0]), ("a",)), "2 pictures, but 1 labels"),
        (lambda: Split(torch.zeros(1, 3, 8, 8), torch.tensor([3]), ("a", "b")), r"labels must lie in 0\.\.1"),
    ],
)
def test_what_does_not_exist_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
