"""Segmentation: heads, the objective that trains them, and runs."""

import pytest
import torch
from conftest import processes
from torch.utils.flop_counter import FlopCounterMode

from prepretrain.distributed import group as distributed
from prepretrain.distributed import shard
from prepretrain.models.dense.norms import BatchNorm
from prepretrain.models.model import Model


def millions(*modules: torch.nn.Module) -> float:
    return sum(p.numel() for module in modules for p in module.parameters()) / 1e6


def macs(function, *arguments) -> float:
    """Billions of multiply-adds, attention included."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(*arguments)
    return counter.get_total_flops() / 2e9


@pytest.mark.parametrize(
    "encoder, channels, parameters, operations",
    [  # of backbone with its deconvolutions, head, auxiliary head; those of the original code
        ("vit_b16", 768, (93.51, 67.96, 1.81), (121.5, 483.4)),
        ("vit_b16", 512, (93.51, 32.33, 1.81), (121.5, 218.4)),
        ("vit_l16", 1024, (316.74, 120.76, 2.40), (387.8, 858.6)),
        ("vit_l16", 512, (316.74, 34.43, 2.40), (387.8, 221.5)),
    ],
)
def test_upernet_has_the_parameters_and_operations_of_its_authors(
    encoder, channels, parameters, operations
):
    with torch.device("meta"):
        head = {"name": "upernet", "classes": 150, "channels": channels}
        model = Model(encoder=encoder, image_size=512, final_norm=False, head=head).eval()
        image = torch.empty(1, 3, 512, 512)
    head = model.head
    parts = ((model.encoder, head.levels), (head.pyramid, head.scores), (head.helper,))
    assert [millions(*part) for part in parts] == pytest.approx(parameters, abs=0.006)
    shard.fuse_attention(model, False)
    maps = model.read(image)
    levels = macs(head.levels, maps)
    found = macs(model.read, image) + levels, macs(head, maps) - levels
    assert found == pytest.approx(operations, rel=1e-3)


@pytest.mark.parametrize("size, published", [("swinv2_b", 33.32), ("swinv2_l", 36.95)])
def test_upernet_on_the_stages_of_a_swinv2_has_the_published_size(size, published):
    with torch.device("meta"):
        head = {"name": "upernet", "classes": 150}
        options = {"image_size": 640, "window": 20, "any_size": True, "final_norm": False}
        model = Model(encoder=size, **options, head=head)
    assert model.head.layers == (1, 2, 3, 4)
    assert millions(model.head.pyramid, model.head.scores) == pytest.approx(published, abs=0.006)


def _normed(rank: int, folder: str) -> None:
    distributed.init()
    norm, maps, weights = batch(folder)
    mine = maps.tensor_split(distributed.world())[distributed.rank()].requires_grad_()
    share = weights.tensor_split(distributed.world())[distributed.rank()]
    found = norm(mine)
    (found * share).sum().backward()
    grads = [distributed.all_sum(p.grad) for p in (norm.weight, norm.bias)]
    rows = [torch.cat(distributed.all_gather_object(t)) for t in (found.detach(), mine.grad)]
    torch.save([*rows, *grads, norm.running_mean, norm.running_var], f"{folder}/{rank}.pt")
    distributed.shutdown()


def batch(folder: str) -> tuple[BatchNorm, torch.Tensor, torch.Tensor]:
    """A norm in training, maps of four images, and what their outputs are weighted by."""
    norm, generator = BatchNorm(5), torch.Generator().manual_seed(0)
    norm.init_non_persistent_buffers()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2, generator=generator)
        norm.bias.normal_(generator=generator)
    maps = torch.randn(4, 5, 3, 2, generator=generator) * 3 + 1
    return norm, maps, torch.randn(4, 5, 3, 2, generator=generator)


def test_batch_norm_is_torchs_and_that_of_all_processes_images(tmp_path, group):
    norm, maps, weights = batch(str(tmp_path))
    known = torch.nn.BatchNorm2d(5)
    known.load_state_dict({**norm.state_dict(), "num_batches_tracked": torch.tensor(0)})
    inputs = [maps.clone().requires_grad_() for _ in range(2)]
    for module, one in zip((norm, known), inputs):
        (module(one) * weights).sum().backward()
    assert torch.allclose(inputs[0].grad, inputs[1].grad, atol=1e-5)
    assert torch.allclose(norm.weight.grad, known.weight.grad, atol=1e-5)
    assert torch.allclose(norm.running_var, known.running_var)
    assert torch.allclose(norm.eval()(maps), known.eval()(maps), atol=1e-6)
    expected = [known.train()(maps).detach(), inputs[1].grad, known.weight.grad, known.bias.grad]
    known.running_mean.zero_(), known.running_var.fill_(1)
    known(maps)
    expected += [known.running_mean, known.running_var]
    processes(2, _normed, str(tmp_path))
    for rank in range(2):
        for one, two in zip(torch.load(tmp_path / f"{rank}.pt"), expected):
            assert torch.allclose(one, two, atol=1e-5)


def test_batch_norm_keeps_its_running_values_where_a_batch_is_not_finite_and_refuses_one_value(
    group,
):
    norm, maps, _ = batch("")
    maps[0, 0, 0, 0] = torch.nan
    norm(maps)
    assert not norm.running_mean.any() and (norm.running_var == 1).all()
    with pytest.raises(ValueError, match="sees one value a channel.*Take at least 2 images"):
        norm(torch.zeros(1, 5, 1, 1))
