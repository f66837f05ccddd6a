"""Draws objects over pictures, and pictures beside each other on a sheet."""

import colorsys
from pathlib import Path

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
    size = [max(1, round(edge * ratio)) for edge in picture.shape[-2:]]
    picture = F.interpolate(picture[None], size, mode="bilinear", antialias=True)[0].contiguous()
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
