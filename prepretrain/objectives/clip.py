"""Weakly supervised training on captions: CLIP (arXiv 2103.00020) from stage one's weights."""

from prepretrain.objectives.captions import Contrastive


class CLIP(Contrastive):
    """Both towers learn to put an image and its caption side by side (CLIP, section 2.3)."""
