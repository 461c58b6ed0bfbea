"""The figures of an estimate are consistent with each other, with the data files and with the site."""

import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from cluster.site import GPU, GPULimits, Site
from pipeline.cost.loading import images_per_core_second
from pipeline.cost.measure import measure_steps
from pipeline.errors import RecipeError, UserError
from pipeline.recipe import ChainRecipe, load_recipe
from pipeline.recipe.detection_settings import ObjectViewSettings
from pipeline.recipe.sections import DataSettings
from pipeline.recipe.segmentation_settings import SceneSettings
from tests.support import tiny_data, write_tiny_recipe
from tools.estimate.engine_options import NEAR, reason
from tools.estimate.estimate_table import assumptions, estimate_json, render_estimate
from tools.estimate.roofline_table import render_roofline
from tools.estimate.stage_estimate import RESERVE, StageEstimate, estimate

CARD = GPU(name="small", memory_gib=0.01, bf16_tflops=10, fp32_tflops=1, utilisation=0.5)


def site(**fields) -> Site:
    return Site(**{"nodes": 2, "gpus_per_node": 2, "gpu": CARD, **fields})


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> ChainRecipe:
    folder = tmp_path_factory.mktemp("estimate")
    tiny_data(folder / "data")
    return load_recipe(write_tiny_recipe(folder))


@pytest.fixture(scope="module")
def found(chain) -> list[StageEstimate]:
    return estimate(chain, site())


def shown(stages: list[StageEstimate], **options) -> str:
    console = Console(width=200, record=True)
    with console.capture() as text:
        console.print(render_estimate(stages, options.get("price"), options.get("formulas", False)))
    return text.get()


def test_figures_follow_from_each_other(found):
    for stage in found:
        recipe, best = stage.recipe, stage.chosen
        assert stage.steps == math.ceil(recipe.schedule.epochs * (192 // 32))
        assert stage.train.bytes == Path(recipe.data.train).stat().st_size
        macs = stage.steps * 32 * best.training_macs + stage.evaluations * 50 * stage.forward_macs
        assert stage.busy_hours * 4 == pytest.approx(2 * macs / (0.5 * 1e12) / 3600)
        assert 0 < stage.useful_share < 1
        assert stage.hours == pytest.approx(stage.busy_hours / stage.useful_share)
        assert stage.hours == pytest.approx(stage.gpu_hours / 4)
        assert stage.checkpoint_bytes == stage.parameters * (16 if recipe.ema else 12)
        assert best.bytes == sum(term.bytes for term in best.terms)
        assert best.bytes <= stage.memory_bytes == int(0.01 * 2**30 * RESERVE)
        assert all(o.images == 8 * o.micro_slots and o.micro_slots == 1 for o in stage.options)


def test_a_time_limit_that_is_shorter_than_a_start_is_said(chain):
    (stage, *_) = estimate(chain, site(time_limit_minutes=2, stop_before_end_seconds=30))
    assert stage.useful_share is None
    assert stage.hours == stage.busy_hours > 0
    assert "no start comes to a step within time_limit_minutes 2" in shown([stage], formulas=True)


def test_cores_are_those_that_keep_a_rank_busy(chain):
    for card, waits in ((CARD, True), (CARD.model_copy(update={"utilisation": 1e-4}), False)):
        for stage in estimate(chain, site(gpu=card, cpus_per_task=1)):
            of_a_core = images_per_core_second(stage.recipe.data)
            assert stage.cores_per_rank * of_a_core == pytest.approx(stage.speed[0] / 2 / stage.chosen.training_macs)
            assert ("so training will wait for images" in " ".join(assumptions([stage]))) is waits
    assert all(stage.cores_per_rank is None for stage in estimate(chain, site(gpu=None)))


@pytest.mark.parametrize(
    ("size", "augment", "measured"), [(224, False, 779), (384, False, 565), (224, True, 500), (384, True, 265)]
)
def test_cores_follow_the_measured_rates(size, augment, measured):
    """docs/benchmarks.md: the means of three runs with JPEGs of 51 kB; 108 kB take 0.47 ms more."""
    data = DataSettings(train="-", image_size=size, rand_augment="rand-m9-mstd0.5-inc1" if augment else None)
    assert 1 / images_per_core_second(data) == pytest.approx(1 / measured + 0.47e-3, rel=0.05)


@pytest.mark.parametrize(("photometric", "measured"), [(False, 247), (True, 139)])
def test_cores_of_scenes_follow_the_measured_rates(photometric, measured):
    """docs/benchmarks.md: crops of 512 px of JPEGs of 683 x 512."""
    scenes = SceneSettings(photometric=photometric)
    data = DataSettings(train="-", image_size=512, scenes=scenes)
    assert images_per_core_second(data) == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize(
    ("kind", "canvas", "measured"), [("large_scale_jitter", 1024, 68), ("multi_scale", 1344, 63), ("resize", 1344, 48)]
)
def test_cores_of_views_with_objects_are_near_the_measured_rates(kind, canvas, measured):
    """docs/benchmarks.md: one constant for all kinds, though some leave more of the canvas empty."""
    data = DataSettings(train="-", image_size=canvas, views=ObjectViewSettings(kind=kind))
    assert images_per_core_second(data) == pytest.approx(measured, rel=0.25)


def test_everything_is_said(found):
    text = shown(found, price=2.0, formulas=True)
    for word in (
        "pretrain",
        "intermediate",
        "finetune",
        "zero3",
        "ASSUMED 50%",
        "useful share",
        "the encoder on its visible cells",
    ):
        assert word in text, text
    told = json.loads(estimate_json(found, 2.0))
    assert [stage["money"] for stage in told] == [pytest.approx(2 * stage.gpu_hours) for stage in found]
    assert told[0]["chosen"]["engine"] == "ddp"


def test_what_does_not_fit_is_shared_out_or_refused(chain):
    def chosen(gib: float):
        small = site(gpu=CARD.model_copy(update={"memory_gib": gib}), nodes=1)
        (stage,) = estimate(chain.model_copy(update={"stages": {"p": chain.stages["pretrain"]}}), small)
        return stage

    (ddp,) = {o.bytes for o in chosen(1).options if (o.engine, o.checkpointing, o.micro_slots) == ("ddp", False, 1)}
    assert chosen(ddp / 2**30 / RESERVE + 1e-6).chosen.micro_slots == 1
    assert chosen(1).chosen.micro_slots == 2
    nothing = chosen(1e-6)
    assert nothing.chosen is None
    assert "none fits" in shown([nothing])


def test_data_that_is_not_here_must_be_told(chain):
    data = {"train": "/nowhere/a.beton", "validation": "/nowhere/b.beton"}
    stage = chain.stages["finetune"]
    away = chain.model_copy(
        update={"stages": {"f": stage.model_copy(update={"data": stage.data.model_copy(update=data)})}}
    )
    (unknown,) = estimate(away, site())
    assert (unknown.steps, unknown.hours) == (None, None)
    assert "give --images /nowhere/a.beton=N" in shown([unknown])
    (known,) = estimate(away, site(), images=["1_000", "b.beton=50"])
    assert known.steps == 2 * (1000 // 32)
    assert (known.train.images, known.validation.images) == (1000, 50)
    with pytest.raises(UserError, match="is no number of images"):
        estimate(away, site(), images=["b.beton=many"])


def test_files_by_variables_and_no_validation(chain, monkeypatch):
    """As in the included recipes: $FCMAE_DATA in paths, and no evaluation on ImageNet-22K."""
    stage = chain.stages["finetune"]
    train = Path(stage.data.train)
    monkeypatch.setenv("FCMAE_DATA", str(train.parent))
    data = stage.data.model_copy(update={"train": f"$FCMAE_DATA/{train.name}", "validation": None})
    (found,) = estimate(chain.model_copy(update={"stages": {"f": stage.model_copy(update={"data": data})}}), site())
    assert (found.train.images, found.train.on_disk, found.validation) == (192, True, None)
    assert "is not here" not in shown([found], formulas=True)
    assert json.loads(estimate_json([found], None))[0]["data_bytes"] == train.stat().st_size


def test_nodes_that_do_not_divide(chain):
    (stage, *_) = estimate(chain, site(), nodes=3)
    assert (stage.site.nodes, stage.ranks) == (2, 4)
    assert "6 ranks do not divide the 4 slots" in stage.notes[0]
    with pytest.raises(RecipeError, match="do not divide"):
        estimate(chain, site(gpus_per_node=3))


@pytest.mark.slow
def test_measured_steps_correct_the_estimate(chain):
    one = chain.model_copy(update={"stages": {"f": chain.stages["finetune"]}})
    cpus = Site(nodes=1, tasks_per_node=2, memory_gb_per_node=4)
    (plain,), (corrected,) = estimate(one, cpus), estimate(one, cpus, measured_here=True)
    assert plain.hours is None
    assert corrected.busy_hours == pytest.approx(
        2 * corrected.steps * 32 * corrected.chosen.training_macs / 2 / corrected.speed[0] / 3600, rel=0.2
    )
    assert corrected.memory_correction != 1
    assert "measured on cpu" in shown([corrected])
    # The speed measured on a CPU is not used for a site with GPUs.
    (gpus,) = estimate(one, site(), measured_here=True)
    assert "ASSUMED" in gpus.speed[1]


def test_measure_alone(chain):
    found = measure_steps(chain.stages["finetune"], steps=1)
    assert found.images == 8
    assert found.images_per_second > 0
    assert 0 < found.allocated_bytes < found.resident_bytes


LIMITS = GPULimits(bf16_tflops=8, memory_tb_per_second=1, node_gb_per_second=10, network_gb_per_second=10)


def test_with_limits_the_fastest_that_fits_is_recommended(chain):
    limited = site(gpu=CARD.model_copy(update={"memory_gib": 1.0, "limits": LIMITS}))
    for stage in estimate(chain, limited):
        best = stage.chosen
        fits = [option for option in stage.options if option.bytes <= stage.memory_bytes]
        assert best.step.seconds <= NEAR * min(option.step.seconds for option in fits)
        evaluated = 2 * stage.evaluations * stage.validation.images * stage.forward_macs / (4 * stage.speed[0])
        assert stage.busy_hours * 3600 == pytest.approx(stage.steps * best.step.seconds + evaluated)
        text = shown([stage])
        assert "PREDICTED" in text
        assert "ASSUMED" not in text
        assert f"recommended {best.overrides}"[:60] in text
    (small, *_) = estimate(chain, limited, nodes=1)
    assert {option.name for option in small.options} >= {"ddp", "fsdp", "zero3"}


def test_sharding_within_nodes_and_bf16_parameters_are_tried(chain):
    limited = site(gpu=CARD.model_copy(update={"memory_gib": 1.0, "limits": LIMITS}))
    stage = chain.stages["finetune"]
    low = stage.model_copy(update={"engine": stage.engine.model_copy(update={"precision": "bf16"})})
    (found,) = estimate(chain.model_copy(update={"stages": {"f": low}}), limited)
    names = {option.name for option in found.options if not option.checkpointing}
    more = {"fsdp/2", "fsdp + bf16_parameters", "fsdp/2 + bf16_parameters"}
    assert names == {"ddp", "fsdp", "zero1", "zero2", "zero3", *more}
    slow = [o for o in found.options if o.name in ("ddp", "fsdp/2 + bf16_parameters")]
    assert "engine.kind=fsdp engine.shard_ranks=2 engine.precision=bf16_parameters" in slow[-1].overrides
    assert reason(slow[-1], slow, None).startswith("fsdp/2 + bf16_parameters")


def test_what_checkpointing_computes_again_is_no_utilisation_in_the_roofline(chain):
    slow = {"bf16_tflops": 0.001, "limits": LIMITS.model_copy(update={"bf16_tflops": 0.001})}
    limited = site(gpu=CARD.model_copy(update={"memory_gib": 1.0, **slow}))
    (stage,) = estimate(chain.model_copy(update={"stages": {"p": chain.stages["pretrain"]}}), limited)
    vars(stage)["chosen"] = next(option for option in stage.options if option.checkpointing)
    console = Console(width=200, record=True)
    with console.capture() as text:
        console.print(render_roofline(stage))
    (row,) = (line.split() for line in text.get().splitlines() if line.startswith("utilisation"))
    assert row[1] == f"{stage.chosen.step.utilisation:.0%}"


def test_the_roofline_shows_the_kernels_of_a_step(chain):
    limited = site(gpu=CARD.model_copy(update={"memory_gib": 1.0, "limits": LIMITS}))
    one = chain.model_copy(update={"stages": {"p": chain.stages["pretrain"]}})
    console = Console(width=200, record=True)
    with console.capture() as text:
        console.print(render_roofline(*estimate(one, limited)), render_roofline(*estimate(one, site())))
    for words in ("PREDICTED", "ms small", "ms H100 SXM", "ms H200 SXM", "matrix products", "largest sink"):
        assert words in text.get(), text.get()
    assert "set gpu.limits" in text.get()
