"""Adapters: what they add to a frozen ViT, in closed form and on any number of processes."""

import json

import pytest
import torch
from conftest import processes
from test_features import Pictures, tiny_model
from torch import nn
from torch.testing import assert_close

from prepretrain.distributed import group as distributed
from prepretrain.distributed import shard
from prepretrain.evaluation.probing.adapters import ADAPTERS, adapt
from prepretrain.evaluation.probing.tuning import Recipe, Tuning
from prepretrain.models.encoders.vit import ViT
from prepretrain.models.model import Model

D, DEPTH, PATCHES = 32, 2, 16  # of vit_test8


def adapted(method: str, moved: bool = True, **options: object) -> ViT:
    """tiny_model's encoder with an adapter, which has moved away from its start."""
    encoder = tiny_model().encoder.eval()
    adapt(encoder, method, options)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in encoder.named_parameters():
        if parameter.requires_grad:
            fill = encoder.get_submodule(name.partition(".adapter.")[0]).adapter.initialise
            assert fill(name.partition(".adapter.")[2], parameter.data, generator)
            if moved:
                nn.init.normal_(parameter, std=0.1, generator=generator)
    return encoder


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("method", "options", "count"),
    [
        ("vpt", {"tokens": 7}, 7 * D),
        ("vpt_deep", {"tokens": 7}, DEPTH * 7 * D),
        ("lora", {"rank": 3}, DEPTH * 4 * 3 * D),
        ("adaptformer", {"width": 5}, DEPTH * (2 * D * 5 + D + 5)),
    ],
)
def test_an_adapter_trains_as_many_parameters_as_its_formula_says(method, options, count):
    encoder = adapted(method, **options)
    trained = {n: p for n, p in encoder.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == count
    assert all(".adapter." in name and p.ndim > 0 for name, p in trained.items())
    others = [k for k in encoder.state_dict() if ".adapter." not in k]
    assert others == list(tiny_model().encoder.state_dict()), "frozen parameters keep their names"


@pytest.mark.parametrize("method", ["lora", "adaptformer"])
def test_lora_and_adaptformer_start_as_the_frozen_encoder(method):
    frozen = tiny_model().encoder.eval()(images())
    assert torch.equal(adapted(method, moved=False)(images()), frozen)
    assert not torch.allclose(adapted(method)(images()), frozen, atol=1e-3)


def test_lora_is_the_frozen_encoder_with_changed_query_and_value_weights():
    encoder, merged = adapted("lora", rank=3, alpha=6.0), tiny_model().encoder.eval()
    with torch.no_grad():
        for ours, plain in zip(encoder.blocks, merged.blocks):
            change = ours.attn.qkv.adapter
            plain.attn.qkv.weight[:D] += 2 * change.q_up.weight @ change.q_down.weight
            plain.attn.qkv.weight[2 * D :] += 2 * change.v_up.weight @ change.v_down.weight
    assert_close(encoder(images()), merged(images()), atol=1e-5, rtol=1e-5)


def test_adaptformer_adds_a_bottleneck_to_each_mlp():
    encoder = adapted("adaptformer", width=5, scale=0.3)
    block, x = encoder.blocks[0], torch.randn(2, 17, D)
    plain = tiny_model().encoder.blocks[0]
    middle = x + plain.attn(plain.norm1(x))
    normed = plain.norm2(middle)
    side = block.mlp.adapter.up(torch.relu(block.mlp.adapter.down(normed)))
    assert_close(block(x), middle + plain.mlp(normed) + 0.3 * side, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layer", [None, 1])
@pytest.mark.parametrize(("method", "deep"), [("vpt", False), ("vpt_deep", True)])
def test_prompts_follow_the_class_token_and_are_dropped_at_the_end(method, deep, layer):
    encoder, plain, seen = adapted(method, tokens=4), tiny_model().encoder.eval(), []
    for block in encoder.blocks:
        block.attn.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    found = encoder(images(), layer=layer)
    assert found.shape == (3, 1 + PATCHES, D) and seen == [1 + 4 + PATCHES] * (layer or DEPTH)
    tokens = tiny_tokens(plain)
    for i, block in enumerate(plain.blocks[:layer]):
        if i == 0 or deep:
            prompts = encoder.blocks[i].adapter.tokens.expand(3, -1, -1)
            tokens = torch.cat(
                [tokens[:, :1], prompts, tokens[:, 1:] if i == 0 else tokens[:, 5:]], 1
            )
        tokens = block(tokens)
    tokens = torch.cat([tokens[:, :1], tokens[:, 5:]], 1)
    assert_close(found, tokens if layer else plain.norm(tokens), atol=1e-5, rtol=1e-5)


def tiny_tokens(encoder: ViT) -> torch.Tensor:
    """What the first block sees."""
    found = []
    handle = encoder.blocks[0].register_forward_pre_hook(lambda _, given: found.append(given[0]))
    encoder(images())
    handle.remove()
    return found[0]


def test_what_an_adapter_cannot_do_is_an_error():
    other = Model(encoder="timm", architecture="vit_tiny_patch16_224").encoder
    with pytest.raises(
        ValueError, match="vpt: adapts the blocks of a ViT, and model.encoder is a TimmViT"
    ):
        adapt(other, "vpt", {})
    encoder = tiny_model().encoder
    with pytest.raises(ValueError, match="no adapter 'lorra'. Did you mean 'lora'"):
        adapt(encoder, "lorra", {})
    with pytest.raises(
        ValueError, match="adapter.token: unknown option. Did you mean adapter.tokens"
    ):
        adapt(encoder, "vpt", {"token": 3})
    with pytest.raises(ValueError, match="adapter.rank: 0 must be at least 1"):
        adapt(encoder, "lora", {"rank": 0})


def test_a_vit_with_windows_takes_the_adapters_that_need_no_tokens():
    windows = {"window": 2, "global_blocks": 1, "relative_positions": True}
    model = Model(encoder="vit_test8", **windows)
    shard.initialise(model, 0)
    encoder, image = model.encoder, torch.randn(2, 3, 24, 40)
    frozen = encoder(image)
    for method in ("vpt", "vpt_deep"):
        with pytest.raises(
            ValueError, match=rf"^{method}: .* no window .*Take lora or adaptformer"
        ):
            adapt(encoder, method, {})
    for method in ("lora", "adaptformer"):
        adapt(encoder, method, {})
        for name, parameter in encoder.named_parameters():
            if ".adapter." in name and parameter.requires_grad:
                parameter.data.fill_(0.1 if "down" in name else 0.0)
        assert_close(encoder(image), frozen)
        for name, parameter in encoder.named_parameters():
            if ".adapter." in name:
                parameter.data.fill_(0.1)
        changed = encoder(image)
        assert not torch.allclose(changed, frozen)
        frozen = changed


@pytest.fixture
def group():
    distributed.init()
    yield
    distributed.shutdown()


def recipe(method: str, **changes: object) -> Recipe:
    values = {"pool": "mean", "optimizer": "sgd", "lr": 1.0, "weight_decay": 1e-4, "epochs": 4}
    values |= {"warmup": 1, "batch_size": 6, "crop_scale": (0.5, 1.0), "precision": "fp32"}
    return Recipe(method=method, **{**values, **changes})


def train(folder) -> None:
    for method in ("linear", *ADAPTERS):
        tuned = Tuning(recipe(method), tiny_model(), 12)
        tuned.train(Pictures(12), 0, folder / f"{distributed.world()}" / method)


def _train(rank: int, folder) -> None:
    distributed.init()
    train(folder)
    distributed.shutdown()


def test_two_processes_train_every_adapter_as_one_does(tmp_path, group):
    train(tmp_path)
    processes(2, _train, tmp_path)
    for method in ("linear", *ADAPTERS):
        one, two = (
            json.loads((tmp_path / world / method / "metrics.jsonl").read_text().splitlines()[-1])
            for world in "12"
        )
        assert one["step"] == two["step"] == 8
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5), method
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3), method


@pytest.mark.parametrize("method", ["linear", *ADAPTERS])
def test_training_changes_the_adapter_and_the_classifier_and_nothing_else(method, tmp_path, group):
    model = tiny_model()
    tuned = Tuning(recipe(method), model, 12)
    tuned.train(Pictures(12), 0, tmp_path)
    given, found = model.encoder.state_dict(), tuned.model.encoder.state_dict()
    assert all(torch.equal(found[name], value) for name, value in given.items())
    fresh = Tuning(recipe(method), model, 12)
    shard.initialise(fresh.objective, 0, frozen=False)
    ours, start = tuned.model.state_dict(), fresh.model.state_dict()
    changed = {n for n in ours if not torch.equal(ours[n], start[n])}
    trained = {n for n in ours if ".adapter." in n or n.startswith("head.")}
    assert changed == trained and (method == "linear") == all("head." in n for n in trained)


def test_a_training_starts_anew_whatever_was_trained_and_measured_before(tmp_path, group):
    tuned = Tuning(recipe("vpt_deep"), tiny_model(), 12)
    seen = []
    for seed in (0, 1, 0):
        tuned.train(Pictures(12), seed, tmp_path / str(len(seen)))
        with torch.no_grad():
            seen.append(
                tuned.model.eval().scores(torch.full((2, 3, 32, 32), 90, dtype=torch.uint8))
            )
    assert torch.equal(seen[0], seen[2]) and not torch.allclose(seen[0], seen[1], atol=1e-4)
