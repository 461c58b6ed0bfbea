"""Objects of a batch: parts of batches, and moves to a device."""

import torch

from pipeline.data.batch import Batch
from pipeline.data.batch_objects import BatchObjects, example_objects


def objects_of(counts):
    rows = torch.arange(sum(counts))
    boxes = torch.stack([rows] * 4, 1).float()
    return BatchObjects(boxes, rows, rows % 2 == 1, rows.byte()[:, None, None].expand(-1, 3, 1), counts)


def test_a_part_of_a_batch_has_the_objects_of_its_images():
    objects, images = objects_of((2, 0, 3, 1)), torch.zeros(4, 3, 3, 8, dtype=torch.uint8)
    sizes = torch.arange(8).reshape(4, 2)
    batch = Batch(
        images,
        torch.zeros(4).long(),
        torch.arange(4),
        0,
        (0, 1),
        torch.ones(4).bool(),
        objects=objects,
        view_sizes=sizes,
        image_sizes=sizes + 1,
    )
    part = batch.part(slice(1, 3), (1,))
    assert part.objects.counts == (0, 3)
    assert part.objects.classes.tolist() == part.objects.masks[:, 0, 0].tolist() == [2, 3, 4]
    assert part.objects.crowd.tolist() == [False, True, False]
    assert (part.view_sizes == sizes[1:3]).all()
    assert (part.image_sizes == sizes[1:3] + 1).all()
    assert batch.part(slice(1, 2)).objects.boxes.shape == (0, 4)
    assert batch.part(slice(4, 4)).objects.counts == ()


def test_the_objects_of_a_batch_move_with_its_images():
    objects = example_objects(2, (24, 20), classes=3, masks=True)
    ones = torch.ones(2)
    batch = Batch(ones, ones, ones, 0, (), ones, objects=objects, view_sizes=torch.ones(2, 2)).to(torch.device("meta"))
    assert all(tensor.is_meta for tensor in batch.tensors())
    assert len(list(batch.tensors())) == 6
    assert not batch.view_sizes.is_meta
    assert batch.objects.counts == (2, 2)
