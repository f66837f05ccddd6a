"""The range of every number that a config can set, in one table, which is looked at before anything
starts: a number outside of it would train silently wrong, or end a run late.

Bounds are as in mathematics: [ and ] include them, ( and ) do not, and inf is never included. A key is
a section and an option, or an option alone, where it means the same in several sections. What has no
row need only be finite.
"""

import math
from functools import cache
from typing import Any

_COUNT = "[1, 1e9]"  # more of anything is a slip
RANGES = {
    # a run
    "batch_size": _COUNT,
    "batch_per_process": _COUNT,
    "seed": "[0, 9223372036854775807]",
    "hang": "[5, 1e9]",  # seconds: less is no hang
    "data.workers": "[0, 1024]",
    "data.window": "[0, 1e9]",
    "data.max_bad": "[0, 1]",
    "data.subset.images": _COUNT,
    "data.subset.classes": "[1, 1e9]",
    "data.train.share": "[0, inf)",
    "data.train.subset": _COUNT,
    "data.resample.t": "(0, inf)",
    "data.resample.epoch": "(0, inf)",
    "data.resample.tail": "(0, 1)",
    "optim.lr": "[0, inf)",
    "optim.lr_end": "[0, inf)",
    "optim.weight_decay": "[0, inf)",
    "optim.layer_decay": "(0, 1]",
    "optim.clip": "(0, inf)",
    "optim.ema": "[0, 1)",
    "optim.decay": "(0, 1]",
    "optim.power": "(0, inf)",
    "optim.betas": "[0, 1)",
    "optim.eps": "(0, inf)",
    "optim.momentum": "[0, 1)",
    "optim.trust_coeff": "(0, inf)",
    "shard.group": _COUNT,
    "checkpoint.keep": _COUNT,
    "numerics.skip": "[0, 1000]",
    "numerics.rollbacks": "[0, 1e9]",
    "numerics.sigma": "(0, inf)",
    "numerics.window": "[2, 1e6]",
    "validation.images": _COUNT,
    "slurm.gpus": "[0, 1024]",
    "slurm.cpus": "[1, 4096]",
    "slurm.requeues": "[0, 1e6]",
    # a stage of curation
    "curation_stage.t": "(0, inf)",
    "curation_stage.eps": "[0, 1)",
    "curation_stage.clusters": _COUNT,
    "curation_stage.rounds": _COUNT,
    "curation_stage.coarse": "[0, 16]",
    "curation_stage.fine": "[0, 128]",
    "curation_stage.colour": "[0, 255]",
    "curation_stage.layer": "[1, 1000]",
    "curation_stage.share": "(0, 1]",
    "curation_stage.similarity": "(0, 1)",
    "curation_stage.workers": "[0, 1024]",
    # a model; its largest are 100 times as large as any that is known
    "model.mean": "[0, 1]",
    "model.std": "(0, inf)",
    "model.image_size": "[1, 16384]",
    "model.patch_size": "[1, 16384]",
    "model.width": "[1, 1e6]",
    "model.base_width": "[1, 1e6]",
    "model.depth": "[1, 1000]",
    "model.depths": "[1, 1000]",
    "model.heads": "[1, 1e6]",
    "model.window": "[1, 16384]",
    "model.pretrained_windows": "[0, 16384]",
    "model.drop_path": "[0, 1)",
    "model.global_blocks": "[0, 1000]",
    "model.frames": "[1, 16384]",
    "model.tube": "[1, 16384]",
    "model.position_size": "[1, 16384]",
    "model.head.classes": "[1, 1e9]",
    "model.head.channels": "[1, 1e6]",
    "model.head.layers": "[1, 1000]",
    "model.head.widths": "[1, 1e6]",
    "model.head.bins": "[0, 1e6]",
    "model.head.range": "[0, inf)",
    "model.head.auxiliary": "[0, inf)",
    "model.head.auxiliary_channels": "[1, 1e6]",
    "model.head.dropout": "[0, 1)",
    "model.head.hidden": "[1, 1e6]",
    "model.head.anchors": "[1, 1e6]",
    "model.head.candidates": _COUNT,
    "model.head.proposals": _COUNT,
    "model.head.sampled_anchors": "[2, 1e9]",
    "model.head.sampled_regions": "[4, 1e9]",  # of which a quarter at most show objects
    "model.joint.width": "[1, 1e6]",
    "model.text.width": "[1, 1e6]",
    "model.text.layers": "[1, 1000]",
    "model.text.depth": "[1, 1000]",
    "model.text.heads": "[1, 1e6]",
    "model.text.hidden": "[1, 1e7]",
    "model.text.context": "[2, 1e6]",  # a start and an end
    "model.text.positions": "[1, 1e6]",
    "model.text.vocabulary": _COUNT,
    "model.text.dropout": "[0, 1)",
    # what it is trained for
    "crop_scale": "(0, 1]",
    "objective.mask_ratio": "(0, 1)",
    "objective.decoder_depth": "[0, 1000]",
    "objective.decoder_width": "[1, 1e6]",
    "objective.decoder_heads": "[1, 1e6]",
    "objective.cell": "[1, 16384]",
    "objective.target_window": "[1, 16384]",
    "objective.tags": _COUNT,
    "objective.context": "[3, 1e6]",  # a start, a token and an end
    "objective.chunk": _COUNT,
    "objective.mixup": "[0, inf)",
    "objective.cutmix": "[0, inf)",
    "objective.smoothing": "[0, 1)",
    "objective.erasing": "[0, 1)",
    "objective.scale": "(0, 100]",
    "objective.short_side": "[1, 16384]",
    "objective.cut": "[1, 16384]",
    "objective.most": "(0, 1]",
    "objective.stride": "[1, 1e6]",
    "objective.span": "(0, 1e6]",
    "objective.draws": "[1, 1000]",
    "objective.federated": _COUNT,
    "objective.repeat": "(0, 1]",
    # how it is measured
    "evaluator.share": "(0, 1]",
    "evaluator.feature_batch": _COUNT,
    "evaluator.workers": "[0, 1024]",
    "evaluator.layer": "[1, 1000]",
    "evaluator.k": _COUNT,
    "evaluator.temperature": "(0, inf)",
    "evaluator.epochs": "[1, 1e6]",
    "evaluator.warmup": "[0, 1e6]",
    "evaluator.batch_size": _COUNT,
    "evaluator.lr": "(0, inf)",
    "evaluator.weight_decay": "[0, inf)",
    "evaluator.l2": "[0, inf)",
    "evaluator.shots": _COUNT,
    "evaluator.percent": "(0, 100]",
    "evaluator.seeds": "[1, 1e6]",
    "evaluator.val_images": _COUNT,
    "evaluator.images": _COUNT,
    "evaluator.severities": "[1, 5]",
    "evaluator.clips": "[1, 1e4]",
    "evaluator.span": "(0, 1e6]",
    "evaluator.threshold": "[0, 1]",
    "evaluator.overlap": "(0, 1]",
    "evaluator.most": _COUNT,
    "evaluator.sides": "[1, 16384]",
    "evaluator.pictures": "[0, 1000]",
    "evaluator.reach": "[0, 100]",
    "evaluator.short_side": "[1, 16384]",
    "evaluator.cut": "[1, 16384]",
    "evaluator.stride": "[1, 16384]",
    "evaluator.scales": "(0, 100]",
    "evaluator.cap": "[0, inf)",
    "evaluator.train_images": _COUNT,
    "evaluator.patches": _COUNT,
    "views.clips": "[1, 1e4]",
    "views.stride": "[1, 1e6]",
    "views.span": "(0, 1e6]",
    "views.short_side": "[1, 16384]",
    "views.frames": "[1, 16384]",
    "adapter.tokens": "[1, 1e6]",
    "adapter.rank": "[1, 1e6]",
    "adapter.alpha": "(0, inf)",
    "adapter.width": "[1, 1e6]",
    "adapter.scale": "(0, inf)",
    # where its images come from
    "source.classes": "[1, 1e9]",
    "source.border": "[0, 16384]",
    "source.images": _COUNT,
    "source.size": "[8, 16384]",
    "source.noise": "[0, 0.5]",
    "source.aside": "[0, 1]",
    "source.ids": "[0, 255]",
    "source.offset": "[0, 255]",
    "source.void": "[0, 255]",
    "source.palette": "[0, 255]",
    "source.marked": "[0, 2]",  # HMDB51: of neither, to train, to test
    "source.rate": "(0, 1000]",
    "source.scale": "(0, inf)",
    "source.range": "[0, inf)",
}
_RISING = ("crop_scale", "scale", "sides", "range", "cap")  # a least and a largest
_WAYS = {  # out of a value that others mean something by
    "optim.clip": "null does not clip",
    "optim.ema": "null keeps no average",
    "optim.layer_decay": "1 is the same rate for all layers",
    "hang": "null never ends a run",
    "data.max_bad": "it is a share of the images; 1 never stops",
    "batch_per_process": "null takes a process's share at once",
    "shard.group": "null chooses by memory",
    "validation.images": "null takes all",
    "data.workers": "0 loads in the process itself",
}


def check(section: str, name: str, value: Any, where: str) -> None:
    """Raises ValueError, naming key, value and the way out, for a number outside of its range, alone
    or within a list or a mapping. where: the key as the user wrote it."""
    if isinstance(value, dict) and known(section, name):
        for inner, one in value.items():
            check(section, name, one, f"{where}.{inner}")
    if isinstance(value, (list, tuple)):
        for i, one in enumerate(value):
            check(section, name, one, f"{where}[{i}]")
        if name in _RISING and list(value) != sorted(value):
            raise ValueError(f"{where}: {list(value)} must name the smaller number first.")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        key = f"{section}.{name}" if section else name
        key = key if key in RANGES else name
        bounds = RANGES.get(key)
        if not _within(value, bounds):
            way = f"; {_WAYS[key]}" if key in _WAYS else ""
            raise ValueError(f"{where}: {value} must {_said(bounds)}{way}.")


def known(section: str, name: str) -> bool:
    """Whether an option has a row."""
    return f"{section}.{name}" in RANGES or name in RANGES


@cache
def _bounds(text: str) -> tuple[bool, float, float, bool]:
    low, high = text[1:-1].split(",")
    return text[0] == "[", float(low), float(high), text[-1] == "]"


def _within(value: float, bounds: str | None) -> bool:
    if isinstance(value, float) and not math.isfinite(value):
        return False
    if bounds is None:
        return abs(value) < 2**63
    closed, low, high, shut = _bounds(bounds)
    return (value > low or (closed and value == low)) and (value < high or (shut and value == high))


def _said(bounds: str | None) -> str:
    if bounds is None:
        return "be a finite number that 64 bits hold"
    closed, low, high, _ = _bounds(bounds)
    if high == math.inf:
        return f"be finite and {'at least' if closed else 'above'} {low:g}"
    return f"be at least {low:g}" if closed and high >= 1e6 else f"lie in {bounds}"
