"""The bytes of a step agree with counts by hand, run eagerly and with fused blocks."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.cost import trace as trace_module
from pipeline.cost.kernel_bytes import (
    DEPTHWISE,
    GROUPS,
    INSTRUCTIONS,
    MATRIX,
    NORM,
    POINTWISE,
    RESPONSE,
    WEIGHTS,
    Kernels,
    OperationLog,
    count_eager,
    count_fused,
)
from pipeline.cost.trace import StepTraces, _Live, trace_step
from tests.unit.cost.test_trace import stage

SITES, C = 1000, 64
ROW = SITES * C * 4  # bytes of features in fp32


def logged(function, *inputs: Tensor) -> OperationLog:
    """The operators of a function, as one pass through a block."""
    live = _Live(nn.Module(), log=True)
    live.log.block, live.log.began = (0, "forward"), True
    with live:
        kept = function(*inputs)  # noqa: F841 - a value that dies is not an output
    return live.log


def x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*(shape or (SITES, C)), device="meta", dtype=dtype)


def total(kernels: Kernels) -> int:
    return int((kernels.bytes * kernels.repeats).sum())


def counted(function, *inputs: Tensor) -> tuple[int, int]:
    operations = logged(function, *inputs).finish()
    return total(count_eager(operations)), total(count_fused(operations))


def test_a_chain_is_read_and_written_once():
    assert counted(lambda a, b: ((a + b) * 2).exp(), x(), x()) == (7 * ROW, 3 * ROW)


def test_a_cast_is_made_again_rather_than_kept():
    def twice(a: Tensor) -> Tensor:
        wide = a.float()
        return wide * wide.mean(0)  # a second pass

    low = x(dtype=torch.bfloat16)
    eager, fused = counted(twice, low)
    assert eager == (ROW // 2 + ROW) + (ROW + 4 * C) + (2 * ROW + 4 * C)
    assert fused == (ROW // 2 + 4 * C) + (ROW // 2 + 4 * C + ROW)


def test_a_reduction_along_channels_needs_no_second_pass():
    assert counted(lambda a: a * a.sum(-1, keepdim=True), x())[1] == 2 * ROW
    assert counted(lambda a: a * a.sum(0, keepdim=True), x())[1] == (ROW + 4 * C) + (2 * ROW + 4 * C)


def test_products_read_each_operand_and_split_the_fusion():
    def layer(a: Tensor, w: Tensor) -> Tensor:
        return (F.gelu(a) @ w).exp()

    kernels = count_fused(logged(layer, x(), x(C, 2 * C)).finish())
    assert kernels.bytes[kernels.group == MATRIX].tolist() == [3 * ROW + 2 * C * C * 4]
    assert kernels.flops[kernels.group == MATRIX].tolist() == [2 * SITES * C * 2 * C]
    assert sorted(kernels.bytes[kernels.group != MATRIX].tolist()) == [2 * ROW, 4 * ROW]


def test_views_and_empty_memory_move_nothing():
    assert counted(lambda a: (a.t(), a.view(-1)[5:], torch.empty_like(a), a.expand(3, SITES, C)), x()) == (0, 0)
    assert counted(lambda a: a.expand(3, SITES, C) + 1, x(1, SITES, C))[1] == ROW + 3 * ROW


def test_writing_into_a_tensor():
    def into(a: Tensor, b: Tensor) -> Tensor:
        torch.sum(a, 0, keepdim=True, out=b)
        return b

    assert counted(into, x(), x(1, C))[0] == ROW + 4 * C
    assert counted(lambda a, b: a.copy_(b), x(), x())[0] == 2 * ROW
    assert counted(lambda a, b: a.add_(b), x(), x())[0] == 3 * ROW


@pytest.mark.parametrize("kind", ["classification", "fcmae"])
def test_fusing_saves_bytes_and_no_operations(monkeypatch, kind):
    monkeypatch.setattr(trace_module, "_kernels_of", lambda device: nullcontext())  # own kernels leave little to fuse
    recipe = stage(kind, 32, slot=8, engine={"precision": "bf16"}, options={"dims": [32, 64]})
    trace = trace_step(recipe, "cuda")
    eager, fused = Kernels(*trace.eager), Kernels(*trace.fused)
    assert total(fused) < 0.75 * total(eager)
    macs = 2 * (trace.forward_macs + trace.backward_macs)
    assert (eager.flops * eager.repeats).sum() == (fused.flops * fused.repeats).sum() == macs
    for group in (MATRIX, DEPTHWISE, WEIGHTS):
        assert eager.bytes[eager.group == group].sum() == fused.bytes[fused.group == group].sum(), GROUPS[group]
    for group in (RESPONSE, NORM, POINTWISE):
        assert 0 < fused.bytes[fused.group == group].sum() <= eager.bytes[eager.group == group].sum(), GROUPS[group]


def test_matrix_operands_by_hand():
    """A linear layer: x W forward, then the gradients of x and of W; all in bf16."""
    recipe = stage(slot=4, engine={"precision": "bf16"}, options={"depths": [1], "dims": [16]})
    kernels = Kernels(*trace_step(recipe, "cuda").fused)
    tokens = 4 * 8 * 8
    layer = 3 * (tokens * 16 + tokens * 64 + 16 * 64)
    biases = 64 + 16  # addmm reads them
    stem = (
        (4 * 3 * 16 * 16 + tokens * 16 + 3 * 4 * 16) * 2 + 16 + 16
    )  # no gradient of the images, a bias and its gradient
    head = 3 * (4 * 16 + 4 * 4 + 16 * 4) + 4
    of_matrices = kernels.bytes[kernels.group == MATRIX].sum()
    assert of_matrices == pytest.approx(2 * (2 * layer + biases + stem + head), rel=0.01)


def test_depthwise_convolutions_are_limited_by_their_instructions():
    kernels = Kernels(*trace_step(stage(size=32), "cuda").fused)
    depthwise = kernels.group == DEPTHWISE
    share = kernels.slots[depthwise] / kernels.flops[depthwise]
    assert set(share.round(3)) == {round(each, 3) for each in INSTRUCTIONS.values()}
    assert (kernels.slots[~depthwise] == kernels.flops[~depthwise]).all()


@pytest.mark.parametrize("kind", ["classification", "fcmae"])
def test_no_kernel_reads_a_gradient_of_4c_channels_for_a_bias_alone(kind):
    recipe = stage(kind, slot=8, engine={"precision": "bf16"})
    live, *_ = trace_module._follow_step(recipe, "cuda")
    operations = [o for o in live.log.finish() if o.block is not None]
    hidden = {o.writes[0] for o in operations if o.name == "fcmae.gelu_grn_backward"}
    assert hidden
    assert {o.name for o in operations if hidden & set(o.reads)} == {"mm"}


def test_two_traces_tell_the_kernels_of_all_others():
    recipe = stage("fcmae", engine={"precision": "bf16"})
    five = recipe.with_micro_slots(5)
    extrapolated, direct = StepTraces(recipe, "cuda")(5), trace_step(five, "cuda")
    assert extrapolated.eager.tolist() == direct.eager.tolist()
    assert extrapolated.fused.tolist() == direct.fused.tolist()
