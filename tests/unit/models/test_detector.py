"""Models for detection: counts of parameters, losses, detections, what is frozen; each image by itself."""

import pytest
import torch
import torch.nn.functional as F

from pipeline.data.batch_objects import BatchObjects
from pipeline.models.batchnorm import set_norm_group
from pipeline.models.detector import create_detector
from pipeline.models.detector_options import DetectorOptions
from tests.object_batches import pack_masks
from tests.unit.models.test_segmenter import SMALL, V1, dims
from tests.unit.models.tiny_models import scatter_norms

SIDE = 64
FORMS = {
    "faster_rcnn": {"head": "faster_rcnn"},
    "mask_rcnn": {"head": "mask_rcnn"},
    "cascade": {"head": "cascade", "region_norm": "batch", "box_loss": "giou"},
}
COUNTS = (2, 0, 3)  # objects of each image


def small_options(**options) -> DetectorOptions:
    sizes = {"channels": 32, "fc_channels": 16, "anchors_sampled": 32, "proposals_before": 60, "proposals": 40}
    return DetectorOptions(**{"classes": 4, **sizes, "regions": 16, "test_proposals": 40, "detections": 20, **options})


def small_detector(family: str = "convnextv2", seed: int = 0, **options):
    return create_detector(family, small_options(**options), seed, **SMALL[family])


def a_batch(counts=COUNTS, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, BatchObjects, torch.Tensor]:
    """Images, sizes of the views, objects and keys, float64; the last object of all is a crowd."""
    draw = torch.Generator().manual_seed(seed)
    total = sum(counts)
    corner = 30 * torch.rand(total, 2, generator=draw)
    boxes = torch.cat((corner, corner + 10 + 20 * torch.rand(total, 2, generator=draw)), 1)
    masks = torch.rand(total, SIDE, SIDE, generator=draw) < 0.5
    crowd = torch.zeros(total, dtype=torch.bool)
    crowd[-1:] = total > 1
    objects = BatchObjects(boxes, torch.arange(total) % 4, crowd, pack_masks(masks), counts)
    images = torch.randn(len(counts), 3, SIDE, SIDE, generator=draw, dtype=torch.float64)
    sizes = torch.tensor([[SIDE, SIDE], [50, SIDE], [SIDE, 62]] * len(counts))[: len(counts)]
    return images, sizes, objects, torch.arange(len(counts)) + 100


def count(name: str, head: str = "mask_rcnn", trained: bool = False, **options) -> int:
    norm = "batch" if head == "cascade" else "none"
    with torch.device("meta"):
        model = create_detector(
            name, DetectorOptions(80, head, region_norm=norm, frozen_stages=int(trained)), **options
        )
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    ("depth", "width", "millions"), [(9, 96, 86), (27, 96, 108), (27, 128, 146), (27, 192, 255), (27, 256, 407)]
)
def test_cascade_on_convnext_v1_has_the_published_counts(depth, width, millions):
    """With one box for all classes there were 85, 107, 145, 254 and 406."""
    found = count("convnextv2", "cascade", depths=(3, 3, depth, 3), dims=dims(width), **V1)
    assert round(found / 1e6) == millions


def test_mask_rcnn_on_tiny_has_the_published_count_of_v1_and_grn_on_top():
    v1 = count("convnextv2", depths=(3, 3, 9, 3), dims=dims(96), **V1)
    assert round(v1 / 1e6) == 48
    grn = sum(depth * (2 * 4 * width - width) for depth, width in zip((3, 3, 9, 3), dims(96), strict=True))
    assert count("convnextv2_tiny") == v1 + grn


@pytest.mark.parametrize(("size", "millions"), [("small", 51.8), ("base", 64.9), ("large", 77.9)])
def test_mask_rcnn_on_nextvit_has_the_published_counts(size, millions):
    """They leave out what is frozen, and keep ImageNet's head and a fourth extra norm, which the code does not use."""
    unused = 1024 * 1000 + 1000 + 2 * 1024
    assert round((count(f"nextvit_{size}", trained=True) + unused) / 1e6, 1) == millions


@pytest.mark.parametrize(("form", "counts"), [("faster_rcnn", (2, 3)), ("mask_rcnn", (0, 0)), ("cascade", (2, 0))])
def test_every_parameter_has_a_gradient_whatever_the_images_hold(form, counts):
    model = small_detector(**FORMS[form]).double()
    sums, numbers = model(*a_batch(counts))
    assert sums.keys() == numbers.keys()
    assert all(value.shape == (2,) for value in [*sums.values(), *numbers.values()])
    parts = 2 + (2 + (form != "faster_rcnn")) * (3 if form == "cascade" else 1)
    assert len(sums) == parts
    sum(value.sum() for value in sums.values()).backward()
    wrong = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert wrong == []
    if not sum(counts):
        assert all(not value.any() for name, value in sums.items() if "box" in name or "mask" in name)


@pytest.mark.parametrize("form", ["mask_rcnn", "cascade"])
def test_an_image_has_the_same_losses_and_detections_alone_and_batched(form):
    """So that losses divided within a slot do not depend on how slots are divided into micro-batches."""
    options = {**FORMS[form], "region_norm": "none"}
    model = small_detector(**options, score_threshold=0.0).double()
    images, sizes, objects, keys = a_batch()
    batched = model(images, sizes, objects, keys)
    found = model.eval()(images, sizes)
    for n in range(len(images)):
        part = slice(n, n + 1)
        alone = model(images[part], sizes[part], objects.part(part), keys[part])
        for whole, own in zip(batched, alone, strict=True):
            for name, value in own.items():
                torch.testing.assert_close(whole[name][part], value, rtol=1e-10, atol=1e-10)
        single = model(images[part], sizes[part])
        assert single.valid.any()
        for name in ("boxes", "scores", "classes", "valid", "mask_logits"):
            if getattr(single, name) is not None:
                torch.testing.assert_close(getattr(found, name)[part], getattr(single, name), rtol=1e-9, atol=1e-9)


def test_a_key_decides_what_is_sampled_and_stages_draw_apart():
    model = small_detector().double()
    images, sizes, objects, keys = a_batch()
    first = model(images, sizes, objects, keys)[0]
    again, other = (model(images, sizes, objects, k)[0] for k in (keys, keys + 1000))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["rpn_class"], other["rpn_class"])
    assert not torch.equal(first["class"], other["class"])


def test_detections_lie_in_the_image_and_empty_places_are_zero():
    model = small_detector(test_proposals=10, detections=50, score_threshold=0.0, nms=0.3).double().eval()
    images, sizes, *_ = a_batch()
    found = model(images, sizes)
    assert found.boxes.shape == (3, 50, 4)
    assert found.mask_logits.shape == (3, 50, 28, 28)
    limits = sizes.flip(1).repeat(1, 2)[:, None]
    assert (found.boxes >= 0).all()
    assert (found.boxes <= limits).all()
    assert (found.scores.diff(dim=1) <= 0).all()
    assert not found.valid.all()
    assert found.valid.any()
    assert not found.boxes[~found.valid].any()
    assert not found.scores[~found.valid].any()


@pytest.mark.parametrize("family", ["nextvit", "slak"])
def test_what_is_frozen_stays_as_it_is(family):
    model = small_detector(family, frozen_stages=1, frozen_norms=True)
    scatter_norms(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert model.train().eval().train() is model
    assert not model.counts_batches  # no BatchNorm looks at a batch
    images, *rest = a_batch((2, 1))
    sums, _ = model(images.float(), *rest, keep=torch.ones(len(model.drop_path_rates(0.5)), 2))
    sum(value.sum() for value in sums.values()).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()  # steps what has a gradient
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}
    inside = [p for module in model.backbone.first_stages(1) for p in module.parameters()]
    assert inside
    assert all(p.grad is None and not p.requires_grad for p in inside)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) + len(inside) == len(list(model.parameters()))
    assert all(model.get_parameter(name).grad is not None for name in trained)
    assert moved
    assert moved <= set(trained)  # neither what is frozen nor a statistic
    rates, all_rates = model.drop_path_rates(0.5), model.backbone.drop_path_rates(0.5)
    assert any(rates)
    assert len(rates) == len(all_rates)
    assert all(rate in (0, whole) for rate, whole in zip(rates, all_rates, strict=True))


def test_batchnorm_of_regions_counts_the_images_of_a_norm_group():
    model = small_detector(**FORMS["cascade"]).double()
    images, sizes, objects, keys = a_batch((2, 1, 2, 3))
    set_norm_group(model, 2, None)
    grouped, _numbers = model(images, sizes, objects, keys)
    for part in (slice(0, 2), slice(2, 4)):
        own, _ = model(images[part], sizes[part], objects.part(part), keys[part])
        for name, value in own.items():
            torch.testing.assert_close(grouped[name][part], value, rtol=1e-10, atol=1e-10)
    set_norm_group(model, None, None)
    together, _ = model(images, sizes, objects, keys)
    assert (together["class_0"] - grouped["class_0"]).abs().max() > 1e-6


def test_a_step_runs_on_the_meta_device_so_no_shape_depends_on_a_value():
    with torch.device("meta"):
        model = small_detector(**FORMS["cascade"])
    images, sizes, objects, keys = a_batch()
    objects = objects.moved(lambda tensor: tensor.to("meta"))
    sums, _ = model(images.float().to("meta"), sizes, objects, keys.to("meta"))
    sum(value.sum() for value in sums.values()).backward()
    found = model.eval()(images.float().to("meta"), sizes)
    assert found.boxes.shape == (3, 20, 4)
    assert found.boxes.is_meta


def test_features_depend_on_the_canvas_and_not_on_other_images():
    model = small_detector().double().eval()
    images = a_batch()[0]
    for whole, own in zip(model.pyramid(images), model.pyramid(images[1:2]), strict=True):
        torch.testing.assert_close(whole[1:2], own, rtol=0, atol=1e-12)
    wider = model.pyramid(F.pad(images, (0, 32)))[0]
    assert (wider[..., :4] - model.pyramid(images)[0][..., :4]).abs().max() > 1e-6  # GRN sees the padding


def test_what_does_not_fit_is_refused_by_name():
    for options, backbone, problem in (
        ({"head": "yolo"}, {}, "head is 'yolo'"),
        ({"region_norm": "layer"}, {}, "region_norm is 'layer'"),
        ({"box_loss": "l2"}, {}, "box_loss is 'l2'"),
        ({"frozen_stages": 5}, {}, "frozen_stages is 5"),
        ({"regions": 3}, {}, "regions is 3"),
        ({}, {"depths": (1,), "dims": (8,)}, "one stage"),
    ):
        with pytest.raises(ValueError, match=problem):
            create_detector("convnextv2", small_options(**options), **{**SMALL["convnextv2"], **backbone})
