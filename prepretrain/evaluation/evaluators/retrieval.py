"""Image-text retrieval: whether an image finds its captions among all, and a caption its image."""

from pathlib import Path

import torch
from torch import Tensor, nn

from prepretrain.distributed import group as distributed
from prepretrain.evaluation.evaluators.base import ContrastiveEvaluator
from prepretrain.evaluation.features import extract_texts
from prepretrain.objectives.captions import captions

AT = (1, 5, 10)


class Retrieval(ContrastiveEvaluator):
    """Recall at 1, 5 and 10 over all images and captions of a split, as on Flickr30k and COCO (CLIP,
    arXiv 2103.00020, appendix).

    data           the card; a sample's `captions` are used, or its `text`
    split          its split
    share          of the image's short side that the centre crop shows
    feature_batch  images or texts at once a process;  workers: as data.workers

    An image is right at K if one of its captions is among its K nearest, a caption if its image is.
    What is as near as the right one counts as nearer. With `leaks`, images that leaked are also left
    out as candidates, with their captions, for the metrics without leaks. Results are `image_to_text_r1` … `_r10`,
    `text_to_image_r1` … `_r10` in percent, their mean, `images`, `captions`, and `cut_captions`,
    those longer than the tower reads.
    """

    headline = "mean_recall"

    def __init__(
        self,
        *,
        data: str,
        split: str = "val",
        share: float = 1.0,
        feature_batch: int = 256,
        workers: int | None = None,
    ):
        super().__init__(
            data=data, split=split, share=share, feature_batch=feature_batch, workers=workers
        )

    def run(self, model: nn.Module, folder: Path) -> dict[str, float]:
        """Recalls on the split, each image and each caption counted once."""
        self.check(model)
        source = self.open_data()[self.split]
        name = f"{self.card.name}:{self.split}"
        texts, owner = self.read(source, name)
        text, cut = extract_texts(model, texts, batch_size=self.feature_batch)
        image, _ = self.images(model, source, labelled=False)
        owners = torch.tensor(owner)
        measure = lambda kept: recalls(*some_of(image, text, owners, kept))
        found = self.certify(measure, self.leaked(source))
        counts = {"images": len(image), "captions": len(texts), "cut_captions": cut}
        return distributed.from_main(found | counts)

    def read(self, source: object, name: str) -> tuple[list[str], list[int]]:
        """All captions, and the number of the image that each belongs to. Raises ValueError for an
        image without one."""
        if not {"text", "captions"} & set(source.fields):
            raise ValueError(
                f"{name}: has no text and no captions (its fields: {', '.join(source.fields)})."
            )
        texts: list[str] = []
        owner: list[int] = []
        for number in range(len(source)):
            found = captions(source.texts(number))
            if not found:
                raise ValueError(
                    f"{name}: image {number} has no caption. An evaluation counts every image: "
                    f"repair this one, or remove it from the data."
                )
            texts += found
            owner += [number] * len(found)
        return texts, owner


def some_of(
    image: Tensor, text: Tensor, owner: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The images that bool [n] keeps and their texts, as `recalls` takes them."""
    number = kept.cumsum(0) - 1  # of an image among those kept
    texts = kept[owner]
    return image[kept], text[texts], number[owner[texts]]


def recalls(image: Tensor, text: Tensor, owner: Tensor) -> dict[str, float]:
    """Recalls in percent of image features [n, J] and text features [m, J], where text i belongs to
    image owner[i]."""
    better_texts, better_images = [], []
    for first in range(0, len(image), 256):  # some rows of [n, m] at a time
        scores = image[first : first + 256] @ text.T
        rows = torch.arange(first, first + len(scores))
        mine = owner[None] == rows[:, None]
        best = scores.masked_fill(~mine, -torch.inf).amax(1, keepdim=True)
        better_texts.append(((scores >= best) & ~mine).sum(1))
    for first in range(0, len(text), 256):
        scores = text[first : first + 256] @ image.T
        right = owner[first : first + 256, None]
        better_images.append((scores >= scores.gather(1, right)).sum(1) - 1)
    found = {}
    for name, better in (("image_to_text", better_texts), ("text_to_image", better_images)):
        better = torch.cat(better)
        found |= {f"{name}_r{k}": 100.0 * (better < k).double().mean().item() for k in AT}
    return {"mean_recall": sum(found.values()) / len(found)} | found
