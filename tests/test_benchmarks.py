"""The measurements run, at tiny sizes: their figures are not looked at."""

import json
from pathlib import Path

import pytest
from conftest import command

ROOT = Path(__file__).parents[1]

# facebookresearch/mae's model by its names, made of our parts
REFERENCE = """
import torch
from mae_step import RENAMED
from torch import nn

from prepretrain.distributed import shard
from prepretrain.models.model import Model
from prepretrain.objectives.mae import MAE


class Reference(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.device("meta"):
            ours = MAE(Model(encoder="vit_test8", positions="fixed"))
        shard.materialise(ours, "fp32")
        shard.initialise(ours, 0)
        self.ours, names = [ours], {name: theirs for theirs, name in RENAMED.items()}
        for module, renamed in ((ours.model.encoder, {}), (ours.decoder, names)):
            for name, child in [*module.named_children(), *module.named_parameters(recurse=False)]:
                setattr(self, renamed.get(name, name), child)

    def forward(self, images, mask_ratio=0.75):
        noise = torch.rand(len(images), self.ours[0].model.encoder.cells, device=images.device)
        self.ours[0].model.normalise = lambda image: image
        return self.ours[0]({"image": images, "noise": noise})["loss"], None, None


def mae_vit_base_patch16(norm_pix_loss):
    return Reference()
"""
# timing is a part of the others; test_faults.py runs checkpoint_stress, and gpu.py is below
ELSEWHERE = ("timing", "checkpoint_stress", "gpu")
TINY = {  # each benchmark's arguments; where it takes hours, that it starts
    "cifar10_evaluators": "--help",
    "cifar10_flop_matched": "--help",
    "cifar10_masked": "--help",
    "cifar10_rung": "--help",
    "cifar10_scaling": "--help",
    "cifar10_two_stage": "--help",
    "average": "--steps 2 --rounds 1 --depth 1",
    "certificate": "--help",
    "clip_step": "--batch 1 --steps 1",
    "detection_coco": "--help",
    "cifar10_curation": "--help",
    "curate_speed": "--help",
    "detection_raccoon": "--help",
    "detection_step": "--encoder vit_test8 --pixels 64 --channels 8 --regions 8 --batch 1 --steps 1 --train 1",
    "duplicates": "--help",
    "feature_copies": "--help",
    "demo_seeds": "--show benchmarks/results/demo_seeds.json",
    "features": "--images 2 --batch 1 --rows 100",
    "finetune_step": "--batch 1 --steps 1",
    "float8": "--help",
    "flickr_clip": "--help",
    "hashtag_step": "--encoder vit_test8 --batch 2 --tags 16 --steps 1",
    "host_memory": "--images 100000 --batches 10 --workers 1",
    "loader": "--count 2 --rounds 2 --batches 1",
    "loop": "--steps 3 --rounds 1",
    "mae_step": "--encoder vit_test8 --batch 2 --steps 1 --reference REFERENCE",
    "memory": "--encoder vit_test8 --batch 1",
    "plan_memory": "--measure hashtag vit_test8 none 1",
    "plan_tables": "--help",
    "remote_shards": "--latency 0 --rate 999 --compute 0 --batch 2 --rounds 1",
    "scaling_fits": "--draws 1",
    "tag_resampling": "--help",
    "tag_counting": "--samples 20 --size 10 --rounds 1",
    "tar_index": "--samples 2 --rounds 1",
    "segmentation_camvid": "--help",
    "video_decoding": "--help",
    "video_shape_actions": "--help",
    "weights_1e9": "--help",
    "weights_loader": "--help",
    "zeroshot_tags": "--help",
}


def benchmark(name: str, *arguments: str) -> str:
    """What a benchmark prints."""
    script, paths = f"../benchmarks/{name}.py", f"{ROOT / 'benchmarks'}:{ROOT}"
    done = command(script, *map(str, arguments), PYTHONPATH=paths)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("name", TINY)
def test_each_benchmark_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "models_mae.py").write_text(REFERENCE)
    assert benchmark(name, *TINY[name].replace("REFERENCE", str(tmp_path)).split())


def test_no_benchmark_is_left_out():
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert scripts == {*TINY, *ELSEWHERE}


@pytest.mark.parametrize(
    "parts, skips, oks",
    [
        ("--only limits objectives steps embed --cases mae_b16 coco_vitdet_b", {}, 5),
        pytest.param(
            "",
            {"reference_mae": "no --reference", "profile": "no GPU"},
            10,
            marks=pytest.mark.faults,
        ),
    ],
    ids=["some", "all"],
)
def test_what_a_gpu_will_be_asked_runs_on_the_cpu(parts, skips, oks, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    benchmark("gpu", "--smoke", "--out", tmp_path, *parts.split())
    figures = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert figures[0]["figure"] == "machine" and figures[-1]["figure"] == "end"
    assert not [figure for figure in figures if "failed" in figure]
    skipped = {figure["figure"]: figure["skipped"] for figure in figures if "skipped" in figure}
    assert skipped == skips
    checks = [figure["ok"] for figure in figures if "ok" in figure]
    assert len(checks) == oks and all(checks)
