"""A detector's step beside torchvision's own Mask R-CNN and its training loop, on the same encoder and
pyramid, on one CPU thread.

    python benchmarks/detection_step.py --images FOLDER --listing train.json
    python benchmarks/detection_step.py --images FOLDER --listing train.json --val val.json --train 300

Images and a file of COCO's format; without them, pictures that are made. Heads, anchors, numbers of
proposals and of sampled boxes are alike: torchvision's are its RPN with two layers, FastRCNNConvFCHead and
MaskRCNNHeads with our norm, and it proposes by our first weights, so that about as many regions show
objects: "drawn" says of how many masks are drawn in a step. --sampling: how often torchvision samples a
cell of a region along a side, 2 as in its detectors; 0 is once a place of the map, as ViTDet and ours do.
Boxes alone where the file has no masks. Steps take the same batches under
large-scale jitter, of 160 pixels unless said otherwise; ours is that of `fit()`, from uint8 images and packed
masks, theirs from float images and masks of uint8, with the checks and logs of its references' loop. Both
take our AdamW, in turns in one process; so do the loaders, theirs torchvision's transforms v2 as its
references' "lsj" has them. --train: both then learn for so many steps from the same weights, and their
average precision, on the images they learned from and on --val, is measured by the same rules. Prints one JSON line a figure.
"""

import argparse
import copy
import io
import itertools
import json
import math
import statistics
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from mae_step import training_step
from PIL import Image
from timing import interleaved, report
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.models.detection import faster_rcnn, mask_rcnn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.transforms import v2

from prepretrain import plugin
from prepretrain.data.dense import masks
from prepretrain.data.loader import Stream
from prepretrain.data.sources.base import Source
from prepretrain.distributed import group as distributed
from prepretrain.distributed import shard
from prepretrain.evaluation.detection_metrics import average_precision, ground_truth
from prepretrain.evaluation.predictions import predict
from prepretrain.files import write_json
from prepretrain.models import weights
from prepretrain.models.dense.layers import ChannelNorm
from prepretrain.models.dense.masks import unpack
from prepretrain.models.heads.base import Detections
from prepretrain.models.load import fitting, open_weights
from prepretrain.models.model import Model
from prepretrain.objectives.detection import Detection
from prepretrain.training import optim


class Maps(nn.Module):
    """Our encoder and pyramid, as torchvision's detectors take a backbone."""

    def __init__(self, model: Model, channels: int):
        super().__init__()
        self.encoder, self.pyramid = model.encoder, model.head.pyramid
        self.layers, self.out_channels = model.head.layers, channels

    def forward(self, images: Tensor) -> OrderedDict:
        """Normalised [B, 3, H, W] to its five maps, the finest first."""
        maps = self.pyramid(self.encoder(images, maps=self.layers))
        return OrderedDict((str(number), one) for number, one in enumerate(maps))


class Theirs(nn.Module):
    """torchvision's detector, whose detections are read as ours are."""

    def __init__(self, model: Model, head: dict, pixels: int, sampling: int):
        super().__init__()
        channels, hidden, classes = head["channels"], head["hidden"], head["classes"] + 1
        sizes = [(size,) for size in head["anchors"]]
        pool = partial(MultiScaleRoIAlign, ["0", "1", "2", "3"], sampling_ratio=sampling)
        convolutions = [channels] * 4
        family, parts = faster_rcnn.FasterRCNN, {}
        if head["masks"]:
            family = mask_rcnn.MaskRCNN
            drawn = mask_rcnn.MaskRCNNHeads(channels, convolutions, 1, ChannelNorm)
            predictor = mask_rcnn.MaskRCNNPredictor(channels, channels, classes)
            parts = {"mask_head": drawn, "mask_predictor": predictor, "mask_roi_pool": pool(14)}
        box_head = faster_rcnn.FastRCNNConvFCHead(
            (channels, 7, 7), convolutions, [hidden], ChannelNorm
        )
        self.detector = family(
            Maps(model, channels),
            min_size=pixels,
            max_size=pixels,
            rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
            rpn_head=RPNHead(channels, 3, conv_depth=2),
            rpn_pre_nms_top_n_train=head["candidates"][0],
            rpn_pre_nms_top_n_test=head["candidates"][1],
            rpn_post_nms_top_n_train=head["proposals"][0],
            rpn_post_nms_top_n_test=head["proposals"][1],
            rpn_batch_size_per_image=head["sampled_anchors"],
            box_batch_size_per_image=head["sampled_regions"],
            box_roi_pool=pool(7),
            box_head=box_head,
            box_predictor=faster_rcnn.FastRCNNPredictor(hidden, classes),
            image_mean=model.mean,
            image_std=model.std,
            **parts,
        )
        self.encoder, self.colour = model.encoder, model.mean
        proposals = self.detector.rpn.head.state_dict()  # ours, under their names
        again = dict(zip(proposals, model.head.proposals.state_dict().values(), strict=True))
        self.detector.rpn.head.load_state_dict(again)

    def inputs(self, batch: dict) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """One of our batches as torchvision takes it: images of 0 to 1, padded with the mean colour, and
        what is annotated in each."""
        images, annotated = [], []
        for i, (image, size) in enumerate(zip(batch["image"], batch["size"].tolist())):
            picture = torch.tensor(self.colour).view(3, 1, 1).expand(image.shape).clone()
            picture[:, : size[0], : size[1]] = image[:, : size[0], : size[1]] / 255
            images.append(picture)
            if "classes" in batch:
                real = batch["classes"][i] >= 0
                one = {"boxes": batch["boxes"][i][real], "labels": batch["classes"][i][real] + 1}
                if "bits" in batch:
                    one["masks"] = unpack(batch["bits"][i][real])[..., : image.shape[-1]]
                annotated.append(one)
        return images, annotated

    def detect(self, image: Tensor, sizes: Tensor, **how: object) -> list[Detections]:
        """See Model.detect; torchvision's thresholds are COCO's."""
        found = self.detector(self.inputs({"image": image, "size": sizes})[0])
        return [Detections(one["boxes"], one["scores"], one["labels"] - 1, None) for one in found]


def their_step(
    detector: nn.Module, optimizer: torch.optim.Optimizer, images: list, annotated: list
) -> None:
    """The body of the loop of torchvision's references."""
    losses = detector(images, annotated)
    total = sum(losses.values())
    if not math.isfinite(total.item()):
        raise RuntimeError(f"the loss is {total.item()}")
    optimizer.zero_grad()
    total.backward()
    optimizer.step()
    _ = {name: loss.item() for name, loss in losses.items()}


def their_batches(asked: argparse.Namespace, source: Source) -> Iterator[list]:
    """Batches by torchvision's transforms: PIL, masks at the image's size, jitter, a crop."""
    pixels = asked.pixels
    transform = v2.Compose(
        [
            v2.ToImage(),
            v2.ScaleJitter((pixels, pixels), asked.scale, antialias=True),
            v2.RandomCrop(
                (pixels, pixels), pad_if_needed=True, fill={tv_tensors.Image: 124, "others": 0}
            ),
            v2.RandomHorizontalFlip(),
            v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
            v2.SanitizeBoundingBoxes(),
            v2.ToPureTensor(),
        ]
    )
    rows: list = []
    for index in itertools.cycle(
        np.random.default_rng(asked.seed).permutation(len(source)).tolist()
    ):
        sample = source[index]
        single, size = np.flatnonzero(~sample["crowds"]), tuple(sample["size"])
        boxes = torch.from_numpy(sample["boxes"][single]).float()
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
            "labels": torch.from_numpy(sample["classes"][single]),
        }
        if "masks" in sample:
            drawn = np.array([masks.bitmap(sample["masks"][i], *size) for i in single])
            target["masks"] = tv_tensors.Mask(torch.from_numpy(drawn.reshape(-1, *size)))
        rows.append(transform(Image.open(io.BytesIO(sample["image"])).convert("RGB"), target))
        if len(rows) == asked.batch:
            yield rows
            rows = []


def made(folder: Path, count: int = 8) -> tuple[str, str]:
    """Noise with bright squares, and its file of COCO's form."""
    rng, images, annotations = np.random.default_rng(0), [], []
    for i in range(count):
        pixels = rng.integers(0, 90, (96, 128, 3)).astype(np.uint8)
        left, top, side = (
            int(rng.integers(low, high)) for low, high in ((0, 60), (0, 40), (24, 56))
        )
        pixels[top : top + side, left : left + side] += 140
        Image.fromarray(pixels).save(folder / f"{i}.jpg")
        images.append({"id": i, "file_name": f"{i}.jpg", "height": 96, "width": 128})
        right, bottom = left + side, top + side
        square = [left, top, right, top, right, bottom, left, bottom]
        one = {"id": i + 1, "image_id": i, "category_id": 1, "bbox": [left, top, side, side]}
        annotations.append(one | {"segmentation": [square], "iscrowd": 0})
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "square"}],
    }
    write_json(folder / "made.json", content)
    return str(folder), str(folder / "made.json")


def ours(asked: argparse.Namespace, head: dict) -> Detection:
    """Our objective, with the encoder's weights of --init."""
    options = {"final_norm": False, "window": 14, "global_blocks": 2, "image_size": asked.pixels}
    with torch.device("meta"):
        model = Model(encoder=asked.encoder, positions="learned", head=head, **options)
        objective = Detection(model, scale=tuple(asked.scale))
    shard.shard(objective, precision="fp32")
    shard.initialise(objective, asked.seed)
    if asked.init:
        weights.fill(*fitting(model, open_weights(asked.init)))
    return objective


def precision(model: nn.Module, source: Source) -> dict[str, float]:
    """Average precision of boxes on all images of a source."""
    found, _ = predict(model, source, batch_size=1, workers=0)
    scored, _ = average_precision(ground_truth(source), found, "box")
    return {name: round(scored[f"box_{name}"], 1) for name in ("AP", "AP50")}


def main() -> None:
    """One JSON line for steps, one for loaders, one for what was learned."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", help="a folder")
    parser.add_argument("--listing", help="a json file of COCO's form of its images")
    parser.add_argument("--val", help="another, on which precision is measured")
    parser.add_argument("--train", type=int, default=0, help="steps before it is")
    parser.add_argument("--init", help="a run or file whose encoder both start from")
    parser.add_argument("--encoder", default="vit_mini8")
    parser.add_argument("--pixels", type=int, default=160)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--anchors", type=int, nargs=5, default=[8, 16, 32, 64, 128])
    parser.add_argument("--regions", type=int, default=128, help="sampled of an image")
    parser.add_argument("--scale", type=float, nargs=2, default=[0.1, 2.0], help="of the jitter")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sampling", type=int, default=2, help="0 is as ours")
    parser.add_argument("--lr", type=float, default=5e-4)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    distributed.init()
    with tempfile.TemporaryDirectory() as folder:
        images, listing = (asked.images, asked.listing) if asked.images else made(Path(folder))
        source = plugin.build("sources", "coco", path=images, listing=listing)
        val = plugin.build("sources", "coco", path=images, listing=asked.val or listing)
        compare(asked, source, val)
    distributed.shutdown()


def compare(asked: argparse.Namespace, source: Source, val: Source) -> None:
    """Prints all figures."""
    head = {
        "name": "mask_rcnn",
        "classes": len(source.classes),
        "masks": "masks" in source.fields,
        "channels": asked.channels,
        "hidden": 4 * asked.channels,
        "anchors": asked.anchors,
        "candidates": [500, 200],
        "proposals": [200, 200],
        "sampled_anchors": 256,
        "sampled_regions": asked.regions,
    }
    objective = ours(asked, head)
    torch.manual_seed(asked.seed)
    theirs = Theirs(copy.deepcopy(objective.model), head, asked.pixels, asked.sampling)
    setting = {
        "encoder": asked.encoder,
        "pixels": asked.pixels,
        "batch": asked.batch,
        "masks": head["masks"],
    }
    fields = source.only(objective.fields)
    stream = Stream(
        fields, objective.transform(True), batch_size=asked.batch, seed=asked.seed
    ).batches()
    optimizers = [  # weights stay, so that what is proposed stays alike
        optim.build(one, lr=0.0, weight_decay=0.1) for one in (objective, theirs.detector)
    ]
    kept = list(itertools.islice(stream, asked.steps))
    mine, its = itertools.cycle(kept), itertools.cycle([theirs.inputs(one) for one in kept])
    steps = {
        "torchvision": lambda: their_step(theirs.detector, optimizers[1], *next(its)),
        "ours": lambda: training_step(objective, optimizers[0], next(mine)),
    }
    objective.train(), theirs.train()
    if head["masks"]:
        drawn: dict[str, list[int]] = {"torchvision": [], "ours": []}
        count_regions(theirs.detector.roi_heads.mask_head, drawn["torchvision"])
        count_regions(objective.model.head.masks, drawn["ours"])
    times = interleaved(steps, asked.steps)
    if head["masks"]:
        setting["drawn"] = {name: round(statistics.mean(one), 1) for name, one in drawn.items()}
    report("detection_step_fp32", times["torchvision"], times["ours"], **setting, clock="cpu")
    peer = their_batches(asked, fields)
    loaders = {"torchvision": lambda: next(peer), "ours": lambda: next(stream)}
    times = interleaved(loaders, 2 * asked.steps)
    report("detection_loader", times["torchvision"], times["ours"], **setting, clock="cpu")
    rates = {name: round(asked.batch * len(t) / sum(t), 1) for name, t in times.items()}
    print(json.dumps({"figure": "detection_loader, images a second", **rates}), flush=True)
    if asked.train:
        learned(asked, head, source, val)


def count_regions(head: nn.Module, found: list[int]) -> None:
    """Appends how many regions a head draws, each time it does."""
    head.register_forward_pre_hook(lambda module, given: found.append(len(given[0])))


def learned(asked: argparse.Namespace, head: dict, whole: Source, val: Source) -> None:
    """Trains both for the same steps, and prints what they find."""
    objective = ours(asked, head)
    torch.manual_seed(asked.seed)
    theirs = Theirs(copy.deepcopy(objective.model), head, asked.pixels, asked.sampling)
    optimizers = [
        optim.build(one, lr=asked.lr, weight_decay=0.1) for one in (objective, theirs.detector)
    ]
    fields = whole.only(objective.fields)
    stream = Stream(fields, objective.transform(True), batch_size=asked.batch, seed=asked.seed)
    objective.train(), theirs.train()
    for number, batch in enumerate(itertools.islice(stream.batches(), asked.train)):
        rate = asked.lr * min((number + 1) / (0.1 * asked.train), 1 - number / asked.train)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        training_step(objective, optimizers[0], batch)
        their_step(theirs.detector, optimizers[1], *theirs.inputs(batch))
    setting = {
        "steps": asked.train,
        "batch": asked.batch,
        "pixels": asked.pixels,
        "seed": asked.seed,
    }
    for name, one in {"train": whole, "val": val}.items():
        found = {"ours": precision(objective.model, one), "torchvision": precision(theirs, one)}
        print(json.dumps({"figure": f"detection_learned, {name}", **found, **setting}), flush=True)


if __name__ == "__main__":
    main()
