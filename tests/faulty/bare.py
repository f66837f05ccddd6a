"""An encoder of one's own that defines what it must and nothing more: no `timm()`, no `open_clip()`."""

from torch import Tensor, nn

from prepretrain import Encoder


class Bare(Encoder):
    """Patches, and a linear layer."""

    prefix = 0

    def __init__(self, *, width: int = 16, image_size: int = 32):
        super().__init__()
        self.width, self.stride, self.image_size = width, 8, (image_size, image_size)
        self.patch, self.patch_width = 8, width
        self.blocks = nn.ModuleList([nn.Linear(3 * 64, width)])

    def forward(self, image: Tensor, **how) -> Tensor:
        self.check(image, **how)
        cells = image.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(3)
        return self.blocks[0](cells.flatten(1, 2))
