"""A ViT on clips against numbers computed with MAE-ST's, SlowFast's and OmniMAE's own code."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from test_detection_golden import read, under
from torch.testing import assert_close

from prepretrain.models import clips
from prepretrain.models.dense.windows import by_distance, places, relative
from prepretrain.models.model import Model
from prepretrain.models.weights import Weights, fill
from prepretrain.training import optim


@pytest.fixture(scope="module")
def video():
    """See `read`."""
    return read("video_reference")


def model_of(dims: dict, **options) -> Model:
    """An image model of the file's size, or with `frames` a video model, with a classifier."""
    return Model(
        encoder="vit_test8",
        patch_size=int(dims["patch_size"]),
        width=int(dims["embed_dim"]),
        depth=int(dims["depth"]),
        heads=int(dims["num_heads"]),
        image_size=int(dims["image_size"]),
        **options,
    )


def clip_options(dims: dict) -> dict:
    """The options of the file's video models."""
    head = {"classes": int(dims["num_classes"]), "pool": "mean", "norm": True}
    return {
        "frames": int(dims["frames"]),
        "tube": int(dims["tube"]),
        "final_norm": False,
        "head": head,
    }


def ours(state: dict) -> dict:
    """MAE-ST's tensors under our names: q, k and v lie together, and so do positions of a frame."""
    found = {}
    for key, value in state.items():
        if part := re.fullmatch(r"(blocks\.\d+\.attn)\.q\.(\w+)", key):
            place, kind = part.groups()
            value = torch.cat([state[f"{place}.{one}.{kind}"] for one in "qkv"])
            found[f"encoder.{place}.qkv.{kind}"] = value
        elif key == "pos_embed_spatial":
            found["encoder.pos_embed"] = torch.cat([state["pos_embed_class"], value], 1)
        elif key.startswith("head."):
            found[f"head.linear.{key.removeprefix('head.')}"] = value
        elif key.startswith("norm."):
            found[f"head.{key}"] = value
        elif key != "pos_embed_class" and not re.search(r"attn\.[kv]\.", key):
            found[f"encoder.{key}"] = value
    return found


def as_weights(state: dict, options: dict | None = None) -> Weights:
    return Weights(
        "golden", {k: tuple(v.shape) for k, v in state.items()}, state.__getitem__, options
    )


def check_everything(model: Model, tensors: dict, name: str) -> None:
    """Tokens after each block, scores, the loss and all gradients of the file."""
    seen = []
    for block in model.encoder.blocks:
        block.register_forward_hook(lambda block, given, output: seen.append(output))
    logits = model.head(model.encode(tensors["clips"]))
    for number, tokens in enumerate(seen):
        assert_close(tokens, tensors[f"{name}.block.{number}"], rtol=1e-5, atol=1e-5)
    assert_close(logits, tensors[f"{name}.logits"], rtol=1e-5, atol=1e-5)
    loss = F.cross_entropy(logits, tensors["labels"])
    assert_close(loss, tensors[f"{name}.loss"], rtol=1e-5, atol=1e-5)
    loss.backward()
    gradients = {k: p.grad for k, p in model.named_parameters()}
    for key, expected in under(tensors, f"{name}.grad.").items():
        if key.endswith("attn.q.weight"):
            found = gradients[f"encoder.{key.replace('.q.', '.qkv.')}"][: len(expected)]
        elif key in ("pos_embed_class", "pos_embed_spatial"):
            first = slice(0, 1) if key == "pos_embed_class" else slice(1, None)
            found = gradients["encoder.pos_embed"][:, first]
        else:
            found = gradients[next(iter(ours({key: expected})))]
        assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_a_vit_on_clips_computes_what_mae_st_computes(video, fused):
    dims, tensors = video
    model = model_of(dims, **clip_options(dims))
    for block in model.encoder.blocks:
        block.attn.fused_attn = fused
    fill(model, as_weights(ours(under(tensors, "state."))))
    check_everything(model, tensors, "mae_st")


def test_with_relative_positions_it_computes_what_mvit_computes(video):
    dims, tensors = video
    model = model_of(dims, relative_positions=True, **clip_options(dims))
    tables = {f"encoder.{k}": v for k, v in under(tensors, "mvit.state.").items()}
    fill(model, as_weights(ours(under(tensors, "state.")) | tables))
    check_everything(model, tensors, "mvit")


def test_relative_positions_in_time_and_space_are_added_to_the_logits_in_the_same_way(video):
    unit = under(video[1], "unit.")
    q, logits = unit["q"][:, :, 1:], unit["attn"]  # after the class token
    grid = [(len(unit[f"rel_{axis}"]) + 1) // 2 for axis in "thw"]
    nothing = {axis: torch.zeros(2 * n - 1, q.shape[-1]) for axis, n in zip("thw", grid)}

    def added(**tables):
        each = [relative(({**nothing, **tables})[axis], n) for axis, n in zip("thw", grid)]
        bias = by_distance(q, *each) @ places(tuple(grid), q).T
        return logits + F.pad(bias, (1, 0, 1, 0))

    assert_close(added(h=unit["rel_h"], w=unit["rel_w"]), unit["spatial"])
    assert_close(added(t=unit["rel_t"]), unit["temporal"])
    assert_close(added(h=unit["rel_h_other"], w=unit["rel_w"]), unit["spatial_resized"])
    assert_close(added(t=unit["rel_t_other"]), unit["temporal_resized"])


def test_an_images_patches_are_inflated_in_the_same_way(video):
    dims, tensors = video
    kernel = tensors["image.state.patch_embed.proj.weight"]
    for how in ("average", "centre"):
        found = clips.inflated(kernel, int(dims["tube"]), how)
        assert_close(found, tensors[f"inflated.{how}"], rtol=0, atol=0)


def test_fixed_positions_of_all_times_are_omnimaes(video):
    expected = video[1]["omnimae.sinusoid"]
    assert_close(clips.sinusoids(expected.shape[2], expected.shape[1]), expected)


def test_rates_decay_by_layer_in_the_same_way(video):
    dims, _ = video
    decay = json.loads(dims["layer_decay"])
    model = model_of(dims, **clip_options(dims))
    groups = optim.groups(model, lr=1.0, weight_decay=0.05, layer_decay=decay["rate"])
    rates = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    found = {name: rates[id(p)] for name, p in model.named_parameters()}
    expected = {}
    for name, factor in decay["factors"].items():
        name = re.sub(r"attn\.[qkv]\.", "attn.qkv.", name)
        name = re.sub(r"^pos_embed_(class|spatial)$", "pos_embed", name)
        name = {"head.": "head.linear."}.get(name[:5], name[:5]) + name[5:]
        place = (
            "" if name.startswith("head.") else "head." if name.startswith("norm.") else "encoder."
        )
        expected[place + name] = factor
    assert found == pytest.approx(expected)


def started(dims: dict, tensors: dict, **options) -> tuple[Model, Model]:
    """An image model with the file's weights, and a video model that starts from it; both as plain
    encoders without a class token, whose image form is that of ViTDet without windows."""
    state = {f"encoder.{k}": v for k, v in under(tensors, "image.state.").items()}
    plain = {"window": int(dims["image_size"]), "global_blocks": int(dims["depth"])}
    image = model_of(dims, **plain, position_size=int(dims["image_size"]))
    clip = model_of(dims, frames=int(dims["frames"]), class_token=False, **options)
    for model in (image, clip):
        fill(model, as_weights(state, {"image_size": int(dims["image_size"])}))
    return image, clip


@pytest.mark.parametrize("positions", ["zero", "joint"])
@pytest.mark.parametrize("inflate", ["centre", "average"])
@pytest.mark.parametrize("relative", [False, True])
def test_a_still_clip_has_the_features_of_its_image(video, positions, inflate, relative):
    dims, tensors = video
    options = {"time_positions": positions, "inflate": inflate, "relative_positions": relative}
    image, clip = started(dims, tensors, **options)
    still = tensors["still.image"]
    with torch.no_grad():
        expected = image.encode(still)
        found = clip.encode(still[:, :, None].expand(-1, -1, int(dims["frames"]), -1, -1))
    for tokens in found.unflatten(1, (-1, expected.shape[1])).unbind(1):
        assert_close(tokens, expected, rtol=1e-5, atol=1e-5)
    tube = int(dims["tube"])
    embedded = F.linear(
        clips.tubes(still[:, :, None].repeat(1, 1, tube, 1, 1), tube, clip.encoder.stride),
        clip.encoder.patch_embed.proj.weight.flatten(1),
        clip.encoder.patch_embed.proj.bias,
    )
    assert_close(embedded, tensors["still.patch_embedding"], rtol=1e-5, atol=1e-5)
