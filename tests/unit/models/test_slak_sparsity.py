"""The published cost of SLaK-T: 5.0 GMACs are those of its weights that SNIP leaves, at 40 % sparsity."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.kernels.large_kernel import DepthwiseConv2d
from pipeline.models import create_model
from pipeline.optim.pruning import DENSE_FROM, snip_densities
from pipeline.optim.sparsity import maskable_weights
from tests.unit.models.test_slak import SIZES, norms_of_blocks


def macs(model: nn.Module, images: Tensor) -> tuple[dict[str, int], Tensor]:
    """Multiply-adds per image of each convolution and linear layer, by the name of its weight; and the output."""
    counts: dict[str, int] = {}
    layers = {layer: name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}

    def note(layer: nn.Module, _: object, output: Tensor) -> None:
        counts[f"{layers[layer]}.weight"] = layer.weight.numel() * output[0].numel() // len(layer.weight)

    for layer in layers:
        layer.register_forward_hook(note)
    return counts, model(images)


@pytest.mark.slow
def test_slak_tiny_has_its_published_cost():
    """15 s of CPU: with native convolutions minutes. Eight images of noise, as no ImageNet is at hand."""
    torch.manual_seed(0)
    model = create_model("slak_tiny").train()
    for conv in (module for module in model.modules() if isinstance(module, DepthwiseConv2d)):
        conv.form = "fft"
    cost, logits = macs(model, torch.randn(8, 3, 224, 224))
    weights = maskable_weights(dict(model.named_parameters()), "all")
    gradients = torch.autograd.grad(F.cross_entropy(logits, torch.randint(0, 1000, (8,))), list(weights.values()))
    scores = {n: (w.detach() * g).abs() for (n, w), g in zip(weights.items(), gradients, strict=True)}
    densities = {name: 1.0 if d >= DENSE_FROM else d for name, d in snip_densities(scores, 0.4).items()}
    assert sum(weight.numel() for weight in weights.values()) == 50_576_524
    assert cost.keys() == weights.keys()
    # Stem, downsampling and head stay dense: LayerScale's 1e-6 leaves all other gradients that much smaller.
    dense = {name for name, density in densities.items() if density == 1.0}
    assert dense == {f"downsample_layers.{i}.{int(i > 0)}.weight" for i in range(4)} | {"head.weight"}
    # Counted as published, by fvcore's rules: convolutions, linear layers, and the norms, which are never sparse.
    norms = norms_of_blocks(model)
    assert norms == pytest.approx(0.0306, abs=5e-5)
    assert sum(cost.values()) / 1e9 + norms == pytest.approx(SIZES["slak_tiny"][2], abs=5e-4)
    sparse = sum(cost[name] * density for name, density in densities.items()) / 1e9 + norms
    # Of these weights and images: other seeds of both give up to 5.00, the official code gave 4.93 with its own.
    assert sparse == pytest.approx(4.976, abs=0.002)
    assert round(sparse, 1) == 5.0
    # The published 30M, and 30.47M, are these and the parameters that have one dimension.
    kept = sum(weight.numel() * densities[name] for name, weight in weights.items())
    assert kept / 1e6 == pytest.approx(30.346, abs=0.001)
    others = sum(parameter.numel() for name, parameter in model.named_parameters() if name not in weights)
    assert (kept + others) / 1e6 == pytest.approx(30.473, abs=0.001)
