"""What a segmentation stage costs: norm groups decide the micro-batches, steps need no data, memory is as measured."""

from collections.abc import Mapping

import pytest

from cluster.site import GPU, Site
from pipeline.cost.collectives import step_collectives
from pipeline.cost.memory import ModelSize
from pipeline.cost.trace import meta_model, trace_step
from pipeline.engines.norm_groups import play_norm_groups
from pipeline.recipe import ChainRecipe, StageRecipe, load_recipe
from pipeline.rehearsal.fake_rank import play_rank
from pipeline.rehearsal.stage_rehearsal import rehearse_stage
from tools.estimate.estimate_table import explain
from tools.estimate.stage_estimate import estimate
from tools.recipes.library import find_recipe

TINY = [
    "defaults.model={name: convnextv2, depths: [1, 1, 1, 1], dims: [16, 24, 32, 40]}",
    "stages.segment.objective.channels=64",
    "stages.segment.objective.auxiliary_channels=32",
    "stages.segment.data.image_size=64",
    "stages.segment.data.scenes={base_size: [128, 64], window_step: 42}",
    "stages.segment.engine.device=cpu",
]
CARD = GPU(name="small", memory_gib=8, bf16_tflops=10, fp32_tflops=1)


def own(*changes: str) -> ChainRecipe:
    return load_recipe(find_recipe("segment-own"), [*TINY, *changes])


@pytest.mark.slow  # what convolutions hold inside differs by processor
@pytest.mark.parametrize(
    ("precision", "changes"), [("fp32", ("norm=batch", "drop_path=0.0")), ("bf16", ("norm=group",))]
)
def test_measured_memory_is_within_five_percent_of_the_traced(precision, changes):
    chain = own(
        "stages.segment.data.image_size=128",  # the memory inside convolutions, which no trace sees, is small beside it
        "stages.segment.data.scenes={base_size: [256, 128], window_step: 85}",
        "stages.segment.batch.micro_slots=8",
        f"stages.segment.engine.precision={precision}",
        *(f"stages.segment.objective.{change}" for change in changes),
    )
    (stage,) = estimate(chain, Site(nodes=1, tasks_per_node=1), measured_here=True)
    assert stage.memory_correction == pytest.approx(1, abs=0.05)


def test_steps_and_kept_checkpoints_need_no_data():
    site = Site(nodes=1, tasks_per_node=1)
    plain, kept = (
        estimate(own(f"stages.segment.checkpoint.keep_every_steps={steps}"), site)[0] for steps in ("null", 1000)
    )
    assert (plain.steps_per_epoch, plain.steps) == (None, 4000)
    assert kept.kept_bytes == plain.kept_bytes + 4 * plain.checkpoint_bytes
    assert "one every 1,000 steps" in "\n".join(explain(kept, None))


def test_each_number_of_ranks_has_the_micro_batches_of_its_norm_groups():
    published = load_recipe(find_recipe("segmentation/v1-tiny"), TINY)
    found = {
        ranks: estimate(published, Site(nodes=ranks, gpus_per_node=1, gpu=CARD), nodes=ranks)[0]
        for ranks in (1, 4, 8, 16)
    }
    images = {ranks: {option.images for option in stage.options} for ranks, stage in found.items()}
    assert images == {1: {16}, 4: {4}, 8: {2}, 16: {1}}
    assert {stage.steps for stage in found.values()} == {160_000}
    assert len({stage.chosen.training_macs for stage in found.values()}) <= 2  # statistics that are shared have none
    (more,) = estimate(published, Site(nodes=40, gpus_per_node=1, gpu=CARD))
    assert more.ranks == 16


def test_the_evaluation_of_an_image_counts_all_its_windows():
    whole, windows = (
        estimate(own(f"stages.segment.data.scenes.test={test}"), Site(nodes=1, gpus_per_node=1, gpu=CARD))[0]
        for test in ("whole", "window")
    )
    # An image of the usual shape is 85 x 64 pixels here, which two windows of 64 x 64 cover.
    assert windows.evaluation_macs > 1.4 * whole.evaluation_macs
    assert whole.evaluation_macs > windows.forward_macs


def test_shared_statistics_are_traced_without_other_ranks():
    recipe = load_recipe(find_recipe("segmentation/v1-tiny"), TINY).stages["segment"]
    alone, shared = trace_step(recipe, "cuda", 1), trace_step(recipe, "cuda", 8)
    assert shared.forward_macs == alone.forward_macs
    _, model = meta_model(recipe)
    play_norm_groups(model, recipe, 8, 2)
    assert model.decode_head.bottleneck.bn.group_images == 2
    assert model.decode_head.bottleneck.bn.group_ranks.size() == 8


NEXTVIT = (
    "{name: nextvit, depths: [1, 2, 2, 1], dims: [12, 24, 48, 48], pattern: CHHC, stem_dim: 8, head_dim: 4,"
    " checkpointing: true}"
)


def fsdp(name: str, *changes: str) -> StageRecipe:
    engine = ("stages.segment.engine.device=auto", "stages.segment.engine.kind=fsdp")
    return load_recipe(find_recipe(name), [*TINY, *engine, *changes]).stages["segment"]


def assert_sent_is_the_formula(recipe: StageRecipe, ranks: int, collectives: Mapping[str, int]) -> None:
    size = ModelSize.of(recipe)
    sums = {c.content: c.tensor_bytes for c in step_collectives(recipe, size, ranks) if c.operation == "all-reduce"}
    assert set(sums) == {"running statistics", "statistics of norm groups"}
    norms = 4 * len(size.shapes)  # one of each gradient, which the formulas leave out
    assert collectives["all-reduce"] == sum(sums.values()) + norms


@pytest.mark.slow
def test_a_rank_of_a_norm_group_is_rehearsed():
    recipe = fsdp("segmentation/v1-tiny")
    result = rehearse_stage(recipe, 3, 8, 8, gpu=True)
    assert (result.problem, result.slow, result.unknown) == ("", "", "")
    assert result.micro_batches == 1
    assert_sent_is_the_formula(recipe, 8, result.collectives)


@pytest.mark.slow
def test_norms_of_blocks_that_are_computed_again_are_summed_again():
    recipe = fsdp("segmentation/nextvit-small-upernet", f"defaults.model={NEXTVIT}")
    assert_sent_is_the_formula(recipe, 8, play_rank(recipe, 3, 8, 8).collectives)
