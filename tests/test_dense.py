"""The backbone of dense tasks: a ViT's own weights within windows, at any image size."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.swin_transformer_v2 import WindowAttention
from torch.testing import assert_close

from prepretrain.distributed import shard
from prepretrain.models import export
from prepretrain.models.dense.pyramid import FeaturePyramid
from prepretrain.models.dense.windows import shifted_windows
from prepretrain.models.encoders import base as encoders
from prepretrain.models.load import load
from prepretrain.models.model import Model

WINDOWS = {"window": 2, "global_blocks": 1, "relative_positions": True}


def made(**options) -> Model:
    """A small model with weights."""
    model = Model(encoder="vit_test8", **options)
    shard.initialise(model, 0)
    return model.eval()


def saved(model: Model, folder) -> dict:
    """The tensors of a model's file, and the file."""
    export.save(model, folder, "here")
    return {k.removeprefix("encoder."): v.clone() for k, v in model.state_dict().items()}


def test_a_trained_vit_becomes_a_backbone_with_windows_and_loses_its_class_token(tmp_path, caplog):
    plain = made(image_size=48)
    saved(plain, tmp_path)
    caplog.set_level("INFO")
    model = load(str(tmp_path), **WINDOWS)
    assert "cls_token" in caplog.text and model.encoder.prefix == 0
    assert torch.equal(model.encoder.pos_embed, plain.encoder.pos_embed[:, 1:])
    assert model.encoder.blocks[0].attn.rel_pos_h.shape == (3, 16)
    assert model.encoder.blocks[1].attn.rel_pos_w.shape == (11, 16)
    assert not any(model.encoder.state_dict()[n].any() for n in model.encoder.may_be_missing()[0])
    assert model(torch.zeros(2, 3, 24, 40, dtype=torch.uint8)).shape == (2, 15, 32)
    with pytest.raises(ValueError, match="is no multiple of model.patch_size 8"):
        model(torch.zeros(2, 3, 24, 41, dtype=torch.uint8))


def test_its_relative_positions_are_kept_and_follow_another_image_size(tmp_path):
    model = made(**WINDOWS)
    tables = [model.encoder.get_parameter(name) for name in model.encoder.may_be_missing()[0]]
    with torch.no_grad():
        for table in tables:
            table.normal_()
    saved(model, tmp_path)
    assert_close(load(str(tmp_path)).state_dict(), model.state_dict())
    wide = load(str(tmp_path), image_size=[32, 64]).encoder
    assert torch.equal(wide.blocks[1].attn.rel_pos_h, model.encoder.blocks[1].attn.rel_pos_h)
    assert wide.blocks[1].attn.rel_pos_w.shape == (15, 16)
    assert torch.equal(wide.pos_embed, model.encoder.pos_embed)
    state = saved(model, tmp_path)
    del state["blocks.0.attn.rel_pos_h"]
    save_file(state, tmp_path / "some.safetensors")
    with pytest.raises(ValueError, match="missing encoder.blocks.0.attn.rel_pos_h"):
        load(str(tmp_path / "some.safetensors"), encoder="vit_test8", **WINDOWS)


def test_within_one_window_of_the_whole_image_it_is_the_plain_vit_without_a_class_token(tmp_path):
    model = made(window=4, global_blocks=0, image_size=32, position_size=32)
    everywhere = made(window=2, global_blocks=[1, 2], image_size=32, position_size=32)
    image = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert_close(model(image), everywhere(image))
    first, second = model(image, maps=(1, 2))
    assert first.shape == second.shape == (2, 32, 4, 4)
    assert torch.equal(second.flatten(2).transpose(1, 2), model(image))
    plain = made()
    assert torch.equal(plain(image, maps=[2])[0].flatten(2).transpose(1, 2), plain(image)[:, 1:])


def test_patches_of_14_become_patches_of_16(tmp_path):
    plain = made(patch_size=14, image_size=56)
    saved(plain, tmp_path)
    with pytest.raises(ValueError, match="patch_embed.proj.weight is .*14, 14.* must be"):
        load(str(tmp_path), patch_size=16, image_size=64)
    encoder = load(str(tmp_path), patch_size=16, image_size=64, **WINDOWS).encoder
    assert encoder.table_grid == (4, 4)  # as before: of images of 64
    assert torch.equal(encoder.pos_embed, plain.encoder.pos_embed[:, 1:])
    image = torch.nn.functional.interpolate(torch.randn(1, 3, 2, 2), (14, 14), mode="bicubic")
    larger = torch.nn.functional.interpolate(image, (16, 16), mode="bicubic", antialias=True)
    before, after = plain.encoder.patch_embed.proj(image), encoder.patch_embed.proj(larger)
    assert_close(before, after, rtol=1e-3, atol=1e-3)
    kept = load(str(tmp_path), image_size=70, **WINDOWS).encoder  # or they stay as they are
    assert torch.equal(kept.patch_embed.proj.weight, plain.encoder.patch_embed.proj.weight)
    (cells,) = kept(torch.randn(1, 3, 70, 42), maps=[2])
    assert cells.shape == (1, 32, 5, 3)


@pytest.mark.parametrize(
    "name, called",
    [
        ("blocks.0.ls1.gamma", "LayerScale"),
        ("blocks.1.gamma_2", "LayerScale"),
        ("reg_token", "register tokens"),
        ("norm_pre.weight", "a norm before the blocks"),
        ("blocks.0.attn.q_norm.weight", "norms of queries and keys"),
        ("blocks.0.attn.norm.weight", "norms within a block"),
    ],
)
def test_weights_of_a_vit_that_computes_something_else_are_refused(tmp_path, name, called):
    state = {**saved(made(), tmp_path), name: torch.ones(32)}
    save_file(state, tmp_path / "other.safetensors")
    for source, how in [("", {}), ("", WINDOWS), (":encoder", WINDOWS)]:
        with pytest.raises(ValueError, match=f"{name}: these weights are of a ViT with {called}"):
            load(f"{tmp_path / 'other.safetensors'}{source}", encoder="vit_test8", **how)


def test_options_of_windows_that_cannot_be_are_refused():
    for options, said in [
        ({"relative_positions": True}, "model.relative_positions: only with model.window"),
        ({"window": 2, "global_blocks": 3}, "3 does not divide the 2 blocks"),
        ({"window": 2, "global_blocks": [3]}, r"model.global_blocks: \[3\] are not all within"),
    ]:
        with pytest.raises(ValueError, match=said):
            Model(encoder="vit_test8", **options)
    with pytest.raises(ValueError, match="a ViT cannot leave patches out"):
        made(window=2, global_blocks=1).encoder.require(["keep"], "objective mae")


def test_the_sizes_of_vitdet_have_its_global_blocks_and_parameters():
    expected = {  # ViTDet's code, instantiated: millions of parameters of the backbone
        "vit_b16": ({3, 6, 9, 12}, 85.889),
        "vit_l16": ({6, 12, 18, 24}, 303.433),
        "vit_h16": ({8, 16, 24, 32}, 631.117),
    }
    for name, (numbers, millions) in expected.items():
        with torch.device("meta"):
            options = {"image_size": 1024, "window": 14, "relative_positions": True}
            encoder = encoders.build(name, **options, final_norm=False)
        everywhere = {i for i, block in enumerate(encoder.blocks, 1) if block.window is None}
        assert everywhere == numbers
        count = sum(p.numel() for p in encoder.parameters()) / 1e6
        assert count == pytest.approx(millions, rel=1e-4)


SWIN = {"depths": [2, 2, 2], "heads": [1, 2, 2], "image_size": [64, 96], "window": 4}
SWIN |= {"any_size": True, "final_norm": False}


def swin(**options) -> Model:
    """A small SwinV2 whose blocks compute something, which they do not where their norms are zero."""
    model = Model(encoder="swinv2_test8", **{**SWIN, **options})
    shard.initialise(model, 0)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".norm1." in name or ".norm2." in name:
            torch.nn.init.normal_(parameter)
    return model.eval()


def test_a_swinv2s_maps_are_those_of_timm_where_windows_fit():
    model = swin(image_size=[64, 128])
    options = {**model.encoder.arguments, "out_indices": (0, 1, 2)}
    peer = timm.create_model("swinv2_tiny_window8_256", features_only=True, **options).eval()
    state = model.encoder.state_dict().items()
    peer.load_state_dict({name.replace("layers.", "layers_"): one for name, one in state})
    image = torch.randn(2, 3, 64, 128)
    maps = model.encode(image, maps=(1, 2, 3))
    assert [(one.shape[1], 128 // one.shape[3]) for one in maps] == [*model.encoder.scales]
    for one, theirs in zip(maps, peer(image)):
        assert torch.equal(one.permute(0, 2, 3, 1), theirs)
    tokens = model.encode(image, maps=[3])[0].flatten(2).transpose(1, 2)
    assert torch.equal(model.encode(image), tokens)
    normed = swin(final_norm=True)
    assert torch.equal(normed.encode(image), normed.encoder.norm(tokens))


def everywhere(attn: WindowAttention, cells: torch.Tensor, shift: int) -> torch.Tensor:
    """What windows that begin `shift` cells in make of a grid, over all pairs of its cells."""
    _, rows, columns, width = cells.shape
    bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    qkv = torch.nn.functional.linear(cells.flatten(1, 2), attn.qkv.weight, bias)
    q, k, v = qkv.unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    normed = (torch.nn.functional.normalize(one, dim=-1) for one in (q, k))
    logits = next(normed) @ next(normed).mT * attn.logit_scale.exp()
    place = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    apart = (place[:, None] - place) / (attn.pretrained_window_size[0] - 1) * 8
    scaled = apart.sign() * (apart.abs() + 1).log2() / 3
    logits = logits + 16 * attn.cpb_mlp(scaled).sigmoid().permute(2, 0, 1)
    moved = place - torch.tensor([shift if side > 4 else 0 for side in (rows, columns)])
    window = moved.div(4, rounding_mode="floor")
    together = (window[:, None] == window).all(-1)
    mixed = logits.masked_fill(~together, -torch.inf).softmax(-1) @ v
    return attn.proj(mixed.transpose(1, 2).reshape(len(cells), rows, columns, width))


@pytest.mark.parametrize("grid", [(8, 8), (9, 6), (5, 11), (3, 7), (2, 3)])
@pytest.mark.parametrize("shift", [0, 2])
def test_windows_on_a_grid_of_any_size_see_neither_padding_nor_another_side(grid, shift):
    torch.manual_seed(0)
    attn = WindowAttention(8, (4, 4), 2, pretrained_window_size=(4, 4))
    cells = torch.randn(2, *grid, 8, requires_grad=True)
    found = shifted_windows(cells, (4, 4), (shift, shift), attn)
    (gradient,) = torch.autograd.grad(found.square().sum(), cells)
    expected = everywhere(attn, cells, shift)
    assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert_close(gradient, torch.autograd.grad(expected.square().sum(), cells)[0])


def test_a_swinv2_takes_images_of_any_whole_number_of_patches(tmp_path):
    model = swin()
    maps = model.encode(torch.randn(2, 3, 100, 68), maps=(1, 2, 3))
    assert [one.shape[1:] for one in maps] == [(16, 25, 17), (32, 13, 9), (64, 7, 5)]
    with pytest.raises(ValueError, match="is no multiple of model.patch_size 4"):
        model.encode(torch.randn(1, 3, 100, 66))
    with pytest.raises(ValueError, match="model.any_size=true, which pads the grid"):
        swin(any_size=False, image_size=[64, 112])
    with pytest.raises(ValueError, match="nor one that pads its windows"):
        model.encoder.timm()
    plain = Model(encoder="swinv2_test8", depths=[2, 2, 2], heads=[1, 2, 2], image_size=64)
    shard.initialise(plain, 0)
    saved(plain, tmp_path)
    head = {"name": "mask_rcnn", "classes": 2, "masks": False}
    with pytest.raises(ValueError, match=r"\[32, 64, 128, 256, 512\] must be 4 sizes"):
        load(str(tmp_path), **SWIN, head=head)
    follows = load(f"{tmp_path}:encoder", **{**SWIN, "window": 8, "final_norm": True}).options
    assert follows["pretrained_windows"] == [4, 4, 4]


def test_the_pyramid_of_stages_is_torchvisions_on_normed_maps_of_any_size():
    torch.manual_seed(0)
    pyramid = FeaturePyramid([4, 8], 6)
    shard.initialise(pyramid, 0)
    bound = max(weight.detach().abs().max() for weight in pyramid.scales.parameters())
    assert 0 < bound <= (3 / 4) ** 0.5
    maps = [torch.randn(1, 4, 9, 5), torch.randn(1, 8, 5, 3)]
    found = pyramid(maps)
    normed = [norm(one) for norm, one in zip(pyramid.norms, maps)]
    lateral = [layer(one) for layer, one in zip(pyramid.scales.inner_blocks, normed)]
    finer = lateral[0] + torch.nn.functional.interpolate(lateral[1], (9, 5))
    smooth = pyramid.scales.layer_blocks
    expected = [smooth[0](finer), smooth[1](lateral[1]), smooth[1](lateral[1])[:, :, ::2, ::2]]
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
