"""The corruptions against their published formulas."""

import colorsys
import io
import math
import os
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from sklearn.datasets import load_sample_image

from prepretrain.evaluation import corruptions
from prepretrain.evaluation.corruptions import (
    NAMES,
    OFFICIAL,
    SEVERITIES,
    TABLES,
    corrupt,
    frost_textures,
)
from prepretrain.evaluation.evaluators.robustness import Robustness

_SHARED = os.environ.get("PREPRETRAIN_SHARED_DATA") or Path(__file__).parents[2] / "shared" / "data"
FROST = Path(_SHARED, "robustness", "frost")
FIXED = (  # those that draw nothing
    *("saturate", "brightness", "contrast", "pixelate", "jpeg_compression"),
    *("zoom_blur", "defocus_blur", "gaussian_blur"),
)


def photo(height: int = 224, width: int = 224) -> torch.Tensor:
    """A photo of temples, uint8 [3, height, width]."""
    picture = Image.fromarray(load_sample_image("china.jpg")).resize((width, height), 2)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def ice() -> list[np.ndarray]:
    """Six made textures."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (300, 400, 3), dtype=np.uint8) for _ in range(6)]


def flat(level: int, side: int = 96) -> torch.Tensor:
    return torch.full((3, side, side), level, dtype=torch.uint8)


def made(image: torch.Tensor, name: str, severity: int, *, seed: int = 0, table: str = "imagenet"):
    """The corrupted image, float64."""
    random = np.random.default_rng(seed)
    return corrupt(image, name, severity, random, table=table, textures=ice()).double()


def test_there_are_the_fifteen_of_the_benchmark_and_four_more_in_both_tables():
    assert len(NAMES) == 19 and len(OFFICIAL) == 15 and OFFICIAL[-1] == "jpeg_compression"
    assert set(TABLES["cifar"]) == set(NAMES)
    assert all(len(row) == 5 for table in TABLES.values() for row in table.values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("table, shape", [("imagenet", (70, 112)), ("cifar", (32, 32))])
def test_any_size_is_corrupted_by_the_seed_alone(name, table, shape):
    image = photo(*shape)
    kept = image.clone()
    for severity in SEVERITIES:
        one, same, other = (
            corrupt(image, name, severity, np.random.default_rng(s), table=table, textures=ice())
            for s in (1, 1, 2)
        )
        assert one.shape == image.shape and one.dtype == torch.uint8
        assert torch.equal(one, same)
        if name in FIXED:
            assert torch.equal(one, other)
        else:
            blurless = name == "glass_blur" and table == "cifar" and severity == 1
            assert blurless or not torch.equal(one, other)
    assert torch.equal(image, kept)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"saturate", "elastic_transform", "spatter"}))
def test_a_higher_severity_changes_more(name):
    image = photo()
    changes = [(made(image, name, s) - image.double()).abs().mean().item() for s in SEVERITIES]
    if name in (
        "snow",
        "glass_blur",
    ):  # the published severities of these do not rise in every step
        assert changes[0] < changes[2] and changes[0] < changes[4]
    else:
        assert changes == sorted(changes) and changes[0] > 0


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("table", ["imagenet", "cifar"])
def test_the_noises_have_the_published_deviations(severity, table):
    def noise(name: str, level: int) -> torch.Tensor:
        return (made(flat(level, 160), name, severity, table=table) + 0.5 - level) / 255

    def constant(name: str) -> float:
        return TABLES[table][name][severity - 1]

    clipped = deviation_when_cut(constant("gaussian_noise"), 128 / 255)
    assert noise("gaussian_noise", 128).std().item() == pytest.approx(clipped, rel=0.02)
    clipped = deviation_when_cut(constant("speckle_noise") * 100 / 255, 100 / 255)
    assert noise("speckle_noise", 100).std().item() == pytest.approx(clipped, rel=0.02)
    grey, photons = np.full((160, 160, 3), 0.2), constant("shot_noise")
    counts = corruptions.shot_noise(grey, photons, np.random.default_rng(0)) * photons
    assert (
        counts.mean() == pytest.approx(0.2 * photons, rel=0.02)
        and abs(counts - counts.round()).max() < 1e-9
    )
    assert counts.var() == pytest.approx(0.2 * photons, rel=0.02)
    found = made(flat(100, 160), "impulse_noise", severity, seed=1, table=table)
    share = constant("impulse_noise")
    assert (found == 0).double().mean().item() == pytest.approx(share / 2, rel=0.1)
    assert (found == 255).double().mean().item() == pytest.approx(share / 2, rel=0.1)


def deviation_when_cut(sigma: float, middle: float) -> float:
    """That of a normal value around `middle` cut to 0 to 1, by quadrature."""
    x = np.linspace(-8, 8, 20001)
    weight = np.exp(-(x**2) / 2)
    values = (middle + sigma * x).clip(0, 1)
    mean = np.average(values, weights=weight)
    return math.sqrt(np.average((values - mean) ** 2, weights=weight))


def test_defocus_spreads_a_point_over_the_published_disk():
    dot = flat(0, 41)
    dot[:, 20, 20] = 255
    for severity, (radius, _) in enumerate(TABLES["imagenet"]["defocus_blur"], 1):
        place = np.arange(41) - 20
        inside = place[:, None] ** 2 + place**2 <= radius**2
        found = made(dot, "defocus_blur", severity)[0].numpy()
        far = place[:, None] ** 2 + place**2 > (radius + 3) ** 2
        core = place[:, None] ** 2 + place**2 < (radius - 2) ** 2
        assert (found[far] == 0).all() and abs(found[core] - 255 / inside.sum()).max() <= 1
    hard = corruptions.disk(3, 0.01)
    assert hard.sum() == pytest.approx(1) and (hard > 0).sum() == 29  # cells within 3 of the middle
    soft = corruptions.disk(4, 0.5)
    line = np.exp([-2.0, 0, -2]) / np.exp([-2.0, 0, -2]).sum()
    assert soft.sum() == pytest.approx(1)
    assert soft[8, 12] / soft[8, 8] == pytest.approx(line[0] * line[1] + line[1] ** 2, rel=0.5)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_gaussian_blur_is_a_gaussian(severity):
    sigma = TABLES["imagenet"]["gaussian_blur"][severity - 1]
    edge = flat(0, 81)
    edge[:, :, 41:] = 255
    row = made(edge, "gaussian_blur", severity)[1, 40]
    want = [255 * (0.5 + 0.5 * math.erf((x - 40.5) / sigma / math.sqrt(2))) for x in range(81)]
    assert (row - torch.tensor(want, dtype=torch.float64)).abs().max() < 4


def test_motion_blur_is_half_a_gaussian_along_the_angle():
    levels = np.zeros((61, 61), dtype=np.uint8)
    levels[30, 30] = 255
    kernel = np.exp(-(np.arange(21) ** 2) / (2 * 9))
    kernel = np.floor(255 * kernel / kernel.sum() + 1e-6)
    flat_on = corruptions._streaked(levels, 10, 3, angle=0)
    assert (flat_on[30, 10:31][::-1] == kernel).all() and flat_on.sum() == kernel.sum()
    upright = corruptions._streaked(levels, 10, 3, angle=90)
    assert (upright[10:31, 30][::-1] == kernel).all()
    slanted = corruptions._streaked(levels, 10, 3, angle=-45)
    rows, columns = np.nonzero(slanted)
    assert (rows + columns == 60).all() and rows.max() > 30
    grey = np.full((9, 9, 3), 77, dtype=np.uint8)
    assert (corruptions._streaked(grey, 20, 15, angle=13) == 77).all()


def test_zoom_blur_keeps_the_middle_and_averages_the_published_zooms():
    assert [len(zooms) for zooms in TABLES["imagenet"]["zoom_blur"]] == [12, 16, 11, 13, 11]
    dot = flat(0, 225)
    dot[:, 112, 112] = 255
    found = made(dot, "zoom_blur", 5)[0]
    assert found.argmax() == 112 * 225 + 112 and (found[:100] == 0).all()
    x = photo(60, 80).permute(1, 2, 0).numpy() / 255
    zooms = (1.0, 1.3)
    crop = x[(60 - 47) // 2 :][:47, (80 - 62) // 2 :][:, :62]
    large = ndimage.zoom(crop, (1.3, 1.3, 1), order=1)
    top, left = (large.shape[0] - 60) // 2, (large.shape[1] - 80) // 2
    want = (x + x + large[top : top + 60, left : left + 80]) / 3
    np.testing.assert_allclose(corruptions.zoom_blur(x, zooms, None), want, atol=1e-12)


def test_glass_blur_shows_near_pixels_in_the_published_order():
    for reach in (1, 2, 4):
        shown = corruptions._shown(30, 40, reach, np.random.default_rng(3))
        random, want = np.random.default_rng(3), np.arange(30 * 40).reshape(30, 40)
        shift = random.integers(-reach, reach, size=(30 - 2 * reach, 40 - 2 * reach, 2))
        for i, row in enumerate(range(30 - reach, reach, -1)):
            for j, column in enumerate(range(40 - reach, reach, -1)):
                dx, dy = shift[i, j]
                want[row, column] = want[row + dy, column + dx]
        assert (shown == want.ravel()).all() and len(set(shown)) < 1200


def test_brightness_adds_to_the_value_of_hsv_and_saturate_scales_its_saturation():
    image = photo(12, 16)
    image[:, 0, :3] = torch.tensor([[0, 255, 90]] * 3)  # black, white and grey
    for table in TABLES:
        for severity in SEVERITIES:
            for name in ("brightness", "saturate"):
                c = TABLES[table][name][severity - 1]
                want = torch.empty(3, 12, 16, dtype=torch.float64)
                for row in range(12):
                    for column in range(16):
                        h, s, v = colorsys.rgb_to_hsv(*(image[:, row, column] / 255).tolist())
                        if name == "brightness":
                            v = min(v + c, 1)
                        else:
                            s = min(s * c[0] + c[1], 1)
                        want[:, row, column] = 255 * torch.tensor(colorsys.hsv_to_rgb(h, s, v))
                error = want - made(image, name, severity, table=table)
                assert -0.01 < error.min() and error.max() < 1.01


def test_contrast_shrinks_the_distance_to_each_colours_mean():
    image = photo(40, 30).double()
    mean = image.mean((1, 2), keepdim=True)
    for severity, share in enumerate([0.4, 0.3, 0.2, 0.1, 0.05], 1):
        want = (image - mean) * share + mean
        assert torch.equal(made(image.byte(), "contrast", severity), (want + 1e-6).floor())


def test_jpeg_and_pixelate_are_pils():
    image = photo(50, 70)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    for severity, (quality, share) in enumerate(
        zip([25, 18, 15, 10, 7], [0.6, 0.5, 0.4, 0.3, 0.25]), 1
    ):
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality)
        want = np.asarray(Image.open(file)).transpose(2, 0, 1)
        assert (made(image, "jpeg_compression", severity).numpy() == want).all()
        small = picture.resize((int(70 * share), int(50 * share)), Image.Resampling.BOX)
        want = np.asarray(small.resize((70, 50), Image.Resampling.BOX)).transpose(2, 0, 1)
        assert (made(image, "pixelate", severity).numpy() == want).all()


def test_the_plasma_of_fog_is_rougher_with_less_decay_and_spans_0_to_1():
    for size, side in ((224, 256), (32, 32), (33, 64), (1, 2)):
        found = corruptions.plasma(size, 2.0, np.random.default_rng(0))
        assert found.shape == (side, side) and found.min() == 0 and found.max() == 1
    rough, smooth = (
        np.abs(np.diff(corruptions.plasma(256, decay, np.random.default_rng(0)), axis=1)).mean()
        for decay in (1.4, 3.0)
    )
    assert rough > 3 * smooth


def test_fog_lifts_black_and_keeps_the_brightest_value():
    image = flat(0, 64)
    image[:, :, :32] = 200
    cloud = corruptions.plasma(64, 1.4, np.random.default_rng(0))
    want = np.floor(200 * (3 * cloud[:, 32:]) / (200 / 255 + 3) + 1e-6)
    found = made(image, "fog", 5)
    assert (found[0, :, 32:].numpy() == want).all() and found.max() <= 200


def test_frost_is_a_weighted_sum_with_a_part_of_a_texture(tmp_path):
    textures = [
        np.full((300, 400, 3), level, dtype=np.uint8) for level in (40, 80, 120, 160, 200, 9)
    ]
    drawn = set()
    for seed in range(40):
        for size in ((224, 224), (350, 90)):  # the second is higher than the textures
            image = torch.full((3, *size), 100, dtype=torch.uint8)
            found = corrupt(
                image, "frost", 1, np.random.default_rng(seed), table="imagenet", textures=textures
            ).unique()
            assert len(found) == 1
            drawn.add((found.item() - 100) / 0.4)
    assert drawn == {40, 80, 120, 160, 200}  # never the sixth, as published
    with pytest.raises(ValueError, match="needs textures"):
        corrupt(photo(), "frost", 1, np.random.default_rng(0), table="imagenet")
    (tmp_path / "frost1.png").touch()
    with pytest.raises(ValueError, match="has no frost2.png, .*frost6.jpg.*hendrycks/robustness"):
        frost_textures(tmp_path)


@pytest.mark.skipif(not FROST.is_dir(), reason=f"no published textures of frost at {FROST}")
def test_the_published_textures_of_frost_are_read():
    textures = frost_textures(FROST)
    assert [t.shape[2] for t in textures] == [3] * 6 and textures[0].shape[:2] == (600, 900)
    image = photo()
    random = np.random.default_rng(0)
    found = corrupt(image, "frost", 3, random, table="imagenet", textures=textures)
    assert (found.double() - 0.7 * image.double()).min() > -1


@pytest.mark.skipif(not FROST.is_dir(), reason=f"no published textures of frost at {FROST}")
def test_tables_of_classifiers_detectors_and_segmenters_have_frost_with_its_folder(
    place, tmp_path, group
):
    from test_detection_evaluator import evaluated, furnish
    from test_robustness import classifier
    from test_segmentation_evaluator import card_of
    from test_segmentation_evaluator import evaluated as segmented

    how = {"corruptions": ["frost", "contrast"], "severities": [5], "images": 2}
    how["frost"] = str(FROST)
    for name in ("boxes", "maps"):
        (tmp_path / name).mkdir()
    boxes, maps = furnish(tmp_path / "boxes", 2), card_of(tmp_path / "maps", 2)
    found = evaluated(tmp_path / "boxes", boxes, **how)
    assert found["corruption/frost/5/box_AP"] < found["box_AP"]
    found = segmented(tmp_path / "maps", maps, pictures=0, **how)
    assert found["mPC"] == fmean(found[f"corruption/{one}/mIoU"] for one in how["corruptions"])
    found = Robustness(data="colours", classifier="own", **how).run(classifier(), tmp_path)
    assert {f"corruption/{one}/top1" for one in how["corruptions"]} <= set(found)


def test_snow_whitens_and_is_its_own_mirror():
    found = made(flat(0), "snow", 1)
    flakes = found - found.min()
    assert torch.equal(flakes, flakes.flip(1, 2)) and flakes.max() > 50
    assert found.min().item() == int(255 * 0.2 * 0.5)  # 0.2 of what is half as white again, and 0.5


def test_spatter_is_pale_turquoise_or_brown():
    water, mud = made(flat(0, 224), "spatter", 1), made(flat(255, 224), "spatter", 5)
    wet = water.amax((1, 2)) / 255
    torch.testing.assert_close(
        wet, 0.6 * torch.tensor([175, 238, 238]).double() / 255, atol=0.01, rtol=0
    )
    dark = mud.reshape(3, -1)[:, mud[0].argmin()]
    assert dark.tolist() == [63, 42, 20]
    assert 0.01 < (water[0] > 0).double().mean() < 0.5 and (mud[0] == 255).double().mean() > 0.3


def test_elastic_transform_moves_and_does_not_recolour():
    image = photo(90, 120)
    for severity in SEVERITIES:
        found = made(image, "elastic_transform", severity)
        assert found.min() >= image.min().item() - 1 and found.max() <= image.max().item()
    assert torch.equal(made(flat(77), "elastic_transform", 2), flat(77).double())
    x = image.permute(1, 2, 0).numpy() / 255
    still = corruptions.elastic_transform(x, (0, 1, 0), np.random.default_rng(0))
    np.testing.assert_allclose(still, x, atol=1e-9)


def test_white_stays_white_where_the_formula_keeps_it():
    for name in ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "gaussian_blur"):
        assert torch.equal(made(flat(255), name, 1), flat(255).double()), name


def test_unknown_names_are_named():
    for name, severity, table, message in (
        ("fgo", 1, "imagenet", "no corruption 'fgo'. Did you mean 'fog'"),
        ("fog", 6, "imagenet", "severity 6 is not one of"),
        ("fog", 1, "cifar10", "no table 'cifar10'. Did you mean 'cifar'"),
    ):
        with pytest.raises(ValueError, match=message.replace("?", "")):
            corrupt(photo(), name, severity, np.random.default_rng(0), table=table)
