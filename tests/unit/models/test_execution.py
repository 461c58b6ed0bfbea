"""One model run in several ways: activation checkpointing, compiled blocks, bf16, channels-last, the meta device."""

from importlib.util import find_spec

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from pipeline.models import create_model, initial_values, initialise
from pipeline.models.fcmae import FCMAE
from pipeline.models.response_norm import KINDS
from pipeline.sparse import DENSE, Layout, VisibleCells, find_layout
from tests.unit.models.tiny_models import scatter_weights, visible_cells

SHAPE = {"depths": (1, 2, 1), "dims": (8, 12, 16), "stem_stride": 2}
LAYOUTS = ("dense", "packed", "masked", *(["spconv"] if find_spec("spconv") else []))  # spconv is an extra


def layout_named(name: str, visible: VisibleCells) -> Layout:
    return DENSE if name == "dense" else find_layout(name)(visible)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["grn", "bn", "cbam"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_checkpointing_changes_memory_alone(name, kind):
    torch.manual_seed(0)
    images, layout = torch.randn(3, 3, 24, 40), layout_named(name, visible_cells())
    keep = torch.tensor([[1.25, 0.0, 1.25]]).expand(4, -1)
    results, saved = [], []
    for checkpointing in (False, True):
        model = create_model("convnextv2", 0, **SHAPE, response=kind, checkpointing=checkpointing)
        scatter_weights(model).float()
        count = [0]

        def pack(tensor, count=count):
            count[0] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = model.features(images, layout, keep)
        y.square().sum().backward()
        results.append({"output": y.detach(), **gradients(model)})
        saved.append(count[0])
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert saved[1] < saved[0] / 2


def test_checkpointing_includes_the_decoder():
    images, mask = torch.randn(3, 3, 24, 40), visible_cells().mask
    for decoder in ("convnext", "transformer", "unet"):
        results = []
        for checkpointing in (False, True):
            encoder = create_model("convnextv2", 0, **SHAPE, checkpointing=checkpointing)
            model = FCMAE(encoder, decoder=decoder, decoder_dim=32, decoder_depth=2)
            output = model(images, mask)
            output.loss.backward()
            results.append({"prediction": output.prediction.detach(), **gradients(model)})
        assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.usefixtures("fresh_compiler")
def test_a_block_compiles_as_one_graph_once_for_all_batches(name):
    model = scatter_weights(create_model("convnextv2", 0, **SHAPE))
    block, counter = model.stages[0][0], CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    for batch in range(3):
        layout = layout_named(name, visible_cells(seed=batch))
        x = layout.stem(model.downsample_layers[0][0], torch.randn(3, 3, 24, 40, dtype=torch.float64)).detach()
        results = []
        for run in (block, compiled):
            pixels = x.clone().requires_grad_()
            y = run(pixels, layout, torch.tensor([1.25, 0.0, 1.25]))
            y.square().sum().backward()
            results.append({"output": y.detach(), "input": pixels.grad, **gradients(block)})
            block.zero_grad(set_to_none=True)
        for key in results[0]:
            torch.testing.assert_close(results[0][key], results[1][key], rtol=1e-12, atol=1e-12)
        assert counter.frame_count == 1, f"batch {batch} compiled again"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "grn"])
@pytest.mark.parametrize("name", ["dense", "packed"])
@pytest.mark.usefixtures("fresh_compiler")
def test_every_response_compiles_as_one_graph(name, kind):
    model, layout = create_model("convnextv2", 0, **SHAPE, response=kind), layout_named(name, visible_cells())
    x = layout.stem(model.downsample_layers[0][0], torch.randn(3, 3, 24, 40)).detach()
    block = model.stages[0][0]
    expected = block(x, layout)
    torch.testing.assert_close(torch.compile(block, backend="eager", fullgraph=True)(x, layout), expected)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_blocks_under_checkpointing():
    images, mask = torch.randn(3, 3, 24, 40), visible_cells().mask
    results = []
    for compiled in (False, True):
        model = FCMAE(create_model("convnextv2", 0, **SHAPE, checkpointing=True), decoder_dim=16)
        if compiled:
            for stage in (*model.encoder.stages, model.decoder):
                for block in stage:
                    block.compile(backend="aot_eager", fullgraph=True)
        output = model(images, mask)
        output.loss.backward()
        results.append({"prediction": output.prediction.detach(), **gradients(model)})
    for key in results[0]:
        torch.testing.assert_close(results[0][key], results[1][key])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_bf16_autocast_stays_close(name, kind):
    torch.manual_seed(0)
    images, layout = torch.randn(3, 3, 24, 40), layout_named(name, visible_cells())
    model = scatter_weights(create_model("convnextv2", 0, **SHAPE, response=kind)).float()
    exact = model.features(images, layout)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.features(images, layout)
        rounded.float().square().mean().backward()
    assert ((rounded - exact).norm() / exact.norm()).item() < 0.03
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("name", LAYOUTS)
def test_statistics_of_half_precision_are_fp32(name):
    layout = layout_named(name, visible_cells())
    x = torch.full((3, 12, 20, 4) if name in ("dense", "masked") else (3, 6 * 16, 4), 300.0, dtype=torch.float16)
    for statistic in (layout.norm(x, False), layout.mean(x), layout.mean(x.abs(), across_images=True)):
        assert statistic.dtype == torch.float32
        assert torch.isfinite(statistic).all()
    assert layout.mean(x).allclose(torch.tensor(300.0))


def test_grn_rounds_its_result_and_not_its_scale():
    """A gain of 1.010 must survive bf16 on average, where 1.010 itself is 1.008."""
    grn = create_model("convnextv2", 0, depths=(1,), dims=(64,)).stages[0][0].grn
    torch.nn.init.constant_(grn.gamma, 0.01)
    x = torch.rand(1, 64, 64, 256, generator=torch.Generator().manual_seed(0)).add(1).bfloat16()
    gain = grn(x, DENSE).double().sum() / x.double().sum() - 1
    assert gain.item() == pytest.approx(0.01, rel=0.05)


def test_convolutions_see_channels_last_memory():
    model, seen = create_model("convnextv2", 3, **SHAPE), []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(
                lambda _, inputs: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
            )
    model(torch.randn(2, 3, 16, 24))
    assert len(seen) == 7
    assert all(seen)


@pytest.mark.parametrize("init", ["plain", "official"])
def test_a_model_made_on_meta_gets_the_same_weights(init):
    def build() -> FCMAE:
        encoder = create_model("convnextv2", 0, **SHAPE, response="bn", layer_scale=0.1, init=init, seed=4)
        return FCMAE(encoder, decoder_dim=16, seed=4)

    expected = build().state_dict()
    with torch.device("meta"):
        model = build()
        initialise(model, 4)
        values = dict(initial_values(model, 4))
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(torch.nan)
    initialise(model, 4)
    assert values.keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
        assert torch.equal(values[name], expected[name]), name


@pytest.mark.parametrize("grid", [(1, 2), (5, 1), (64, 3), (2, 9)])
@pytest.mark.parametrize("channels", [1, 4, 13])
def test_any_grid_and_any_number_of_channels(grid, channels):
    encoder = create_model("convnextv2", 0, depths=(1, 1), dims=(4, 8), stem_stride=2, in_channels=channels)
    model = FCMAE(encoder, decoder_dim=8)
    cells = grid[0] * grid[1]
    mask = torch.rand(2, cells).argsort(1) >= max(cells // 4, 1)
    images = torch.randn(2, channels, grid[0] * 4, grid[1] * 4)
    output = model(images, mask)
    output.loss.backward()
    assert output.prediction.shape == (2, 16 * channels, *grid)
    assert torch.isfinite(output.loss)
    assert model.paint(images, mask, output.prediction).shape == images.shape
