"""RandAugment by timm, drawn by a sample's own randomness, alike for all frames of a clip."""

import random
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor

from prepretrain.data.transforms import Size, sides


class RandAugment:
    """timm's RandAugment (Cubuk et al. 2020), drawn by the sample's own randomness."""

    def __init__(self, description: str, mean: tuple[float, float, float], size: Size):
        """description: timm's, as rand-m9-mstd0.5-inc1. mean: colour of what moves into a picture, 0 to
        1, as in MAE's and SimMIM's code. Raises ValueError for a description that timm does not read."""
        if not description.startswith("rand"):
            raise ValueError(
                f"objective.augment: {description!r} must be a RandAugment, as rand-m9-mstd0.5-inc1."
            )
        grey = tuple(round(255 * value) for value in mean)
        given = {"translate_const": int(min(sides(size)) * 0.45), "img_mean": grey}
        try:
            self.apply = rand_augment_transform(
                description, {**given, "interpolation": Image.BICUBIC}
            )
        except (AssertionError, ValueError, KeyError) as error:
            raise ValueError(
                f"objective.augment: {description!r} is not understood ({error})."
            ) from error
        for operation in self.apply.ops:
            if operation.name.startswith("Posterize"):
                operation.aug_fn = posterize

    def __call__(self, image: Tensor, generator: np.random.Generator) -> Tensor:
        """uint8 [3, H, W], or a clip [T, 3, H, W] whose frames are all changed alike, to the same
        shape."""
        seeds = [int(generator.integers(2**32)) for _ in range(2)]
        if image.ndim == 3:
            return self._changed(image, seeds)
        return torch.stack([self._changed(frame, seeds) for frame in image])

    def _changed(self, image: Tensor, seeds: list[int]) -> Tensor:
        # timm draws from the two global generators, which other parts of the process also use
        before = random.getstate(), np.random.get_state()
        random.seed(seeds[0])
        np.random.seed(seeds[1])
        try:
            changed = self.apply(Image.fromarray(image.permute(1, 2, 0).numpy()))
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
        return torch.from_numpy(np.array(changed)).permute(2, 0, 1)


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """The image with `bits` bits of each colour, 0 to 8. timm asks for 0 at its largest magnitude,
    which gives black, as in Pillow up to 12; later ones refuse it."""
    if bits < 1:
        return Image.new(image.mode, image.size)
    return image if bits >= 8 else ImageOps.posterize(image, bits)
