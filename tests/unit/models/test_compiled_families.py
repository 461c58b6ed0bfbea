"""Every block of every family compiles as one graph for each shape, forward and backward, and never again for another
batch, mask or draw of dropped paths."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from pipeline.kernels.large_kernel import DepthwiseConv2d
from pipeline.kernels.triton_support import meta_stands_for_gpu
from pipeline.models import BLOCKS, create_model
from pipeline.models.rival_blocks import RIVALS
from pipeline.sparse import VisibleCells
from tests.unit.models.tiny_models import tiny_fcmae, visible_cells

Forward = Callable[[int], Tensor]
SLAK = {"kernel_sizes": (9, 7), "small_kernel": 3, "width": 1.0, "stem_stride": 2}


def classifier(name: str, size: int = 32, device: str = "cpu", **options) -> tuple[nn.Module, Forward]:
    with torch.device(device):
        model = create_model(name, num_classes=5, **options)
    paths = len(model.drop_path_rates(0.1))

    def forward(batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(batch)
        images = torch.randn(3, 3, size, size, generator=generator).to(device)
        keep = torch.rand(paths, 3, generator=generator).round().to(device)
        return model(images, keep).square().sum()

    return model, forward


def autoencoder(backend: str, decoder: str = "convnext", device: str = "cpu") -> tuple[nn.Module, Forward]:
    model = tiny_fcmae(backend, decoder, decoder_dim=32).to(device)

    def forward(batch: int) -> Tensor:
        images = torch.randn(3, 3, 24, 40, generator=torch.Generator().manual_seed(batch)).to(device)
        cells = visible_cells(seed=batch)
        return model(images, VisibleCells(cells.mask, cells.grid, images.device)).loss

    return model, forward


NEXTVIT = {"depths": (1, 2), "dims": (12, 24), "stem_dim": 8, "stem_stride": 2, "head_dim": 4, "pattern": "CC"}
# The model, and the number of its blocks that differ in class or shape.
FAMILIES = {
    "convnextv2": (lambda: classifier("convnextv2", depths=(2, 2), dims=(8, 12)), 2),
    "convnext-v1": (
        lambda: classifier("convnextv2", depths=(2, 2), dims=(8, 12), response="none", layer_scale=1e-6), 2,
    ),
    "fcmae-packed": (lambda: autoencoder("packed"), 4),
    "fcmae-masked": (lambda: autoencoder("masked"), 4),
    "fcmae-dense": (lambda: autoencoder("dense"), 4),
    "fcmae-transformer": (lambda: autoencoder("packed", "transformer"), 4),
    "fcmae-unet": (lambda: autoencoder("packed", "unet"), 6),
    "slak": (lambda: classifier("slak", depths=(2, 2), dims=(6, 8), **SLAK), 2),
    "nextvit": (
        lambda: classifier(
            "nextvit", depths=(1, 2, 3), dims=(12, 24, 48), stem_dim=8, stem_stride=2, head_dim=4, pattern="CHH"
        ),
        6,
    ),
    **{f"nextvit-{block}": (partial(classifier, "nextvit", block=block, **NEXTVIT), 3) for block in RIVALS},
    "convnextv2-gpu": (lambda: classifier("convnextv2", device="meta", depths=(2, 2), dims=(8, 12)), 2),
    "fcmae-packed-gpu": (lambda: autoencoder("packed", device="meta"), 4),
}  # fmt: skip


def blocks(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, BLOCKS)]


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


QUICK = ("convnextv2", "convnext-v1", "fcmae-packed", "slak", "fcmae-packed-gpu")


@pytest.mark.parametrize("family", [pytest.param(f, marks=() if f in QUICK else pytest.mark.slow) for f in FAMILIES])
@pytest.mark.usefixtures("fresh_compiler")
def test_every_block_is_one_graph_for_all_batches_and_masks(family):
    make, shapes = FAMILIES[family]
    with meta_stands_for_gpu() if family.endswith("-gpu") else nullcontext():
        model, forward = make()
        # Of BatchNorm undivided, torch expects other strides than its CPU kernel returns; Inductor divides it too.
        divided = "aot_eager_decomp_partition" if family.startswith("nextvit") else "aot_eager"
        counter = CompileCounterWithBackend(divided)
        for number in range(3):
            forward(number).backward()
            expected = {name: p.grad for name, p in model.named_parameters()}
            model.zero_grad(set_to_none=True)
            originals = [block.forward for block in blocks(model)]
            for block in blocks(model):
                block.forward = torch.compile(block.forward, backend=counter, fullgraph=True, dynamic=False)
            forward(number).backward()
            for block, original in zip(blocks(model), originals, strict=True):
                block.forward = original
            assert counter.frame_count == shapes, f"batch {number}"
            for name, parameter in model.named_parameters():
                if not parameter.is_meta:
                    torch.testing.assert_close(parameter.grad, expected[name])
            model.zero_grad(set_to_none=True)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["fft", "banded"])
@pytest.mark.usefixtures("fresh_compiler")
def test_blocks_with_large_kernels_in_other_forms_compile_too(form):
    model, forward = classifier("slak", depths=(1, 1), dims=(6, 8), **SLAK)
    for module in model.modules():
        if isinstance(module, DepthwiseConv2d):
            module.form = form
    counter = CompileCounterWithBackend("aot_eager")
    for block in blocks(model):
        block.forward = torch.compile(block.forward, backend=counter, fullgraph=True, dynamic=False)
    for number in range(2):
        forward(number).backward()
    assert counter.frame_count == 2
