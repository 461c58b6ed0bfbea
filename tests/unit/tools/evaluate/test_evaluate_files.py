"""Accuracies from JPEGs and a weights file, compared with a plain computation by Pillow and torch."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from pipeline.data.beton_writer import BetonWriter
from pipeline.distributed.processes import start_time
from pipeline.distributed.world import World
from pipeline.errors import CheckpointError, DataError, UserError
from pipeline.models import create_model
from pipeline.recipe import load_recipe, write_recipe
from pipeline.recipe.channel_statistics import IMAGENET, ChannelStatistics
from pipeline.stage.directory import Stage
from pipeline.weights.safetensors_file import write_weights
from tests.archives import class_images, write_folder
from tests.oracles import randomise
from tests.support import fcmae, tiny_recipe
from tools.evaluate import run_evaluation as module
from tools.evaluate.run_evaluation import EvaluationRequest, run_evaluation
from tools.predict.image_model import default_crop, load_image_model
from tools.prepare.preparation import prepare_beton

ROOT = Path(__file__).resolve().parents[4]
SIZE, PER_CLASS = 32, 4
WNIDS = ("n01440764", "n01443537", "n02085620", "n04399382")
HEAD = (*WNIDS[:3], "n00000001", "n00000002", "n09999999")  # knows three of the four, and three others


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images, data.beton, and weights.pt: a classifier of HEAD and its moving average."""
    place = tmp_path_factory.mktemp("evaluate")
    write_folder(place / "images", class_images(PER_CLASS, WNIDS))
    prepare_beton(place / "images", place / "data.beton")
    model = create_model("convnextv2", len(HEAD), depths=(1, 1), dims=(8, 16))
    states = [randomise(model.state_dict(), seed) for seed in (0, 1)]
    raw, average = ({name: 3 * tensor.float() for name, tensor in state.items()} for state in states)
    torch.save({"model": raw, "model_ema": average}, place / "weights.pt")
    (place / "head.txt").write_text("\n".join(HEAD))
    return place


def by_hand(place: Path, entry: str, squash: bool = False, statistics: ChannelStatistics = IMAGENET) -> np.ndarray:
    """Logits (images, outputs)."""
    model = create_model("convnextv2", len(HEAD), depths=(1, 1), dims=(8, 16)).eval()
    model.load_state_dict(torch.load(place / "weights.pt")[entry])
    with torch.no_grad():
        return np.concatenate([model(x).numpy() for x in pixels(place, squash, statistics=statistics)])


def pixels(
    place: Path, squash: bool = False, size: int = SIZE, statistics: ChannelStatistics = IMAGENET
) -> Iterator[torch.Tensor]:
    """The input of a model, image by image, in the order of classes and names."""
    for path in sorted((place / "images").glob("*/*")):
        image = Image.open(path).convert("RGB")
        if squash:
            image = image.resize((size, size), Image.BICUBIC)
        else:
            short = int(size / 0.875)
            width, height = (short * side // min(image.size) for side in image.size)
            image = image.resize((width, height), Image.BICUBIC)
            left, top = round((width - size) / 2), round((height - size) / 2)
            image = image.crop((left, top, left + size, top + size))
        x = torch.from_numpy(np.asarray(image, np.float32) / 255).permute(2, 0, 1)
        mean, deviation = (torch.tensor(v)[:, None, None] for v in (statistics.mean, statistics.std))
        yield ((x - mean) / deviation)[None]


LABELS = np.repeat(np.arange(len(WNIDS)), PER_CLASS)


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("squash", [False, True])
def test_subset_accuracy_is_that_of_a_plain_loop(place, ema, squash):
    logits = by_hand(place, "model_ema" if ema else "model", squash=squash)
    among = np.concatenate([logits[:, :3], np.full((len(logits), 1), -np.inf)], 1)  # no output for the fourth class
    job = EvaluationRequest(
        str(place / "weights.pt"),
        str(place / "data.beton"),
        image_size=SIZE,
        crop_pct=1.0 if squash else None,
        ema=ema,
        classes=str(place / "head.txt"),
        batch=5,
        device="cpu",
    )
    result = run_evaluation(job)
    assert result.metrics["top1"] == pytest.approx(100 * (among.argmax(1) == LABELS).mean())
    assert result.metrics["images"] == len(LABELS)
    assert result.missing == ("n04399382",)
    assert "compared were 3 of the classifier's 6 outputs: those of the data's classes" in str(result)
    assert result.weights == ("model_ema" if ema else "model")
    if not ema and not squash:
        assert 0 < result.metrics["top1"] < 100


def test_images_are_normalised_as_the_weights_say(place, tmp_path):
    """A file of ours names the means and deviations that it was trained with."""
    own = ChannelStatistics(mean=(0.3, 0.6, 0.2), std=(0.4, 0.1, 0.3))
    state, path = torch.load(place / "weights.pt")["model"], tmp_path / "weights.safetensors"
    write_weights(path, state, {"classes": list(HEAD), **own.facts})
    model = load_image_model(str(path), image_size=SIZE)
    assert model.transform.statistics == own
    logits = by_hand(place, "model", statistics=own)
    among = np.concatenate([logits[:, :3], np.full((len(logits), 1), -np.inf)], 1)
    result = run_evaluation(EvaluationRequest(str(path), str(place / "data.beton"), image_size=SIZE, device="cpu"))
    assert result.metrics["top1"] == pytest.approx(100 * (among.argmax(1) == LABELS).mean())
    assert (by_hand(place, "model").argmax(1) != logits.argmax(1)).any()


def test_real_answers_of_files(place, tmp_path):
    logits = by_hand(place, "model")[:, :4]
    head = tmp_path / "head.txt"
    head.write_text("\n".join((*WNIDS, "n1", "n2")))
    answers = [[int(label)] if number % 3 else [] for number, label in enumerate(LABELS)]
    answers[1].append(int(logits[1].argmin()))
    (tmp_path / "real.json").write_text(json.dumps(answers))
    job = EvaluationRequest(
        str(place / "weights.pt"), str(place / "data.beton"), image_size=SIZE, classes=str(head),
        real=str(tmp_path / "real.json"), device="cpu",
    )  # fmt: skip
    found = run_evaluation(job)
    right = [row.argmax() in answer for row, answer in zip(logits, answers, strict=True) if answer]
    assert found.metrics["images"] == len(right)
    assert found.metrics["top1"] == pytest.approx(100 * np.mean(right))


@pytest.mark.slow
def test_processes_share_the_images_out_once(place):
    job = EvaluationRequest(
        str(place / "weights.pt"), str(place / "data.beton"), image_size=SIZE, classes=str(place / "head.txt"), batch=3,
        device="cpu",
    )  # fmt: skip
    assert run_evaluation(job, 3).metrics == pytest.approx(run_evaluation(job).metrics)
    neighbours = EvaluationRequest(
        str(place / "weights.pt"), str(place / "data.beton"), image_size=SIZE, knn=str(place / "data.beton"), batch=3,
        device="cpu",
    )  # fmt: skip
    assert run_evaluation(neighbours, 2).metrics == pytest.approx(run_evaluation(neighbours).metrics)
    with pytest.raises(UserError, match="give --classes"):
        run_evaluation(EvaluationRequest(job.weights, job.data, image_size=SIZE, device="cpu"), 2)


@pytest.mark.slow
def test_an_answer_longer_than_a_pipe_arrives(place, tmp_path):
    """The result lists the missing classes: with ImageNet-22K a quarter of a megabyte, more than a pipe holds."""
    names = [HEAD[0], *(f"{number:0100d}" for number in range(1000))]
    with BetonWriter(tmp_path / "many.beton", names, 4) as writer:
        for number in range(4):
            writer.add(np.full((SIZE, SIZE, 3), number, np.uint8), number)
    script = tmp_path / "evaluate.py"
    script.write_text(LONG_ANSWER)
    asked = [place / "weights.pt", tmp_path / "many.beton", place / "head.txt"]
    # In a process with a timeout, because a deadlock must not stop the tests.
    done = subprocess.run(
        [sys.executable, script, *asked], env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=600, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.split() == ["4", "1000"]


LONG_ANSWER = f"""
import sys
from tools.evaluate.run_evaluation import EvaluationRequest, run_evaluation
if __name__ == "__main__":
    weights, data, head = sys.argv[1:]
    found = run_evaluation(EvaluationRequest(weights, data, image_size={SIZE}, classes=head, device="cpu"), 2)
    print(found.metrics["images"], len(found.missing))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_signal_ends_the_processes_that_wait_for_each_other(number):
    """Sent to the whole group, as a terminal does, and while the ranks are in a collective that never ends."""
    command = subprocess.Popen(
        [sys.executable, "-c", WAITING], env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    workers = [int(command.stdout.readline()) for _ in range(2)]
    if number == signal.SIGINT:
        os.killpg(command.pid, number)
    else:
        command.send_signal(number)
    _, said = command.communicate(timeout=600)  # their own limit is an hour
    assert command.returncode == (1 if number == signal.SIGINT else 128 + number)
    assert (said.strip().splitlines() or ["nothing"])[-1] == ("stopped" if number == signal.SIGINT else "nothing")
    assert [start_time(pid) for pid in workers] == [0, 0]


WAITING = """
import sys
import tests.unit.tools.evaluate.test_evaluate_files as here
from tools.evaluate.run_evaluation import run_on_processes
try:
    run_on_processes(here.wait_for_nobody, 2)
except KeyboardInterrupt:
    sys.exit("stopped")
"""


def wait_for_nobody() -> None:
    """On rank 0 receive what rank 1, which receives as well, never sends."""
    world = World.join("cpu", timeout_seconds=3600)
    os.write(1, f"{os.getpid()}\n".encode())
    torch.distributed.recv(torch.zeros(1), 1 - world.rank)


def test_a_rank_whose_gpu_is_full_says_what_to_do(monkeypatch):
    monkeypatch.setattr(module, "die_with_parent", lambda parent: None)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that the test's end removes what is set here
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    answers = SimpleQueue()

    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        module._run_spawned(1, 2, 0, full, answers, 0)
    assert "fewer or smaller images at once" in answers.get()


def test_neighbours_of_files(place):
    model = create_model("convnextv2", len(HEAD), depths=(1, 1), dims=(8, 16)).eval()
    model.load_state_dict(torch.load(place / "weights.pt")["model"])
    with torch.no_grad():
        found = torch.cat([model.norm(model.features(x).mean((1, 2))) for x in pixels(place)])
    found = torch.nn.functional.normalize(found)
    votes = np.zeros((len(LABELS), len(WNIDS)))  # all sixteen images vote, because there are fewer than twenty
    for image, similarities in enumerate((found @ found.t()).tolist()):
        for label, similarity in zip(LABELS, similarities, strict=True):
            votes[image, label] += np.exp(similarity / 0.07)
    data = str(place / "data.beton")
    result = run_evaluation(EvaluationRequest(str(place / "weights.pt"), data, image_size=SIZE, knn=data, device="cpu"))
    assert result.metrics["top1"] == pytest.approx(100 * (votes.argmax(1) == LABELS).mean())
    assert "images of 4 classes" in str(result)


def test_data_that_lack_classes_of_the_neighbours(place, tmp_path):
    """The images of two of four classes: votes and answers are those among all four."""
    for wnid in WNIDS[1:3]:
        (tmp_path / "some" / wnid).parent.mkdir(exist_ok=True)
        (tmp_path / "some" / wnid).symlink_to(place / "images" / wnid)
    prepare_beton(tmp_path / "some", tmp_path / "some.beton")
    weights, some, whole = (str(path) for path in (place / "weights.pt", tmp_path / "some.beton", place / "data.beton"))
    found = [
        run_evaluation(EvaluationRequest(weights, data, image_size=SIZE, knn=whole, device="cpu")).confusions
        for data in (some, whole)
    ]
    classes = [{c.name: (c.images, c.correct) for c in confusions.classes} for confusions in found]
    assert classes[0] == {WNIDS[0]: (0, 0), WNIDS[3]: (0, 0), **{w: classes[1][w] for w in WNIDS[1:3]}}
    assert set(found[0].confused) == {pair for pair in found[1].confused if pair.name in WNIDS[1:3]}
    with pytest.raises(DataError, match=r"data\.beton holds class .*, which --knn .*some\.beton lacks"):
        run_evaluation(EvaluationRequest(weights, whole, image_size=SIZE, knn=some, device="cpu"))


@pytest.fixture
def stage(tmp_path):
    """A finished stage of the tiny chain with an unusual GRN and crop in its recipe."""
    raw = tiny_recipe(tmp_path)
    raw["defaults"]["model"]["grn_normaliser"] = "sum"
    raw["defaults"]["data"]["crop_pct"] = 0.9
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(raw))
    chain = load_recipe(path)
    recipe = chain.stages["intermediate"]
    stage = Stage.create(tmp_path / "run" / "intermediate", recipe)
    write_recipe(chain, tmp_path / "run" / "recipe.yaml")
    model = create_model("convnextv2", 4, depths=(1, 2), dims=(8, 16), stem_stride=2, grn_normaliser="sum")
    tensors = randomise(model.state_dict())
    facts = {"model": recipe.model.model_dump(mode="json"), "image_size": 16, "classes": list("abcd"), "weights": "ema"}
    digest = write_weights(stage.directory / "weights.safetensors", tensors, facts)
    stage.finish({"weights": "weights.safetensors", "weights_sha256": digest}, 1)
    return stage


def test_a_stage_and_its_run_are_evaluated_as_they_were_trained(stage):
    images = torch.randn(2, 3, 16, 16)
    for path in (stage.directory, stage.directory.parent):
        subject = load_image_model(str(path))
        assert (subject.image_size, subject.crop_pct, subject.weights) == (16, 0.9, "ema")
        assert subject.class_names == tuple("abcd")
        assert subject.network.stages[0][0].grn.normaliser == "sum"
        # The weights file records the same except the crop.
        alone = load_image_model(str(stage.directory / "weights.safetensors"))
        assert (alone.image_size, alone.class_names) == (16, tuple("abcd"))
        torch.testing.assert_close(alone.network(images), subject.network(images), rtol=0, atol=0)
    with pytest.raises(CheckpointError, match="no checkpoint; leave --ema and --raw out"):
        load_image_model(str(stage.directory), ema=False)
    assert load_image_model(str(stage.directory), image_size=384).crop_pct == 1.0


def test_sizes_and_crops(place):
    assert (default_crop(224), default_crop(288), default_crop(384), default_crop(512)) == (0.875, 0.875, 1.0, 1.0)
    official = place / "convnextv2_atto_22k_384_ema.pt"
    official.write_bytes((place / "weights.pt").read_bytes())
    subject = load_image_model(str(official))
    assert (subject.image_size, subject.crop_pct) == (384, 1.0)


def test_what_cannot_be_evaluated(place, tmp_path):
    data = str(place / "data.beton")
    encoder = create_model("convnextv2", 0, depths=(1, 1), dims=(8, 16)).state_dict()
    torch.save(encoder, tmp_path / "encoder.pt")
    with pytest.raises(DataError, match="has no head, so it gives no classes; give --knn"):
        run_evaluation(EvaluationRequest(str(tmp_path / "encoder.pt"), data, image_size=SIZE, device="cpu"))
    with pytest.raises(CheckpointError, match="leave --ema out"):
        load_image_model(str(tmp_path / "encoder.pt"), ema=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no finished stage"):
        load_image_model(str(tmp_path / "empty"))
    done = fcmae("evaluate", tmp_path / "encoder.pt", "--data", tmp_path / "none.beton")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert "does not exist" in done.stderr
