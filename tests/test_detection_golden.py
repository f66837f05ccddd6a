"""ViTDet's backbone, heads and losses against numbers computed with its authors' code."""

import json
import os
from ast import literal_eval
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.testing import assert_close

from prepretrain.models import weights
from prepretrain.models.dense import windows
from prepretrain.models.model import Model
from prepretrain.training import optim

GOLDEN = Path(os.environ.get("PREPRETRAIN_GOLDEN", Path(__file__).parent / "golden"))


def read(name: str) -> tuple[dict, dict]:
    """(dims, tensors) of a file of the folder; skips where it is not there."""
    path = GOLDEN / f"{name}.safetensors"
    if not path.exists():
        pytest.skip(f"{path} is not there: set PREPRETRAIN_GOLDEN to the folder that holds it")
    with safe_open(path, "pt") as file:
        return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}


def under(tensors: dict, prefix: str) -> dict:
    """Those under a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def fill(module: torch.nn.Module, state: dict) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    weights.fill(module, weights.Weights("golden", shapes, state.__getitem__))


@pytest.fixture(scope="module")
def vitdet():
    """(dims, tensors) of the backbone."""
    return read("vitdet_reference")


def backbone(dims: dict, tensors: dict, **options) -> Model:
    """The encoder that the file's dims describe, with its weights."""
    depth, windowed = int(dims["depth"]), literal_eval(dims["window_block_indexes"])
    model = Model(
        encoder="vit_test8",
        **{
            "patch_size": int(dims["patch_size"]),
            "width": int(dims["embed_dim"]),
            "depth": depth,
            "heads": int(dims["num_heads"]),
            "image_size": int(dims["img_size"]),
            "position_size": int(dims["pretrain_img_size"]),
            "window": int(dims["window_size"]),
            "global_blocks": [i + 1 for i in range(depth) if i not in windowed],
            "relative_positions": True,
            "final_norm": False,
            **options,
        },
    )
    fill(model.encoder, under(tensors, "state.net."))
    return model


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("case", ["divisible", "padded", "small"])
def test_the_backbone_gives_the_same_maps_after_every_block(vitdet, case, fused):
    dims, tensors = vitdet
    encoder = backbone(dims, tensors).encoder
    for block in encoder.blocks:
        block.attn.fused_attn = fused
    image = tensors[f"case.{case}.images"]
    maps = encoder(image, maps=range(1, encoder.depth + 1))
    for number, found in enumerate(maps):
        expected = tensors[f"case.{case}.block.{number}"].permute(0, 3, 1, 2)
        assert_close(found, expected, rtol=1e-5, atol=1e-5)
    last = tensors[f"case.{case}.last_feat"]
    assert_close(maps[-1], last, rtol=1e-5, atol=1e-5)
    assert_close(encoder(image), last.flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_positions_and_windows_are_resized_and_split_in_the_same_way(vitdet):
    _, tensors = vitdet
    for name, expected in under(tensors, "unit.abs_pos.").items():
        if name != "table":
            grid = tuple(map(int, name.split("x")))
            table = tensors["unit.abs_pos.table"][:, 1:]
            assert_close(windows.resize_positions(table, (4, 4), grid), expected)
    for name, expected in under(tensors, "unit.rel_pos.").items():
        if name != "table" and expected.shape[0] == expected.shape[1]:
            found = windows.relative(tensors["unit.rel_pos.table"], len(expected))
            assert_close(found, expected, rtol=1e-5, atol=1e-6)
    cells = tensors["unit.window.in"]
    split = windows.split_windows(cells, tensors["unit.window.out"].shape[1])
    assert torch.equal(split, tensors["unit.window.out"])
    assert torch.equal(windows.join_windows(split, cells.shape[1:3]), cells)


def test_rates_decay_by_layer_in_the_same_way(vitdet):
    dims, tensors = vitdet
    expected = json.loads(dims["lr_decay"])
    model = backbone(dims, tensors)
    groups = optim.groups(model, lr=1.0, weight_decay=0.1, layer_decay=expected["rate"])
    rates = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    for name, parameter in model.encoder.named_parameters():
        assert rates[id(parameter)] == pytest.approx(expected["factors"][f"backbone.net.{name}"])


def test_relative_positions_are_added_to_the_logits_in_the_same_way(vitdet):
    unit = under(vitdet[1], "unit.decomposed.")
    rows = (len(unit["rel_pos_h"]) + 1) // 2
    columns = unit["q"].shape[1] // rows  # another number than its table is of
    tables = (
        windows.relative(unit["rel_pos_h"], rows),
        windows.relative(unit["rel_pos_w"], columns),
    )
    bias = windows.decomposed_bias(unit["q"][:, None], *tables)[:, 0]
    assert_close(unit["attn"] + bias, unit["out"], rtol=1e-5, atol=1e-5)
