"""A stage that does not fit into the site's GPUs is refused before it is queued, or warned of when it just fits."""

import re
from pathlib import Path

import pytest
import yaml

from cluster.site import GPU, Site
from cluster.slurm.gpu_memory_check import GIB, check_gpu_memory, smaller_settings
from pipeline.cost.memory import estimate_peak
from pipeline.errors import LaunchError
from pipeline.recipe import ChainRecipe, StageRecipe, load_recipe
from tests.support import write_tiny_recipe
from tools.recipes.library import find_recipe
from tools.run.commands import submit_run


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory) -> Path:
    return write_tiny_recipe(tmp_path_factory.mktemp("memory"))


@pytest.fixture(scope="module")
def chain(recipe_file) -> ChainRecipe:
    return load_recipe(recipe_file)


def site(gib: float | None, **fields) -> Site:
    gpu = gib and GPU(name="B7 PCIe", memory_gib=gib, bf16_tflops=10, fp32_tflops=1)
    return Site(**{"nodes": 1, "gpus_per_node": 2, "gpu": gpu, **fields})


def needed(recipe: StageRecipe, ranks: int = 2) -> float:
    return sum(term.bytes for term in estimate_peak(recipe, ranks, "cuda")) / GIB


def changed(recipe: StageRecipe, **sections: dict) -> StageRecipe:
    return recipe.model_copy(update={n: getattr(recipe, n).model_copy(update=u) for n, u in sections.items()})


def test_what_does_not_fit_is_one_sentence_with_the_figures_and_the_remedy():
    recipe = changed(
        load_recipe(find_recipe("atto")).stages["pretrain"], batch={"micro_slots": 2}, evaluation={"batch": 1}
    )
    gib = needed(recipe, 64)
    assert 0.4 < gib < 2
    with pytest.raises(LaunchError) as refused:
        check_gpu_memory(recipe, site(0.4, nodes=32))
    assert re.sub(r"alone \d\.\d", "alone X", str(refused.value)) == (
        f"stage pretrain: a rank is estimated to need {gib:.1f} GiB (activations alone X), and the site's"
        " gpu, B7 PCIe, has 0.4; set stages.pretrain.batch.micro_slots below 2 or"
        " stages.pretrain.model.checkpointing=true or stages.pretrain.engine.kind=fsdp (`fcmae estimate` tells what"
        " fits), or leave gpu out of the site if you know better"
    )


@pytest.mark.parametrize(
    ("sections", "remedies"),
    [
        ({"engine": {"kind": "deepspeed", "zero_stage": 2}}, ["engine.zero_stage=3", "engine.offload=true"]),
        ({"engine": {"kind": "deepspeed", "zero_stage": 3, "offload": True}}, []),
        ({"engine": {"kind": "fsdp", "shard_ranks": 1}}, ["engine.shard_ranks above 1", "engine.offload=true"]),
        ({"engine": {"kind": "fsdp"}, "model": {"checkpointing": True}}, ["engine.offload=true"]),
    ],
)
def test_each_remedy_is_one_that_the_recipe_has_not_taken(chain, sections, remedies):
    recipe = changed(chain.stages["intermediate"], evaluation={"batch": 1}, **sections)
    if not recipe.model.checkpointing:
        remedies = ["model.checkpointing=true", *remedies]
    assert list(smaller_settings(recipe, evaluating=False)) == remedies


def test_an_evaluation_that_does_not_fit_needs_a_smaller_batch(chain):
    recipe = changed(chain.stages["finetune"], evaluation={"batch": 4096})
    with pytest.raises(
        LaunchError, match=r"evaluation alone .*; set stages\.finetune\.evaluation\.batch below 4096 or"
    ):
        check_gpu_memory(recipe, site(needed(recipe) / 2))


def test_remedies_take_less(chain):
    """Of a model whose activations and state both count."""
    recipe = changed(chain.stages["pretrain"], batch={"micro_slots": 2}, evaluation={"batch": 1})
    for less in (
        {"batch": {"micro_slots": 1}}, {"model": {"checkpointing": True}}, {"engine": {"kind": "fsdp"}},
    ):  # fmt: skip
        assert needed(changed(recipe, **less)) < needed(recipe)


def test_near_the_limit_it_is_a_warning(chain):
    recipe = chain.stages["pretrain"]
    gib = needed(recipe)
    assert check_gpu_memory(recipe, site(gib * 1.2)).warning is None
    assert check_gpu_memory(recipe, site(gib * 1.05)).warning == (
        f"warning: stage pretrain is estimated to need {gib:.1f} of the {gib * 1.05:.1f} GiB that a rank's B7 PCIe has,"
        " and CUDA and NCCL need some too"
    )


def test_nothing_is_checked_where_nobody_says_what_there_is(chain):
    recipe = chain.stages["pretrain"]
    assert check_gpu_memory(recipe, site(None)) is None
    assert check_gpu_memory(recipe, site(1e-6, gpus_per_node=0)) is None
    assert check_gpu_memory(changed(recipe, engine={"device": "cpu"}), site(1e-6)) is None


def test_an_estimate_that_cannot_be_made_is_told_and_refuses_nothing(chain, monkeypatch):
    def fail(*_: object) -> None:
        raise NotImplementedError("no\nmeta kernel")

    monkeypatch.setattr("pipeline.cost.memory.estimate_peak", fail)
    found = check_gpu_memory(chain.stages["pretrain"], site(80))
    assert str(found) == "? of 80.0"
    assert found.warning == (
        "warning: the memory of stage pretrain was not checked: NotImplementedError: no meta kernel"
    )


def test_submit_shows_it_and_refuses_before_anything_is_queued(recipe_file, chain, tmp_path, fake_slurm, capsys):
    fake_slurm.answer("squeue", "")
    fake_slurm.answer("scontrol", "PartitionName=gpu Default=YES State=UP MaxTime=UNLIMITED")
    fake_slurm.answer("sbatch", "Submitted batch job 7")
    path, run = tmp_path / "site.yaml", tmp_path / "run"

    def at(gib: float, **options: bool) -> tuple[str, str]:
        path.write_text(yaml.safe_dump(site(gib).model_dump(mode="json")))
        submit_run(str(recipe_file), str(path), run, **options)
        return capsys.readouterr()

    most = max(needed(stage) for stage in chain.stages.values())
    with pytest.raises(LaunchError, match="a rank is estimated to need"):
        at(most / 2)
    assert not run.exists()
    shown = at(80, dry_run=True)
    assert shown.err.splitlines() == [
        f"stage {name}: {needed(stage):.1f} of 80.0 GiB of a B7 PCIe by estimate"
        for name, stage in chain.stages.items()
    ]
    assert "estimate" not in shown.out
    assert "warning: stage" in at(most * 1.05, dry_run=True).err
    shown = at(80).out
    assert "GiB of a GPU" in shown
    assert shown.count(" of 80.0 ") == 3
    assert shown.count(": job 7") == 3
