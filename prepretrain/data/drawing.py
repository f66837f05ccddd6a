"""Draws objects over pictures, and pictures beside each other on a sheet."""

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

_TURN = 0.618034  # of the colour circle from a class to the next: neighbours differ
_MARGIN, _LINE = 8, 22  # pixels between pictures, and of a line of text


def draw_objects(
    picture: Tensor,
    boxes: Tensor,
    classes: Tensor,
    texts: list[str],
    masks: Tensor | None = None,
    *,
    side: int = 480,
) -> Tensor:
    """A picture uint8 [3, H, W], resized to a longer side of `side`, with boxes [n, 4], their texts, and
    masks bool [n, H, W] drawn over it. A class has one colour everywhere; a box without area is not drawn.
    """
    ratio = side / max(picture.shape[-2:])
    picture = at_side(picture, side)
    size = picture.shape[-2:]
    wide = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(1).nonzero()[:, 0].tolist()
    if not wide:
        return picture
    colours = [colour_of(int(classes[i])) for i in wide]
    if masks is not None:
        small = F.interpolate(masks[wide][:, None].to(torch.uint8), size, mode="nearest")[:, 0]
        for mask, colour in zip(
            small.bool(), colours
        ):  # together they would be black where two are
            picture = draw_segmentation_masks(picture, mask, alpha=0.45, colors=[colour])
    return draw_bounding_boxes(
        picture,
        boxes[wide].float() * ratio,
        labels=[texts[i] for i in wide],
        colors=colours,
        width=2,
        font=_font_file(),
        font_size=11,
        label_colors="black",
        fill_labels=True,
    )


def coloured(
    picture: Tensor, labels: Tensor | None = None, palette: list | None = None, *, side: int = 320
) -> Tensor:
    """A picture uint8 [3, H, W], resized to a longer side of `side`; with labels [H, W] over it in the
    colours of a palette. Pixels without a class stay as they are, darker."""
    picture = at_side(picture, side)
    if labels is None:
        return picture
    small = F.interpolate(labels[None, None].to(torch.uint8), picture.shape[-2:])[0, 0].long()
    table = torch.zeros(256, 3, dtype=torch.uint8)
    table[: len(palette)] = torch.tensor(palette, dtype=torch.uint8)
    colours = table[small].permute(2, 0, 1).float()
    return (0.3 * picture + 0.7 * colours).to(torch.uint8)


def heights(values: Tensor, low: float, high: float, *, side: int = 320) -> Tensor:
    """A map of depths [H, W] as uint8 [3, h, w]: from blue, `low`, to red, `high`; 0 is black."""
    small = F.interpolate(values[None, None].float(), _size_at(values, side))[0, 0]
    place = ((small - low) / max(high - low, 1e-9)).clamp(0, 1)
    colours = torch.from_numpy(matplotlib.colormaps["turbo"](place.numpy())[..., :3])
    return (255 * colours.permute(2, 0, 1) * (small > 0)).to(torch.uint8)


def principal_colours(maps: Tensor) -> Tensor:
    """Maps of features [n, D, rows, columns] as uint8 [n, 3, rows, columns]: their three directions of
    most variance over all of them as red, green and blue, each from its 1st to its 99th percentile."""
    cells = maps.permute(0, 2, 3, 1).flatten(0, 2).double()
    centred = cells - cells.mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    directions = directions[:3]
    # of two opposite directions the one whose largest part is positive, so that pictures are alike
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    shown = centred @ (directions * largest.sign()).T
    low, high = (shown.quantile(share, dim=0) for share in (0.01, 0.99))
    colours = ((shown - low) / (high - low).clamp(min=1e-9)).clamp(0, 1)
    whole = colours.unflatten(0, (len(maps), *maps.shape[-2:]))
    return (255 * whole).round().to(torch.uint8).permute(0, 3, 1, 2)


def legend(maps: Sequence[Tensor], palette: list, names: Sequence[str], height: int) -> Tensor:
    """uint8 [3, height, 160]: the colour and the name of each class of some label maps, as many as
    there is room for, those with the most pixels first."""
    counts = sum(torch.bincount(one.flatten().long(), minlength=256) for one in maps)
    shown = [i for i in counts[: len(names)].argsort(descending=True).tolist() if counts[i]]
    page = Image.new("RGB", (160, height), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.truetype(_font_file(), 11)
    for place, label in enumerate(shown[: height // 15]):
        top = 15 * place
        pen.rectangle((0, top, 16, top + 12), fill=tuple(palette[label]))
        pen.text((21, top), names[label], fill="black", font=font)
    return torch.from_numpy(np.array(page)).permute(2, 0, 1)


def lines_of_text(lines: Sequence[tuple[str, str]], height: int, width: int = 160) -> Tensor:
    """uint8 [3, height, width]: lines of (text, colour), cut where there is no room."""
    page = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.truetype(_font_file(), 12)
    for place, (text, colour) in enumerate(lines):
        pen.text((0, 18 * place), text, fill=colour, font=font)
    return torch.from_numpy(np.array(page)).permute(2, 0, 1)


def palette_of(card: Any) -> list[list[int]]:
    """The colours of a card's classes: those that it says, else bright ones."""
    said = card.values.get("palette")
    return said or [list(colour_of(label)) for label in range(len(card.classes))]


def at_side(picture: Tensor, side: int) -> Tensor:
    """A picture uint8 [3, H, W] with a longer side of `side`."""
    resized = F.interpolate(picture[None], _size_at(picture, side), mode="bilinear", antialias=True)
    return resized[0].contiguous()


def _size_at(picture: Tensor, side: int) -> list[int]:
    """Height and width with a longer side of `side`."""
    ratio = side / max(picture.shape[-2:])
    return [max(1, round(edge * ratio)) for edge in picture.shape[-2:]]


def colour_of(label: int) -> tuple[int, int, int]:
    """A bright colour for a class."""
    red, green, blue = colorsys.hsv_to_rgb(label * _TURN % 1, 0.65, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def sheet(rows: list[list[Tensor]], titles: list[str]) -> Image.Image:
    """Rows of pictures uint8 [3, H, W] of any sizes, and a title over each column."""
    width = max(picture.shape[-1] for row in rows for picture in row) + _MARGIN
    heights = [max(picture.shape[-2] for picture in row) + _MARGIN for row in rows]
    columns = max(map(len, rows))
    page = Image.new("RGB", (columns * width + _MARGIN, sum(heights) + _MARGIN + _LINE), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.truetype(_font_file(), 14)
    for column, title in enumerate(titles):
        pen.text((_MARGIN + column * width, 3), title, fill="black", font=font)
    top = _LINE + _MARGIN
    for pictures, height in zip(rows, heights):
        for column, picture in enumerate(pictures):
            pixels = np.ascontiguousarray(picture.permute(1, 2, 0).cpu().numpy())
            page.paste(Image.fromarray(pixels), (_MARGIN + column * width, top))
        top += height
    return page


def _font_file() -> str:
    """A font of matplotlib's, which has the letters of most alphabets."""
    return str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf")
