"""Our objectives against numbers computed with the papers' reference code."""

import json
import os
from ast import literal_eval
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.testing import assert_close

from prepretrain.models import maws, weights
from prepretrain.models.encoders.vit import patchify, take
from prepretrain.models.load import load
from prepretrain.models.model import Model
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
    """See `mae_reference`."""
    return mae_reference()


def mae_reference():
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
    features = tokens.transpose(1, 2).unflatten(2, encoder.grid)
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


@pytest.fixture(scope="module")
def clip():
    """(tensors, a model with MAWS-CLIP's weights from a file under the released key names)."""
    with safe_open(GOLDEN / "maws_clip_reference.safetensors", "pt") as file:
        dims = {key: json.loads(value) for key, value in file.metadata().items()}
        tensors = {k: file.get_tensor(k) for k in file.keys()}
    return tensors, dims


def released(tensors: dict) -> dict:
    """The weights of the released file's form."""
    return {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}


def load_clip(path: Path, dims: dict) -> Model:
    """The model that the file's dims describe."""
    vit, roberta = dims["vit"], dims["roberta"]
    return load(
        str(path),
        encoder="vit_test8",
        patch_size=vit["patch_size"],
        width=vit["embed_dim"],
        depth=vit["depth"],
        heads=vit["num_heads"],
        image_size=vit["img_size"],
        text={
            "name": "xlmr",
            "width": roberta["embedding_dim"],
            "depth": roberta["num_encoder_layers"],
            "heads": roberta["num_attention_heads"],
            "hidden": roberta["ffn_dimension"],
            "vocabulary": roberta["vocab_size"],
            "positions": roberta["max_seq_len"],
            "context": roberta["max_seq_len"] - 2,
        },
        joint={"width": dims["clip"]["embed_dim"]},
    )


def before_torchtext_12(key: str) -> str:
    """A key of a text tower by the names that torchtext had before 0.12."""
    for new, old in (
        ("layers.layers.", "layers."),
        ("self_attn.in_proj_", "attention.input_projection."),
        ("self_attn.out_proj", "attention.output_projection"),
        ("linear1", "residual_mlp.mlp.0"),
        ("linear2", "residual_mlp.mlp.3"),
        (".norm1", ".attention_layer_norm"),
        (".norm2", ".final_layer_norm"),
    ):
        key = key.replace(new, old) if key.startswith("text_encoder") else key
    return key


@pytest.mark.parametrize("rename_key", [str, before_torchtext_12])
def test_a_released_clip_file_loads_and_gives_the_same_features_and_logits(
    clip, tmp_path, rename_key
):
    tensors, dims = clip
    torch.save({rename_key(k): v for k, v in released(tensors).items()}, tmp_path / "clip.pt")
    model = load_clip(tmp_path / "clip.pt", dims)
    with torch.no_grad():
        pooled = model.encoder(tensors["images"])[:, 0]
        text = model.text(tensors["tokens"])
        image_features, text_features, scale, _ = model.joint(pooled, text)
    assert_close(pooled, tensors["vision_pooled"], rtol=0, atol=1e-4)
    assert_close(text, tensors["text_cls"], rtol=0, atol=1e-4)
    assert_close(image_features, tensors["image_features"], rtol=0, atol=1e-4)
    assert_close(text_features, tensors["text_features"], rtol=0, atol=1e-4)
    assert_close(scale * image_features @ text_features.T, tensors["logits"], rtol=0, atol=1e-4)


def test_a_released_clip_files_every_key_is_accounted_for(clip, tmp_path):
    tensors, dims = clip
    state = released(tensors) | {"text_encoder.pooler.weight": torch.zeros(2)}
    del state["text_encoder.encoder.transformer.layers.layers.1.linear2.bias"]
    torch.save(state, tmp_path / "clip.pt")
    said = (
        r"(?s)2 keys.*left over text_encoder.pooler.weight.*missing text.*layer.1.output.dense.bias"
    )
    with pytest.raises(ValueError, match=said):
        load_clip(tmp_path / "clip.pt", dims)


def test_the_released_clip_models_have_our_architectures_keys_and_shapes():
    path = GOLDEN / "maws_manifest.json"
    if not path.exists():
        pytest.skip("the manifest of MAWS's released files is not in PREPRETRAIN_GOLDEN")
    rows = {k: r for k, r in json.loads(path.read_text()).items() if k.startswith("maws_clip/")}
    for name, row in rows.items():
        vit, _, size = name.removeprefix("maws_clip/").partition("_xlmr_")
        shapes, _ = maws.released({k: tuple(s) for k, s in row["shapes"].items()}, torch.empty)
        with torch.device("meta"):
            model = Model(
                encoder=vit,
                text={"name": "xlmr", "size": {"b": "base", "l": "large"}[size]},
                joint={"width": row["shapes"]["text_projection"][1]},
            )
        assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == shapes, name
        assert sum(p.numel() for p in model.parameters()) == row["params"], name
