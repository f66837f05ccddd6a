"""The image tower of any open_clip model by its name (CLIP, EVA-CLIP, …), to be a teacher or to be
measured beside our own."""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from prepretrain.data.transforms import Size
from prepretrain.models.encoders.base import Encoder, resample_positions

logger = logging.getLogger(__name__)

SIZES = {"open_clip": {}}
_OF_TAGS = ("quick_gelu", "mean", "std")  # what differs between weights of one architecture


class OpenClip(Encoder):
    """The tokens of an open_clip image tower after its last norm, before pooling and projection.

    Its activation, mean and standard deviation are those that open_clip states for the weights.
    """

    trains = False

    def __init__(
        self, *, architecture: str, tag: str | None = None, image_size: Size | None = None
    ):
        """architecture: open_clip's name, as `ViT-B-16`; tag: its name of the weights, as `openai`,
        by which activation, mean and deviation differ; None takes what all tags of the architecture
        share, else open_clip's defaults. image_size: its own if None."""
        import open_clip  # slow to import, and only its own models need it

        super().__init__()
        if architecture not in open_clip.list_models():
            raise ValueError(
                f"model.architecture: open_clip has no '{architecture}'. See open_clip.list_models()."
            )
        stated = _stated(architecture, tag)
        tower = open_clip.create_model(
            architecture,
            force_image_size=image_size,
            force_quick_gelu=bool(stated.get("quick_gelu")),
            force_preprocess_cfg={k: stated[k] for k in ("mean", "std") if k in stated},
            load_weights=False,
            device=torch.get_default_device(),
        ).visual
        self.mean, self.std = tower.image_mean, tower.image_std
        self.image_size = tuple(tower.image_size)
        if isinstance(tower, open_clip.timm_model.TimmModel):
            self.net = nn.Module()
            self.net.trunk = net = tower.trunk
            if not hasattr(net, "patch_embed") or not hasattr(net, "num_prefix_tokens"):
                raise ValueError(
                    f"model.architecture: the image tower of {architecture} is a "
                    f"{type(net).__name__}, which gives no tokens of patches. Take a ViT."
                )
            self.prefix, self.width = net.num_prefix_tokens, net.num_features
            self.stride = net.patch_embed.patch_size[0]
        elif isinstance(tower, open_clip.transformer.VisionTransformer):
            tower.proj = tower.attn_pool = None
            self.net, self.prefix, self.width = tower, 1, tower.conv1.out_channels
            self.stride = tower.patch_size[0]
        else:
            raise ValueError(
                f"model.architecture: the image tower of {architecture} is a "
                f"{type(tower).__name__}, which gives no tokens of patches. Take a ViT."
            )
        self.patch, self.patch_width = self.stride, self.width

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
        if hasattr(self.net, "trunk"):
            return self.net.trunk.forward_features(image)
        found = self.net.forward_intermediates(
            image,
            indices=1,
            normalize_intermediates=True,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        return torch.cat(
            [found["image_intermediates_prefix"][0], found["image_intermediates"][0]], 1
        )

    def adapt(self, name: str, tensor: Tensor, before: dict[str, Any]) -> Tensor:
        """Positions for another image size."""
        if name == "net.positional_embedding":
            table, prefix = tensor[None], self.prefix
            return resample_positions(table, self.grid, prefix, self.stride, before)[0]
        if name == "net.trunk.pos_embed":
            bare = self.net.trunk.pos_embed.shape[1] == self.cells
            prefix = 0 if bare else self.prefix
            return resample_positions(tensor, self.grid, prefix, self.stride, before)
        return tensor

    def released(self, names: list[str]) -> dict[str, str | None]:
        """See Encoder.released: open_clip's files hold the text tower and projections too."""
        if any(n.startswith("net.") for n in names):
            return {n: n for n in names}
        unused = ("visual.proj", "visual.head.", "visual.attn_pool")
        return {
            n: "net." + n.removeprefix("visual.")
            if n.startswith("visual.") and not n.startswith(unused)
            else None
            for n in names
        }

    @staticmethod
    def offered(name: str) -> dict[str, Any]:
        """See Encoder.offered: `ViT-B-16/laion2b_s34b_b88k`, an architecture and a tag."""
        import open_clip

        architecture, _, tag = name.partition("/")
        if tag not in open_clip.list_pretrained_tags_by_model(architecture):
            raise ValueError(
                f"open_clip/{name}: open_clip offers no such weights. Write "
                f"open_clip/ARCHITECTURE/TAG, as open_clip.list_pretrained() has them."
            )
        return {"encoder": "open_clip", "architecture": architecture, "tag": tag}

    @staticmethod
    def fetch(name: str) -> dict[str, Tensor]:
        """See Encoder.fetch."""
        import open_clip

        architecture, _, tag = name.partition("/")
        quick = bool(_stated(architecture, tag).get("quick_gelu"))
        model = open_clip.create_model(architecture, pretrained=tag, force_quick_gelu=quick)
        return model.state_dict()


def _stated(architecture: str, tag: str | None) -> dict[str, Any]:
    """What open_clip states of the weights `tag`; without one, of all weights of the architecture
    alike, and a warning names what differs. Raises ValueError for a tag that it has not."""
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(architecture)
    every = {t: open_clip.get_pretrained_cfg(architecture, t) for t in tags}
    if tag is not None:
        if tag not in every:
            raise ValueError(
                f"model.tag: open_clip has no weights '{tag}' of {architecture}. It has: "
                f"{', '.join(tags) or 'none'}."
            )
        return every[tag]
    first = next(iter(every.values()), {})
    alike = {k for k in _OF_TAGS if all(one.get(k) == first.get(k) for one in every.values())}
    if differing := [k for k in _OF_TAGS if k not in alike]:
        logger.warning(
            "open_clip's weights of %s differ in %s, and model.tag does not say which these are: "
            "open_clip's defaults are taken. There are: %s",
            *(architecture, " and ".join(differing), ", ".join(tags)),
        )
    return {k: v for k, v in first.items() if k in alike}
