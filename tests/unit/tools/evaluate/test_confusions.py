"""Confusions of any number of classes, and evaluations that are kept beside a stage for the report."""

import json

import numpy as np
import pytest
import torch

from pipeline.data.beton_writer import BetonWriter
from tests.fitted import SIZE, fitted_classifier, write_fitted_run
from tests.support import CLASSES, fcmae, tiny_image
from tools.evaluate.confusions import MATRIX_CLASSES, OTHER, Confusions
from tools.evaluate.kept_results import kept_results
from tools.evaluate.run_evaluation import EvaluationRequest, run_evaluation
from tools.report import write_report


def random_answers(classes: int, images: int = 3000) -> tuple[list[str], np.ndarray, np.ndarray]:
    draw = np.random.default_rng(classes)
    labels = draw.integers(0, classes, images)
    answers = np.where(draw.random(images) < 0.7, labels, draw.integers(-1, classes + 2, images))
    return [f"class {number}" for number in range(classes)], labels, answers


@pytest.mark.parametrize("classes", [2, 7, 20, 21, 1000])
def test_every_image_is_counted_once(classes):
    names, labels, answers = random_answers(classes)
    found = Confusions.of_answers(names, labels, answers)
    assert Confusions.of_json(json.loads(json.dumps(found.json_facts()))) == found
    assert sum(row.images for row in found.classes) == len(labels)
    assert sum(row.correct for row in found.classes) == (labels == answers).sum()
    assert sum(pair.images for pair in found.confused) == (labels != answers).sum()
    for name, images, correct in found.classes:
        own = labels == names.index(name)
        assert (images, correct) == (own.sum(), (own & (answers == labels)).sum())
    for name, answer, images in found.confused[:50]:
        given = answers[labels == names.index(name)]
        outside = (given < 0) | (given >= classes)
        assert images == (outside if answer == OTHER else given == names.index(answer)).sum()
    counts = [pair.images for pair in found.confused]
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize("classes", [2, 20, 21, 1000])
def test_tables_fit_a_page(classes):
    names, labels, answers = random_answers(classes)
    tables = Confusions.of_answers(names, labels, answers).tables()
    for _, headers, rows in tables:
        assert all(len(row) == len(headers) for row in rows)
        assert len(rows) <= MATRIX_CLASSES
        assert len(headers) <= MATRIX_CLASSES + 4
    if classes <= MATRIX_CLASSES:
        (_, headers, rows), cells = tables[0], [[0 if c == "·" else int(c) for c in row[1:-1]] for row in tables[0][2]]
        assert headers[1:-2] == [*map(str, range(1, classes + 1)), "other"]
        assert all(sum(row[:-1]) == row[-1] for row in cells)
        assert [row[0] for row in rows] == [f"{number} {name}" for number, name in enumerate(names, 1)]
    else:
        accuracies = [float(row[2].removesuffix(" %")) for row in tables[0][2]]
        assert accuracies == sorted(accuracies)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """run, train.beton, test.beton, and given.pt: the run's classifier after its weights were disturbed."""
    place = tmp_path_factory.mktemp("confusions")
    write_fitted_run(place / "run")
    for name, first in (("train", 0), ("test", 2000)):
        with BetonWriter(place / f"{name}.beton", CLASSES, 60) as writer:
            for number in range(first, first + 60):
                writer.add(*tiny_image(number))
    state = fitted_classifier().state_dict()
    torch.manual_seed(0)
    torch.save({name: t + 0.3 * torch.randn_like(t) for name, t in state.items()}, place / "given.pt")
    return place


def evaluate(place, *options: object):
    return fcmae("evaluate", place / "run", "--data", place / "test.beton", *options, timeout_seconds=120)


def test_the_head_is_judged_by_class(place):
    done = evaluate(place, "--per-class", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert [row["class"] for row in facts["per_class"]] == list(CLASSES)
    assert sum(row["correct"] for row in facts["per_class"]) == pytest.approx(facts["metrics"]["top1"] * 60 / 100)
    assert evaluate(place, "--per-class").stdout.count("gradient") == 1
    report = write_report([str(place / "run")], place / "page.html", markdown=False, compare=False).read_text()
    assert "Images of each class (rows)" in report
    for number, name in enumerate(CLASSES, 1):
        assert f"{number} {name}" in report


def test_own_and_given_weights_stand_beside_each_other(place):
    knn = ("--knn", place / "train.beton", "--beside", place / "given.pt")
    done = evaluate(place, *knn)
    assert done.returncode == 0, done.stderr
    own, given = next(results for results in kept_results(place / "run" / "finetune") if results[0].neighbours_of)
    alone = [
        run_evaluation(
            EvaluationRequest(
                str(place / weights), str(place / "test.beton"), image_size=SIZE, crop_pct=1.0,
                knn=str(place / "train.beton"), device="cpu",
            )
        ).metrics["top1"]
        for weights in ("run", "given.pt")
    ]  # fmt: skip
    assert [own.top1, given.top1] == alone
    word = "more" if own.top1 >= given.top1 else "less"
    sentence = f"{abs(own.top1 - given.top1):.2f} percentage points {word}"
    assert sentence in done.stdout
    report = write_report([str(place / "run")], place / "page.md", markdown=True, compare=False).read_text()
    assert sentence in report
    assert f"{own.top1:.2f} %" in report
    assert f"{given.top1:.2f} %" in report


def test_damaged_results_are_left_out_of_the_report(place):
    folder = place / "run" / "finetune" / "evaluations"
    folder.mkdir(exist_ok=True)
    names = [f"zz{number}.json" for number in range(5)]
    for name, content in zip(names, ("{", "[]", "[{}]", '[{"metrics": 3}]', "[3]"), strict=True):
        (folder / name).write_text(content)
    assert len(kept_results(place / "run" / "finetune")) == len(list(folder.glob("*.json"))) - 5
    for name in names:
        (folder / name).unlink()
