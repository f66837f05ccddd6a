"""Videos: which frames are read of which files, what is bad, and lists of them."""

import csv
import json
import os
import pickle
import tarfile
import tracemalloc
import wave
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from prepretrain.data import video as module
from prepretrain.data.card import load_card
from prepretrain.data.loader import Stream, evaluation_batches
from prepretrain.data.sources.shards import Shards
from prepretrain.data.sources.video import Video as Videos
from prepretrain.data.transforms import BadImage
from prepretrain.data.video import RawFrames, Video

av = pytest.importorskip("av")
_SHARED = Path(
    os.environ.get("PREPRETRAIN_SHARED_DATA") or Path(__file__).parents[2] / "shared" / "data"
)
OPEN_GOP = "open-gop=1:keyint=10:min-keyint=10:scenecut=0:bframes=3:log-level=none"


def picture(number: int, height: int, width: int) -> np.ndarray:
    """A frame by which its number can be told."""
    y, x = np.mgrid[:height, :width]
    shade = np.full((height, width), number * 11 % 256)
    return np.stack([(x * 3 + number * 5) % 256, (y * 3 + number * 7) % 256, shade], -1).astype(
        "uint8"
    )


def film(
    path: Path,
    codec: str = "libx264",
    *,
    frames: int = 24,
    size: tuple[int, int] = (32, 48),
    rate: int = 25,
    pixels: str = "yuv420p",
    gop: int = 10,
    between: int = 2,
    stamps: list[int] | None = None,
    rotation: dict | None = None,
    options: dict | None = None,
    **colours: int,
) -> Path:
    """A video of `picture`s; between: B-frames; stamps: when each is shown, in milliseconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = size
        stream.pix_fmt, context = pixels, stream.codec_context
        context.gop_size, context.max_b_frames = gop, between
        unit = Fraction(1, rate if stamps is None else 1000)
        context.time_base = stream.time_base = unit
        for name, value in colours.items():
            setattr(context, name, value)
        if rotation is not None:
            stream.set_display_rotation(**rotation)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(number, *size), format="rgb24")
            frame = frame.reformat(format=pixels)
            frame.pts, frame.time_base = number if stamps is None else stamps[number], unit
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def sequential(path: Path) -> np.ndarray:
    """All frames of a video as PyAV decodes them one after the other, [T, 3, H, W]."""
    with av.open(str(path)) as opened:
        stream = opened.streams.video[0]
        stream.thread_type = "NONE"
        how = {"format": "rgb24", "interpolation": "BICUBIC"}
        frames = [frame.reformat(**how).to_ndarray() for frame in opened.decode(stream)]
    return np.stack(frames).transpose(0, 3, 1, 2)


def equal(path: Path, draws: int = 4) -> int:
    """The number of a video's frames, after a check of all of them, and of random ones."""
    expected, whole = sequential(path), Video(path)
    assert whole.frames == len(expected)
    assert np.array_equal(whole.read(range(whole.frames)), expected)
    rng = np.random.default_rng(0)
    for _ in range(draws):
        numbers = rng.integers(whole.frames, size=4)
        assert np.array_equal(Video(path).read(numbers), expected[numbers])
    return whole.frames


def bad(path: Path) -> BadImage:
    """What is wrong with a video."""
    with pytest.raises(BadImage) as caught:
        Video(path).read([0])
    assert str(path) in str(caught.value)
    return caught.value


# --- frames ---

FILES = {
    "b_frames.mp4": {},
    "open_gop.mp4": {"options": {"x264-params": OPEN_GOP}},
    # libx265 of some builds writes past its memory at less than 64 pixels
    "h265.mkv": {"codec": "libx265", "options": {"x265-params": OPEN_GOP}, "size": (64, 64)},
    "h264.avi": {},  # AVI does not say when reordered frames are shown
    "mpeg4.avi": {"codec": "mpeg4"},
    "plain.avi": {"codec": "mpeg4", "between": 0},
    "mpeg2.mkv": {"codec": "mpeg2video"},
    "vp9.webm": {"codec": "libvpx-vp9", "between": 0},
    "vp8.webm": {"codec": "libvpx", "between": 0},
    "av1.mp4": {"codec": "libsvtav1", "size": (64, 64), "between": 0},
    "animated.gif": {"codec": "gif", "pixels": "rgb8", "between": 0},
    "odd.mov": {"codec": "mpeg4", "size": (33, 47)},
    "ten_bits.mkv": {"codec": "ffv1", "pixels": "yuv422p10le", "size": (33, 47), "between": 0},
}


@pytest.mark.parametrize("name", FILES)
def test_each_frame_is_the_one_that_decoding_from_the_start_gives(tmp_path, name):
    assert equal(film(tmp_path / name, **FILES[name])) == 24


def test_frames_of_shared_clips_are_those_of_sequential_decoding():
    folder = _SHARED / "video"
    if not folder.is_dir():
        pytest.skip("no ../shared/data/video")
    for clip in json.loads((folder / "clips.json").read_text()):
        video = Video(folder / "clips" / clip["file"])
        assert video.frames == clip["frames_decoded"]  # of one the header says another number
        if clip["height"] > 500:
            continue  # seconds each; benchmarks/video_decoding.py compares all frames of all clips
        expected, numbers = sequential(video.path), [0, video.frames - 1, video.frames // 2, 7]
        assert len(expected) == video.frames
        assert np.array_equal(video.read(numbers), expected[numbers])
        assert video.size == (clip["height"], clip["width"])


def test_frames_are_timed_by_the_containers_stamps(tmp_path):
    stamps = np.cumsum([0, *[40, 80, 20, 33] * 5, 500, 40, 40]).tolist()
    for name in ("a.mp4", "b.mkv"):
        video = Video(film(tmp_path / name, stamps=stamps))
        assert np.allclose(video.times * 1000, stamps)
        assert video.rate == pytest.approx(23 / stamps[-1] * 1000)
        assert video.seconds == pytest.approx(video.frames / video.rate)
        assert np.array_equal(video.read([5, 20]), sequential(video.path)[[5, 20]])


def test_a_dropped_frame_of_an_avi_is_none_and_leaves_a_gap(tmp_path):
    path = film(
        tmp_path / "a.avi", "mpeg4", between=0, stamps=[*range(0, 400, 40), *range(440, 1000, 40)]
    )
    video = Video(path)
    assert video.frames == 24 and np.diff(video.times).max() == pytest.approx(0.08)


def test_a_frame_may_be_asked_for_twice_and_numbers_outside_are_an_error(tmp_path):
    video = Video(film(tmp_path / "a.mp4"))
    clip = video.read([7, 3, 7])
    assert clip.dtype == torch.uint8 and torch.equal(clip[0], clip[2])
    assert torch.equal(clip[1], Video(video.path).read([3])[0])
    for numbers in ([], [24], [-1]):
        with pytest.raises(ValueError, match="of 24"):
            video.read(numbers)


TURNS = {
    "a quarter": ({"degrees": 90}, lambda p: np.rot90(p, 1)),
    "a half": ({"degrees": 180}, lambda p: np.rot90(p, 2)),
    "three quarters": ({"degrees": 270}, lambda p: np.rot90(p, 3)),
    "a mirror": ({"degrees": 0, "hflip": True}, lambda p: p[:, ::-1]),
}


@pytest.mark.parametrize("turn", TURNS)
def test_a_telephones_rotation_is_applied(tmp_path, turn):
    rotation, turned = TURNS[turn]
    lossless = {"pixels": "rgb24", "options": {"qp": "0"}, "between": 0, "frames": 3}
    video = Video(film(tmp_path / "a.mp4", "libx264rgb", rotation=rotation, **lossless))
    expected = turned(picture(2, 32, 48))
    assert video.size == expected.shape[:2]
    assert np.array_equal(video.read([2])[0].permute(1, 2, 0), expected)


def test_ten_bits_and_hdr_are_read_with_the_matrix_that_the_file_names(tmp_path):
    grey = np.full((32, 48, 3), 128, dtype="uint8")
    for name, matrix in (("sdr.mkv", 1), ("hdr.mkv", 9)):  # BT.709, BT.2020
        path = film(
            tmp_path / name, "ffv1", pixels="yuv420p10le", colorspace=matrix, frames=2, between=0
        )
        video = Video(path)
        assert np.array_equal(video.read([0, 1]), sequential(path))
        assert np.abs(video.read([1]).float().mean() - picture(1, *grey.shape[:2]).mean()) < 20


def test_a_video_goes_to_another_process_and_closes_its_file(tmp_path):
    video = Video(film(tmp_path / "a.mp4"))
    before, open_files = video.read([4]), len(os.listdir("/proc/self/fd"))
    assert torch.equal(pickle.loads(pickle.dumps(video)).read([4]), before)
    for _ in range(20):
        Video(video.path).read([4])
    assert len(os.listdir("/proc/self/fd")) == open_files
    video.close()
    assert len(os.listdir("/proc/self/fd")) == open_files - 1
    child = os.fork()
    if not child:
        os._exit(0 if torch.equal(video.read([4]), before) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_of_four_hours_only_the_frames_from_a_key_frame_on_are_decoded_in_flat_memory(
    tmp_path, monkeypatch
):
    stamps = list(range(0, 4 * 3600 * 1000, 4000))
    path = film(
        tmp_path / "long.mkv", "mpeg4", frames=len(stamps), stamps=stamps, size=(16, 16), gop=100,
        between=0,
    )  # fmt: skip
    decoded, decode = [], module._OpenFile.decoded

    def counting(*arguments):
        for frame in decode(*arguments):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(module._OpenFile, "decoded", counting)
    tracemalloc.start()
    video = Video(path)
    clip = video.read([0, 1802, 3550])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert video.seconds == 4 * 3600 and clip.shape == (3, 3, 16, 16)
    assert len(decoded) < 2 * 100
    assert peak < 1_000_000


# --- bad input ---


def test_what_is_no_video_is_bad_and_says_why(tmp_path):
    for name, content in {
        "empty.mp4": b"",
        "text.mp4": b"hello " * 99,
        "playlist.mp4": b"#EXTM3U\n#EXTINF:10,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n",
        "script.avi": b"ffconcat version 1.0\nfile 'good.mp4'\n",
    }.items():
        (tmp_path / name).write_bytes(content)
        assert bad(tmp_path / name).cause == "unreadable"
    Image.new("RGB", (32, 32)).save(tmp_path / "still.png")
    (tmp_path / "still.png").rename(tmp_path / "still.mp4")
    assert bad(tmp_path / "still.mp4").cause == "unreadable"


def test_a_file_with_sound_alone_has_no_video_stream(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as out:
        stream = out.add_stream("aac", rate=8000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype="float32"), "fltp", "mono")
        silence.rate = 8000
        out.mux(stream.encode(silence))
        out.mux(stream.encode())
    assert bad(tmp_path / "a.mp4").cause == "no video stream"


def test_a_codec_outside_of_those_that_are_read_is_named(tmp_path):
    error = bad(film(tmp_path / "a.avi", "wmv2", between=0))
    assert error.cause == "unreadable codec" and error.detail.startswith("wmv2")


@pytest.mark.parametrize("name", ["a.mkv", "a.webm", "a.gif", "fast.mp4"])
def test_a_file_that_breaks_off_has_the_frames_before_the_cut(tmp_path, name):
    options = dict(FILES["vp9.webm"]) if name == "a.webm" else {}
    options = dict(FILES["animated.gif"]) if name == "a.gif" else options
    path = film(tmp_path / name, **options)
    if name == "fast.mp4":
        path = with_its_index_first(path)
    expected, data = sequential(path), path.read_bytes()
    path.write_bytes(data[: len(data) * 3 // 4])
    video = Video(path)
    shown = (video.times * 25).round().astype(int)  # one may be there before some that it was decoded for
    assert 3 < video.frames < 24 and (shown[:-1] == np.arange(video.frames - 1)).all()
    assert np.array_equal(video.read(range(video.frames)), expected[shown])


def with_its_index_first(path: Path) -> Path:
    """The mp4 anew, with its index before its frames, as for the web."""
    fast = path.with_name(f"web_{path.name}")
    with (
        av.open(str(path)) as given,
        av.open(str(fast), "w", options={"movflags": "faststart"}) as out,
    ):
        stream = out.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(video=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    return fast


def test_an_mp4_that_lacks_its_index_at_the_end_is_bad(tmp_path):
    path = film(tmp_path / "a.mp4")
    path.write_bytes(path.read_bytes()[:-500])
    assert bad(path).cause in ("unreadable", "no frame")


def test_a_frame_that_does_not_decode_is_bad_where_it_is_asked_for(tmp_path):
    path = film(tmp_path / "a.mkv", between=0)
    with av.open(str(path)) as opened:
        damaged = bytes(list(opened.demux(video=0))[15])
    data = path.read_bytes()
    assert data.count(damaged) == 1
    path.write_bytes(data.replace(damaged, damaged[:4] + b"\xff" * (len(damaged) - 4)))
    assert len(Video(path).read([3, 5, 23])) == 3
    with pytest.raises(BadImage, match="a.mkv: undecodable frame: frame 15 of 24"):
        Video(path).read([3, 15])


def test_a_frame_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = film(tmp_path / "a.mp4", frames=2)
    data = path.read_bytes()
    assert data.count(b"avc1") >= 1
    place = data.rindex(b"avc1") + 28  # width and height of the sample's description
    path.write_bytes(data[:place] + b"\xff\xff\xff\xff" + data[place + 4 :])
    monkeypatch.setattr(module, "MAX_PIXELS", 1000)
    assert bad(film(tmp_path / "b.mp4", frames=2)).cause == "too large"
