"""Supervised classification of videos by clips: what fine-tuning on Kinetics and Something-Something
trains (MAE-ST, arXiv 2205.09113; OmniMAE, arXiv 2206.08356)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prepretrain.data.randaugment import RandAugment
from prepretrain.data.transforms import Size, random_resized_crop, resize_center_crop
from prepretrain.data.transforms import flip as mirrored
from prepretrain.data.video.clips import Sampling
from prepretrain.data.video.views import Way, sampling_of
from prepretrain.models.model import Model
from prepretrain.objectives.base import blank_images
from prepretrain.objectives.supervised import Supervised, class_of


class Video(Supervised):
    """Cross-entropy over the classes of a card of videos, from clips of `model.frames` frames, whose
    crop, flip, RandAugment, mixup, cutmix and erasing are the same for all frames."""

    fields = ("video", "label")

    def __init__(
        self,
        model: Model,
        *,
        sampling: Way = "strided",
        stride: int = 4,
        span: float = 2.7,
        draws: int = 1,
        flip: bool = True,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        smoothing: float = 0.0,
        erasing: float = 0.0,
        augment: str | None = None,
        crop_scale: tuple[float, float] = (0.08, 1.0),
    ):
        """sampling: "strided", frames `stride` thirtieths of a second apart (Kinetics); "segments", one
        of each of equal parts of the video, or "window", spread over `span` seconds of it
        (Something-Something). draws: clips of each video in a batch (repeated augmentation);
        batch_size counts videos. flip: mirrors half of the clips. mixup, cutmix, smoothing, erasing,
        augment: as classify's."""
        options = {"mixup": mixup, "cutmix": cutmix, "smoothing": smoothing, "erasing": erasing}
        super().__init__(model, augment=augment, **options)
        if model.encoder.frames is None:
            raise ValueError(
                "model.frames: is missing; objective 'video' trains on clips, as of model.frames=16."
            )
        if self.mix is not None and draws % 2 == 0:
            self.multiple = 1  # one video's clips are pairs
        self.sampling = sampling_of(sampling, model.encoder.frames, stride=stride, span=span)
        self.draws, self.flip, self.crop_scale = draws, flip, crop_scale

    def transform(self, train: bool) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """Random clips of a video, or the middle one with the crop of its centre, and the label."""
        size = self.model.encoder.image_size
        if not train:
            return Middle(size, self.classes, self.sampling)
        how = self.draws, self.crop_scale, self.flip, self.augment
        return Draws(size, self.classes, self.sampling, *how)

    def example(self, images: int) -> dict[str, Tensor]:
        """See Objective.example; an image is a video, with all of its draws."""
        encoder = self.model.encoder
        frames = blank_images(images * self.draws * encoder.frames, encoder.image_size)
        clips = frames.unflatten(0, (images, self.draws, encoder.frames)).transpose(2, 3)
        return {"clip": clips, "label": torch.empty(images, dtype=torch.int64, device="meta")}

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """{"clip": uint8 [B, draws, 3, T, H, W], "label": int64 [B]} to the loss, and in evaluation the
        accuracy."""
        clip = batch["clip"]
        label = batch["label"].repeat_interleave(clip.shape[1], output_size=clip.shape[:2].numel())
        return self.loss_of(self.model.normalise(clip.flatten(0, 1)), label)


class Draws:
    """A sample to {"clip": uint8 [draws, 3, T, H, W], "label": int}, each clip random."""

    def __init__(
        self,
        size: Size,
        classes: int,
        sampling: Sampling,
        draws: int,
        crop_scale: tuple[float, float],
        flip: bool,
        augment: RandAugment | None,
    ):
        self.size, self.classes, self.sampling = size, classes, sampling
        self.draws, self.crop_scale, self.flip, self.augment = draws, crop_scale, flip, augment

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Raises ValueError for a label that is no class. Frames of several clips are decoded once."""
        label, video, random = class_of(sample, self.classes), sample["video"], sample["random"]
        purposes = {name: random(name) for name in ("frames", "crop", "flip", "augment")}
        numbers = [self.sampling.train(video, purposes["frames"]) for _ in range(self.draws)]
        frames = video.read([number for clip in numbers for number in clip])
        clips = [self._changed(clip, **purposes) for clip in frames.chunk(self.draws)]
        return {"clip": torch.stack(clips).transpose(1, 2), "label": label}

    def _changed(self, clip: Tensor, *, crop: Any, flip: Any, augment: Any, **_: Any) -> Tensor:
        """[T, 3, h, w] to [T, 3, H, W], all frames alike."""
        clip = random_resized_crop(clip, self.size, crop, scale=self.crop_scale)
        if self.flip:
            clip = mirrored(clip, flip)
        return clip if self.augment is None else self.augment(clip, augment)


class Middle:
    """A sample to {"clip": uint8 [1, 3, T, H, W], "label": int}: the clip and the crop in the middle."""

    def __init__(self, size: Size, classes: int, sampling: Sampling):
        self.size, self.classes, self.sampling = size, classes, sampling

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Raises ValueError for a label that is no class."""
        label, video = class_of(sample, self.classes), sample["video"]
        clip = video.read(self.sampling.test(video, 1)[0])
        seen = resize_center_crop(clip, self.size, share=1.0)
        return {"clip": seen.transpose(0, 1)[None], "label": label}
