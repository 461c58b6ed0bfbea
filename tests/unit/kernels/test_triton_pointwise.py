"""GELU with GRN, and LayerNorm: equal by Triton's interpreter, compiled for GPUs, chosen by a block."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.kernels.triton_support import meta_stands_for_gpu, plain_kernels
from pipeline.models.convnextv2 import ConvNeXtBlock
from pipeline.models.response_norm import ResponseNorm
from pipeline.sparse import DENSE, Packed, VisibleCells
from tests.unit.kernels.triton_programs import interpret
from tests.unit.models.tiny_models import visible_cells
from tools.bench.gpu_code import compile_launches
from tools.bench.kernel_code import gelu_grn, layer_norm

TOLERANCES = {"float64": 1e-13, "float32": 1e-6, "bfloat16": 1e-2}
OPERATORS = ["depthwise", "layer_norm", "gelu_grn"]


@pytest.fixture(scope="module")
def errors():
    pytest.importorskip("triton", reason="pip install 'fcmae[kernels]'")
    return interpret("triton_pointwise_check", *TOLERANCES)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_kernels_equal_torch(dtype, errors):
    for case in errors[dtype]:
        assert all(error <= TOLERANCES[dtype] for error in case.values()), case


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_without_atomics_and_spills(capability, triton_cache):
    pytest.importorskip("triton", reason="pip install 'fcmae[kernels]'")
    for run in (lambda: gelu_grn(80, 5632), lambda: layer_norm(1280, 2816), lambda: layer_norm(81920, 352)):
        for name, code in compile_launches(run, capability).items():
            assert (code.spills, code.atomics) == (0, 0), name
            if name.startswith("gelu"):
                assert not any(loop.barriers for loop in code.loops), name


class OwnOperators(TorchDispatchMode):
    """Notes the own operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fcmae":
            self.names.append(function.name().removeprefix("fcmae::"))
        return function(*args, **(kwargs or {}))


def build_block(device: str) -> ConvNeXtBlock:
    with torch.device(device):
        return ConvNeXtBlock(8, ResponseNorm())


@pytest.mark.parametrize("across_images", [False, True])
def test_a_block_of_packed_tokens_runs_the_kernels_on_a_gpu(across_images):
    block, cells = build_block("meta"), visible_cells((3, 4), visible=5, images=2)
    block.grn.across_images = across_images
    layout = Packed(VisibleCells(cells.mask, cells.grid, torch.device("meta")))
    x = torch.empty(2, 5 * 4, 8, device="meta", requires_grad=True)
    with meta_stands_for_gpu(), OwnOperators() as seen:
        layout._prepare(2)
        y = block(x, layout)
        y.sum().backward()
    assert seen.names == OPERATORS + [f"{name}_backward" for name in reversed(OPERATORS)]
    assert y.shape == x.shape
    assert all(p.grad.shape == p.shape and p.grad.dtype == p.dtype for p in block.parameters())


def test_a_block_with_the_kernels_compiles_as_one_graph_once_for_all_masks():
    torch._dynamo.reset()
    block, counter = build_block("meta"), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    with meta_stands_for_gpu():
        for seed in range(2):
            cells = visible_cells((3, 4), visible=5, images=2, seed=seed)
            layout = Packed(VisibleCells(cells.mask, cells.grid, torch.device("meta")))
            layout._prepare(2)
            compiled(torch.empty(2, 5 * 4, 8, device="meta", requires_grad=True), layout).sum().backward()
        assert counter.frame_count == 1
        block.dwconv.form = "triton"
        compiled(torch.empty(2, 6, 6, 8, device="meta", requires_grad=True), DENSE).sum().backward()
    own = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes if "fcmae" in str(node.target)]
    names = [*OPERATORS, "depthwise_maps", *OPERATORS[1:]]
    assert own == [f"fcmae.{name}.default" for name in names]
    torch._dynamo.reset()


def test_a_block_of_whole_images_runs_them_and_keeps_bf16_under_autocast():
    block, x = build_block("meta"), torch.empty(2, 6, 6, 8, device="meta", requires_grad=True)
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    kept = []
    try:
        with (
            meta_stands_for_gpu(),
            OwnOperators() as seen,
            torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        ):
            y = block.grn.after_linear(block.pwconv1, x, DENSE)
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert seen.names == ["gelu_grn"]
    assert y.dtype == torch.bfloat16
    # Beside the linear layer's input, the features before GELU alone.
    assert [t.dtype for t in kept if t.numel() >= y.numel()] == [torch.bfloat16]


def test_a_cpu_and_plain_kernels_take_torch_alone():
    torch.manual_seed(0)
    block, x = build_block("cpu"), torch.randn(2, 6, 6, 8)
    torch.nn.init.normal_(block.grn.gamma)
    with OwnOperators() as seen:
        y = block(x)
        with plain_kernels():
            reference = block(x)
    expected = block.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    expected = block.pwconv2(block.grn(F.gelu(block.pwconv1(block.norm(expected))), DENSE)) + x
    assert torch.equal(y, expected)
    torch.testing.assert_close(reference, y)
    assert seen.names == []
