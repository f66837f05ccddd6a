"""Weights of other libraries: what a Model makes of them, against those libraries' own code."""

import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import open_clip
import pytest
import timm
import torch
import torchvision
from open_clip.transformer import QuickGELU
from timm.layers import resample_abs_pos_embed
from timm.optim import param_groups_layer_decay
from torch.testing import assert_close

from prepretrain.models.encoders.openclip import OpenClip
from prepretrain.models.encoders.timm_vit import TimmViT
from prepretrain.models.load import load, open_text
from prepretrain.models.model import Model
from prepretrain.models.text.open_clip import OpenClip as TextTower
from prepretrain.objectives.classify import Classify
from prepretrain.training import optim
from prepretrain.zoo import releases as zoo

RATE = 0.65


def photos(size: int, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


@dataclass
class Foreign:
    """A file of another library's: what `load` is given, and at each of two sizes what that library
    makes of the images, as it normalises them, and of our tokens where it goes on from there."""

    source: str
    colours: tuple
    theirs: dict[int, Callable[[torch.Tensor], torch.Tensor]]
    options: dict = field(default_factory=dict)
    ours: Callable = lambda size, tokens: tokens


def drawn(net: torch.nn.Module) -> torch.nn.Module:
    """A network with weights among which none is small."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in net.named_parameters():
        scale = 1.0 if "pos_embed" in name else 0.05
        with torch.no_grad():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return net.eval()


def shrink(monkeypatch, **options: int) -> None:
    """Whatever timm makes by a name is smaller: for us and for the reference alike."""
    monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, **options))


def of_timm(folder: Path, monkeypatch, name: str, sizes: tuple[int, int]) -> Foreign:
    """A model of timm's by its name, made for another size and filled by timm's own loader."""
    shrink(monkeypatch, depth=2)
    made = functools.partial(timm.create_model, name, num_classes=0)
    torch.save(drawn(made(img_size=sizes[0])).state_dict(), folder / "timm.pt")
    overlay = {"file": str(folder / "timm.pt"), "custom_load": False}
    nets = {
        s: made(img_size=s, pretrained=True, pretrained_cfg_overlay=overlay).eval() for s in sizes
    }
    stated = timm.get_pretrained_cfg(name)
    options = {"encoder": "timm", "architecture": name}
    theirs = {size: net.forward_features for size, net in nets.items()}
    return Foreign(str(folder / "timm.pt"), (stated.mean, stated.std), theirs, options)


TEXT = {"width": 16, "layers": 1, "heads": 1, "vocab_size": 49408}
OWN_TOWER = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
TIMMS_TOWER = {
    "image_size": 32,
    "timm_model_name": "vit_base_patch16_siglip_224",
    "timm_pool": "map",
    "timm_proj": "none",
}


def of_open_clip(folder: Path, monkeypatch, stated: dict, tower: dict = OWN_TOWER) -> Foreign:
    """A tower of open_clip's by its tag, filled by open_clip's own loader."""
    shrink(monkeypatch, depth=2, embed_dim=32, num_heads=2)
    config = {"embed_dim": 32, "vision_cfg": tower, "text_cfg": TEXT}
    (folder / "tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "tiny.json")
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", {"theirs": {"url": "", **stated}})
    quick = {"force_quick_gelu": stated.get("quick_gelu", False)}
    peer = drawn(open_clip.create_model("tiny", **quick))
    torch.save(peer.state_dict(), folder / "clip.pt")
    made = functools.partial(open_clip.create_model, "tiny", str(folder / "clip.pt"), **quick)
    nets = {size: made(force_image_size=size).eval() for size in (32, 48)}
    return Foreign(
        str(folder / "clip.pt"),
        (tuple(stated["mean"]), tuple(stated["std"])),
        {size: net.encode_image for size, net in nets.items()},
        {"encoder": "open_clip", "architecture": "tiny", "tag": "theirs"},
        lambda size, tokens: pooled(nets[size].visual, tokens),
    )


def pooled(tower: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    if hasattr(tower, "trunk"):
        return tower.head(tower.trunk.forward_head(tokens))
    return tower._global_pool(tokens)[0] @ tower.proj


def of_release(
    folder: Path, monkeypatch, name: str, state: dict, encoder: str, theirs: dict, **options
) -> Foreign:
    """A small file as those of a release, which the table's own row opens."""
    row = zoo.releases()[name]
    size = {**row.preprocessing, "image_size": 32}
    small = replace(row, encoder=encoder, options=row.options | options, preprocessing=size)
    torch.save(state, folder / "release.pt")
    monkeypatch.setattr(zoo, "releases", lambda: {name: small})
    monkeypatch.setattr(zoo, "fetch", lambda _: folder / "release.pt")
    return Foreign(name, (tuple(size["mean"]), tuple(size["std"])), theirs)


PLAIN = dict(patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0)


def plain_vits() -> tuple[dict, dict]:
    """The tensors of a ViT of timm's, which MAE's and MAWS's code is, and its tokens at two sizes."""
    norm = functools.partial(torch.nn.LayerNorm, eps=1e-6)
    made = functools.partial(timm.models.VisionTransformer, **PLAIN, norm_layer=norm)
    state, theirs = drawn(made(img_size=32)).state_dict(), {}
    for size in (32, 48):
        net, grid = made(img_size=size).eval(), [size // 8] * 2
        net.load_state_dict(state | {"pos_embed": resample_abs_pos_embed(state["pos_embed"], grid)})
        theirs[size] = net.forward_features
    return state, theirs


def of_mae(folder: Path, monkeypatch) -> Foreign:
    state, theirs = plain_vits()
    return of_release(folder, monkeypatch, "mae/vit_b16", {"model": state}, "vit_test8", theirs)


def of_maws(folder: Path, monkeypatch) -> Foreign:
    state, theirs = plain_vits()
    return of_release(folder, monkeypatch, "maws/vit_b16", state, "vit_test8", theirs)


def of_swag(folder: Path, monkeypatch) -> Foreign:
    """torchvision's ViT, under the names of SWAG's own files. SWAG's code knows one size; at another
    the positions are those of timm, as for all files here."""
    made = functools.partial(
        torchvision.models.VisionTransformer,
        **dict(patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=128),
    )
    state, theirs = drawn(made(image_size=32)).state_dict(), {}
    place = "encoder.pos_embedding"
    for size in (32, 48):
        net = made(image_size=size).eval()
        table = resample_abs_pos_embed(state[place], [size // 8] * 2)
        net.load_state_dict(state | {place: table})
        theirs[size] = functools.partial(torchvision_tokens, net)
    named = {
        key.replace("encoder_layer_", "layer_")
        .replace(".mlp.0.", ".mlp.linear_1.")
        .replace(".mlp.3.", ".mlp.linear_2."): value.transpose(0, 1) if key == place else value
        for key, value in state.items()
        if not key.startswith("heads.")
    }
    return of_release(folder, monkeypatch, "swag/vit_b16", named, "vit_test8", theirs)


def torchvision_tokens(net: torch.nn.Module, image: torch.Tensor) -> torch.Tensor:
    patches = net._process_input(image)
    return net.encoder(torch.cat([net.class_token.expand(len(image), -1, -1), patches], 1))


def of_simmim(folder: Path, monkeypatch) -> Foreign:
    """A SwinV2 of timm's, under the names of SimMIM's files; at another size the position bias keeps
    the scale of the windows that it was trained with."""
    made = functools.partial(
        timm.models.SwinTransformerV2,
        **dict(patch_size=4, embed_dim=16, depths=(1, 2), num_heads=(1, 2), num_classes=0),
    )
    state, theirs = drawn(made(img_size=32, window_size=4)).state_dict(), {}
    for size in (32, 64):
        net = made(img_size=size, window_size=4, pretrained_window_sizes=(4, 4)).eval()
        net.load_state_dict(state)
        theirs[size] = lambda image, net=net: net.forward_features(image).flatten(1, 2)
    named = {
        "encoder." + re.sub(r"^layers\.1\.downsample", "layers.0.downsample", key): value
        for key, value in state.items()
    }
    named = {key.replace("cpb_mlp", "rpe_mlp"): value for key, value in named.items()}
    others = {"encoder.mask_token": torch.zeros(1, 1, 16), "decoder.0.bias": torch.zeros(3)}
    name = "simmim/swinv2_b_1k_125k"
    content = {"model": named | others | {"decoder.0.weight": torch.zeros(3, 32, 1, 1)}}
    return of_release(folder, monkeypatch, name, content, "swinv2_test8", theirs, window=4)


OPENAI = dict(mean=open_clip.OPENAI_DATASET_MEAN, std=open_clip.OPENAI_DATASET_STD)
FAMILIES: dict[str, Callable[..., Foreign]] = {
    "timm, its default colours": lambda *at: of_timm(*at, "vit_tiny_patch16_224", (32, 64)),
    "timm, DINO": lambda *at: of_timm(*at, "vit_small_patch16_224.dino", (32, 64)),
    "timm, DINOv2": lambda *at: of_timm(*at, "vit_small_patch14_reg4_dinov2.lvd142m", (28, 42)),
    "timm, DINOv3": lambda *at: of_timm(*at, "vit_small_patch16_dinov3.lvd1689m", (32, 64)),
    "timm, EVA": lambda *at: of_timm(*at, "eva02_tiny_patch14_224.mim_in22k", (28, 42)),
    "open_clip": lambda *at: of_open_clip(*at, OPENAI),
    "open_clip, OpenAI": lambda *at: of_open_clip(*at, {**OPENAI, "quick_gelu": True}),
    "open_clip, SigLIP": lambda *at: of_open_clip(
        *at, {"mean": [0.5] * 3, "std": [0.5] * 3}, TIMMS_TOWER
    ),
    "open_clip, other colours": lambda *at: of_open_clip(
        *at, {"mean": [0.5] * 3, "std": [0.5] * 3}
    ),
    "MAE": of_mae,
    "MAWS": of_maws,
    "SWAG": of_swag,
    "SimMIM": of_simmim,
}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_weights_give_their_own_librarys_features_at_two_sizes_with_its_colours(
    family, tmp_path, monkeypatch
):
    given = FAMILIES[family](tmp_path, monkeypatch)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in given.colours)
    for size, theirs in given.theirs.items():
        model = load(given.source, image_size=size, **given.options)
        expected = theirs((photos(size) / 255 - mean) / std)
        assert expected.std() > 0.01
        scale = expected.abs().max().item()
        assert_close(given.ours(size, model(photos(size))), expected, rtol=0, atol=1e-5 * scale)


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
