"""Which frames make a clip, and crops that are the same for all its frames."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from prepretrain.data.random import Random
from prepretrain.data.transforms import crop_box, flip, random_resized_crop, resized
from prepretrain.data.video import clips
from prepretrain.data.video.handles import Clip

GOLDEN = Path(
    os.environ.get("PREPRETRAIN_GOLDEN", Path(__file__).parent / "golden"), "video_sampling.json"
)
SAMPLINGS = {
    "strided": clips.Strided(length=8, stride=4),
    "segments": clips.Segments(length=8),
    "a window": clips.Window(length=8, span=1.0),
}


class Made(Clip):
    """A video without pixels."""

    def __init__(self, frames: int, rate: float = 25.0, times: np.ndarray | None = None):
        self.key = "made"
        self.times = np.arange(frames) / rate if times is None else times
        self.rate, self.seconds = rate, float(self.times[-1]) + 1 / rate


@pytest.fixture(scope="module")
def golden() -> dict:
    """Tables that the papers' own code made."""
    if not GOLDEN.is_file():
        pytest.skip(f"{GOLDEN} is not there: set PREPRETRAIN_GOLDEN to the folder that holds it")
    return json.loads(GOLDEN.read_text())


def test_strided_views_are_those_of_mae_st_in_every_entry(golden):
    for row in golden["k400"]:
        given = row["num_frames"], row["fps"], row["clip_frames"], row["rate"]
        starts = clips.view_starts(*given, row["views"])
        assert [clips.strided(*given, start) for start in starts] == row["indices"], row
        sampling = clips.Strided(row["clip_frames"], row["rate"])
        video = Made(row["num_frames"], row["fps"])
        assert sampling.test(video, row["views"]) == row["indices"], row


def test_segments_are_those_of_slowfast_in_every_entry(golden):
    for row in golden["ssv2"]:
        low, high = clips.segments(row["num_frames"], row["clip_frames"])
        assert (low, high) == (row["train_low"], row["train_high_inclusive"]), row
        video = Made(row["num_frames"])
        assert clips.Segments(row["clip_frames"]).test(video, 2) == [row["test_indices"]] * 2


def test_crops_of_a_test_are_those_of_mae_st_in_every_entry(golden):
    for row in golden["crops"]:
        size = clips.scaled_size(row["height"], row["width"], row["short_side"])
        assert list(size) == row["scaled"], row
        corners = [list(corner) for corner in clips.view_corners(*size, row["crop"], 3)]
        assert corners == row["top_left_of_0_1_2"], row


def test_windows_in_seconds_are_those_of_omnimae_in_every_entry(golden):
    for row in golden["omnimae_ssv2_clips"]:
        windows = clips.windows(row["seconds"], row["clip_seconds"], row["clips"])
        assert [list(window) for window in windows] == row["start_end"], row


@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_clip_is_a_pure_function_of_the_samples_generator(name):
    sampling, video = SAMPLINGS[name], Made(300)
    drawn = [sampling.train(video, Random(0, 0, index)("clip")) for index in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1]
    for numbers in drawn + sampling.test(video, 5):
        assert len(numbers) == 8 and numbers == sorted(numbers)
        assert 0 <= numbers[0] and numbers[-1] < 300


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_a_video_that_is_shorter_than_the_window_gives_a_whole_clip_all_the_same(name, frames):
    sampling, video = SAMPLINGS[name], Made(frames)
    for numbers in [sampling.train(video, Random(0, 0, 0)("clip")), *sampling.test(video, 3)]:
        assert len(numbers) == 8 and set(numbers) <= set(range(frames))
        assert numbers == sorted(numbers)


def test_random_clips_reach_the_first_and_the_last_frame():
    sampling, video = clips.Strided(length=4, stride=30), Made(120, rate=30)
    starts = {sampling.train(video, Random(0, 0, index)("clip"))[0] for index in range(200)}
    assert starts == {0}  # the clip is as long as the video
    video = Made(150, rate=30)
    drawn = [sampling.train(video, Random(0, 0, index)("clip")) for index in range(300)]
    assert {clip[0] for clip in drawn} == set(range(30))
    assert max(clip[-1] for clip in drawn) == 148  # 119 after a real number below 30


def test_of_a_variable_rate_the_frames_on_the_clock_are_taken():
    times = np.concatenate([np.arange(50) / 50, 1 + np.arange(10) / 10])  # 50 a second, then 10
    video = Made(60, rate=30, times=times)
    numbers = clips.on_the_clock(video.times, 2.0, range(60))
    shown = video.times[numbers]
    wanted = np.arange(60) * (2 / 60)
    assert (shown <= wanted + 1e-6).all() and (wanted - shown).max() < 0.1
    assert clips.on_the_clock(np.arange(60) / 30, 2.0, [3, 59]) == [3, 59]


def pattern(frames: int = 3, height: int = 40, width: int = 60) -> torch.Tensor:
    """A clip that shows one picture."""
    picture = torch.randint(256, (3, height, width), generator=torch.Generator().manual_seed(0))
    return picture.to(torch.uint8).expand(frames, -1, -1, -1)


CROPS = {
    "a random resized crop": lambda clip, rng: random_resized_crop(clip, 24, rng, scale=(0.2, 1)),
    "a jittered crop": lambda clip, rng: clips.jittered_crop(clip, 24, rng, short=(24, 36)),
    "a flip": flip,
}


@pytest.mark.parametrize("name", CROPS)
def test_all_frames_of_a_clip_are_moved_alike_by_one_draw(name):
    moved = [CROPS[name](pattern(), Random(0, 0, index)("crop")) for index in range(4)]
    for clip in moved:
        assert clip.dtype == torch.uint8 and torch.equal(clip[0], clip[2])
    assert any(not torch.equal(moved[0], other) for other in moved[1:])


def test_a_clip_is_cropped_as_each_of_its_frames_would_be():
    clip = pattern()
    crop = random_resized_crop(clip, 24, Random(0, 0, 0)("crop"), scale=(0.2, 1))
    alone = random_resized_crop(clip[0], 24, Random(0, 0, 0)("crop"), scale=(0.2, 1))
    assert torch.equal(crop[1], alone)
    top, left, height, width = crop_box(40, 60, Random(0, 0, 0)("crop"), (0.2, 1), (3 / 4, 4 / 3))
    inside = clip[0, :, top : top + height, left : left + width]
    assert torch.equal(alone, resized(inside, 24, 24))


def test_crops_of_a_test_lie_along_the_long_side():
    clip = torch.arange(60, dtype=torch.uint8).expand(2, 3, 40, 60)
    left, middle, right = clips.view_crops(clip, 40, 3)
    assert [crop[0, 0, 0, 0].item() for crop in (left, middle, right)] == [0, 10, 20]
    assert left.shape == (2, 3, 40, 40)
    assert torch.equal(clips.view_crops(clip, 40, 1)[0], middle)
    assert clips.view_crops(clip, 20, 3, short=30)[2].shape == (2, 3, 20, 20)
    with pytest.raises(ValueError, match="2 crops of a frame"):
        clips.view_crops(clip, 40, 2)
