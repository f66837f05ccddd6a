"""Errors of a model's depths, on the images of a card with depth maps."""

from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from prepretrain.data.dense.maps import pair
from prepretrain.data.drawing import coloured, heights, sheet
from prepretrain.data.random import Random
from prepretrain.data.sources.base import Source
from prepretrain.evaluation import corruptions as makers
from prepretrain.evaluation.dense import DenseEvaluator
from prepretrain.models.heads.base import Depths

Region = Literal["all", "nyu", "garg", "eigen"]
# top, bottom, left, right of what is measured, as shares of the height and width (BTS's bts_test.py)
_SHARES = {
    "garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229),
    "eigen": (0.3324324, 0.91351351, 0.0359477, 0.96405229),
}
_NYU = (45, 471, 41, 601)  # pixels of 480 x 640, where its cameras both see


class Depth(DenseEvaluator):
    """Depths that a model's head says, against those of a card's split, pixel by pixel at the size of
    the maps; those that are not known, or outside of `cap`, are left out. An image counts as much as
    another, however many depths of it are known.

    data           the card
    split          its split, of which each image is counted once
    cap            least and largest depth in metres that is measured; what is said is cut to it
    region         "nyu": the part of 480 x 640 that Eigen's protocol measures; "garg", "eigen": those of
                   KITTI; "all" of the image
    cut            of an image and its map so many rows, the lowest, and columns, those in the middle, are
                   seen and measured, and of these the region; [352, 1216] is KITTI's benchmark; null: all
    short_side     an image is resized to; null is the smaller side of model.image_size
    whole          true: it is resized to fit into model.image_size instead, and seen at once
    stride         pixels between windows of model.image_size; null is two thirds of it
    flip           also averages the depths of the mirrored image
    images         so many, spread evenly over the split; null takes all
    pictures       of so many of them a sheet is drawn: image, truth, what is said
    corruptions    of evaluation/corruptions.py, done to the images as they are; [all] takes all 19
    severities     theirs
    frost          the folder of the published textures, which corruption frost needs
    feature_batch  windows at once a process;  workers: as data.workers

    Results are `RMSE` in metres, `AbsRel`, the mean of the error over the depth, and `delta1`, in percent
    the share of pixels whose depth is wrong by a factor below 1.25; each the mean over images. Of
    corruptions as of `segmentation`, of `delta1`.
    """

    headline, field, averaged = "delta1", "depth", {"delta1": ""}

    def __init__(
        self,
        *,
        data: str,
        split: str = "val",
        cap: tuple[float, float] = (0.001, 10.0),
        region: Region = "all",
        cut: tuple[int, int] | None = None,
        short_side: int | None = None,
        whole: bool = False,
        stride: int | tuple[int, int] | None = None,
        flip: bool = False,
        images: int | None = None,
        pictures: int = 8,
        corruptions: tuple[str, ...] = (),
        severities: tuple[int, ...] = makers.SEVERITIES,
        frost: str | None = None,
        feature_batch: int = 4,
        workers: int | None = None,
    ):
        super().__init__(
            data=data,
            split=split,
            short_side=short_side,
            whole=whole,
            stride=stride,
            flip=flip,
            images=images,
            pictures=pictures,
            corruptions=corruptions,
            severities=severities,
            frost=frost,
            feature_batch=feature_batch,
            workers=workers,
        )
        self.cap, self.region, self.cut = cap, region, cut

    def check(self, model: nn.Module) -> None:
        """See Evaluator.check: a head that says depths is needed."""
        super().check(model)
        if not isinstance(model.head, Depths):
            raise ValueError(
                f"depth/{self.data}: this model says no depths. Training on depth maps makes one that does: "
                f"--stage finetune/nyuv2_dpt, from this model with --init."
            )

    def asked(self) -> list[Any]:
        """See DenseEvaluator."""
        return [*super().asked(), self.cap, self.region, self.cut]

    def nothing(self, model: nn.Module) -> Tensor:
        """See DenseEvaluator: sums over images of the three metrics, and how many images."""
        return torch.zeros(4, dtype=torch.float64)

    def count(self, truth: Tensor, said: Tensor) -> Tensor:
        """See DenseEvaluator; zeros for an image of which nothing is measured."""
        low, high = self.cap
        known = (truth > low) & (truth < high) & inside(self.region, truth.shape)
        if not known.any():
            return torch.zeros(4, dtype=torch.float64)
        return torch.tensor([*errors(truth[known], said[known].clamp(low, high)), 1.0]).double()

    def said_of(self, values: Tensor) -> Tensor:
        """See DenseEvaluator."""
        return values[0]

    def metrics(self, total: Tensor) -> tuple[dict[str, float], dict[str, Any]]:
        """See DenseEvaluator. Raises ValueError where nothing was measured."""
        *sums, images = total.tolist()
        if not images:
            raise ValueError(
                f"depth/{self.data}: no depth of {self.split} lies within depth.cap {list(self.cap)} and "
                f"depth.region '{self.region}'."
            )
        rmse, relative, near = (one / images for one in sums)
        return {"RMSE": rmse, "AbsRel": relative, "delta1": 100 * near, "measured": images}, {}

    def drawn(self, source: Source, said: list[Tensor], change: Any) -> Image.Image:
        """See DenseEvaluator: blue is near, red is far, the same in both maps."""
        rows = []
        for index, found in enumerate(said):
            sample = source[index]
            picture, known = pair(sample, "depth", self.cut)
            truth = torch.from_numpy(known)
            if change is not None:
                picture = change(picture, Random(0, 0, index))
            limits = float(truth[truth > 0].min()), float(truth.max())
            rows.append([coloured(picture), heights(truth, *limits), heights(found, *limits)])
        return sheet(rows, ["image", "depth, blue near, black not known", "said"])


def errors(truth: Tensor, said: Tensor) -> tuple[float, float, float]:
    """(RMSE, AbsRel, share below a factor of 1.25) of depths [n]."""
    truth, said = truth.double(), said.double()
    ratio = torch.maximum(truth / said, said / truth)
    off = (truth - said).abs()
    return (
        float(off.square().mean().sqrt()),
        float((off / truth).mean()),
        float((ratio < 1.25).double().mean()),
    )


def inside(region: Region, size: tuple[int, int]) -> Tensor:
    """bool [H, W]: the part of an image that is measured. Raises ValueError for "nyu" on another size
    than its own."""
    height, width = size
    mask = torch.zeros(height, width, dtype=torch.bool)
    if region == "all":
        return ~mask
    if region == "nyu":
        if tuple(size) != (480, 640):
            raise ValueError(f"depth.region: 'nyu' is of 480 x 640 pixels, not {height} x {width}.")
        top, bottom, left, right = _NYU
    else:
        shares = _SHARES[region]
        top, bottom = (int(share * height) for share in shares[:2])
        left, right = (int(share * width) for share in shares[2:])
    mask[top:bottom, left:right] = True
    return mask
