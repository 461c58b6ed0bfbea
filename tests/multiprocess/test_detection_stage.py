"""A detection stage in real processes: from pre-trained weights to boxes and masks, killed, resumed, on other ranks."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml

from pipeline.data.beton import open_beton
from pipeline.data.open import evaluation_feed, train_feed
from pipeline.data.subset import Subset, select_subset
from pipeline.distributed.sharded_tensors import whole
from pipeline.distributed.world import World
from pipeline.errors import RecipeError
from pipeline.models import initial_values
from pipeline.recipe import StageRecipe, load_recipe
from pipeline.tracking import journal
from pipeline.training.evaluation import evaluate
from pipeline.weights.safetensors_file import read_facts
from tests.engines import ENGINES, Trained, largest_difference, resume_halfway, train
from tests.processes import start_fcmae
from tests.ranks import on_ranks
from tests.support import fcmae, wait_for_step, weights_sha256
from tests.tiny_objects import CLASSES, tiny_detection, write_composed, write_objects

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


def fed(world: World, recipe: StageRecipe, steps: range, **places: Path) -> Trained:
    """Steps on the stage's own feed."""
    data = select_subset(open_beton(Path(recipe.data.train)), annotated_only=True)
    feed = train_feed(recipe, data, 3, world, 1)
    run = train(world, recipe, steps, slots=feed.slots, **places)
    feed.close()
    return run


def trained(world: World, recipe: StageRecipe, steps: int) -> tuple[list[float], dict[str, float]]:
    """Losses of steps, and the scores afterwards."""
    run = fed(world, recipe, range(steps))
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


def losses(world: World, recipe: StageRecipe, steps: int) -> list[float]:
    return fed(world, recipe, range(steps)).losses


@pytest.mark.parametrize(("precision", "bound"), [("fp64", 1e-10), ("fp32", 1e-5)])
def test_sharded_engines_are_ddp(directory, precision, bound):
    """On as many ranks, as the order of fp32's sums may exchange proposals. DeepSpeed has no fp64."""
    kinds = {"fp64": ("ddp", "fsdp"), "fp32": ("ddp", "zero1", "zero2", "zero3")}[precision]
    found = {}
    for kind in kinds:
        settings = {"precision": precision, **ENGINES[kind]}
        changes = [f"defaults.engine.{name}={value}" for name, value in settings.items()]
        found[kind] = on_ranks(2, losses, detect_stage(directory, 2, *changes), 3)[0]
        assert largest_difference(found[kind], found["ddp"]) <= bound, kind


def test_norm_groups_of_a_cascade_lie_on_one_rank_or_on_four(directory):
    settings = {"head": "cascade", "region_norm": "batch", "norm_group": 8, "box_loss": "giou"}
    changes = [f"stages.detect.objective.{name}={value}" for name, value in settings.items()]
    one, four = (on_ranks(n, trained, detect_stage(directory, n, *changes), 3)[0] for n in (1, 4))
    assert largest_difference(four[0], one[0]) <= 1e-9
    assert four[1] == one[1]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_resume_has_the_same_bits_on_any_engine(directory, tmp_path, engine):
    settings = (f"defaults.engine.{name}={value}" for name, value in ENGINES[engine].items())
    recipe = detect_stage(directory, 2, "defaults.engine.precision=bf16", *settings)
    names, other = on_ranks(2, resume_halfway, recipe, 2, tmp_path, fed)[0]
    assert names
    assert other == []


def test_heads_are_kept_and_each_part_of_the_loss_is_journalled(run, directory, tmp_path):
    settings = {
        "init.start": "file", "init.head": "keep", "init.weights": f"{run}/detect/weights.safetensors",
        "schedule.steps": 1, "schedule.warmup_steps": 0, "schedule.decay": "cosine", "schedule.milestones": "[]",
    }  # fmt: skip
    changes = [f"stages.detect.{name}={value}" for name, value in settings.items()]
    done = fcmae("run", directory / "objects.yaml", "--out", tmp_path / "run", "stages.pretrain=null", *changes)
    assert done.returncode == 0, done.stderr
    events = journal.read_events(tmp_path / "run" / "detect" / "journal.jsonl")
    handed = next(e for e in events if e["kind"] == "handoff")
    assert (handed["initialised"], handed["dropped"]) == ([], [])
    step = next(e for e in events if e["kind"] == "step")
    parts = [value for name, value in step.items() if name.startswith("loss_")]
    assert len(parts) == 5
    assert sum(parts) == pytest.approx(step["loss"], rel=1e-5)


def test_four_scenes_are_overfit(directory, tmp_path):
    """The demo's kind of scenes, jittered and flipped in training, and tested on the same four."""
    write_composed(tmp_path / "four.beton", range(4))
    values = {
        "data.train": tmp_path / "four.beton", "data.validation": tmp_path / "four.beton", "data.image_size": 96,
        "data.views.scale": "[0.8,1.2]", "data.views.test_size": "[96,96]",
        "batch.global_batch": 4, "batch.slot": 4, "batch.micro_slots": 1, "model.dims": "[16,32,48,64]",
        "objective.classes": 10, "objective.head_channels": 64, "objective.fc_channels": 128,
        "objective.drop_path": 0.0, "objective.regions": 64, "objective.anchors_sampled": 64,
        "objective.proposals": 100,
        "optimizer.lr": 1e-3, "optimizer.layer_decay": 1.0, "ema": "null", "schedule.steps": 200,
        "schedule.warmup_steps": 10, "schedule.milestones": "[150]", "evaluation.every_steps": 1000,
        "checkpoint.every_steps": 1000, "tracking.pictures": 4,
    }  # fmt: skip
    changes = [f"stages.detect.{name}={value}" for name, value in values.items()]
    done = fcmae("run", directory / "objects.yaml", "--out", tmp_path / "run", "stages.pretrain=null", *changes)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run" / "detect" / "result.json").read_text())["metrics"]
    assert metrics["box_ap50"] > 90
    assert metrics["mask_ap50"] > 90


def frozen_and_trained(world: World, recipe: StageRecipe, steps: int) -> tuple[list[float], list[str]]:
    """Losses of steps, and which tensors of the frozen parts changed or have moments."""
    data = select_subset(open_beton(Path(recipe.data.train)), annotated_only=True)
    feed = train_feed(recipe, data, 3, world, 1)
    run = train(world, recipe, range(steps), slots=feed.slots)
    feed.close()
    before, state = dict(initial_values(run.engine.module, run.engine.module.seed)), run.engine.state(steps)
    after = {name: whole(tensor).cpu() for name, tensor in state["model"].items()}
    frozen = [name for name in after if name.startswith(("backbone.stem.", "backbone.features.0."))]
    moved = {name for name in after if not torch.equal(after[name], before[name].to(after[name].dtype))}
    assert moved
    assert frozen
    return run.losses, sorted((set(frozen) & (moved | state["optim"].keys())) | {n for n in moved if "running" in n})


def test_frozen_weights_stay_and_the_others_train_alike_under_ddp_and_fsdp(directory):
    model = "{name: nextvit, depths: [1, 2, 1], dims: [24, 24, 48], pattern: CHC, head_dim: 4, stem_dim: 8}"
    changes = [
        f"defaults.model={model}",
        "stages.detect.objective.frozen_stages=1",
        "stages.detect.objective.frozen_norms=true",
        "stages.detect.init.weights=any",
        "stages.detect.optimizer.layer_decay=1.0",
    ]
    losses, broken = on_ranks(1, frozen_and_trained, detect_stage(directory, 1, *changes), 3)[0]
    assert broken == []
    for engine in ("ddp", "fsdp"):
        recipe = detect_stage(directory, 2, *changes, f"defaults.engine.kind={engine}")
        found, broken = on_ranks(2, frozen_and_trained, recipe, 3)[0]
        assert (largest_difference(found, losses) <= 1e-10, broken) == (True, []), engine
    fp32 = "defaults.engine.precision=fp32"
    with pytest.raises(RecipeError, match=r"frozen_stages is 1, but engine\.kind deepspeed"):
        detect_stage(directory, 1, *changes, "defaults.engine.kind=deepspeed", fp32)
