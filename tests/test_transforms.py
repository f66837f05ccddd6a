import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from prepretrain.data import transforms
from prepretrain.data.random import Random
from prepretrain.data.transforms import BadImage, crop_box, decode


def photo(height=48, width=64, seed=0, mode="RGB"):
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    return image.convert(mode)


def encoded(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(image):
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def huge_jpeg(height=10_000, width=20_000):
    """A JPEG of a few hundred bytes whose header declares 200 megapixels."""
    data = encoded(Image.new("RGB", (16, 16)))
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + data[at + 4 :]


@pytest.mark.parametrize("make", [transforms._torchcodec, transforms._torchvision])
def test_every_fast_decoder_gives_the_pixels_that_pil_gives(make):
    try:
        fast = make()
    except (ImportError, OSError, RuntimeError):
        pytest.skip("this decoder is not installed here")
    for image in (photo(), photo(mode="L"), photo(57, 91)):
        for options in ({"quality": 90}, {"quality": 75, "progressive": True}):
            data = encoded(image, **options)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                theirs = pixels(Image.open(io.BytesIO(data)))
                assert torch.equal(fast(data).expand(3, -1, -1), theirs)


def exif_block(*, name=b"Exif\0\0", kind=3, count=1, cut=0):
    """An APP1 segment that says an orientation of 6, more or less."""
    entry = b"\x01\x12" + kind.to_bytes(2, "big") + count.to_bytes(4, "big") + b"\0\6\0\0"
    body = name + b"MM\0*\0\0\0\x08" + b"\0\1" + entry + bytes(4)
    body = body[: len(body) - cut]
    return b"\xff\xe1" + (len(body) + 2).to_bytes(2, "big") + body


@pytest.mark.parametrize(
    "form",
    [{}, {"count": 0}, {"kind": 0}, {"cut": 6}, {"name": b"exif\0\0"}, {"name": b"EXIF\0\0"}],
)
def test_a_malformed_orientation_turns_no_image_whatever_the_decoder(form, monkeypatch):
    plain = encoded(photo(48, 32))
    data = plain[:2] + exif_block(**form) + plain[2:]
    assert torch.equal(decode(data), pixels(Image.open(io.BytesIO(plain))))
    monkeypatch.setattr(transforms, "_fast_decoder", lambda: None)
    assert torch.equal(decode(data), decode(plain))


def test_a_png_with_a_large_profile_is_read():
    data = encoded(photo(), "PNG", icc_profile=bytes(2_000_000))
    assert len(data) < 20_000 and decode(data).shape == decode(encoded(photo(), "PNG")).shape


def test_the_orientation_tag_is_ignored_whatever_the_decoder(monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(photo(), exif=exif)
    expected = pixels(Image.open(io.BytesIO(data)))
    assert torch.equal(decode(data), expected)
    monkeypatch.setattr(transforms, "_fast_decoder", lambda: None)
    assert torch.equal(decode(data), expected)


@pytest.mark.parametrize(
    "mode, kind",
    [
        ("L", "JPEG"),
        ("CMYK", "JPEG"),
        ("RGBA", "PNG"),
        ("LA", "PNG"),
        ("P", "PNG"),
        ("1", "PNG"),
        ("RGBA", "WEBP"),
        ("RGB", "WEBP"),
    ],
)
def test_every_colour_mode_becomes_three_channels(mode, kind):
    image = photo().convert("RGB").convert(mode)
    data = encoded(image, kind)
    assert decode(data).shape == (3, 48, 64)
    assert decode(data).dtype == torch.uint8
    assert torch.equal(decode(data), pixels(Image.open(io.BytesIO(data))))


def test_sixteen_bit_grey_keeps_its_range():
    ramp = np.linspace(0, 65535, 64 * 8).reshape(8, 64).astype(np.uint16)
    out = decode(encoded(Image.fromarray(ramp), "PNG"))
    assert out.min() == 0 and out.max() == 255
    assert 120 < out.float().mean() < 135


def test_a_jpeg_without_its_end_marker_is_decoded():
    data = encoded(photo())
    assert data.endswith(b"\xff\xd9")
    assert torch.equal(decode(data[:-2]), decode(data))
    large = encoded(photo(480, 640))
    assert torch.equal(decode(large[:-2]), decode(large))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an image",
        encoded(photo())[:40],
        encoded(photo(480, 640))[:9000],
        encoded(photo(480, 640))[:-40],
        b"\xff\xd8\xff" + b"\0" * 500,
    ],
)
def test_what_cannot_be_decoded_is_a_bad_image_with_a_cause(data):
    with pytest.raises(BadImage) as caught:
        decode(data)
    assert caught.value.cause == "unreadable"


@pytest.mark.parametrize(
    "start", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", b"8BPS\0\1"]
)
def test_formats_off_the_list_are_not_even_looked_at(start, tmp_path, monkeypatch):
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    data = start + b"%%EndComments\nshowpage\n%%EOF\n" + b"\0" * 200
    with pytest.raises(BadImage) as caught:
        decode(data)
    assert caught.value.cause == "unreadable" and not (tmp_path / "ran").exists()


def test_only_one_place_opens_images():
    package = Path(transforms.__file__).parents[1]
    places = [p.name for p in package.rglob("*.py") if "Image.open(" in p.read_text()]
    assert places == ["transforms.py"]
    assert Path(transforms.__file__).read_text().count("Image.open(") == 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"])
def test_every_format_of_the_list_is_read(kind):
    if kind not in transforms._formats():
        pytest.skip("this Pillow does not read it")
    assert decode(encoded(photo(), kind)).shape == (3, 48, 64)


@pytest.mark.parametrize("highest", [1023, 4095, 65535])
def test_a_pgm_of_more_than_8_bits_says_its_range(highest):
    values = np.array([0, highest // 2 + 1, highest], ">u2")
    pixels = decode(f"P5 3 1 {highest}\n".encode() + values.tobytes())
    assert pixels[:, 0].tolist() == [[0, 128, 255]] * 3


@pytest.mark.parametrize("mode", ["RGB", "P", "I;16", "LA"])
def test_a_large_image_has_the_same_pixels_though_it_is_read_in_strips(mode, monkeypatch):
    image = Image.fromarray(np.arange(48 * 64, dtype=np.uint16).reshape(48, 64) * 21)
    data = encoded(image if mode == "I;16" else photo(mode=mode), "PNG")
    whole = decode(data)
    monkeypatch.setattr(transforms, "_STRIP", 64 * 7)
    assert torch.equal(decode(data), whole)


@pytest.mark.parametrize("shape", [(1, 65_500), (4, 60_000), (65_500, 1)])
@pytest.mark.parametrize("size", [32, (32, 64)])
def test_a_thin_picture_is_cropped_before_it_is_resized(shape, size, monkeypatch):
    image = torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
    resize, made = transforms.resized, []

    def limited(image, height, width):
        made.append(height * width)
        return resize(image, height, width)

    monkeypatch.setattr(transforms, "resized", limited)
    found = transforms.resize_center_crop(image, size)
    height, width = transforms.sides(size)
    assert found.shape == (3, height, width) and max(made) <= 65 * 73 * 73
    # as far as the picture is long enough, its ends do not matter
    shorter = image[:, :, 2000:-2000] if shape[1] > 1 else image[:, 2000:-2000]
    assert torch.equal(transforms.resize_center_crop(shorter, size), found)


def test_an_image_with_too_long_a_side_is_refused():
    data = encoded(Image.new("L", (70_000, 1)), "PNG")
    with pytest.raises(BadImage, match="65535 a side"):
        decode(data)


def test_an_image_of_200_megapixels_is_refused_by_its_header():
    data = huge_jpeg()
    assert len(data) < 2000
    with pytest.raises(BadImage, match="20000 x 10000|200000000") as caught:
        decode(data)
    assert caught.value.cause == "too large"
    with pytest.raises(BadImage, match="limit is 100"):
        decode(encoded(photo()), max_pixels=100)


def test_random_is_a_pure_function_of_its_four_arguments():
    draw = lambda *a, purpose="crop": Random(*a)(purpose).random(4).tolist()
    assert draw(1, 2, 3) == draw(1, 2, 3)
    others = [
        draw(0, 2, 3),
        draw(1, 0, 3),
        draw(1, 2, 0),
        draw(1, 3, 2),
        draw(1, 2, 3, purpose="flip"),
    ]
    assert len({tuple(o) for o in [draw(1, 2, 3), *others]}) == 6


def test_neighbouring_images_draw_independent_numbers():
    first = np.array([Random(0, 0, i)("crop").random() for i in range(4000)])
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.05
    assert abs(first.mean() - 0.5) < 0.03


def test_crop_boxes_lie_inside_and_cover_the_asked_share_of_the_area():
    rng = Random(0, 0, 0)("crop")
    boxes = np.array([crop_box(300, 400, rng, (0.2, 1.0), (3 / 4, 4 / 3)) for _ in range(2000)])
    top, left, height, width = boxes.T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + height <= 300).all() and (left + width <= 400).all()
    area, ratio = height * width / 120_000, width / height
    assert area.min() > 0.19 and area.max() <= 1 and 0.4 < area.mean() < 0.62
    assert ratio.min() > 0.74 and ratio.max() < 1.35


def test_a_very_flat_image_falls_back_to_its_centre():
    box = crop_box(10, 1000, Random(0, 0, 0)("crop"), (0.9, 1.0), (3 / 4, 4 / 3))
    assert box == (0, (1000 - 13) // 2, 10, 13)
    out = transforms.random_resized_crop(
        torch.zeros(3, 1, 500, dtype=torch.uint8), 8, Random(0, 0, 0)("crop"), scale=(0.2, 1.0)
    )
    assert out.shape == (3, 8, 8)


def test_the_resized_crop_agrees_with_pil_to_rounding():
    image = photo(240, 320)
    rng = lambda: Random(3, 1, 7)("crop")
    top, left, height, width = crop_box(240, 320, rng(), (0.2, 1.0), (3 / 4, 4 / 3))
    ours = transforms.random_resized_crop(pixels(image), 96, rng(), scale=(0.2, 1.0))
    box = (left, top, left + width, top + height)
    theirs = image.resize((96, 96), Image.Resampling.BICUBIC, box=box)
    assert ours.dtype == torch.uint8 and ours.shape == (3, 96, 96)
    assert (ours.int() - pixels(theirs).int()).abs().float().mean() < 1


@pytest.mark.parametrize("size", [(240, 320), (320, 240), (100, 100), (20, 33)])
def test_the_centre_crop_agrees_with_torchvision(size):
    from torchvision.transforms import v2

    image = pixels(photo(480, 640))[:, : size[0], : size[1]].contiguous()
    theirs = v2.CenterCrop(56)(v2.Resize(64, interpolation=v2.InterpolationMode.BICUBIC)(image))
    ours = transforms.resize_center_crop(image, 56)
    assert ours.shape == (3, 56, 56)
    assert (ours.int() - theirs.int()).abs().max() <= 1


def test_flip_mirrors_about_half_of_the_images():
    image = pixels(photo())
    mirrored = sum(
        torch.equal(transforms.flip(image, Random(0, 0, i)("flip")), image.flip(-1))
        for i in range(400)
    )
    assert 150 < mirrored < 250
