"""Our objectives against numbers computed with the papers' reference code."""

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.testing import assert_close

from prepretrain import weights
from prepretrain.model import Model
from prepretrain.objectives.mae import MAE

GOLDEN = Path(os.environ.get("PREPRETRAIN_GOLDEN", Path(__file__).parent / "golden"))


def rename(key: str) -> str:
    """A key of MAE's released files as ours."""
    if key.startswith("decoder_"):
        return "decoder." + key.removeprefix("decoder_")
    return "decoder.mask_token" if key == "mask_token" else f"model.encoder.{key}"


@pytest.fixture(scope="module")
def mae():
    """(tensors, an MAE built from the file's dims with its weights for a given target)."""
    with safe_open(GOLDEN / "mae_reference.safetensors", "pt") as file:
        dims, tensors = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}

    def build(normalise_target: bool) -> MAE:
        model = Model(
            encoder="vit_test8",
            mean=(0, 0, 0),
            std=(1 / 255,) * 3,
            positions="fixed",
            patch_size=int(dims["patch_size"]),
            width=int(dims["embed_dim"]),
            depth=int(dims["depth"]),
            heads=int(dims["heads"]),
            image_size=int(dims["image_size"]),
        )
        objective = MAE(
            model,
            mask_ratio=float(dims["mask_ratio"]),
            decoder_depth=int(dims["decoder_depth"]),
            decoder_width=int(dims["decoder_dim"]),
            decoder_heads=int(dims["decoder_heads"]),
            normalise_target=normalise_target,
        )
        state = {
            rename(k.removeprefix("state.")): v
            for k, v in tensors.items()
            if k.startswith("state.")
        }
        weights.fill(
            objective,
            weights.Weights(
                "golden", {k: tuple(v.shape) for k, v in state.items()}, state.__getitem__
            ),
        )
        return objective

    return tensors, build


def test_mae_encodes_the_same_patches_to_the_same_latent(mae):
    tensors, build = mae
    objective = build(True)
    keep, masked = objective.split(tensors["noise"])
    mask = torch.ones_like(tensors["mask"]).scatter(1, keep, 0.0)
    assert torch.equal(mask, tensors["mask"])
    assert_close(
        objective.model.encoder(tensors["images"], keep=keep), tensors["latent"], rtol=0, atol=1e-5
    )


def test_mae_predicts_the_same_pixels_for_every_patch(mae):
    tensors, build = mae
    objective = build(True)
    keep, masked = objective.split(tensors["noise"])
    latent = objective.model.encoder(tensors["images"], keep=keep)
    everything = objective.decoder(latent, keep, masked, everything=True)[:, 1:]
    places = torch.cat([keep, masked], 1)[..., None].expand_as(everything)
    assert_close(everything, tensors["pred"].gather(1, places), rtol=0, atol=1e-5)
    hidden = objective.decoder(latent, keep, masked)
    assert_close(hidden, everything[:, keep.shape[1] :], rtol=0, atol=1e-6)


@pytest.mark.parametrize("normalise_target, name", [(False, "loss"), (True, "loss_norm_pix")])
def test_mae_gives_the_same_losses(mae, normalise_target, name):
    tensors, build = mae
    loss = build(normalise_target)({"image": tensors["images"], "noise": tensors["noise"]})["loss"]
    assert_close(loss, tensors[name], rtol=1e-5, atol=1e-5)


def test_mae_gives_the_same_gradients(mae):
    tensors, build = mae
    compared = []
    for normalise_target in (False, True):
        objective = build(normalise_target)
        objective({"image": tensors["images"], "noise": tensors["noise"]})["loss"].backward()
        parameters = dict(objective.named_parameters())
        compared.append(
            max(
                float((parameters[rename(k.removeprefix("grad."))].grad - v).norm() / v.norm())
                for k, v in tensors.items()
                if k.startswith("grad.")
            )
        )
    assert min(compared) < 1e-4, compared


def test_the_fixed_positions_are_the_papers(mae):
    tensors, build = mae
    objective = build(True)
    sincos = torch.empty_like(objective.model.encoder.pos_embed)
    objective.model.encoder.initialise("pos_embed", sincos, torch.Generator())
    assert_close(sincos, tensors["state.pos_embed"], rtol=0, atol=1e-6)
