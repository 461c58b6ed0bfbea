"""What stands behind the backbone of a model for detection, how it is trained and how it is tested."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BoxStage:
    """A box head's stage: the only one, or one of a cascade's three."""

    deviations: tuple[float, ...]  # by which coded boxes are divided, see `encode_boxes`
    overlap: float = 0.5  # intersection over union from which a box lies on an object
    weight: float = 1.0  # factor on the stage's losses


ONE_STAGE = (BoxStage((0.1, 0.1, 0.2, 0.2)),)
CASCADE = (
    BoxStage((0.1, 0.1, 0.2, 0.2)),
    BoxStage((0.05, 0.05, 0.1, 0.1), 0.6, 0.5),
    BoxStage((0.033, 0.033, 0.067, 0.067), 0.7, 0.25),
)


@dataclass(frozen=True)
class DetectorOptions:
    """What stands behind the backbone, how it is trained and how it is tested.

    Args:
        classes: without the background.
        head: "mask_rcnn", "cascade" or "faster_rcnn".
        masks: whether a cascade has mask heads; Mask R-CNN has one, Faster R-CNN none.
        channels: of the pyramid and the heads' convolutions.
        fc_channels: of the box heads' linear layers.
        region_norm: of a cascade's convolutions: "none", "batch" or "group".
        class_agnostic: one box for all classes; published configurations of all three heads have one for each class.
        box_loss: "l1" of coded boxes or "giou" of boxes.
        anchors_sampled: anchors of an image that the losses of the proposals count.
        proposals_before, proposals: in training, boxes of each map that go into the NMS, and proposals of an image that
            remain.
        proposal_nms: intersection over union above which the lower-scored of two proposals is dropped.
        regions: regions of an image that the losses of the second stage count.
        positive_share: share of them that lies on objects, at most.
        sampling_ratio: points on a side of a bin of RoIAlign; 0 is one for each site of the map.
        test_proposals: in tests, both of each map before the NMS and of an image after it.
        score_threshold, nms, soft_nms, detections: of tests, see `select_detections`.
        frozen_stages: number of the backbone's stages that are not trained; the stem is not trained either then.
        frozen_norms: the backbone's BatchNorms use their running statistics and do not change them.
        map_norms: whether a norm of its own follows each map of the backbone.
    """

    classes: int
    head: str = "mask_rcnn"
    masks: bool = True
    channels: int = 256
    fc_channels: int = 1024
    region_norm: str = "none"
    class_agnostic: bool = False
    box_loss: str = "l1"
    anchors_sampled: int = 256
    proposals_before: int = 2000
    proposals: int = 1000
    proposal_nms: float = 0.7
    regions: int = 512
    positive_share: float = 0.25
    sampling_ratio: int = 0
    test_proposals: int = 1000
    score_threshold: float = 0.05
    nms: float = 0.5
    soft_nms: bool = False
    detections: int = 100
    frozen_stages: int = 0
    frozen_norms: bool = False
    map_norms: bool = True

    @property
    def cascade(self) -> bool:
        """Whether several box heads refine each other's boxes."""
        return self.head == "cascade"

    @property
    def stages(self) -> tuple[BoxStage, ...]:
        """The stages of the box heads, in order."""
        return CASCADE if self.cascade else ONE_STAGE

    @property
    def has_masks(self) -> bool:
        """Whether there are mask heads."""
        return self.masks and self.head != "faster_rcnn"

    @property
    def positives(self) -> int:
        """The most regions of an image that lie on objects."""
        return int(self.regions * self.positive_share)
