"""A ViT that takes clips: how it starts from an image model, and what it refuses."""

import pytest
import torch
from test_dense import made, saved
from torch.testing import assert_close

from prepretrain.models.load import load
from prepretrain.models.model import Model

CLIP = torch.arange(2 * 3 * 4 * 32 * 32).remainder(251).to(torch.uint8).view(2, 3, 4, 32, 32)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """(an image model, the folder that it lies in)."""
    folder, model = tmp_path_factory.mktemp("image"), made()
    saved(model, folder)
    return model, str(folder)


def test_a_video_model_starts_from_an_image_model(image):
    plain, folder = image
    model = load(folder, frames=4)
    assert model(CLIP).shape == (2, 1 + 2 * 16, 32)
    assert torch.equal(model.encoder.pos_embed, plain.encoder.pos_embed)
    assert not model.encoder.pos_embed_temporal.any()
    kernel = model.encoder.patch_embed.proj.weight
    assert_close(kernel.sum(2), plain.encoder.patch_embed.proj.weight)
    drawn = load(folder, frames=4, time_positions="normal").encoder.pos_embed_temporal
    again = load(folder, frames=4, time_positions="normal").encoder.pos_embed_temporal
    assert drawn.std().item() == pytest.approx(0.02, rel=0.3) and torch.equal(drawn, again)
    whole = load(folder, frames=4, time_positions="joint").encoder
    assert torch.equal(whole.pos_embed[:, 1:], plain.encoder.pos_embed[:, 1:].repeat(1, 2, 1))
    fixed = load(folder, frames=4, time_positions="sinusoid", class_token=False)
    assert fixed(CLIP).shape == (2, 2 * 16, 32) and not fixed.encoder.pos_embed.requires_grad
    with pytest.raises(ValueError, match="no class token"):
        fixed.features(CLIP)


@pytest.mark.parametrize("positions", ["normal", "joint"])
def test_it_follows_another_number_of_frames_and_image_size(image, tmp_path, positions):
    model = load(image[1], frames=4, time_positions=positions, relative_positions=True)
    with torch.no_grad():
        model.encoder.blocks[0].attn.rel_pos_t.normal_()
    saved(model, tmp_path)
    again = load(str(tmp_path))
    assert_close(again.state_dict(), model.state_dict())
    longer = load(str(tmp_path), frames=8, image_size=48).encoder
    assert longer.blocks[0].attn.rel_pos_t.shape == (7, 16)
    assert longer(torch.zeros(1, 3, 8, 48, 48)).shape == (1, 1 + 4 * 36, 32)


def test_a_clip_of_the_wrong_kind_is_refused(image):
    plain, folder = image
    model = load(folder, frames=4)
    with pytest.raises(
        ValueError, match=r"takes \[B, 3, 4, H, W\], and what it is given is \[2, 3, 3"
    ):
        model(CLIP[:, :, :3])
    with pytest.raises(ValueError, match=r"None takes \[B, 3, H, W\]"):
        plain(CLIP)
    with pytest.raises(ValueError, match="cannot give maps"):
        Model(**{**model.options, "head": {"name": "linear_segmentation", "classes": 2}})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"encoder": "swinv2_s", "frames": 4}, "a SwinV2 takes images, not clips"),
        ({"frames": 3}, "model.frames: 3 is no multiple of model.tube"),
        ({"frames": 4, "window": 2}, "a ViT with model.window takes images"),
        ({"class_token": False}, "only with model.frames"),
        ({"relative_positions": True}, "only with model.window or model.frames"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        Model(**{"encoder": "vit_test8", **options})


def test_other_libraries_have_no_such_vit(image):
    encoder = load(image[1], frames=4).encoder
    with pytest.raises(ValueError, match="timm has no ViT that takes clips"):
        encoder.timm()
    with pytest.raises(ValueError, match="open_clip has no ViT that takes clips"):
        encoder.open_clip({}, "class")
