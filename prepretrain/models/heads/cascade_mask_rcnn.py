"""Cascade Mask R-CNN (arXiv 1906.09756) as ViTDet has it: three stages, each on the boxes of the one
before and stricter than it."""

from prepretrain.models.dense.boxes import Coder
from prepretrain.models.dense.rcnn import RCNN, Stage


class CascadeMaskRCNN(RCNN):
    """Boxes and masks of objects, the boxes in three stages."""

    stages = (
        Stage(0.5, Coder(10.0, 5.0)),
        Stage(0.6, Coder(20.0, 10.0)),
        Stage(0.7, Coder(30.0, 15.0)),
    )
    shared_boxes = True
