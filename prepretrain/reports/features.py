"""Draws what models make of images: the main directions of their patches' features as colours."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from prepretrain.data.card import open_data
from prepretrain.data.drawing import principal_colours
from prepretrain.data.subset import evenly_spaced
from prepretrain.data.transforms import decode, resize_center_crop
from prepretrain.models.load import load
from prepretrain.reports.reconstructions import draw


@torch.no_grad()
def colour(
    sources: Sequence[str],
    data: str,
    images: int,
    path: str | Path,
    names: Sequence[str] = (),
    size: int | None = None,
) -> None:
    """Draws `images` images of a card, spread evenly over it, and beside each the features of its
    patches by one or several models, after the last norm: the three directions in which those of
    all images differ most are red, green and blue.

    names: of the models. size: pixels of the images' side, a multiple of the patches'; None: the
    first model's. Raises ValueError for a model that gives no maps.
    """
    source = open_data(data)
    if not 1 <= images <= len(source):
        raise ValueError(f"--images: {images} does not fit; '{data}' has {len(source)} images.")
    if names and len(names) != len(sources):
        raise ValueError(f"--names: {len(names)} names for {len(sources)} runs.")
    some = evenly_spaced(source.only(["image"]), images)
    pictures: Tensor | None = None
    columns: dict[str, Tensor] = {}
    for address, name in zip(sources, names or [Path(one).resolve().name for one in sources]):
        model = load(address, **({} if size is None else {"image_size": size}))
        encoder = model.encoder
        encoder.require(("maps",), address)
        if pictures is None:
            seen = partial(resize_center_crop, size=encoder.image_size, share=1.0)
            rows = [seen(decode(some[i]["image"])) for i in range(len(some))]
            columns["image"] = pictures = torch.stack(rows)
        last = len(encoder.scales or encoder.blocks)
        (maps,) = model.encode(model.normalise(pictures), maps=(last,))
        colours = principal_colours(maps).float()
        shown = torch.nn.functional.interpolate(colours, pictures.shape[-2:], mode="nearest")
        columns[name] = shown.to(torch.uint8)
    draw(columns, path)
