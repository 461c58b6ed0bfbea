"""A segmentation stage in real processes: from pre-trained weights to label maps, killed, resumed, on other ranks."""

import json
import os
import signal
from pathlib import Path

import pytest
import yaml

from pipeline.data.beton import open_beton
from pipeline.data.open import evaluation_feed
from pipeline.data.subset import Subset
from pipeline.distributed.world import World
from pipeline.recipe import StageRecipe, load_recipe
from pipeline.tracking import journal
from pipeline.training.evaluation import evaluate
from pipeline.weights.safetensors_file import read_facts
from tests.engines import ENGINES, largest_difference, resume_halfway, train
from tests.processes import start_fcmae
from tests.ranks import on_ranks
from tests.support import fcmae, wait_for_step, weights_sha256
from tests.tiny_scenes import CLASSES, tiny_segmentation, write_scenes


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("scenes")
    write_scenes(directory / "train.beton", range(48))
    write_scenes(directory / "validation.beton", range(1000, 1007))
    (directory / "scenes.yaml").write_text(yaml.safe_dump(tiny_segmentation(directory), sort_keys=False))
    return directory


@pytest.fixture(scope="module")
def run(directory) -> Path:
    """The chain on two ranks, which nothing disturbed."""
    done = fcmae("run", directory / "scenes.yaml", "--out", directory / "run", "--nproc", 2)
    assert done.returncode == 0, done.stderr
    return directory / "run"


def test_the_run_has_scores_overlays_and_weights_that_name_their_classes(run):
    result = json.loads((run / "segment" / "result.json").read_text())
    assert result["steps"] == 12
    assert next(iter(result["metrics"])) == "miou"
    assert {"mean_accuracy", "pixel_accuracy", "loss"} < result["metrics"].keys()
    events = journal.read_events(run / "segment" / "journal.jsonl")
    assert [e["step"] for e in events if e["kind"] == "evaluate"] == [6, 12]
    pictures = [e["path"] for e in events if e["kind"] == "picture" and e["path"].startswith("pictures/")]
    assert all((run / "segment" / path).stat().st_size > 1000 for path in pictures)
    assert len(pictures) == 2
    handed = next(e for e in events if e["kind"] == "handoff")
    assert all(name.startswith(("decode_head.", "auxiliary_head.", "backbone.norm")) for name in handed["initialised"])
    assert handed["dropped"]
    facts = read_facts(run / "segment" / result["weights"])
    assert tuple(facts["classes"]) == CLASSES
    assert facts["segmentation"]["head"]["kind"] == "upernet"
    rates = [e["lr"] for e in events if e["kind"] == "step"]
    assert rates == pytest.approx([4e-3 * (1 - n / 12) * min(n / 2, 1) for n in range(12)])


@pytest.mark.slow
def test_killed_and_resumed_it_ends_with_the_same_bits(run, directory, tmp_path):
    again = tmp_path / "run"
    process = start_fcmae(
        "run", directory / "scenes.yaml", "--out", again, "--nproc", 2, FAULTS=json.dumps({"hold": {"segment": 12}})
    )
    wait_for_step(again / "segment", 8)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert fcmae("run", directory / "scenes.yaml", "--out", again, "--nproc", 2).returncode == 0
    assert weights_sha256(again / "segment") == weights_sha256(run / "segment")


def segment_stage(directory: Path, ranks: int, *overrides: str) -> StageRecipe:
    """The stage from scratch, in double precision, with the micro-batch that so many ranks need."""
    fixed = (
        "stages.pretrain=null",
        f"defaults.batch.micro_slots={max(4 // ranks, 1)}",
        "defaults.engine.precision=fp64",
    )
    return load_recipe(directory / "scenes.yaml", [*fixed, *overrides]).stages["segment"]


def trained(world: World, recipe: StageRecipe, steps: int) -> tuple[list[float], dict]:
    run = train(world, recipe, range(steps))
    return run.losses, evaluated(world, run.engine, run.objective, recipe)


def evaluated(world: World, engine, objective, recipe: StageRecipe) -> dict[str, float]:
    validation = Subset(open_beton(Path(recipe.data.validation)))
    return evaluate(engine, objective, evaluation_feed(recipe, validation, world, 1))


@pytest.mark.slow
@pytest.mark.parametrize("head", ["upernet", "semantic_fpn"])
def test_any_number_of_ranks_trains_and_scores_the_same(directory, head):
    """The norm group of eight images lies on one rank, on two, or on four; 16 ranks would share slots."""
    changes = (f"stages.segment.objective.head={head}", "stages.segment.objective.channels=16")
    found = {n: on_ranks(n, trained, segment_stage(directory, n, *changes), 3)[0] for n in (1, 2, 4)}
    for ranks in (2, 4):
        assert largest_difference(found[ranks][0], found[1][0]) <= 1e-10
        for name in ("miou", "mean_accuracy", "pixel_accuracy"):
            assert found[ranks][1][name] == found[1][1][name], (ranks, name)
        assert found[ranks][1]["loss"] == pytest.approx(found[1][1]["loss"], rel=1e-9)


def losses(world: World, recipe: StageRecipe) -> list[float]:
    return train(world, recipe, range(2)).losses


def test_ranks_that_share_slots_share_norm_groups_too(directory):
    """Four ranks have one image each of two slots of two, and all images are one norm group."""
    changes = {"global_batch": 4, "slot": 2}
    recipe = segment_stage(directory, 4, "stages.segment.objective.norm_group=4")
    found = []
    for ranks, micro_slots in ((1, 2), (4, 1)):
        batch = recipe.batch.model_copy(update={**changes, "micro_slots": micro_slots})
        stage = recipe.model_copy(update={"batch": batch})
        assert stage.norm_group_on(ranks) == (ranks, 4 // ranks)
        found.append(on_ranks(ranks, losses, stage)[0])
    assert largest_difference(*found) <= 1e-10


FAMILIES = {
    "slak": {
        "name": "slak", "depths": [1, 1, 1, 1], "dims": [8, 8, 12, 12], "width": 1.0, "stem_stride": 2,
        "kernel_sizes": [9, 7, 5, 5], "small_kernel": 3,
    },
    "nextvit": {
        "name": "nextvit", "depths": [1, 2, 2, 1], "dims": [12, 24, 48, 48], "stem_stride": 2, "stem_dim": 8,
        "head_dim": 4, "pattern": "CHHC",
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_batchnorms_of_a_backbone_count_norm_groups_too(directory, family):
    changes = [f"defaults.model={json.dumps(FAMILIES[family])}", "stages.segment.optimizer.layer_decay_groups=single"]
    one, four = (on_ranks(n, trained, segment_stage(directory, n, *changes), 3)[0] for n in (1, 4))
    assert largest_difference(four[0], one[0]) <= 1e-9
    assert four[1]["miou"] == one[1]["miou"]


def by_batches(world: World, recipes: list[StageRecipe]) -> list[dict[str, float]]:
    run = train(world, recipes[0], range(2))
    results = []
    for recipe in recipes:
        run.objective.recipe = recipe
        results.append(evaluated(world, run.engine, run.objective, recipe))
    return results


def test_scores_do_not_depend_on_the_batch_of_windows_and_fsdp_makes_equally_many_passes(directory):
    """The scenes have one to six windows, so ranks have other numbers of passes of their own."""
    recipes = [
        segment_stage(directory, 2, "defaults.engine.kind=fsdp", f"stages.segment.evaluation.batch={n}")
        for n in (1, 3, 64)
    ]
    one, three, many = on_ranks(2, by_batches, recipes)[0]
    for name in ("miou", "mean_accuracy", "pixel_accuracy"):
        assert one[name] == three[name] == many[name]


@pytest.mark.slow
def test_four_scenes_are_overfit(directory, tmp_path):
    """Crops of four scenes, jittered and distorted; tested by windows on the same four."""
    write_scenes(tmp_path / "four.beton", range(4))
    values = {
        "data.train": tmp_path / "four.beton", "data.validation": tmp_path / "four.beton",
        "batch.global_batch": 4, "batch.slot": 4, "batch.micro_slots": 1, "objective.norm_group": 4,
        "model.dims": [16, 32, 48, 64], "objective.channels": 64, "objective.drop_path": 0.0, "objective.dropout": 0.0,
        "optimizer.lr": 2e-3, "optimizer.layer_decay": 1.0, "optimizer.layer_decay_groups": "single", "ema": "null",
        "schedule.steps": 160, "schedule.warmup_steps": 10, "evaluation.every_steps": 1000,
        "checkpoint.every_steps": 1000, "tracking.pictures": 0,
    }  # fmt: skip
    changes = [f"stages.segment.{name}={value}" for name, value in values.items()]
    done = fcmae("run", directory / "scenes.yaml", "--out", tmp_path / "run", "stages.pretrain=null", *changes)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "segment" / "result.json").read_text())["metrics"]["miou"] > 95


@pytest.mark.slow
def test_sharded_engines_are_ddp(directory):
    plain = ["defaults.engine.precision=fp32"]
    losses, scores = on_ranks(1, trained, segment_stage(directory, 1, *plain), 6)[0]
    for engine, settings in ENGINES.items():
        changes = [*plain, *(f"defaults.engine.{name}={value}" for name, value in settings.items())]
        found, others = on_ranks(2, trained, segment_stage(directory, 2, *changes), 6)[0]
        assert largest_difference(found, losses) <= 1e-6, engine
        assert others["miou"] == pytest.approx(scores["miou"], abs=0.1), engine


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_resume_has_the_same_bits_on_any_engine(directory, tmp_path, engine):
    settings = (f"defaults.engine.{name}={value}" for name, value in ENGINES[engine].items())
    recipe = segment_stage(directory, 2, "defaults.engine.precision=bf16", *settings)
    names, other = on_ranks(2, resume_halfway, recipe, 2, tmp_path)[0]
    assert any("running_var" in name for name in names)
    assert other == []
