"""Images that are no squares, in encoders, objectives, crops, evaluations and exports."""

from functools import partial

import timm
import torch
from conftest import command
from torch.testing import assert_close

from prepretrain.data.card import open_data
from prepretrain.data.random import Random
from prepretrain.data.transforms import random_resized_crop, resize_center_crop
from prepretrain.distributed import shard
from prepretrain.evaluation.evaluators.knn import Knn
from prepretrain.models import export
from prepretrain.models.encoders.base import resample_positions
from prepretrain.models.load import load
from prepretrain.models.model import Model
from prepretrain.objectives.feature_mae import FeatureMAE
from prepretrain.objectives.mae import MAE
from prepretrain.objectives.simmim import SimMIM

SIZE = [32, 48]


def wide(encoder: str = "vit_test8", size=SIZE, **options) -> Model:
    """A small model of wide images, with weights."""
    model = Model(encoder=encoder, image_size=size, **options)
    shard.initialise(model, 0)
    return model.eval()


def pictures(height: int = 32, width: int = 48) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)


def batch(objective, key: int = 0) -> dict:
    """Two images of other shapes as the objective's training transform makes them."""
    made = []
    for index, shape in enumerate([(60, 50), (40, 90)]):
        image = torch.nn.functional.interpolate(
            torch.rand(1, 3, 6, 6), shape, mode="bicubic"
        ).clamp(0, 1)
        sample = {"image": jpeg((255 * image[0]).to(torch.uint8)), "random": Random(key, 0, index)}
        made.append(objective.transform(train=True)(sample))
    return {name: torch.stack([row[name] for row in made]) for name in made[0]}


def jpeg(image: torch.Tensor) -> bytes:
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()


def test_a_rectangle_has_rows_and_columns_and_timms_features(tmp_path):
    for name, size in (("vit_test8", SIZE), ("swinv2_test8", [32, 64])):
        model = wide(name, size)
        assert model.encoder.grid == (size[0] // 8, size[1] // 8)
        export.save(model, tmp_path / name, "here")
        peer = timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True).eval()
        image = pictures(*size)
        theirs = peer.forward_features(model.normalise(image))
        theirs = theirs.flatten(1, 2) if theirs.ndim == 4 else theirs
        assert_close(model(image), theirs, rtol=1e-4, atol=1e-5)


def test_positions_go_from_any_grid_to_any_other(tmp_path):
    torch.manual_seed(0)
    square, table = Model(encoder="vit_test8"), torch.randn(1, 17, 32)
    with torch.no_grad():
        square.encoder.pos_embed.copy_(table)
        for name in ("cls_token", "patch_embed.proj.weight", "patch_embed.proj.bias"):
            torch.nn.init.normal_(square.encoder.get_parameter(name))
    export.save(square, tmp_path / "square", "here")
    flat = load(str(tmp_path / "square"), image_size=[16, 64])  # as many cells, in another shape
    want = resample_positions(table, (2, 8), 1, 8, {})
    assert want.shape == table.shape and not torch.equal(want, table)
    assert torch.equal(flat.encoder.pos_embed, want)
    export.save(flat, tmp_path / "flat", "here")
    assert torch.equal(load(str(tmp_path / "flat")).encoder.pos_embed, want)
    again = load(str(tmp_path / "flat"), image_size=32)  # not taken for a square of 16 cells
    assert_close(
        again.encoder.pos_embed, resample_positions(want, (4, 4), 1, 8, {"image_size": [16, 64]})
    )
    assert not torch.equal(again.encoder.pos_embed, want)


def test_masked_objectives_train_on_rectangles_and_draw_them():
    for objective in (
        MAE(wide(), decoder_depth=1, decoder_width=32, decoder_heads=2),
        SimMIM(wide("swinv2_test8", [32, 64]), cell=16, target_window=3),
        SimMIM(wide(final_norm=False), cell=16, decoder_depth=1, target_window=None),
    ):
        shard.initialise(objective, 0)
        made = batch(objective)
        size = objective.model.encoder.image_size
        assert made["image"].shape == (2, 3, *size) and not made["image"].is_floating_point()
        objective(made)["loss"].backward()
        drawn = objective.reconstruct(made)
        assert {tuple(image.shape) for image in drawn.values()} == {(2, 3, *size)}
        assert torch.equal(drawn["original"], made["image"])
        seen = (drawn["masked"] == made["image"]).all(1)
        assert torch.equal((drawn["reconstructed"] == made["image"]).all(1) & seen, seen)
        assert 0.1 < seen.float().mean() < 0.6


def test_a_teachers_grid_may_be_another_rectangle(tmp_path):
    export.save(wide(size=[16, 24]), tmp_path, "here")
    objective = FeatureMAE(
        wide(),
        teacher=str(tmp_path),
        resample=True,
        decoder_depth=1,
        decoder_width=32,
        decoder_heads=2,
    )
    objective.prepare(partial(shard.materialise, precision="fp32"))
    shard.initialise(objective, 0)
    assert objective(batch(objective))["loss"].isfinite()


def test_crops_of_a_rectangle_keep_the_shape_of_things():
    circle = torch.hypot(*torch.meshgrid(*[torch.linspace(-1, 1, 100)] * 2, indexing="ij")) < 0.5
    image = (255 * circle.to(torch.uint8)).expand(3, -1, -1)
    for size in ((40, 80), (80, 40), (60, 60)):
        shown = resize_center_crop(image, size, share=1.0)[0] > 127
        assert tuple(shown.shape) == size
        assert abs(int(shown[size[0] // 2].sum()) - min(int(max(size) / 2), size[1])) <= 2
        assert abs(int(shown[:, size[1] // 2].sum()) - min(int(max(size) / 2), size[0])) <= 2
    for seed in range(50):
        box = random_resized_crop(
            grid(120, 120), (40, 80), Random(0, 0, seed)("crop"), scale=(0.2, 0.4)
        )
        down = (box[0, -1, 0].float() - box[0, 0, 0].float()) / 40  # source pixels a pixel
        across = (box[1, 0, -1].float() - box[1, 0, 0].float()) / 80
        assert 0.7 < float(down / across) < 1.43


def grid(height: int, width: int) -> torch.Tensor:
    """An image whose first two colours are a pixel's row and column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns, rows]).to(torch.uint8)


def test_an_evaluation_and_a_run_take_rectangles(place):
    found = Knn(data="colours", pool="mean", k=3, workers=0).run(wide(), place)
    assert found["images"] == 60
    said = command(
        "launch.py", "--stage", "small.yaml", "--out", "runs/wide", "model.image_size=[32, 16]"
    )
    assert said.returncode == 0, said.stderr
    assert load("runs/wide").encoder.grid == (4, 2)
    assert len(open_data("colours")) > 0


def test_the_same_pixels_come_of_a_number_and_of_its_pair():
    image = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8)
    assert torch.equal(resize_center_crop(image, 32), resize_center_crop(image, (32, 32)))
    crops = [
        random_resized_crop(image, size, Random(0, 0, 0)("crop"), scale=(0.2, 1.0))
        for size in (32, (32, 32))
    ]
    assert torch.equal(*crops)
