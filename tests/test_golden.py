"""Our objectives against numbers computed with the papers' reference code."""

import os
from ast import literal_eval
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.testing import assert_close

from prepretrain import weights
from prepretrain.encoders.vit import patchify, take
from prepretrain.model import Model
from prepretrain.objectives.mae import MAE
from prepretrain.objectives.simmim import SimMIM, window_statistics

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


@pytest.fixture(scope="module")
def simmim():
    """(tensors, a SimMIM built from the file's dims with its weights)."""
    with safe_open(GOLDEN / "simmim_swinv2_reference.safetensors", "pt") as file:
        dims, tensors = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}
    model = Model(
        encoder="swinv2_test8",
        mean=(0, 0, 0),
        std=(1 / 255,) * 3,
        base_width=int(dims["embed_dim"]),
        depths=literal_eval(dims["depths"]),
        heads=literal_eval(dims["heads"]),
        window=int(dims["window"]),
        image_size=int(dims["image_size"]),
    )
    objective = SimMIM(
        model,
        mask_ratio=float(dims["mask_ratio"]),
        cell=int(dims["mask_patch"]),
        target_window=47 if literal_eval(dims["norm_target"]) else None,
    )
    state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    encoder = {k: v for k, v in state.items() if k.startswith("encoder.")}
    weights.fill(
        model, weights.Weights("golden", _shapes(encoder), encoder.__getitem__, whole=False)
    )
    parts = {
        "mask_token.token": state["encoder.mask_token"],
        "decoder.pred.weight": state["decoder.0.weight"].flatten(1),
        "decoder.pred.bias": state["decoder.0.bias"],
    }
    unused = objective.load_state_dict(parts, strict=False)
    assert not unused.unexpected_keys
    assert all(k.startswith("model.") for k in unused.missing_keys)
    return tensors, objective


def _shapes(state: dict) -> dict:
    return {k: tuple(v.shape) for k, v in state.items()}


def cells(tensors: dict, objective: SimMIM) -> torch.Tensor:
    """Noise that masks the cells of the file's mask, which is of patches."""
    times = objective.cell // objective.model.encoder.patch
    return 1 - tensors["mask"][:, ::times, ::times].flatten(1).float()


def test_simmim_encodes_masked_images_to_the_same_features(simmim):
    tensors, objective = simmim
    encoder = objective.model.encoder
    mask = tensors["mask"].flatten(1).bool()
    tokens = encoder(tensors["images"], hide=(mask, objective.mask_token()))
    features = tokens.transpose(1, 2).unflatten(2, (encoder.grid,) * 2)
    assert_close(features, tensors["features"], rtol=0, atol=1e-5)


def test_simmim_predicts_the_same_pixels_under_the_mask(simmim):
    tensors, objective = simmim
    size = objective.model.encoder.stride
    places, predicted = objective.predict(tensors["images"], cells(tensors, objective))
    expected = take(patchify(tensors["reconstruction"], size), places)
    assert_close(predicted, expected, rtol=0, atol=1e-5)


def test_simmim_normalises_the_target_in_the_same_windows(simmim):
    tensors, objective = simmim
    mean, deviation = window_statistics(tensors["images"], 47)
    target = (tensors["images"] - mean) / deviation
    assert_close(target, tensors["normalised_target_47"], rtol=1e-5, atol=1e-5)


def test_simmim_gives_the_same_loss_and_gradient(simmim):
    tensors, objective = simmim
    batch = {"image": tensors["images"], "noise": cells(tensors, objective)}
    loss = objective(batch)["loss"]
    assert_close(loss, tensors["loss"], rtol=1e-5, atol=1e-5)
    objective.zero_grad()
    loss.backward()
    found = objective.mask_token.token.grad
    assert float((found - tensors["grad.mask_token"]).norm() / found.norm()) < 1e-4


def test_a_released_simmim_file_and_ours_go_into_each_other(simmim):
    tensors, objective = simmim
    released = objective.release()
    state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    assert released.keys() == state.keys()
    for name, tensor in released.items():
        assert_close(tensor, state[name], rtol=1e-6, atol=1e-6)
