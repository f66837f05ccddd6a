"""Captions for a locked image tower: LiT (arXiv 2111.07991), as MAWS's zero-shot models are trained
(arXiv 2303.13496, section 4.3)."""

from prepretrain.objectives.captions import Contrastive


class LiT(Contrastive):
    """The text tower and both projections learn; the image tower keeps the weights of --init.

    It is in no optimizer, keeps no activations, does not drop paths, and computes in the run's
    precision.
    """

    locked = needs_init = True

    def train(self, mode: bool = True) -> "LiT":
        """All but the image tower, which stays in evaluation mode."""
        super().train(mode)
        self.model.encoder.eval()
        return self
