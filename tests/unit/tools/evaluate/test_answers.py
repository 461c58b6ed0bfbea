"""Matching outputs to classes and counting correct answers, compared with plain loops."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pipeline.data.batch import Batch
from pipeline.data.beton import open_beton
from pipeline.data.beton_writer import BetonWriter
from pipeline.errors import DataError
from pipeline.objectives.pixels import denormalise
from tools.evaluate.answers import Answers, outputs_of, real_answers
from tools.evaluate.knn import NEIGHBOURS, TEMPERATURE, vote


class Table(nn.Module):
    """A model whose logits are the table row given by the image's first pixel."""

    def __init__(self, logits: np.ndarray):
        super().__init__()
        self.logits = nn.Parameter(torch.from_numpy(logits).float())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits[denormalise(images)[:, 0, 0, 0].long()]


def batch(labels: list[int], valid: list[bool]) -> Batch:
    images = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    return Batch(images, torch.tensor(labels), torch.arange(len(labels)), 0, (), torch.tensor(valid))


@st.composite
def subsets(draw):
    """A classifier and data with partly different classes."""
    names = [f"n{number:02d}" for number in range(9)]
    head = draw(st.permutations(draw(st.lists(st.sampled_from(names), min_size=1, unique=True))))
    data = sorted(draw(st.lists(st.sampled_from(names), min_size=1, unique=True)))
    images = draw(st.integers(1, 12))
    labels = draw(st.lists(st.integers(0, len(data) - 1), min_size=images, max_size=images))
    valid = draw(st.lists(st.booleans(), min_size=images, max_size=images))
    return head, data, labels, valid, draw(st.integers(0, 99))


@given(subsets())
def test_a_subset_is_scored_among_its_own_classes(case):
    head, data, labels, valid, seed = case
    if not set(head) & set(data):
        with pytest.raises(DataError, match="give --classes"):
            outputs_of(data, head, len(head))
        return
    logits = np.random.default_rng(seed).permuted(np.arange(len(labels) * len(head))).reshape(len(labels), -1)
    scorer = Answers(outputs_of(data, head, len(head)))
    sums = scorer.evaluate(Table(logits), batch(labels, valid))
    top1 = top5 = 0
    for row, label, counts in zip(logits, labels, valid, strict=True):
        ranked = sorted((name for name in data if name in head), key=lambda name: -row[head.index(name)])
        top1 += counts and ranked[0] == data[label]
        top5 += counts and data[label] in ranked[:5]
    assert (int(sums["top1"]), int(sums["count"])) == (top1, sum(valid))
    if len(set(data) & set(head)) == len(data):  # otherwise classes that the head lacks are among the first five
        assert int(sums["top5"]) == top5


@given(st.lists(st.lists(st.integers(0, 4), max_size=3, unique=True), min_size=1, max_size=12), st.integers(0, 99))
def test_several_answers_may_be_right_and_images_without_are_not_counted(right, seed):
    logits = np.random.default_rng(seed).permuted(np.arange(len(right) * 5)).reshape(len(right), 5)
    table = torch.zeros(len(right), 5, dtype=torch.bool)
    for row, answers in enumerate(right):
        table[row, answers] = True
    scorer = Answers(range(5), table)
    sums = scorer.evaluate(Table(logits), batch([0] * len(right), [True] * len(right)))
    counted = [row for row, answers in enumerate(right) if answers]
    assert int(sums["count"]) == len(counted)
    assert int(sums["top1"]) == sum(int(logits[row].argmax()) in right[row] for row in counted)
    if not counted:
        with pytest.raises(DataError, match="no image has a correct class"):
            scorer.metrics({name: value.item() for name, value in sums.items()})


def test_numbers_are_places_in_the_head_and_not_in_the_data():
    assert outputs_of(["0", "1", "10", "2"], None, 1000) == [0, 1, 10, 2]
    assert outputs_of(["a", "b"], None, 2) == [0, 1]
    assert outputs_of(["b", "z"], ["a", "b", "c"], 3) == [1, None]
    for names, outputs in ((None, 3), (["x", "y", "z"], 3)):
        with pytest.raises(DataError, match="--classes"):
            outputs_of(["a", "b"], names, outputs)
    with pytest.raises(DataError, match="names 2 classes and the head has 3 outputs"):
        outputs_of(["a"], ["a", "b"], 3)


def test_all_outputs():
    logits = np.array([[0, 9, 5], [9, 0, 5]])
    images = batch([0, 0], [True, True])  # both are of the class at output 2
    assert int(Answers([2]).evaluate(Table(logits), images)["top1"]) == 2
    assert int(Answers([2], restricted=False).evaluate(Table(logits), images)["top1"]) == 0
    with pytest.raises(DataError, match="leave --all-outputs out"):
        Answers([None], restricted=False)


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    """Five images of the classes 0, 1, 2, 0, 1."""
    path = tmp_path_factory.mktemp("real") / "val.beton"
    with BetonWriter(path, ("a", "b", "c"), 5) as writer:
        for label in (0, 1, 2, 0, 1):
            writer.add(np.zeros((4, 4, 3), np.uint8), label)
    return open_beton(path)


def test_real_json(five, tmp_path):
    path = tmp_path / "real.json"
    path.write_text(json.dumps([[0, 2], [1], [], [0], [2]]))
    table = real_answers(path, five, [0, 1, 2])
    assert table.nonzero().tolist() == [[0, 0], [0, 2], [1, 1], [3, 0], [4, 2]]
    wrong = {
        "[[0], [1]]": "answers for 2 images",
        "[[1], [2], [0], [1], [2]]": "another order",
        "[[0], [7], [], [], []]": "names class 7",
        "{}": "answers for 0 images",
        "[1, 2]": "no list of lists",
        "[[": "no list of lists",
    }
    for content, sentence in wrong.items():
        path.write_text(content)
        with pytest.raises(DataError, match=sentence):
            real_answers(path, five, [0, 1, 2])


@given(st.integers(1, 30), st.integers(0, 99))
def test_neighbours_vote_as_a_loop_says(count, seed):
    generator = torch.Generator().manual_seed(seed)
    bank, queries = (
        nn.functional.normalize(torch.randn(n, 4, generator=generator, dtype=torch.float64)) for n in (count, 3)
    )
    labels = torch.randint(0, 3, (count,), generator=generator)
    votes = vote(queries, bank, labels, 3)
    for query, row in zip(queries, votes, strict=True):
        near = sorted((float(query @ other), int(label)) for other, label in zip(bank, labels, strict=True))
        expected = [0.0, 0.0, 0.0]
        for similarity, label in near[-NEIGHBOURS:]:
            expected[label] += np.exp(similarity / TEMPERATURE)
        assert row.tolist() == pytest.approx(expected)


def test_parts_of_the_bank_change_nothing():
    bank, labels = nn.functional.normalize(torch.randn(50, 4, dtype=torch.float64)), torch.arange(50) % 3
    whole = vote(bank[:7], bank, labels, 3)
    torch.testing.assert_close(vote(bank[:7], bank, labels, 3, rows=8), whole)


def test_similarities_are_not_rounded_to_bf16():
    generator = torch.Generator().manual_seed(0)
    middle, noise = torch.randn(1, 16, generator=generator), torch.randn(200, 16, generator=generator)
    bank, labels = nn.functional.normalize(middle + 0.05 * noise), torch.arange(200) % 7
    whole = vote(bank[:5], bank, labels, 7)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vote(bank[:5], bank, labels, 7), whole)
