"""Every response normalisation computes its formula, ignores hidden sites, and has gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.kernels.triton_support import meta_stands_for_gpu
from pipeline.models import create_model
from pipeline.models.response_norm import GRN, KINDS, ResponseBatchNorm, ResponseNorm
from pipeline.sparse import DENSE, Masked, Packed, VisibleCells
from tests.unit.models.tiny_models import scatter_weights, tiny_fcmae, visible_cells

GRN_FORMS = [
    {"grn_aggregation": aggregation, "grn_normaliser": normaliser, "grn_residual": residual}
    for aggregation in ("l2", "l1", "average")
    for normaliser in ("mean", "sum", "inverse", "standardise")
    for residual in (True, False)
]
CHOICES = [{"response": kind} for kind in KINDS] + GRN_FORMS[1:] + [{"response": "none", "layer_scale": 0.5}]


def label(choice: dict) -> str:
    return "-".join(str(value) for value in choice.values())


def build(dim: int, **fields) -> torch.nn.Module:
    return scatter_weights(ResponseNorm(**fields).create(dim))


@pytest.mark.parametrize("choice", CHOICES, ids=label)
def test_packed_equals_masked(choice):
    torch.manual_seed(0)
    visible, images = visible_cells(), torch.randn(3, 3, 24, 40, dtype=torch.float64)
    results = []
    for backend in ("packed", "masked"):
        model, pixels = scatter_weights(tiny_fcmae(backend, **choice)), images.clone().requires_grad_()
        output = model(pixels, visible.mask)
        output.prediction.square().mean().backward()  # the loss itself looks at hidden pixels: they are its target
        tensors = {name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers())
        assert all(tensor is not None for tensor in tensors.values())
        results.append(tensors | {"pixels": pixels.grad, "prediction": output.prediction.detach()})
    for name, value in results[1].items():
        assert torch.isfinite(value).all(), name
        assert (results[0][name] - value).abs().max() <= 1e-12 * value.abs().max().clamp_min(1e-3), name
    hidden = visible.mask.view(3, 1, 3, 5).repeat_interleave(8, 2).repeat_interleave(8, 3).expand_as(images)
    assert results[0]["pixels"][hidden].abs().max() == results[1]["pixels"][hidden].abs().max() == 0


@pytest.mark.parametrize("choice", CHOICES, ids=label)
def test_shapes_and_gradients(choice):
    model = create_model("convnextv2", 5, depths=(1, 2), dims=(8, 12), stem_stride=2, **choice)
    # The noise of every third seed leaves the one hidden unit of SE below zero, and its weights without gradients.
    images = torch.randn(2, 3, 12, 20, generator=torch.Generator().manual_seed(1))
    assert [tuple(x.shape) for x in model.forward_features(images)] == [(2, 8, 6, 10), (2, 12, 3, 5)]
    scatter_weights(model)
    model(images.double()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("fields", "identity"),
    [({"kind": "grn"}, True), ({"kind": "grn", "aggregation": "l1", "normaliser": "standardise"}, True),
     ({"kind": "grn", "residual": False}, False), ({"kind": "none"}, True), ({"kind": "bn"}, False)],
)  # fmt: skip
def test_identity_at_the_start(fields, identity):
    encoder = create_model(
        "convnextv2", 0, depths=(1,), dims=(4,), stem_stride=1,
        **{("response" if name == "kind" else f"grn_{name}"): value for name, value in fields.items()},
    )  # fmt: skip
    slot = getattr(encoder.stages[0][0], encoder.response.name)
    x = torch.randn(2, 3, 3, 16)
    assert torch.equal(slot(x, DENSE), x) == identity
    assert slot(x, DENSE).abs().mean() > 0.1  # nothing is shut off


def test_grn_forms_by_their_formulas():
    torch.manual_seed(1)
    x = torch.randn(3, 4, 5, 16, dtype=torch.float64)
    aggregations = {
        "l2": x.square().sum((1, 2)).sqrt(), "l1": x.abs().sum((1, 2)), "average": x.mean((1, 2)),
    }  # fmt: skip
    for aggregation, g in aggregations.items():
        shares = {
            "mean": g / (g.mean(1, keepdim=True) + 1e-6), "sum": g / (g.sum(1, keepdim=True) + 1e-6),
            "inverse": 1 / (g.mean(1, keepdim=True) + 1e-6),
            "standardise": (g - g.mean(1, keepdim=True)) / (g.var(1, keepdim=True, correction=0) + 1e-6).sqrt(),
        }  # fmt: skip
        for normaliser, share in shares.items():
            for residual in (False, True):
                grn = build(16, kind="grn", aggregation=aggregation, normaliser=normaliser, residual=residual)
                expected = grn.gamma * (x * share.view(3, 1, 1, -1)) + grn.beta + (x if residual else 0)
                torch.testing.assert_close(grn(x, DENSE), expected, rtol=1e-12, atol=1e-12)


def test_lrn_and_layer_norm_are_torch_s():
    x = torch.randn(2, 3, 4, 12, dtype=torch.float64)
    ours = build(12, kind="lrn")(x, DENSE)
    theirs = F.local_response_norm(x.permute(0, 3, 1, 2), 5, alpha=5e-4, beta=0.75, k=2.0).permute(0, 2, 3, 1)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    norm = build(12, kind="ln")
    torch.testing.assert_close(norm(x, DENSE), F.layer_norm(x, (12,), norm.weight, norm.bias, 1e-6))


def test_batch_norm_is_torch_s_and_uses_running_statistics_in_evaluation():
    x = torch.randn(4, 3, 5, 6, dtype=torch.float64) * 3 + 1
    ours, theirs = build(6, kind="bn"), torch.nn.BatchNorm2d(6, eps=1e-6).double()
    theirs.load_state_dict(ours.state_dict(), strict=False)
    for _ in range(2):
        expected = theirs(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        torch.testing.assert_close(ours(x, DENSE), expected, rtol=1e-12, atol=1e-12)
        ours.update_running()
    for module in (ours, theirs):
        module.eval()
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    expected = theirs(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(ours(x, DENSE), expected, rtol=1e-12, atol=1e-12)


def test_running_statistics_move_once_per_forward_with_checkpointing():
    images, mask = torch.randn(3, 3, 24, 40, dtype=torch.float64), visible_cells().mask
    buffers = []
    for checkpointing in (False, True):
        model = tiny_fcmae(response="bn", checkpointing=checkpointing).double()
        start = {name: buffer.clone() for name, buffer in model.named_buffers()}
        model(images, mask).loss.backward()
        buffers.append(dict(model.named_buffers()))
        assert not any(torch.equal(start[name], buffer) for name, buffer in buffers[-1].items())
        model.eval()(images, mask)
    assert all(torch.equal(buffers[0][name], buffers[1][name]) for name in buffers[0])
    assert len(buffers[0]) == 2 * sum(isinstance(m, ResponseBatchNorm) for m in model.modules()) == 8


@pytest.mark.parametrize("kind", ["se", "cbam"])
def test_gates_pool_visible_sites_alone(kind):
    """An image with one visible cell has the gate of that cell alone, whatever the hidden cells hold."""
    gate, cell = build(32, kind=kind), torch.randn(1, 4, 4, 32, dtype=torch.float64)
    visible = VisibleCells(torch.tensor([[True, False, True, True, True, True]]), (2, 3))
    around = torch.randn(1, 8, 12, 32, dtype=torch.float64) * 9
    around[:, :4, 4:8] = cell
    alone = gate(cell, DENSE)
    torch.testing.assert_close(gate(around, Masked(visible))[:, :4, 4:8], alone, rtol=1e-12, atol=1e-12)
    packed = gate(cell.flatten(1, 2), Packed(visible)).view_as(cell)
    torch.testing.assert_close(packed, alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("response", "millions"), [("grn", 88.7178), ("none", 88.5734), ("se", 109.59), ("cbam", 109.59)]
)
def test_parameter_counts_of_base(response, millions):
    """The paper prints 89M for GRN and 109M for both gates."""
    with torch.device("meta"):
        model = create_model("convnextv2_base", response=response)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize(("size", "count"), [("tiny", 28_589_128), ("base", 88_591_464)])
def test_convnext_v1_has_the_published_size_and_names(size, count):
    with torch.device("meta"):
        model = create_model(f"convnextv2_{size}", response="none", layer_scale=1e-6)
    assert sum(p.numel() for p in model.parameters()) == count
    names = [name.removeprefix("stages.2.8.") for name in model.state_dict() if name.startswith("stages.2.8.")]
    assert names == ["gamma", "dwconv.weight", "dwconv.bias", "norm.weight", "norm.bias",
                     "pwconv1.weight", "pwconv1.bias", "pwconv2.weight", "pwconv2.bias"]  # fmt: skip


def test_convnext_v1_block_by_its_formula():
    block = scatter_weights(create_model("convnextv2", 0, depths=(1,), dims=(8,), response="none", layer_scale=1e-6))
    block, x = block.stages[0][0], torch.randn(2, 5, 6, 8, dtype=torch.float64)
    y = F.conv2d(x.permute(0, 3, 1, 2), block.dwconv.weight, block.dwconv.bias, padding=3, groups=8)
    y = F.layer_norm(y.permute(0, 2, 3, 1), (8,), block.norm.weight, block.norm.bias, 1e-6)
    y = block.pwconv2(F.gelu(block.pwconv1(y)))
    torch.testing.assert_close(block(x), x + block.gamma * y, rtol=1e-12, atol=1e-12)
    keep = torch.tensor([0.0, 2.0])
    expected = x + keep.double().view(2, 1, 1, 1) * (block.gamma * y)
    torch.testing.assert_close(block(x, keep=keep), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        ({"response": "gnr"}, "response is 'gnr'; choose one of grn, none"),
        ({"grn_aggregation": "max"}, "grn_aggregation is 'max'; choose one of l2"),
        ({"grn_normaliser": "max"}, "grn_normaliser is 'max'; choose one of mean"),
        ({"response": "se", "grn_residual": False}, "response is 'se', which has no grn_aggregation"),
    ],
)
def test_wrong_choices_are_one_sentence(choice, sentence):
    with pytest.raises(ValueError, match=sentence):
        create_model("convnextv2_atto", **choice)


def test_weights_that_are_gathered_at_each_layer_are_not_read_before():
    """As ZeRO-3 holds them outside of a training step: empty, but while their own layer is called."""
    linear, norm = nn.Linear(4, 16, device="meta"), GRN(16).to("meta")
    x, layout, called = torch.empty(2, 3, 3, 4, device="meta"), DENSE, []
    whole = {p: p.data for layer in (linear, norm) for p in layer.parameters()}

    def gather(layer, arguments):
        called.append(layer)
        for p in layer.parameters():
            p.data = whole[p]

    def release(layer, arguments, output):
        for p in layer.parameters():
            p.data = torch.empty(0, device="meta")

    with meta_stands_for_gpu(), torch.no_grad():
        fused = norm.after_linear(linear, x, layout)
        for layer in (linear, norm):
            layer.register_forward_pre_hook(gather)
            layer.register_forward_hook(release)
            release(layer, (), None)
        assert norm.after_linear(linear, x, layout).shape == fused.shape
    assert called == [linear, norm]
