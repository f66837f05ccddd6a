"""Weights of other libraries: what a Model makes of them, against those libraries' own code."""

import re

import open_clip
import pytest
import timm
import torch
from open_clip.transformer import QuickGELU
from timm.optim import param_groups_layer_decay
from torch.testing import assert_close

from prepretrain.models.encoders.openclip import OpenClip
from prepretrain.models.encoders.timm_vit import TimmViT
from prepretrain.models.load import load, open_text
from prepretrain.models.model import Model
from prepretrain.models.text.open_clip import OpenClip as TextTower
from prepretrain.objectives.classify import Classify
from prepretrain.training import optim

RATE = 0.65


def photos(size: int, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def ours(encoder: str, head: dict, **options: object) -> dict[str, tuple[float, float]]:
    """(rate, weight decay) of each parameter of a classifier, by timm's name."""
    with torch.device("meta"):
        model = Model(encoder=encoder, head={"classes": 3, **head}, **options)
    built = optim.build(Classify(model), lr=1.0, weight_decay=0.05, layer_decay=RATE)
    given = {
        id(p): (g["lr_scale"], g["weight_decay"]) for g in built.param_groups for p in g["params"]
    }
    rename = {
        "head.linear.": f"{model.encoder.timm_head}.",
        "head.norm.": "fc_norm.",
        "encoder.": "",
    }
    names = {}
    for name, parameter in model.named_parameters():
        prefix = next(p for p in rename if name.startswith(p))
        names[rename[prefix] + name.removeprefix(prefix)] = given[id(parameter)]
    return names


def timms(net: torch.nn.Module, spared: set[str]) -> dict[str, tuple[float, float]]:
    """The same by timm, which is given the whole model."""
    groups = param_groups_layer_decay(net, 0.05, spared, layer_decay=RATE)
    given = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    return {name: given[id(p)] for name, p in net.named_parameters()}


def layer_of_vit(name: str, blocks: int) -> int:
    """MAE's util/lr_decay.py (be47fef), and SimMIM's of a ViT: the stem is 0, the head blocks + 1."""
    if match := re.match(r"blocks\.(\d+)\.", name):
        return int(match[1]) + 1
    return 0 if name.startswith(("cls_token", "pos_embed", "patch_embed")) else blocks + 1


def layer_of_swin(name: str, depths: tuple[int, ...]) -> int:
    """SimMIM's optimizer.py (0e71746), by timm's names: a merging of patches, which timm puts before
    its stage, is of the layer of the last block before it."""
    if match := re.match(r"layers\.(\d+)\.downsample\.", name):
        return sum(depths[: int(match[1])])
    if match := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", name):
        return sum(depths[: int(match[1])]) + int(match[2]) + 1
    return 0 if name.startswith("patch_embed") else sum(depths) + 1


VIT = dict(patch_size=8, embed_dim=32, depth=3, num_heads=2, img_size=32, num_classes=3)


@pytest.mark.parametrize("pool", ["class", "mean"])
def test_layer_decay_gives_maes_rates_and_but_for_the_last_norm_timms(pool):
    mean = pool == "mean"
    head = {"pool": pool, "norm": mean}
    got = ours("vit_test8", head, depth=3, final_norm=not mean)
    net = timm.models.VisionTransformer(**VIT, global_pool="avg" if mean else "token")
    want = timms(net, {"pos_embed", "cls_token"})
    assert got.keys() == want.keys()
    for name, (rate, decay) in got.items():
        assert rate == pytest.approx(RATE ** (4 - layer_of_vit(name, 3))), name
        assert decay == want[name][1], name
        if not name.startswith("norm."):  # timm lets it learn as the last block does
            assert rate == pytest.approx(want[name][0]), name


def test_layer_decay_gives_simmims_rates_of_a_swin_and_timms_of_its_blocks():
    depths = (2, 2, 3)
    sizes = dict(depths=depths, num_heads=(1, 2, 4), window_size=4)
    net = timm.models.swin_transformer_v2.SwinTransformerV2(
        **sizes, img_size=64, patch_size=4, embed_dim=16, num_classes=3
    )
    options = dict(depths=depths, heads=(1, 2, 4), window=4, image_size=64, base_width=16)
    got, want = ours("swinv2_test8", {"pool": "mean"}, **options), timms(net, set())
    assert got.keys() == want.keys()
    for name, (rate, _) in got.items():
        assert rate == pytest.approx(RATE ** (8 - layer_of_swin(name, depths))), name
        if not name.startswith("norm.") and ".downsample." not in name:
            assert rate == pytest.approx(want[name][0]), name


def test_layer_decay_without_layers_to_tell_apart_is_refused():
    with pytest.raises(ValueError, match="optim.layer_decay: 0.65 does nothing here"):
        optim.groups(
            torch.nn.Sequential(torch.nn.Linear(2, 2)), lr=1, weight_decay=0, layer_decay=0.65
        )


def tags() -> list[str]:
    """Of each architecture of open_clip whose tower is built in a moment, the tags that differ."""
    few = {}
    for architecture, tag in open_clip.list_pretrained():
        stated = open_clip.get_pretrained_cfg(architecture, tag)
        if architecture in ("ViT-B-32", "ViT-B-32-quickgelu", "ViT-B-16", "ViT-B-16-SigLIP"):
            key = architecture, bool(stated.get("quick_gelu")), str(stated.get("mean"))
            few.setdefault(key, f"{architecture}/{tag}")
    return list(few.values())


@pytest.mark.parametrize("name", tags())
def test_a_tower_of_open_clip_has_the_activation_and_colours_that_are_stated_for_its_weights(name):
    architecture, _, tag = name.partition("/")
    stated = open_clip.get_pretrained_cfg(architecture, tag)
    with torch.device("meta"):
        model = Model(**OpenClip.offered(name))
    quick = any(isinstance(module, QuickGELU) for module in model.modules())
    assert quick == bool(stated.get("quick_gelu"))
    assert (model.mean, model.std) == (tuple(stated["mean"]), tuple(stated["std"]))


def test_without_a_tag_a_tower_of_open_clip_is_what_all_its_tags_state_and_else_warns(caplog):
    with torch.device("meta"):
        sigmoid = OpenClip(architecture="ViT-B-16-SigLIP")
        assert "model.tag" not in caplog.text
        several = OpenClip(architecture="ViT-B-16")
    assert tuple(sigmoid.mean) == tuple(sigmoid.std) == (0.5, 0.5, 0.5)
    assert not any(isinstance(module, QuickGELU) for module in several.modules())
    assert "ViT-B-16 differ in quick_gelu, and model.tag does not say which" in caplog.text
    with pytest.raises(ValueError, match="model.tag: open_clip has no weights 'mine' of ViT-B-16"):
        OpenClip(architecture="ViT-B-16", tag="mine")


def test_a_text_tower_of_another_activation_than_its_weights_is_refused(monkeypatch):
    config = {"width": 32, "layers": 1, "heads": 2}
    peer = open_clip.CLIP(
        8, {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}, config
    )
    monkeypatch.setattr(OpenClip, "fetch", staticmethod(lambda name: peer.state_dict()))
    with pytest.raises(ValueError, match="ViT-B-32/openai was trained with QuickGELU"):
        open_text("open_clip/ViT-B-32/openai", TextTower(architecture="ViT-B-32", **config))
    quick = TextTower(architecture="ViT-B-32-quickgelu", **config)
    assert open_text("open_clip/ViT-B-32/openai", quick).shapes


def test_a_model_of_timm_that_pools_by_a_mean_is_a_teacher_by_its_name_and_by_its_file(
    monkeypatch, tmp_path
):
    name = "eva02_tiny_patch14_224.mim_in22k"
    torch.manual_seed(0)
    peer = timm.create_model(name, img_size=28, num_classes=0).eval()
    assert "fc_norm.weight" in peer.state_dict()
    monkeypatch.setattr(TimmViT, "fetch", staticmethod(lambda name: peer.state_dict()))
    monkeypatch.setattr(timm, "is_model_pretrained", lambda name: True)
    classifier = {"head.weight": torch.zeros(3, 192), "head.bias": torch.zeros(3)}
    torch.save({**peer.state_dict(), **classifier}, tmp_path / "eva.pt")
    file = {"encoder": "timm", "architecture": name}
    for source, options in ((f"timm/{name}", {}), (f"{tmp_path / 'eva.pt'}:encoder", file)):
        model = load(source, image_size=28, **options)
        with torch.no_grad():
            expected = peer.forward_features(model.normalise(photos(28)))
            assert_close(model(photos(28)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("encoder", ["timm", "open_clip"])
def test_another_librarys_tower_is_not_trained_and_the_error_says_what_it_is_for(encoder):
    architecture = {"timm": "vit_tiny_patch16_224", "open_clip": "ViT-S-32-alt"}[encoder]
    with torch.device("meta"):
        model = Model(encoder=encoder, architecture=architecture, head={"classes": 3})
    with pytest.raises(ValueError, match="is a teacher .* and is not trained"):
        Classify(model)
