"""Mask R-CNN (arXiv 1703.06870) as ViTDet has it: one stage of boxes, one for each class."""

from prepretrain.models.dense.boxes import Coder
from prepretrain.models.dense.rcnn import RCNN, Stage


class MaskRCNN(RCNN):
    """Boxes and masks of objects, in one stage."""

    stages = (Stage(0.5, Coder(10.0, 5.0)),)
    shared_boxes = False
