"""Fine-tuning and evaluation on clips: videos of a square that moves left or right."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import listed, processes
from PIL import Image
from safetensors.torch import load_file
from test_train import rows, train
from torch.testing import assert_close

from prepretrain import config as configs
from prepretrain.data.batch import collate
from prepretrain.data.card import load_card
from prepretrain.data.randaugment import RandAugment
from prepretrain.data.random import Random
from prepretrain.data.video.views import Views
from prepretrain.distributed import group as distributed
from prepretrain.distributed import shard
from prepretrain.evaluation import parts
from prepretrain.evaluation.evaluators import video
from prepretrain.evaluation.evaluators.base import build
from prepretrain.evaluation.features import extract
from prepretrain.models.load import load
from prepretrain.models.model import Model
from prepretrain.objectives.video import Video
from prepretrain.runs.plan import build_objective, forward_flops

FRAMES = 8


def furnish(folder: Path, count: int = 6) -> str:
    """Writes folders of frames, half of each class, and a card; returns the card's path."""
    for number in range(count):
        toward = ("left", "right")[number % 2]
        place = folder / "videos" / toward / f"{number}"
        place.mkdir(parents=True)
        for frame in range(FRAMES):
            picture = np.full((20, 26, 3), 10 * number, dtype=np.uint8)
            left = 2 * (frame if toward == "right" else FRAMES - 1 - frame) + 2
            picture[6 + number : 12 + number, left : left + 6] = (200, 80 + 9 * number, 60)
            Image.fromarray(picture).save(place / f"{frame}.png", compress_level=0)
    split = f"{{source: video, path: {folder}/videos, rate: 30}}"
    (folder / "moving.yaml").write_text(f"classes: [left, right]\ntrain: {split}\nval: {split}\n")
    return str(folder / "moving.yaml")


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("moving"))


def made(**options) -> Model:
    """A small model of clips with weights."""
    head = {"classes": 2, "norm": True}
    asked = {"frames": 4, "image_size": 16, "depth": 1, "final_norm": False, "head": head}
    model = Model(encoder="vit_test8", **{**asked, **options})
    shard.initialise(model, 0)
    return model


def row(card: str, objective: Video, index: int = 3, *, train: bool = True, seed: int = 0) -> dict:
    sample = load_card(card).open("train")[index]
    return objective.transform(train)(sample | {"random": Random(seed, 0, index)})


def test_each_draw_of_a_video_is_another_clip_by_its_key_alone(card):
    objective = Video(made(), stride=1, draws=2)
    one = row(card, objective)["clip"]
    assert one.shape == (2, 3, 4, 16, 16) and one.dtype == torch.uint8
    assert not torch.equal(one[0], one[1])
    assert torch.equal(row(card, objective)["clip"], one)
    assert not torch.equal(row(card, objective, seed=1)["clip"], one)


def test_all_frames_of_a_clip_are_cropped_mirrored_and_augmented_alike(card):
    still = (
        torch.arange(3 * 24 * 24)
        .remainder(256)
        .to(torch.uint8)
        .view(1, 3, 24, 24)
        .repeat(5, 1, 1, 1)
    )
    augment = RandAugment("rand-m7-n4-mstd0.5-inc1", (0.4, 0.4, 0.4), 24)
    changed = [augment(still, np.random.default_rng(seed)) for seed in range(6)]
    assert all(torch.equal(frame, clip[0]) for clip in changed for frame in clip)
    assert any(not torch.equal(clip, still) for clip in changed)
    moves = []
    for seed in range(12):
        objective = Video(made(), stride=1, crop_scale=(1.0, 1.0))
        bright = (row(card, objective, seed=seed)["clip"][0, 0] > 100).float()
        place = (bright * torch.arange(16.0)).sum((1, 2)) / bright.sum((1, 2))
        moves.append(bool(place[-1] > place[0]))
    assert len(set(moves)) == 2  # some are mirrored
    unflipped = Video(made(), stride=1, crop_scale=(1.0, 1.0), flip=False)
    for seed in range(4):
        bright = (row(card, unflipped, seed=seed)["clip"][0, 0] > 100).float()
        place = (bright * torch.arange(16.0)).sum((1, 2)) / bright.sum((1, 2))
        assert place[-1] > place[0]  # as video 3 does


def test_clips_are_erased_and_mixed_as_a_whole_and_their_loss_is_that_of_their_videos(card):
    objective = Video(made(), stride=1, draws=2, mixup=0.8, cutmix=1.0, smoothing=0.1, erasing=0.9)
    batch = collate([row(card, objective, i) for i in range(3)])
    assert batch["clip"].shape == (3, 2, 3, 4, 16, 16) and objective.multiple == 1
    seen = []
    objective.model.encoder.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    loss = objective.train()(batch)["loss"]
    loss.backward()
    assert loss.item() > 0 and seen[0].shape == (6, 3, 4, 16, 16)
    only_erased = Video(made(), stride=1, erasing=0.999)
    clips = torch.zeros(8, 3, 4, 16, 16)
    only_erased.model.encoder.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    only_erased.train().loss_of(clips, torch.zeros(8, dtype=torch.int64))
    erased = (seen[1] != 0).any(1)  # of every frame the same rectangle
    assert erased.any() and all(torch.equal(erased[:, 0], erased[:, t]) for t in range(4))
    said = objective.eval()(batch)
    assert said.keys() == {"loss", "accuracy"}


def test_validation_sees_the_middle_and_an_images_model_is_refused(card):
    objective = Video(made(), stride=1)
    clip = row(card, objective, train=False)["clip"]
    assert clip.shape == (1, 3, 4, 16, 16)
    assert torch.equal(clip, row(card, objective, train=False, seed=5)["clip"])
    with pytest.raises(ValueError, match="objective 'video' trains on clips"):
        Video(Model(encoder="vit_test8", head={"classes": 2}))


def test_flops_of_a_video_are_of_all_its_draws():
    def flops(draws: int) -> int:
        with torch.device("meta"):
            return forward_flops(
                Video(Model(encoder="vit_test8", frames=4, head={"classes": 2}), draws=draws)
            )

    assert flops(2) == 2 * flops(1) > 0


def evaluated(folder: Path, card: str, model: Model | None = None, **options) -> dict[str, float]:
    evaluator = build("video", cache=True, data=card, stride=1, **options)
    model = model or made(head={"classes": 2, "norm": True}).eval()
    evaluator.check(model)
    evaluator.open_data()
    return evaluator.run(model, folder)


def place(folder: Path) -> Path:
    (found,) = (folder / "predictions").iterdir()
    return found


def in_process(rank: int, folder: str, card: str) -> None:
    distributed.init()
    options = {"feature_batch": 12, "clips": 2, "pictures": 2}
    found = evaluated(Path(folder), card, **options, leaks=str(Path(folder).parent))
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    distributed.shutdown()


def test_any_number_of_processes_sees_each_clip_and_crop_once(tmp_path, card):
    said = {}
    listed(tmp_path, {"moving:val": (load_card(card).open("val"), [0, 3])})
    for count in (1, 3):
        folder = tmp_path / str(count)
        folder.mkdir()
        if count == 1:
            in_process(0, str(folder), card)
        else:
            processes(count, in_process, str(folder), card)
        each = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]
        assert all(one == each[0] for one in each)
        said[count] = each[0], json.loads((place(folder) / "videos.json").read_text())
    assert said[1] == said[3]
    found, rows = said[1]
    assert found["leaked_images"] == 2 and "view/0x1/top1_without_leaks" in found
    assert found["videos"] == 6 and len({one["key"] for one in rows}) == 6
    views = [key for key in found if key.startswith("view/") and key.endswith("/top1")]
    assert len(views) == 6 and all(len(one["ranks"]) == 6 for one in rows)
    assert found["view/1x2/top1"] == pytest.approx(
        100 * sum(one["ranks"][5] == 0 for one in rows) / 6
    )
    assert Image.open(place(tmp_path / "1") / "sheet.png").width > 4 * 128


def test_an_evaluation_that_was_cut_off_goes_on(tmp_path, monkeypatch, group, card):
    whole = evaluated(tmp_path / "whole", card, clips=1, crops=1, pictures=0)
    monkeypatch.setattr(parts, "_PART", 2)
    computed, original = [], video._part

    def interrupted(model, source, *how):
        computed.append(len(source))
        if len(computed) == 2:
            raise KeyboardInterrupt
        return original(model, source, *how)

    monkeypatch.setattr(video, "_part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluated(tmp_path / "cut", card, clips=1, crops=1, pictures=0)
    assert evaluated(tmp_path / "cut", card, clips=1, crops=1, pictures=0) == whole
    assert computed == [2, 2, 2, 2] and not (place(tmp_path / "cut") / "parts").exists()


def test_the_mean_is_of_probabilities():
    scores = torch.tensor([[0.6, 0.4], [0.1, 0.9], [0.55, 0.45]])
    said = video._said(scores, 0, "a")
    assert said == {"predicted": 1, "probability": 0.5833, "rank": 1, "ranks": [0, 1, 0]}
    with pytest.raises(ValueError, match="a: label 2 is none of the 2 classes"):
        video._said(scores, 2, "a")


def test_what_does_not_fit_is_refused_before_anything_is_computed(card):
    evaluator = build("video", cache=False, data=card)
    for model, message in (
        (made(head=None), "this model has no classifier"),
        (made(head={"classes": 3, "norm": True}), "the card has 2 classes"),
        (made(image_size=[16, 24]), "the crops of a video are squares"),
        (made(frames=None), "this model takes images"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluator.check(model)


def test_probes_read_the_mean_over_frames_and_clips(tmp_path, group, card):
    image = Model(encoder="vit_test8", image_size=16, depth=1)
    shard.initialise(image, 0)
    view = {"clips": 2, "crops": 3, "stride": 1}
    source, views = load_card(card).open("val"), Views(frames=4, **view)
    features, labels = extract(image, source, pool="mean", batch_size=4, views=views)
    row = views.of(image.encoder)(source[2])
    frames = row["clip"].transpose(1, 2).flatten(0, 1)
    assert frames.shape == (2 * 3 * 4, 3, 16, 16) and labels.tolist() == [0, 0, 0, 1, 1, 1]
    with torch.no_grad():
        assert_close(features[2], image.features(frames, "mean").mean(0), rtol=1e-5, atol=1e-5)
        clips = made(head=None, final_norm=True)
        found, _ = extract(clips, source, batch_size=4, views=Views(**view))
        assert_close(found[2], clips.features(row["clip"]).mean(0), rtol=1e-5, atol=1e-5)
    for protocol, pool in (("lbfgs", "mean"), ("attentive", "tokens")):
        options = {"protocol": protocol, "pool": pool, "views": {"stride": 1}}
        evaluator = build("linear", cache=True, data=card, **options)
        evaluator.check(clips)
        found = evaluator.run(clips, tmp_path)
        assert 0 <= found["top1"] <= 100 and found["images"] == 6
    kept = [json.loads(path.read_text()) for path in (tmp_path / "features").glob("*.json")]
    assert [2 * 4 + 1, 32] in [one["shape"] for one in kept]
    with pytest.raises(ValueError, match="views.frames: 8, and the model takes 4"):
        build("linear", cache=False, data=card, views={"frames": 8}).run(clips, tmp_path)


TUNING = [
    "objective={name: video, stride: 1, draws: 2, augment: rand-m7-mstd0.5-inc1, mixup: 0.8, cutmix: 1.0, "
    "erasing: 0.25}",
    "model={frames: 4, positions: learned, drop_path: 0.1, final_norm: false, head: {classes: 2, norm: true, "
    "dropout: 0.3}}",
    "batch_size=4",
    "length=4it",
    "optim.warmup=1it",
    "optim.layer_decay=0.75",
    "checkpoint.every=1it",
    "checkpoint.keep=9",
]


def test_a_fine_tuning_on_clips_starts_from_an_image_run_and_resumes_bitwise(place, group, card):
    video = [*TUNING, f"data.train={card}", "shard.recompute=block"]
    video += [
        f"evaluators=[{{name: video, data: {card}, every: 2it, stride: 1, clips: 1, crops: 1}}]"
    ]
    train("runs/mae")
    train("runs/whole", *video, init="runs/mae")
    shutil.copytree("runs/whole", "runs/cut")
    for step in (3, 4):
        shutil.rmtree(f"runs/cut/checkpoints/{step:09d}")
    shutil.rmtree("runs/cut/export")
    train("runs/cut", *video, init="runs/mae")
    assert rows("runs/cut") == rows("runs/whole")
    one, other = (load_file(f"runs/{n}/export/model.safetensors") for n in ("whole", "cut"))
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert load("runs/whole").encoder.patch_embed.proj.weight.shape == (32, 3, 2, 8, 8)


@pytest.mark.parametrize(
    "stage, giga, millions", [("k400_b", 180, 87), ("k400_l", 598, 304), ("k400_h", 1193, 632)]
)
def test_the_stages_models_have_the_published_sizes(stage, giga, millions):
    config = configs.load(f"finetune/{stage}", ["objective.draws=1"])
    objective = build_objective(config)
    assert sum(p.numel() for p in objective.parameters()) / 1e6 == pytest.approx(millions, abs=0.6)
    assert forward_flops(objective) / 2e9 == pytest.approx(giga, rel=0.004)  # of multiply-adds
