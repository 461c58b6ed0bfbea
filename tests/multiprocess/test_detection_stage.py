"""A detection stage in real processes: from pre-trained weights to boxes and masks, killed, resumed, on other ranks."""

import json
import os
import signal
from pathlib import Path

import pytest
import yaml

from pipeline.data.beton import open_beton
from pipeline.data.open import evaluation_feed, train_feed
from pipeline.data.subset import Subset, select_subset
from pipeline.distributed.world import World
from pipeline.recipe import StageRecipe, load_recipe
from pipeline.tracking import journal
from pipeline.training.evaluation import evaluate
from pipeline.weights.safetensors_file import read_facts
from tests.engines import ENGINES, largest_difference, train
from tests.processes import start_fcmae
from tests.ranks import on_ranks
from tests.support import fcmae, wait_for_step, weights_sha256
from tests.tiny_objects import CLASSES, tiny_detection, write_objects

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("objects")
    write_objects(directory / "train.beton", range(48))
    write_objects(directory / "validation.beton", range(1000, 1007))
    (directory / "objects.yaml").write_text(yaml.safe_dump(tiny_detection(directory), sort_keys=False))
    return directory


@pytest.fixture(scope="module")
def run(directory) -> Path:
    """The chain on two ranks, which nothing disturbed."""
    done = fcmae("run", directory / "objects.yaml", "--out", directory / "run", "--nproc", 2)
    assert done.returncode == 0, done.stderr
    return directory / "run"


def test_the_run_has_scores_pictures_and_weights_that_name_their_classes(run):
    result = json.loads((run / "detect" / "result.json").read_text())
    assert result["steps"] == 12
    assert next(iter(result["metrics"])) == "box_ap"
    assert {"box_ap50", "box_ap_small", "box_ar100", "mask_ap", "mask_ap75", "mask_ar10"} < result["metrics"].keys()
    events = journal.read_events(run / "detect" / "journal.jsonl")
    assert [e["step"] for e in events if e["kind"] == "evaluate"] == [6, 12]
    pictures = [e["path"] for e in events if e["kind"] == "picture" and e["path"].startswith("pictures/")]
    assert all((run / "detect" / path).stat().st_size > 1000 for path in pictures)
    assert len(pictures) == 2
    handed = next(e for e in events if e["kind"] == "handoff")
    assert all(name.startswith(("neck.", "rpn_head.", "roi_head.", "backbone.norm")) for name in handed["initialised"])
    assert handed["dropped"]
    facts = read_facts(run / "detect" / result["weights"])
    assert tuple(facts["classes"]) == CLASSES
    rates = [e["lr"] for e in events if e["kind"] == "step"]
    assert rates == pytest.approx([0.0, 1e-3, *[2e-3] * 6, 2e-4, 2e-4, 2e-5, 2e-5])


def test_killed_and_resumed_it_ends_with_the_same_bits(run, directory, tmp_path):
    again = tmp_path / "run"
    process = start_fcmae(
        "run", directory / "objects.yaml", "--out", again, "--nproc", 2, FAULTS=json.dumps({"hold": {"detect": 12}})
    )
    wait_for_step(again / "detect", 8)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert fcmae("run", directory / "objects.yaml", "--out", again, "--nproc", 2).returncode == 0
    assert weights_sha256(again / "detect") == weights_sha256(run / "detect")


def detect_stage(directory: Path, ranks: int, *overrides: str) -> StageRecipe:
    """The stage from scratch, in double precision, with the micro-batch that so many ranks need."""
    fixed = (
        "stages.pretrain=null",
        f"defaults.batch.micro_slots={max(4 // ranks, 1)}",
        "defaults.engine.precision=fp64",
    )
    return load_recipe(directory / "objects.yaml", [*fixed, *overrides]).stages["detect"]


def trained(world: World, recipe: StageRecipe, steps: int) -> tuple[list[float], dict[str, float]]:
    """Losses of steps on the stage's own feed, and the scores afterwards."""
    data = select_subset(open_beton(Path(recipe.data.train)), annotated=True)
    feed = train_feed(recipe, data, 3, world, 1)
    run = train(world, recipe, range(steps), slots=feed.slots)
    feed.close()
    validation = Subset(open_beton(Path(recipe.data.validation)))
    return run.losses, evaluate(run.engine, run.objective, evaluation_feed(recipe, validation, world, 1))


@pytest.mark.parametrize("head", ["mask_rcnn", "cascade"])
def test_any_number_of_ranks_trains_and_scores_the_same(directory, head):
    """Views, proposals and samples are those of each image alone, so only the order of additions differs."""
    changes = f"stages.detect.objective.head={head}"
    found = {n: on_ranks(n, trained, detect_stage(directory, n, changes), 3)[0] for n in (1, 2, 4)}
    for ranks in (2, 4):
        assert largest_difference(found[ranks][0], found[1][0]) <= 1e-10
        assert found[ranks][1] == found[1][1]


def test_sharded_engines_are_ddp(directory):
    plain = ["defaults.engine.precision=fp32"]
    losses, _ = on_ranks(1, trained, detect_stage(directory, 1, *plain), 3)[0]
    for engine, settings in ENGINES.items():
        changes = [*plain, *(f"defaults.engine.{name}={value}" for name, value in settings.items())]
        found, _ = on_ranks(2, trained, detect_stage(directory, 2, *changes), 3)[0]
        assert largest_difference(found, losses) <= 1e-5, engine
