"""What a GPU does with this project: correctness first, then speed beside the card's own limits.

    make gpu                        all sections, at most nine minutes
    make gpu SMOKE=1                the same code at tiny sizes, on the CPU
    python benchmarks/gpu.py --only limits steps --out FOLDER [--reference DIR]

One JSON line a figure, printed and written to FOLDER/gpu.jsonl as it is known: what is done survives
a cut. A section that fails says why, and the next one runs; one whose turn comes after --seconds is
named as skipped. MFU is the model's FLOPs (three forward passes, attention included) over what the
card's data sheet promises for dense bf16, 989 TFLOP/s for an H100 or H200.

--reference: a checkout of facebookresearch/mae, whose step is then measured as it is written.
"""

import argparse
import gc
import importlib
import io
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from torch import Tensor, nn

from prepretrain import config as configs
from prepretrain import plugin
from prepretrain.data.loader import Stream
from prepretrain.distributed import checkpoint, shard
from prepretrain.distributed import group as distributed
from prepretrain.evaluation.features import extract
from prepretrain.models.export import save
from prepretrain.models.model import Model
from prepretrain.runs import plan
from prepretrain.training import fit as train
from prepretrain.training import optim
from prepretrain.training.schedule import Schedule

DATA_SHEET = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 FLOP/s
TAGS = 28672  # MAWS's vocabulary, rounded up to a multiple of 4096
CUDA = torch.cuda.is_available()
TINY = "vit_test8"  # the encoder of a smoke test
# What a smoke test's models of shipped stages have instead.
SMALL_DETECTOR = f"""{{encoder: {TINY}, image_size: 64, window: 2, global_blocks: 1, head: {{name: mask_rcnn,
    classes: 80, channels: 8, hidden: 16}}}}"""
SMALL_SEGMENTER = f"""{{encoder: {TINY}, image_size: 64, depth: 4, head: {{name: upernet, classes: 150,
    channels: 8, layers: [1, 2, 3, 4]}}}}"""
SMALL_CLIPS = f"{{encoder: {TINY}, image_size: 32, frames: 4}}"


class Record:
    """Prints figures as lines of JSON, and appends them to a file."""

    def __init__(self, path: Path, started: float):
        self.path, self.started = path, started
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")

    def __call__(self, figure: str, **values: Any) -> None:
        line = json.dumps(
            {"figure": figure, "at": round(time.time() - self.started, 1)}
            | {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in values.items()}
        )
        print(line, flush=True)
        with self.path.open("a") as file:
            file.write(line + "\n")


def synchronize() -> None:
    """Waits for the GPU, if there is one."""
    if CUDA:
        torch.cuda.synchronize()


def seconds_of(action: Callable[[], Any], times: int, warmup: int = 2) -> float:
    """The median seconds of an action, whose work on the GPU is waited for."""
    for _ in range(warmup):
        action()
    spent = []
    for _ in range(times):
        synchronize()
        before = time.perf_counter()
        action()
        synchronize()
        spent.append(time.perf_counter() - before)
    return statistics.median(spent)


def seconds_a_step(step: Callable[[], Any], steps: int, warmup: int = 3) -> float:
    """The median, over three runs of `steps` steps that nothing waits for in between, of a step's
    seconds."""
    for _ in range(warmup):
        step()
    return seconds_of(lambda: [step() for _ in range(steps)], times=3, warmup=0) / steps


# --- the parts that are measured --------------------------------------------------------------


def mae(encoder: str) -> nn.Module:
    """MAE with the paper's decoder (a tiny one in a smoke test), on the meta device."""
    small = {"decoder_depth": 2, "decoder_width": 32, "decoder_heads": 2}
    decoder = small if encoder == TINY else {}
    return plugin.build("objectives", "mae", Model(encoder=encoder, positions="fixed"), **decoder)


def hashtag(encoder: str) -> nn.Module:
    """Supervised training on 28,672 tags, on the meta device."""
    model = Model(encoder=encoder)
    return plugin.build("objectives", "hashtag", model, vocabulary="unread.json", tags=TAGS)


def clip(encoder: str, chunk: int | None = None) -> nn.Module:
    """CLIP with open_clip's text tower of ViT-B-16 (a tiny one in a smoke test), on the meta
    device."""
    text = {"name": "open_clip", "architecture": "ViT-B-16"}
    text |= {"width": 32, "layers": 2, "heads": 2} if encoder == TINY else {}
    model = Model(encoder=encoder, text=text, joint={"width": 512})
    return plugin.build("objectives", "clip", model, chunk=chunk)


def of_stage(name: str, tiny: str, encoder: str) -> nn.Module:
    """The objective of one of the shipped stages, on the meta device; tiny: options of the encoder and head
    that a smoke test has instead."""
    model = yaml.safe_load(tiny)
    keys = [f"model.{key}={value}" for key, value in model.items()] if encoder == TINY else []
    return plan.build_objective(configs.load(name, keys))


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """An objective on the meta device, as `build` makes it there."""
    with torch.device("meta"):
        return build()


def flops(build: Callable[[], nn.Module]) -> int:
    """FLOPs of one image's training step: three forward passes."""
    return 3 * plan.forward_flops(on_meta(build))


def batch_of(objective: nn.Module, images: int, where: torch.device) -> dict[str, Tensor]:
    """Random values in the shapes that an objective takes."""
    generator = torch.Generator().manual_seed(0)
    side = objective.model.encoder.image_size[0]
    tops = {"image": 256, "clip": 256, "bits": 256, "cut": 1, "tags": TAGS}
    tops |= {"classes": 3, "label": 3, "label_map": 3}
    batch = {}
    for name, like in objective.example(images).items():
        if like.dtype.is_floating_point:
            value = torch.rand(like.shape, generator=generator)
        else:
            value = torch.randint(tops.get(name, 400), like.shape, generator=generator)
            value = value.to(like.dtype)
        if name == "boxes":
            value = value.unflatten(-1, (2, 2)).sort(-2).values.flatten(2) * side
        elif name in ("size", "depth"):
            value = torch.full_like(value, side) if name == "size" else value * 9 + 0.5
        batch[name] = value.pin_memory() if CUDA and where.type == "cpu" else value.to(where)
    return batch


def plain(build: Callable[[], nn.Module]) -> nn.Module:
    """An objective as a bare module, without FSDP."""
    objective = on_meta(build)
    shard.materialise(objective, "fp32")
    shard.initialise(objective, 0)
    return objective.train()


def sharded(build: Callable[[], nn.Module], **how: Any) -> nn.Module:
    """An objective as a run prepares it."""
    objective = on_meta(build)
    shard.shard(objective, **how)
    shard.initialise(objective, 0)
    return objective.train()


def bare_step(objective: nn.Module, batch: dict, autocast: bool = False) -> Callable[[], None]:
    """Forward, backward and AdamW, and nothing that waits for the GPU."""
    optimizer = optim.build(objective, lr=1e-5, weight_decay=0.05)
    device = distributed.device().type

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = objective(batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


class Ready:
    """Stands in for a Stream: the same pinned batch for ever, and when each was asked for."""

    accumulate, max_bad = 1, 0.01

    def __init__(self, batch: dict, images: int, at: dict[int, Callable[[], None]] | None = None):
        """at: what to do when the batch of that number, from 0, is asked for."""
        self.batch, self.batch_size, self.at = batch, images, at or {}
        self.asked: list[float] = []

    def fingerprint(self, position: int = 0) -> str:
        """As Stream.fingerprint."""
        return "ready"

    def batches(self, consumed: int = 0) -> Iterator[dict]:
        """As Stream.batches."""
        number = consumed // self.batch_size
        while True:
            self.at.get(number, lambda: None)()
            self.asked.append(time.perf_counter())
            rows = list(range(number * self.batch_size, (number + 1) * self.batch_size))
            yield {**self.batch, "key": [str(r) for r in rows], "position": rows, "bad": []}
            number += 1


def fitted(
    objective: nn.Module, batch: dict, images: int, steps: int, folder: Path, **how: Any
) -> Ready:
    """Runs `fit`, the loop of a real run, for some steps."""
    folder.mkdir(parents=True, exist_ok=True)
    data = Ready(batch, images, how.pop("at", None))
    optimizer = optim.build(objective, lr=1e-5, weight_decay=0.05)
    how = {"save_every": None, "log_every": 10} | how
    schedule = Schedule(1e-5, steps)
    train.fit(objective, data, optimizer, schedule, folder=folder, seed=0, options={}, **how)
    return data


# --- sections ---------------------------------------------------------------------------------


def limits(record: Record, tiny: bool, asked: argparse.Namespace) -> None:
    """What the card itself can do, which all below is to be read beside."""
    where, size = distributed.device(), 256 if tiny else 8192
    a, b = (torch.randn(size, size, device=where, dtype=torch.bfloat16) for _ in range(2))
    record("matrix_product_bf16_tflops", value=2 * size**3 / seconds_of(lambda: a @ b, 10) / 1e12)
    one = torch.empty((1 if tiny else 2000) * 2**20, dtype=torch.uint8, device=where)
    other = torch.empty_like(one)
    rate = 2 * one.numel() / seconds_of(lambda: other.copy_(one), 10) / 1e9
    record("copy_on_device_gb_per_second", value=rate)
    if CUDA:
        for name, host in (
            ("pinned", torch.empty(2**28, dtype=torch.uint8).pin_memory()),
            ("pageable", torch.empty(2**28, dtype=torch.uint8)),
        ):
            spent = seconds_of(partial(host.to, where, non_blocking=True), 5)
            record(f"host_to_device_{name}_gb_per_second", value=2**28 / spent / 1e9)
    small = torch.zeros(1, device=where)

    def launches() -> None:
        for _ in range(1000):
            small.add_(1)

    record("launch_microseconds", value=seconds_of(launches, 5) * 1e3)


def of_tests(name: str) -> Any:
    """A module of the tests, which have reference numbers and a small one of every objective."""
    folder = str(Path(__file__).parents[1] / "tests")
    sys.path[:0] = [] if folder in sys.path else [folder]
    return importlib.import_module(name)


def golden(record: Record, tiny: bool, asked: argparse.Namespace) -> None:
    """The papers' reference numbers on this device, in float32, and our own CPU's gradients."""
    where = distributed.device()
    tensors, build = of_tests("test_golden").mae_reference()
    for normalise, name in ((False, "loss"), (True, "loss_norm_pix")):
        objective, found = build(normalise), {}
        for device in ("cpu", where):
            objective.to(device).zero_grad()
            batch = {k: tensors[k].to(device) for k in ("noise",)} | {
                "image": tensors["images"].to(device)
            }
            loss = objective(batch)["loss"]
            loss.backward()
            gradients = {
                k: p.grad.to("cpu", copy=True)  # `.cpu()` of a CPU's tensor would be the tensor
                for k, p in objective.named_parameters()
                if p.grad is not None
            }
            found[str(device)] = (loss.item(), gradients)
        (_, on_cpu), (loss_here, here) = found["cpu"], found[str(where)]
        worst = max(((here[k] - g).norm() / g.norm()).item() for k, g in on_cpu.items())
        error = abs(loss_here / tensors[name].item() - 1)
        record(
            f"golden_mae_{name}",
            error=error,
            worst_gradient=worst,
            ok=error < 1e-5 and worst < 1e-4,
        )


def objectives(record: Record, tiny: bool, asked: argparse.Namespace) -> None:
    """Loss and gradients of every objective in float32 on this device, beside those on the CPU; and at
    which lines a step of it in the loop waits."""
    import pytest

    tests = of_tests("test_step")
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("PREPRETRAIN_DATA", place)
        tests.furnish_parts()
        for name in ("mae", "video") if tiny else tests.OBJECTIVES:
            said = name.replace(", ", "_").replace(" ", "_")
            try:
                record(f"objective_{said}", **_beside_cpu(tests, name, distributed.device()))
                record(f"synchronisations_{said}", **_waiting(tests, name, tiny))
            except Exception as error:
                traceback.print_exc()
                record(f"objective_{said}", failed=_said(error))


def _waiting(tests: Any, name: str, tiny: bool) -> dict[str, Any]:
    """At which lines steps of an objective wait."""
    objective, batch = tests.built(name)
    prepare = partial(shard.shard, precision="fp32" if tiny else "bf16")
    prepare(objective)
    objective.prepare(prepare)
    shard.initialise(objective, 0)
    batch = {k: v for k, v in batch.items() if isinstance(v, Tensor)}
    batch = {k: v.pin_memory() if CUDA else v for k, v in batch.items()}
    places, error = _waits(objective.train(), batch)
    allowed = name.startswith("detection")  # NMS's one answer an image
    ok = allowed or (not places and error is None)
    return {"at_lines": dict(places), "said": error, "ok": ok}


def _beside_cpu(tests: Any, name: str, where: torch.device) -> dict[str, Any]:
    """How far loss and gradients of an objective, which draws nothing, are from the CPU's."""
    objective, batch = tests.built(name)
    for module in (objective, *objective.frozen()):
        module.to_empty(device="cpu")
        shard.fill_buffers(module)
    objective.prepare(lambda module: None)
    shard.initialise(objective, 0)
    for (
        part
    ) in objective.modules():  # dropout and stochastic depth draw other values on each device
        part.eval()
    found = []
    for device in (torch.device("cpu"), where):
        for module in (objective, *objective.frozen()):
            module.to(device).zero_grad()
        there = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        with torch.backends.cudnn.flags(allow_tf32=False):  # torch's default for convolutions
            loss = objective(there)["loss"]
            loss.backward()
        gradients = {
            k: p.grad.to("cpu", copy=True)
            for k, p in objective.named_parameters()
            if p.grad is not None
        }
        found.append((loss.item(), gradients))
    (on_cpu, expected), (here, gradients) = found
    size = torch.stack([g.norm() for g in expected.values()]).norm()
    apart = torch.stack([(gradients[k] - g).norm() for k, g in expected.items()]).norm()
    error, gradient = abs(here / on_cpu - 1), (apart / size).item()
    # which regions a detector learns from is decided by near ties of scores and overlaps
    limit = 0.1 if name.startswith("detection") else 1e-3
    ok = error < limit and gradient < limit
    return {"loss": on_cpu, "error": error, "gradient": gradient, "ok": ok}


def equalities(record: Record, tiny: bool, asked: argparse.Namespace) -> None:
    """A run repeated, and one that was stopped and continued, beside the run that was not."""

    def weights_of(objective: nn.Module) -> Tensor:
        return torch.cat(
            [distributed.whole(p.detach()).flatten().float().cpu() for p in objective.parameters()]
        )

    def run(folder: Path, stop_at: int | None = None) -> Tensor:
        small = partial(mae, TINY if tiny else "vit_ti16")
        objective = sharded(small, precision="fp32" if tiny else "bf16")
        batch, images = batch_of(objective, 16, torch.device("cpu")), 16
        saved = checkpoint.newest(folder)

        def stop() -> None:
            raise KeyboardInterrupt

        at = {} if stop_at is None else {stop_at: stop}
        try:
            fitted(objective, batch, images, 8, folder, save_every=4, saved=saved, at=at)
        except KeyboardInterrupt:
            pass
        return weights_of(objective)

    with tempfile.TemporaryDirectory() as place:
        first, again = run(Path(place, "a")), run(Path(place, "b"))
        run(Path(place, "c"), stop_at=6)
        continued = run(Path(place, "c"))
    for name, other in (("repeated", again), ("continued", continued)):
        difference = (first - other).abs().max().item() / first.abs().max().item()
        record(
            f"equal_{name}",
            bitwise=torch.equal(first, other),
            difference=difference,
            ok=difference < 1e-2,
        )


def float8(record: Record, tiny: bool, asked: argparse.Namespace) -> None:
    """The loss of a few steps in fp8 beside that of the same in bf16."""
    losses = {}
    for precision in ("bf16", "fp8"):
        objective = sharded(partial(mae, TINY if tiny else "vit_b16"), precision=precision)
        batch = batch_of(objective, 4 if tiny else 64, distributed.device())
        step = bare_step(objective, batch)
        for _ in range(2 if tiny else 50):
            step()
        losses[precision] = objective(batch)["loss"].item()
    error = abs(losses["fp8"] / losses["bf16"] - 1)
    record("fp8_loss", **losses, error=error, ok=error < 0.02)


def _waits(objective: nn.Module, batch: dict) -> tuple[Counter[str], str | None]:
    """How often which line waited for the GPU in two steps of the loop, and what was raised in two more
    in which that was forbidden. There are none where all is well."""
    places: Counter[str] = Counter()
    said = None

    def note(message: Any, category: Any, filename: str, lineno: int, *_: Any) -> None:
        if "called a synchronizing" in str(message):  # and not what is said of the mode itself
            frame, stack = sys._getframe(), []
            while frame is not None:
                if "prepretrain" in frame.f_code.co_filename:
                    stack.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
                frame = frame.f_back
            places[stack[0] if stack else f"{Path(filename).name}:{lineno}"] += 1

    def mode(name: str) -> None:
        if CUDA:
            torch.cuda.set_sync_debug_mode(name)

    at = {6: partial(mode, "warn"), 8: partial(mode, "error"), 10: partial(mode, "default")}
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        try:
            fitted(objective, batch, 4, 11, Path(place), at=at, log_every=1, clip=1.0)
        except RuntimeError as error:
            said = f"{error} {traceback.extract_tb(error.__traceback__)[-1]}"
        finally:
            mode("default")
    return places, said


CASES = {  # name: (objective, encoder, images, variants)
    "mae_b16": (mae, "vit_b16", 256, ("plain", "prepared", "fit", "compiled", "fit_compiled")),
    "hashtag_l16": (hashtag, "vit_l16", 128, ("prepared", "compiled")),
    "mae_l16": (mae, "vit_l16", 256, ("prepared", "compiled", "fit_compiled")),
    "coco_vitdet_b": (
        partial(of_stage, "finetune/coco_vitdet_b", SMALL_DETECTOR),
        *("vit_b16", 8, ("prepared", "compiled")),
    ),
    "ade20k_upernet_b": (
        partial(of_stage, "finetune/ade20k_upernet_b", SMALL_SEGMENTER),
        *("vit_b16", 16, ("prepared", "compiled")),
    ),
    "k400_b": (
        partial(of_stage, "finetune/k400_b", SMALL_CLIPS),
        *("vit_b16", 8, ("prepared", "compiled")),
    ),
    "clip_b16": (clip, "vit_b16", 512, ("prepared", "compiled", "open_clip")),
    "mae_h14": (mae, "vit_h14", 128, ("prepared", "compiled", "compiled_fp8")),
    "hashtag_h14": (hashtag, "vit_h14", 64, ("compiled", "compiled_fp8")),
}


def steps(record: Record, tiny: bool, asked: argparse.Namespace) -> None:
    """Images a second, MFU and memory of training steps."""
    tried: set[str] = set()
    for name, (build, encoder, images, variants) in CASES.items():
        if asked.cases and name not in asked.cases:
            continue
        if tiny:
            encoder, images = TINY, 4
        work = flops(partial(build, encoder))
        for variant in variants:
            if asked.variants and variant not in asked.variants:
                continue
            if tiny and variant in tried and variant != variants[0]:
                continue
            tried.add(variant)
            if time.time() > asked.deadline - 30:
                record(f"{name}_{variant}", skipped="no time left")
                continue
            _forget()
            try:
                before = time.time()
                spent = VARIANTS[variant](partial(build, encoder), images, tiny)
            except Exception as error:
                record(f"{name}_{variant}", failed=_said(error))
                continue
            record(
                f"{name}_{variant}",
                images_per_second=images / spent,
                mfu=images / spent * work / _peak(),
                milliseconds=spent * 1e3,
                images=images,
                gib_allocated=torch.cuda.max_memory_allocated() / 2**30 if CUDA else 0.0,
                gib_reserved=torch.cuda.max_memory_reserved() / 2**30 if CUDA else 0.0,
                section_seconds=time.time() - before,
            )


def _steps(tiny: bool) -> int:
    return 1 if tiny else 10


def _plain_step(build: Callable, images: int, tiny: bool) -> float:
    objective = plain(build)
    batch = batch_of(objective, images, distributed.device())
    return seconds_a_step(bare_step(objective, batch, autocast=not tiny), _steps(tiny))


def _prepared_step(build: Callable, images: int, tiny: bool, **how: Any) -> float:
    objective = sharded(build, **{"precision": "fp32" if tiny else "bf16", **how})
    batch = batch_of(objective, images, distributed.device())
    return seconds_a_step(bare_step(objective, batch), _steps(tiny))


def _fit_step(build: Callable, images: int, tiny: bool, **how: Any) -> float:
    objective = sharded(build, precision="fp32" if tiny else "bf16", **how)
    batch, count = batch_of(objective, images, torch.device("cpu")), 8 if tiny else 30
    with tempfile.TemporaryDirectory() as place:
        at = {5: synchronize, count - 1: synchronize}
        data = fitted(objective, batch, images, count, Path(place), at=at)
    return (data.asked[count - 1] - data.asked[5]) / (count - 6)


def _open_clip_step(build: Callable, images: int, tiny: bool) -> float:
    """open_clip's own model and loss under autocast, with AdamW as its training script makes it."""
    import open_clip

    if tiny:
        towers = (
            {"layers": 1, "width": 32, "head_width": 16},
            {"layers": 1, "width": 32, "heads": 2},
        )
        model = open_clip.CLIP(32, *towers)
    else:
        model = open_clip.create_model("ViT-B-16")
    model = model.to(distributed.device()).train()
    loss_of = open_clip.ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    example = batch_of(on_meta(build), images, distributed.device())
    image = torch.randn(images, 3, 224, 224, device=distributed.device())

    def step() -> None:
        with torch.autocast(distributed.device().type, torch.bfloat16, enabled=not tiny):
            loss = loss_of(*model(image, example["tokens"]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6052)

    return seconds_a_step(step, _steps(tiny))


VARIANTS: dict[str, Callable] = {
    "plain": _plain_step,  # a bare module under autocast
    "prepared": _prepared_step,  # as a run prepares it
    "compiled": partial(_prepared_step, compile=True),
    "compiled_fp8": partial(_prepared_step, compile=True, precision="fp8"),
    "fit": _fit_step,  # in the loop of a run
    "fit_compiled": partial(_fit_step, compile=True),
    "open_clip": _open_clip_step,
}


def reference(record: Record, tiny: bool, asked: argparse.Namespace) -> None:
    """facebookresearch/mae's own step, as its engine takes it."""
    if asked.reference is None:
        record("reference_mae", skipped="no --reference")
        return
    images = 2 if tiny else 256
    for name, size in (("b16", "base"), ("l16", "large")):
        spent = _reference_step(asked.reference, size, images, tiny)
        record(f"reference_mae_{name}", images_per_second=images / spent, milliseconds=spent * 1e3)
        _forget()


def _reference_step(folder: str, size: str, images: int, tiny: bool) -> float:
    import mae_step

    where = distributed.device()
    model = mae_step.reference_model(folder, size).to(where).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95))
    scaler = torch.amp.GradScaler(where.type, enabled=CUDA)
    batch = torch.randn(images, 3, 224, 224, device=where)

    def step() -> None:
        with torch.autocast(where.type, torch.float16 if CUDA else torch.bfloat16):
            loss = model(batch, mask_ratio=0.75)[0]
        loss.item()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        parameters = [p for p in model.parameters() if p.grad is not None]
        torch.norm(torch.stack([torch.norm(p.grad.detach(), 2.0) for p in parameters]), 2.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        synchronize()

    return seconds_a_step(step, _steps(tiny), warmup=2)


def loader(record: Record, tiny: bool, asked: argparse.Namespace) -> None:
    """Batches from JPEGs of 500 x 375 in a shard, alone, and fed to a run of MAE."""
    import loader as pipeline

    count, images = (20, 4) if tiny else (2000, 256)
    encoder = TINY if tiny else "vit_l16"
    with tempfile.TemporaryDirectory() as place:
        some = list(pipeline.textures(min(count, 200)))
        pipeline.write([some[i % len(some)] for i in range(count)], Path(place, "00000.tar"))
        source = plugin.build("sources", "shards", path=place)
        objective = sharded(
            partial(mae, encoder), precision="fp32" if tiny else "bf16", compile=not tiny
        )
        transform = objective.transform(train=True)
        cores = os.cpu_count() or 1
        for workers in (0,) if tiny else (1, 4, cores - 1):
            stream = Stream(source, transform, batch_size=images, seed=0, workers=workers).batches()
            for _ in range(1 if tiny else 2 * workers):  # what was ready before the clock started
                next(stream)
            before, batches = time.perf_counter(), 1 if tiny else max(2, workers)
            for _ in range(batches):
                next(stream)
            rate = batches * images / (time.perf_counter() - before)
            stream.close()
            record(f"loader_{workers}_workers", images_per_second=rate, cores=cores)
        stream = Stream(
            source, transform, batch_size=images, seed=0, workers=0 if tiny else cores - 1
        )
        optimizer = optim.build(objective, lr=1e-5, weight_decay=0.05)
        count = 4 if tiny else 60
        Path(place, "run").mkdir()
        how = {"folder": Path(place, "run"), "seed": 0, "options": {}, "save_every": None}
        train.fit(objective, stream, optimizer, Schedule(1e-5, count), log_every=count // 2, **how)
        rows = [
            json.loads(line) for line in Path(place, "run/metrics.jsonl").read_text().splitlines()
        ]
    last = rows[-1]
    record("fed_mae", images_per_second=last["images_per_second"], data_wait=last["data_wait"])


PROFILED = {  # name: (objective, encoder, images, compile)
    "mae_b16": (mae, "vit_b16", 256, False),
    "mae_b16_compiled": (mae, "vit_b16", 256, True),
    "mae_l16_compiled": (mae, "vit_l16", 256, True),
    "hashtag_l16_compiled": (hashtag, "vit_l16", 128, True),
    "coco_vitdet_b": (
        partial(of_stage, "finetune/coco_vitdet_b", SMALL_DETECTOR),
        *("vit_b16", 8, False),
    ),
}


def profile(record: Record, tiny: bool, asked: argparse.Namespace) -> None:
    """The share of time in which the GPU computes during the loop, what stands before its gaps, and
    which kernels take the time."""
    if not CUDA:
        record("profile", skipped="no GPU")
        return
    for name, (build, encoder, images, compiled) in PROFILED.items():
        if asked.cases and name not in asked.cases:
            continue
        _forget()
        objective = sharded(partial(build, encoder), precision="bf16", compile=compiled)
        batch = batch_of(objective, images, torch.device("cpu"))
        record(f"profile_{name}", **_profiled(objective, batch, images))


def _profiled(objective: nn.Module, batch: dict, images: int) -> dict[str, Any]:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiling

    profiler = profiling(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
    with tempfile.TemporaryDirectory() as place:
        at = {8: profiler.start, 13: profiler.stop}
        fitted(objective, batch, images, 15, Path(place), at=at)
    events = profiler.profiler.kineto_results.events()
    kernels = sorted(
        (e.start_ns(), e.start_ns() + e.duration_ns(), e.name())
        for e in events
        if str(e.device_type()).endswith("CUDA") and e.duration_ns() > 0
        if not e.name().startswith("Optimizer.")  # what the profiler says of a whole step
    )
    spent: Counter[str] = Counter()
    busy, end, gaps = 0, kernels[0][0], []
    for start, stop, name in kernels:
        if start - end > 50_000:
            gaps.append(((start - end) / 1e6, name[:80]))
        busy += max(0, stop - max(start, end))
        end = max(end, stop)
        spent[name[:110]] += stop - start
    whole = end - kernels[0][0]
    return {
        "gpu_busy": busy / whole,
        "milliseconds_a_step": whole / 5e6,
        "kernels_a_step": len(kernels) / 5,
        "gaps_over_50_us": len(gaps),
        "milliseconds_in_gaps_a_step": sum(g for g, _ in gaps) / 5,
        "longest_gaps": [[round(g, 2), name] for g, name in sorted(gaps, reverse=True)[:4]],
        "kernels": [[round(n / 5e6, 3), name] for name, n in spent.most_common(24)],
    }


def saves(record: Record, tiny: bool, asked: argparse.Namespace) -> None:
    """How long a checkpoint of MAE's ViT-L holds training up."""
    objective = sharded(partial(mae, TINY if tiny else "vit_l16"), precision="fp32")
    optimizer = optim.build(objective, lr=1e-5, weight_decay=0.05)
    objective(batch_of(objective, 2, distributed.device()))["loss"].backward()
    optimizer.step()
    size = sum(p.numel() for p in objective.parameters()) * 12
    with tempfile.TemporaryDirectory() as place:
        for name in ("whole", "in_background"):
            background = (
                checkpoint.Background(Path(place, name), keep=1) if name != "whole" else None
            )
            synchronize()
            before = time.perf_counter()
            if background is None:
                checkpoint.save(Path(place, name), 1, objective, optimizer, {}, keep=1)
            else:
                background.save(1, objective, optimizer, {})
            blocked = time.perf_counter() - before
            if background is not None:
                background.wait()
                background.close()
            total = time.perf_counter() - before
            record(f"checkpoint_{name}", blocked_seconds=blocked, seconds=total, gb=size / 1e9)


def features(record: Record, tiny: bool, asked: argparse.Namespace) -> None:
    """Extraction of ViT-L's features, with and without the store on disk."""
    encoder, count = (TINY, 8) if tiny else ("vit_l16", 6000)
    model = on_meta(partial(Model, encoder=encoder))
    shard.materialise(model, "fp32")
    shard.initialise(model, 0)
    source = plugin.build("sources", "synthetic", images=count, size=64)
    cores = 0 if tiny else (os.cpu_count() or 1) - 1
    with tempfile.TemporaryDirectory() as place:
        for name, cache in (("without_store", None), ("with_store", Path(place))):
            before = time.perf_counter()
            extract(
                model,
                source,
                pool="mean",
                batch_size=256,
                workers=cores,
                cache=cache,
                labelled=False,
            )
            record(f"features_{name}", images_per_second=count / (time.perf_counter() - before))


def embed(record: Record, tiny: bool, asked: argparse.Namespace) -> None:
    """Curation's features of JPEGs in shards, by its command; eight of them beside the CPU's."""
    import loader as pipeline
    import pyarrow.parquet as pq

    encoder, count, shards = (TINY, 8, 2) if tiny else ("vit_l16", 2000, 4)
    with tempfile.TemporaryDirectory() as text:
        place = Path(text)
        some = list(pipeline.textures(min(count, 100)))
        for number in range(shards):
            images = [some[(number + i) % len(some)] for i in range(count // shards)]
            (place / "shards").mkdir(exist_ok=True)
            pipeline.write(images, place / "shards" / f"{number:05d}.tar")
        model = Model(encoder=encoder)
        shard.initialise(model, 0)
        save(model, place / "model", "random weights")
        files = {"card": {"train": {"source": "shards", "path": str(place / "shards")}}}
        first = {"meta": {}, "look": {}}
        workers = 0 if tiny else (os.cpu_count() or 1) - 1
        second = {"model": str(place / "model"), "batch_size": 4 if tiny else 128}
        files |= {"first": first, "both": {**first, "embed": {**second, "workers": workers}}}
        for name, content in files.items():
            (place / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        tool = str(Path(__file__).parents[1] / "tools" / "curate.py")
        for name in ("both",) if tiny else ("first", "both"):
            before = time.time()
            command = [sys.executable, tool, "run", str(place / "card.yaml")]
            command += ["--recipe", str(place / f"{name}.yaml"), "--out", str(place / "out")]
            subprocess.run(command, check=True, stdout=sys.stderr)
            record(f"curation_{name}", seconds=time.time() - before, images=count)
        table = pq.read_table(place / "out" / "embed" / "00000.parquet")
        found = torch.tensor(table["feature"].slice(0, 8).to_pylist())
        source = plugin.build("sources", "shards", path=str(place / "shards" / "00000.tar"))
        seen = [
            model.preprocess(Image.open(io.BytesIO(source[i]["image"]))) for i in range(len(found))
        ]
        with torch.no_grad():
            expected = model.eval().features(torch.stack(seen), "mean")
        error = ((found - expected).norm() / expected.norm()).item()
        record("curation_embed_beside_cpu", error=error, ok=error < 1e-2)


def planner(record: Record, tiny: bool, asked: argparse.Namespace) -> None:
    """What the planner expected of the memory that steps took; in a process of its own, on the CPU."""
    if asked.planned is None:
        record("planned_memory", skipped="the planner did not run")
        return
    out, _ = asked.planned.communicate(timeout=60)
    for line in out.decode().splitlines():
        if line.startswith("{"):
            values = json.loads(line)
            record(values.pop("figure"), **values)


SECTIONS = (
    limits,
    golden,
    objectives,
    equalities,
    float8,
    embed,
    profile,
    steps,
    reference,
    loader,
    saves,
    features,
    planner,
)


def plan_cases(tiny: bool) -> None:
    """Prints what the planner expects of the sharded, eager cases."""
    from prepretrain.runs import memory

    for name, (build, encoder, images, _) in CASES.items():
        if tiny and name != "mae_b16":
            continue
        encoder, images = (TINY, 4) if tiny else (encoder, images)
        step = memory.simulate(partial(on_meta, partial(build, encoder)), images=images, world=1)
        print(json.dumps({"figure": f"planned_{name}", "gib": step.peak / 2**30}), flush=True)


def _peak() -> float:
    name = torch.cuda.get_device_name() if CUDA else ""
    return next((v for k, v in DATA_SHEET.items() if k in name), 1e12)


def _forget() -> None:
    torch._dynamo.reset()
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _said(error: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "prepretrain" in f.filename]
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {str(error)[:400]}{where}"


def main() -> None:
    """Runs the sections in their order."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [section.__name__ for section in SECTIONS]
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    known = sorted({*CASES, *PROFILED})
    parser.add_argument("--cases", nargs="+", choices=known, help="of steps and profile; all")
    parser.add_argument("--variants", nargs="+", choices=sorted(VARIANTS), help="of steps; all")
    parser.add_argument(
        "--seconds", type=float, default=510.0, help="no section starts after these"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on any device")
    parser.add_argument("--reference", metavar="DIR", help="a checkout of facebookresearch/mae")
    parser.add_argument("--plan", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.plan:
        plan_cases(asked.smoke)
        return
    if not (CUDA or asked.smoke):
        raise SystemExit("make gpu: torch sees no GPU here. SMOKE=1 runs the same at tiny sizes.")
    if asked.smoke:  # the compiler's own work is not what is tried
        nn.Module.compile = partialmethod(nn.Module.compile, backend="eager")
    logging.disable(logging.INFO)
    started = time.time()
    asked.deadline = started + asked.seconds
    record = Record(asked.out / "gpu.jsonl", started)
    again = [sys.executable, __file__, "--plan", *(["--smoke"] if asked.smoke else [])]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    asked.planned = None
    if "planner" in asked.only:
        asked.planned = subprocess.Popen(
            again, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=hidden
        )
    distributed.init()
    record(
        "machine",
        device=torch.cuda.get_device_name() if CUDA else platform.machine(),
        cores=os.cpu_count(),
        torch=torch.__version__,
        python=platform.python_version(),
        commit=os.environ.get("COMMIT", "unknown"),
    )
    for section in SECTIONS:
        if section.__name__ not in asked.only:
            continue
        if time.time() > asked.deadline:
            record(section.__name__, skipped="no time left")
            continue
        try:
            section(record, asked.smoke, asked)
        except Exception as error:
            traceback.print_exc()
            record(section.__name__, failed=_said(error))
        _forget()
    record("end", seconds=time.time() - started)
    distributed.shutdown()


if __name__ == "__main__":
    main()
