"""RoIAlign equals torchvision's definition, in all forms that run on a CPU."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from pipeline.kernels import region_align as forms
from pipeline.kernels.region_align import crop_masks, region_align
from tests.oracles import oracle

HEIGHT, WIDTH, STRIDE = 9, 12, 4
TOLERANCE = {"rtol": 0, "atol": 1e-12}
STRIDES = (4, 8, 16)


@pytest.fixture(scope="module")
def reference():
    """torchvision's own Python form: right for samples inside the map."""
    oracle("torchvision", always_in_ci=True)
    return importlib.import_module("torchvision.ops.roi_align")._roi_align.__wrapped__


@pytest.fixture
def plain(monkeypatch):
    """Take the form for GPUs without Triton, on a CPU: it is chosen for any other device type."""

    def pool(maps, grids, bins, ratio):
        return _Plain.apply(grids, bins, ratio, *maps)

    monkeypatch.setattr(forms, "_region_align", pool)


class _Plain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grids, bins, ratio, *maps):
        ctx.rest = grids, [x.permute(0, 2, 3, 1).shape for x in maps], ratio
        return forms._pool_plainly([forms._channels_last(x) for x in maps], grids, bins, ratio)

    @staticmethod
    def backward(ctx, gradient):
        grids, shapes, ratio = ctx.rest
        spread = forms._spread_plainly(gradient.permute(0, 1, 3, 4, 2), grids, shapes, ratio)
        return None, None, None, *(x.permute(0, 3, 1, 2) for x in spread)


def interval(start: float, length: float, limit: float) -> tuple[float, float]:
    """An interval inside [0, limit], from two shares."""
    low = start * limit
    return low, low + length * (limit - low)


SHARE, LENGTH = st.floats(0, 0.99), st.floats(0.001, 1)  # torchvision's gradient of an empty region is NaN
BOX = st.tuples(SHARE, LENGTH, SHARE, LENGTH).map(
    lambda s: [
        value
        for pair in zip(
            interval(s[0], s[1], WIDTH * STRIDE - STRIDE),
            interval(s[2], s[3], HEIGHT * STRIDE - STRIDE),
            strict=True,
        )
        for value in pair
    ]
)


def check_against_reference(reference, boxes: list, bins: int, ratio: int) -> None:
    generator = torch.Generator().manual_seed(len(boxes))
    x = torch.randn(2, 3, HEIGHT, WIDTH, generator=generator, dtype=torch.float64)
    regions = torch.tensor([boxes, boxes[::-1]], dtype=torch.float64)
    index = torch.arange(2.0).repeat_interleave(len(boxes))[:, None].double()
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = region_align([one], [STRIDE], regions, bins, ratio)
    expected = reference(other, torch.cat([index, regions.flatten(0, 1)], 1), 1 / STRIDE, bins, bins, ratio, True)
    torch.testing.assert_close(y, expected.view_as(y), **TOLERANCE)
    gradient = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    (result,), (truth,) = (
        torch.autograd.grad(out, leaf, gradient.view_as(out)) for out, leaf in ((y, one), (expected, other))
    )
    torch.testing.assert_close(result, truth, **TOLERANCE)


ANY = given(st.lists(BOX, min_size=1, max_size=4), st.sampled_from([1, 2, 3]), st.sampled_from([0, 2]))
FEW = settings(max_examples=10, deadline=None)


@FEW
@ANY
def test_regions_inside_the_map_equal_torchvision(reference, boxes, bins, ratio):
    check_against_reference(reference, boxes, bins, ratio)


def random_regions(images: int, number: int, side: float = 120.0, seed: int = 0) -> Tensor:
    """Of all sizes; some reach far beyond the image, some are empty."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.rand(images, number, 2, generator=generator, dtype=torch.float64) * side * 1.5 - side / 4
    length = torch.rand(images, number, 2, generator=generator, dtype=torch.float64) ** 3 * side
    return torch.cat([start, start + length - 1], -1)


def pyramid(images: int = 2, channels: int = 5, seed: int = 1, dtype=torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [(-(-96 // stride), -(-120 // stride)) for stride in STRIDES]
    return [torch.randn(images, channels, *size, generator=generator).to(dtype).requires_grad_() for size in sizes]


def pooled_and_gradients(maps: list[Tensor], regions: Tensor, bins: int, ratio: int = 0):
    y = region_align(maps, STRIDES, regions, bins, ratio, finest=14)
    weights = torch.linspace(-1, 1, y[0].numel(), dtype=torch.bfloat16).to(y.dtype).view(y.shape[1:])
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), maps)]


@pytest.mark.parametrize(("ratio", "bins"), [(0, 7), (2, 3), (0, 2), (3, 7)])
def test_the_plain_form_for_gpus_equals_the_loops_for_cpus_everywhere(ratio, bins, request):
    case = (pyramid(), random_regions(2, 80), bins, ratio)
    loops = pooled_and_gradients(*case)
    request.getfixturevalue("plain")
    for result, expected in zip(pooled_and_gradients(*case), loops, strict=True):
        torch.testing.assert_close(result, expected, **TOLERANCE)


def test_gradients_by_finite_differences():
    maps = [x.detach()[:1, :2, :6, :7].contiguous().requires_grad_() for x in pyramid()]
    regions = random_regions(1, 4, side=24)
    assert torch.autograd.gradcheck(lambda *x: region_align(x, STRIDES, regions, 2, finest=4), maps)


def test_samples_beyond_one_feature_outside_give_0_and_nearer_ones_the_border():
    x = torch.full((1, 1, 4, 4), 3.0, dtype=torch.float64)
    regions = torch.tensor([[[-9.0, 0, -1, 4], [-0.9, 1, 0, 2], [4, 0, 5, 4], [2, 2, 6, 3]]]) + 0.5  # features' centres
    one, two, three, four = region_align([x], [1], regions.double(), 2, 2)[0, :, 0].unbind()
    assert torch.equal(one, torch.zeros_like(one))
    torch.testing.assert_close(two, torch.full_like(two, 3.0), **TOLERANCE)
    # Columns of samples at 4.25 and more are outside, though within the last feature's pixel.
    assert torch.equal(three, torch.zeros_like(three))
    torch.testing.assert_close(four, torch.tensor([[3.0, 0], [3, 0]], dtype=torch.float64), **TOLERANCE)


def test_regions_that_are_empty_not_finite_or_far_away_give_0():
    infinite, nothing = float("inf"), float("nan")
    boxes = [[5, 5, 5, 5], [9, 9, 3, 3], [nothing, 0, 9, 9], [0, 0, infinite, 9], [-1e30, -1e30, 1e30, 1e30]]
    maps = pyramid(1)
    assert all((each == 0).all() for each in pooled_and_gradients(maps, torch.tensor([boxes]), 2))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_bits_depend_on_neither_threads_nor_other_images(memory_format):
    maps, regions = pyramid(3, dtype=torch.float32), random_regions(3, 40).float()
    maps = [x.detach().contiguous(memory_format=memory_format).requires_grad_() for x in maps]
    together = pooled_and_gradients(maps, regions, 7)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        threaded = pooled_and_gradients(maps, regions, 7)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for pair in zip(together, threaded, strict=True))
    for image in range(3):
        part = slice(image, image + 1)
        alone = pooled_and_gradients([x.detach()[part].requires_grad_() for x in maps], regions[part], 7)
        assert all(torch.equal(one, all_[part]) for one, all_ in zip(alone, together, strict=True))


def test_levels_are_those_of_mmdetection():
    side = torch.tensor([1.0, 55, 56, 111, 112, 113, 223, 224, 447, 448, 900])
    regions = torch.stack([torch.zeros_like(side), torch.zeros_like(side), side, side], -1)[None]
    maps = [torch.full((1, 1, 2, 2), float(level)) for level in range(4)]
    found = region_align(maps, (1000,) * 4, regions, 1)[0, :, 0, 0, 0]
    assert found.tolist() == torch.log2(side / 56 + 1e-6).floor().clamp(0, 3).tolist()


def test_bf16_maps_are_summed_in_fp32():
    maps, regions = pyramid(dtype=torch.bfloat16), random_regions(2, 20).float()
    exact = pooled_and_gradients([x.detach().double().requires_grad_() for x in maps], regions, 7)
    for result, expected in zip(pooled_and_gradients(maps, regions, 7), exact, strict=True):
        assert result.dtype == torch.bfloat16
        torch.testing.assert_close(result.double(), expected, rtol=2**-8, atol=1e-4 * expected.abs().max().item())


def test_the_operators_say_their_shapes_and_run_on_meta_tensors():
    maps, regions = pyramid(dtype=torch.float32), random_regions(2, 6).float()
    grids = forms._lay_grids(torch.zeros(2, 6), regions, 3, 0)
    quick = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.fcmae.region_align.default, (maps, grids, 3, 0), test_utils=quick)
    sizes = [size for x in maps for size in x.shape[2:]]
    arguments = (torch.randn(2, 6, 5, 3, 3), grids, sizes, 0)
    torch.library.opcheck(torch.ops.fcmae.region_align_backward.default, arguments, test_utils=quick)
    masks = (torch.zeros(3, 20, 3, dtype=torch.uint8), 20, torch.zeros(4, 7), 5)
    torch.library.opcheck(torch.ops.fcmae.crop_masks.default, masks, test_utils=quick)
    there = [x.detach().to("meta").requires_grad_() for x in maps]
    region_align(there, STRIDES, regions.to("meta"), 7).sum().backward()
    assert [x.grad.shape for x in there] == [x.shape for x in maps]
    with FakeTensorMode() as mode:
        fake = region_align([mode.from_tensor(x) for x in maps], STRIDES, mode.from_tensor(regions), 7)
    assert fake.shape == (2, 6, 5, 7, 7)


def drawn_masks(number: int, height: int, width: int) -> Tensor:
    """Discs, (number, height, width) of 0 and 1."""
    generator = torch.Generator().manual_seed(4)
    centre = torch.rand(number, 2, 1, 1, generator=generator) * torch.tensor([height, width]).view(2, 1, 1)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return ((y - centre[:, 0]) ** 2 + (x - centre[:, 1]) ** 2 < (height / 3) ** 2).to(torch.uint8)


def pack(masks: Tensor) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.packbits(masks.numpy(), axis=-1))


@pytest.mark.parametrize("width", [40, 45])
def test_crops_of_packed_masks_are_aligned_regions_of_the_unpacked_ones(width):
    masks, index = drawn_masks(5, 33, width), torch.tensor([4, 0, 0, 3, 2, 1, 1])
    low = torch.rand(7, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 15
    boxes = torch.cat([low, low + 4 + low.flip(0) * 1.5], 1)
    boxes[0] = torch.tensor([0, 0, width, 33])
    expected = region_align([masks[index, None].double()], [1], boxes[:, None], 7)[:, 0, 0]
    clear = (expected - 0.5).abs() > 1e-9  # at exactly half, rounding decides
    crops = crop_masks(pack(masks), width, index, boxes, 7)
    assert crops.dtype == torch.float32
    assert torch.equal(crops[clear], (expected >= 0.5)[clear].float())
    assert 0.05 < crops.mean() < 0.9
    grids = forms._lay_grids(index.double(), boxes, 7, 0)
    torch.testing.assert_close(forms._pool_bits_plainly(pack(masks), width, grids, 7), expected, **TOLERANCE)


def test_autocast_does_not_reach_into_the_plain_forms():
    """It stays active inside custom operators: a matrix product in bf16 would move masks' edges."""
    maps = [x.detach().float() for x in pyramid()]
    grids = forms._lay_grids(torch.zeros(2, 6), random_regions(2, 6, side=24).float(), 7, 0)
    features, shapes = [forms._channels_last(x) for x in maps], [x.permute(0, 2, 3, 1).shape for x in maps]
    masks = pack(drawn_masks(6, 33, 45))
    of_masks = torch.cat([torch.arange(6.0)[:, None], grids[0, :, 1:]], 1)

    def computed() -> list[Tensor]:
        pooled = forms._pool_plainly(features, grids, 7, 0)
        spread = forms._spread_plainly(pooled.permute(0, 1, 3, 4, 2), grids, shapes, 0)
        return [pooled, *spread, forms._pool_bits_plainly(masks, 45, of_masks, 7)]

    with torch.autocast("cpu", torch.bfloat16):
        casted = computed()
    exact = computed()
    assert all(torch.equal(*pair) for pair in zip(casted, exact, strict=True))
    assert exact[0].any()
    assert exact[1].any()
    assert exact[-1].any()
