"""Any Vision Transformer of timm by its name (MAE, DINO, DINOv2, EVA, …), to be a teacher or to be
measured beside our own."""

from typing import Any

import timm
from torch import Tensor, nn

from prepretrain.data.transforms import Size
from prepretrain.models.encoders.base import Encoder, resample_positions

SIZES = {"timm": {}}


class TimmViT(Encoder):
    """A model of timm that gives tokens: class and register tokens first, then the grid.

    Its mean and standard deviation are those that timm states for the name.
    """

    trains = False

    def __init__(self, *, architecture: str, image_size: Size | None = None):
        """architecture: timm's name, as `vit_base_patch16_224.dino`; image_size: its own if None."""
        super().__init__()
        if ":" in architecture:  # timm would fetch it from a hub, or read a folder
            raise ValueError(f"model.architecture: {architecture!r} is no model of timm's own.")
        size = {} if image_size is None else {"img_size": image_size}
        try:
            net = timm.create_model(architecture, pretrained=False, num_classes=0, **size)
        except (RuntimeError, TypeError, AssertionError) as error:
            raise ValueError(f"model.architecture: {architecture}: {error}") from error
        if not hasattr(net, "patch_embed") or not hasattr(net, "num_prefix_tokens"):
            raise ValueError(
                f"model.architecture: {architecture} is a {type(net).__name__}, which gives no tokens "
                f"of patches. Take a ViT."
            )
        net.fc_norm = nn.Identity()  # of the mean that a classifier takes: no token sees it
        self.net, self.prefix, self.width = net, net.num_prefix_tokens, net.num_features
        self.image_size, self.stride = net.patch_embed.img_size, net.patch_embed.patch_size[0]
        self.patch, self.patch_width = self.stride, self.width
        self.mean, self.std = net.pretrained_cfg["mean"], net.pretrained_cfg["std"]

    def forward(
        self,
        image: Tensor,
        *,
        keep: Tensor | None = None,
        hide: tuple[Tensor, Tensor] | None = None,
        layer: int | None = None,
    ) -> Tensor:
        """See Encoder.forward. Raises ValueError for anything but whole images and the last layer."""
        self.check(image, keep=keep, hide=hide, layer=layer)
        return self.net.forward_features(image)

    def adapt(self, name: str, tensor: Tensor, before: dict[str, Any]) -> Tensor:
        """Positions for another image size; some of timm's tables leave out the prefix."""
        if name != "net.pos_embed":
            return tensor
        bare = self.net.pos_embed.shape[1] == self.cells
        prefix = 0 if bare else self.prefix
        return resample_positions(tensor, self.grid, prefix, self.stride, before)

    def released(self, names: list[str]) -> dict[str, str | None]:
        """See Encoder.released: timm's files name its modules, and a classifier with its norm."""
        if any(n.startswith("net.") for n in names):
            return {n: n for n in names}
        return {n: None if n.startswith(("head.", "fc_norm.")) else f"net.{n}" for n in names}

    @staticmethod
    def offered(name: str) -> dict[str, Any]:
        """See Encoder.offered: `vit_base_patch16_224.dino`."""
        if not timm.is_model_pretrained(name):
            raise ValueError(
                f"timm/{name}: timm offers no such weights. See timm.list_pretrained()."
            )
        return {"encoder": "timm", "architecture": name}

    @staticmethod
    def fetch(name: str) -> dict[str, Tensor]:
        """See Encoder.fetch."""
        return timm.create_model(name, pretrained=True, num_classes=0).state_dict()
