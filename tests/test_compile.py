"""torch.compile of blocks: all of a depth share their graphs, with drop path, in training and in
evaluation, with recomputation, for every objective that has blocks."""

import shutil
from functools import partial

import pytest
import torch
from test_detection import STAGES, batch_of, computed, opened
from test_detection import made as detector
from torch import nn

from prepretrain.distributed import compile as compiling
from prepretrain.distributed import shard
from prepretrain.distributed.compile import DropPath
from prepretrain.models.model import Model
from prepretrain.objectives.classify import Classify
from prepretrain.objectives.detection import Detection
from prepretrain.objectives.mae import MAE
from prepretrain.objectives.simmim import SimMIM
from prepretrain.objectives.video import Video

IMAGES = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)


@pytest.fixture
def graphs(monkeypatch, group):
    """The graphs that are compiled, each by torch's "eager" backend."""
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    compiled = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **how: compiled(self, backend=backend, **how)
    )
    torch._dynamo.reset()
    yield seen
    torch._dynamo.reset()


def made(build, **how):
    """The objective that `build` makes on the meta device, sharded, with first values."""
    with torch.device("meta"):
        objective = build()
    shard.shard(objective, precision="fp32", compile=True, **how)
    shard.initialise(objective, 0)
    return objective


def classify(depth: int) -> Classify:
    return Classify(Model(encoder="vit_test8", depth=depth, drop_path=0.1, head={"classes": 3}))


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_a_deep_encoder_with_drop_path_has_no_more_graphs_than_a_shallow_one(graphs, recompute):
    counts = []
    for depth in (3, 12):
        torch._dynamo.reset()
        graphs.clear()
        objective = made(partial(classify, depth), recompute=recompute)
        batch = {"image": IMAGES, "label": torch.tensor([0, 1, 2, 0])}
        for _ in range(2):
            objective.train()
            objective(batch)["loss"].backward()
            objective.eval()
            with torch.no_grad():
                objective(batch)
        counts.append(len(graphs))
    assert counts[0] == counts[1] <= 8


@pytest.mark.parametrize(
    ("build", "noise"),
    [
        (
            lambda: MAE(
                Model(encoder="vit_test8", depth=9),
                decoder_depth=9,
                decoder_width=16,
                decoder_heads=2,
            ),
            16,
        ),
        (lambda: SimMIM(Model(encoder="swinv2_test8", depths=[2, 9], drop_path=0.2), cell=16), 4),
    ],
)
def test_masked_objectives_compile_at_depth_with_the_same_losses(graphs, build, noise):
    objective = made(build)
    batch = {"image": IMAGES, "noise": torch.rand(4, noise)}
    objective.eval()
    compiled = objective(batch)["loss"]
    compiled.backward()
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(objective(batch)["loss"], compiled)
    objective.train()
    objective(batch)["loss"].backward()
    assert 0 < len(graphs) <= 12


TWO_STAGES = {**STAGES, "depths": [1, 2], "heads": [1, 1]}


@pytest.mark.parametrize("given", [{}, {"encoder": TWO_STAGES, "anchors": [8, 16, 32]}])
def test_recomputed_and_compiled_a_detector_has_the_same_losses_and_gradients(
    graphs, given, tmp_path
):
    pytest.importorskip("faster_coco_eval")
    found = []
    for how in ({}, {"recompute": "block"}, {"compile": True}):
        objective = Detection(detector(**given))
        shard.shard(objective, precision="fp32", **how)
        shard.initialise(objective, 0)
        found.append(computed(objective, batch_of(objective, opened(tmp_path), 0, 1)))
    assert graphs
    for one in found[1:]:
        torch.testing.assert_close(one, found[0])


@pytest.mark.faults
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs g++")
def test_inductor_gives_the_loss_and_gradients_of_clips(group):
    clips = torch.randint(0, 256, (2, 1, 3, 4, 16, 16), dtype=torch.uint8)
    batch, found = {"clip": clips, "label": torch.tensor([0, 1])}, []
    for how in ({}, {"compile": True}):
        asked = {"frames": 4, "image_size": 16, "depth": 1, "final_norm": False}
        with torch.device("meta"):
            head = {"classes": 2, "norm": True}
            objective = Video(Model(encoder="vit_test8", head=head, **asked), stride=1)
        shard.shard(objective, precision="fp32", **how)
        shard.initialise(objective, 0)
        loss = objective(batch)["loss"]
        loss.backward()
        gradients = {k: p.grad for k, p in objective.named_parameters()}
        found.append({"loss": loss.detach(), **gradients})
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_drop_path_drops_whole_rows_and_makes_up_for_them():
    drop = DropPath(0.25, True)
    dropped = drop(torch.ones(4000, 3))
    assert torch.equal(dropped.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert torch.equal(dropped.amax(1), dropped.amin(1))
    assert abs(float(dropped.mean()) - 1) < 0.05
    assert torch.equal(drop.eval()(torch.ones(4, 3)), torch.ones(4, 3))
    assert compiling.GRAPHS > 8
