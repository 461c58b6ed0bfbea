"""Any rank of a job of any size plays its steps, its save plan and an evaluation in one process of a machine without
GPUs."""

import dataclasses
import math

import pytest
import torch

from pipeline.cost.collectives import step_collectives
from pipeline.cost.memory import ModelSize
from pipeline.objectives.classification import ClassificationObjective
from pipeline.rehearsal.fake_rank import play_rank
from pipeline.rehearsal.stage_rehearsal import rehearse_stage
from tests.engines import stage_recipe


def recipe_of(stage: str, ranks: int, kind: str = "fsdp", micro_batches: int = 1, **engine):
    engine = {"kind": kind, **engine}
    return stage_recipe(stage, batch={"global_batch": 2 * ranks * micro_batches, "slot": 2}, engine=engine, ema=0.9)


def cut(shape: tuple[int, ...], ranks: int) -> tuple[int, list[int]]:
    """The elements of a row, and how many rows each rank has: as torch.chunk cuts the first dimension, or another one
    that divides evenly where the first is 1."""
    dim = next((d for d, size in enumerate(shape) if size > 1 and size % ranks == 0), 0) if shape[0] == 1 else 0
    rows = [len(part) for part in torch.empty(shape[dim]).chunk(ranks)]
    return math.prod(shape) // shape[dim], rows + [0] * (ranks - len(rows))


@pytest.mark.parametrize(
    ("stage", "rank", "shard"), [("pretrain", 0, None), ("finetune", 511, None), ("finetune", 9, 8)]
)
def test_a_rank_of_512_holds_saves_and_sends_what_fsdp_gives_it(stage, rank, shard):
    recipe = recipe_of(stage, 512, shard_ranks=shard)
    size, ranks = ModelSize.of(recipe), shard or 512
    cuts = [cut(shape, ranks) for shape in size.shapes]
    held = sum(row * rows[rank % ranks] for row, rows in cuts)
    padded = sum(row * max(rows) * ranks for row, rows in cuts)  # all ranks send as much as the first
    played = play_rank(recipe, rank, 512, 8)
    assert played.held == held
    if shard is None:  # weights, two moments and the average, and for some parameters a number of steps
        assert 16 * held <= played.save_bytes <= 16 * held + 4 * len(size.shapes) + 2**11
    formulas = {collective.operation: collective.tensor_bytes for collective in step_collectives(recipe, size, 512)}
    expected = {"reduce-scatter": padded, "all-reduce": padded // ranks}
    for operation, formula in formulas.items():
        norms = 16 * len(size.shapes)  # one of each gradient and two steps, which the formulas leave out
        assert formula == 4 * expected.get(operation, formula // 4)
        assert formula <= played.collectives[operation] <= formula + norms


def test_micro_batches_gather_again_and_reduce_once():
    one, many = (play_rank(recipe_of("pretrain", 4, micro_batches=n), 3, 4, 4).collectives for n in (1, 5))
    assert many["all-gather"] == 5 * one["all-gather"]
    assert many["reduce-scatter"] == one["reduce-scatter"]


@pytest.mark.parametrize("kind", ["ddp", "deepspeed"])
def test_engines_that_cannot_wrap_fake_tensors_are_rehearsed_by_formula(kind):
    result = rehearse_stage(recipe_of("finetune", 512, kind), 511, 512, 8, gpu=True)
    assert not result.problem
    assert not result.unknown
    assert result.by_formula
    assert result.held == result.parameters
    assert result.collectives["all-reduce"] == 4 * result.parameters
    assert result.peak_bytes > 16 * result.parameters / (1 if kind == "ddp" else 2)


def test_ranks_that_do_not_divide_are_refused():
    recipe = recipe_of("finetune", 512)
    assert "511 processes do not divide" in rehearse_stage(recipe, 0, 511, 8, gpu=False).problem
    sharded = recipe_of("finetune", 512, shard_ranks=7)
    assert "shard_ranks is 7 but 512 processes run" in rehearse_stage(sharded, 0, 512, 8, gpu=False).problem
    assert "no rank 512 of 512" in rehearse_stage(recipe, 512, 512, 8, gpu=False).problem


def test_a_host_tensor_in_an_operator_of_the_gpu_is_refused(monkeypatch):
    honest = ClassificationObjective.loss

    def mixed(self, *arguments):
        return honest(self, *arguments) * torch.ones(1)

    monkeypatch.setattr(ClassificationObjective, "loss", mixed)
    recipe = recipe_of("finetune", 8)
    result = rehearse_stage(recipe, 0, 8, 8, gpu=True)
    assert "test_stage_rehearsal.py" in result.problem
    assert "gets tensors of the GPU and one of shape (1,) of the host" in result.problem
    assert not rehearse_stage(recipe, 0, 8, 8, gpu=False).problem


def test_a_step_that_waits_for_the_device_is_slow_and_no_failure(monkeypatch):
    honest = ClassificationObjective.loss

    def waiting(self, *arguments):
        loss = honest(self, *arguments)
        if loss.device.type == "meta":
            loss.item()
        return loss

    monkeypatch.setattr(ClassificationObjective, "loss", waiting)
    result = rehearse_stage(recipe_of("finetune", 8), 0, 8, 8, gpu=True)
    assert "reads a value of the device" in result.slow
    assert not result.problem


def test_what_the_rehearsal_itself_cannot_do_is_no_problem_of_the_recipe(monkeypatch):
    def broken(self, *arguments):
        raise NotImplementedError("no kernel for fake tensors\nand more")

    monkeypatch.setattr(ClassificationObjective, "loss", broken)
    result = rehearse_stage(recipe_of("finetune", 8), 0, 8, 8, gpu=True)
    assert not result.problem
    assert result.unknown == "NotImplementedError: no kernel for fake tensors"
    assert dataclasses.asdict(result) == result.facts()
