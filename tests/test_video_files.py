"""Videos: which frames are read of which files, what is bad, and lists of them."""

import csv
import json
import os
import pickle
import runpy
import tarfile
import tracemalloc
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from prepretrain.data.card import load_card
from prepretrain.data.loader import Stream, evaluation_batches
from prepretrain.data.sources.shards import Shards
from prepretrain.data.sources.video import Video as Videos
from prepretrain.data.transforms import BadImage
from prepretrain.data.video import container
from prepretrain.data.video import handles as module
from prepretrain.data.video.handles import RawFrames, Video

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
    assert Video(film(tmp_path / "c.mp4", rate=30)).rate == 30


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


def painted(path: Path, colour: tuple[int, int, int], matrix: str, **colours: int) -> Path:
    """A video of 10 bits whose frames are of one colour, by the matrix that it names."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p10le"
        for name, value in colours.items():
            setattr(stream.codec_context, name, value)
        pixels = np.full((32, 48, 3), colour, dtype="uint8")
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        how = {"format": "yuv420p10le", "dst_colorspace": matrix}
        frame = frame.reformat(**how)
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def test_ten_bits_and_hdr_are_read_with_the_matrix_that_the_file_names(tmp_path):
    colour = (200, 60, 30)
    hdr = {"color_primaries": 9, "color_trc": 16}  # BT.2020, PQ
    for name, matrix, colours in (
        ("709.mkv", "ITU709", {"colorspace": 1}),
        ("2020.mkv", "BT2020", {"colorspace": 9, **hdr}),
    ):
        shown = Video(painted(tmp_path / name, colour, matrix, **colours)).read([0])
        assert np.abs(shown[0, :, 8, 8].numpy().astype(int) - colour).max() <= 2


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
    decoded, decode = [], container.OpenFile.decoded

    def counting(*arguments):
        for frame in decode(*arguments):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(container.OpenFile, "decoded", counting)
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
    shown = (
        (video.times * 25).round().astype(int)
    )  # one may be there before some that it was decoded for
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
    monkeypatch.setattr(container, "MAX_PIXELS", 1000)
    error = bad(film(tmp_path / "a.mp4", frames=2))
    assert error.cause == "too large" and "48 x 32" in error.detail
    monkeypatch.setattr(container, "MAX_PIXELS", 10**6)
    monkeypatch.setattr(module, "MAX_RUN", 5)
    assert len(Video(film(tmp_path / "b.mp4")).read([15])) == 1
    with pytest.raises(BadImage, match="too far from a key frame: frame 18"):
        Video(tmp_path / "b.mp4").read([18])
    monkeypatch.setattr(container, "MAX_FRAMES", 20)
    assert bad(tmp_path / "b.mp4").cause == "too long"


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """The file with bytes flipped, and cut, or a part of it doubled or moved."""
    changed = bytearray(data)
    for place in rng.integers(len(data), size=int(rng.integers(1, 30))):
        changed[place] = rng.integers(256)
    first, last = sorted(rng.integers(len(data), size=2).tolist())
    kind = rng.integers(6)
    if kind == 0:
        del changed[last:]
    elif kind == 1:
        changed[first:first] = changed[first:last]
    elif kind == 2:
        del changed[first:last]
    return bytes(changed)


def mutations(folder: Path, count: int) -> dict[str, int]:
    """How many of a number of damaged files were read, and how many were bad and why."""
    sound = [film(folder / name, **FILES[name]).read_bytes() for name in FILES]
    causes = Counter()
    for number in range(count):
        rng = np.random.default_rng(number)
        path = folder / "damaged.mp4"
        path.write_bytes(mutated(sound[number % len(sound)], rng))
        try:
            video = Video(path)
            for index in {0, video.frames // 2, video.frames - 1}:
                assert video.read([index]).dtype == torch.uint8
            causes["read"] += 1
        except BadImage as error:
            causes[error.cause] += 1
    return causes


def test_of_damaged_files_frames_are_read_or_they_are_bad_for_a_cause(tmp_path):
    causes = mutations(tmp_path, 52)
    assert sum(causes.values()) == 52 and causes["read"] > 10 and len(causes) > 1


@pytest.mark.faults
def test_of_many_damaged_files_frames_are_read_or_they_are_bad_for_a_cause(tmp_path):
    causes = mutations(tmp_path, 20_000)

    assert sum(causes.values()) == 20_000


# --- sources ---


def furnish(folder: Path, classes: tuple[str, ...] = ("jump", "run"), each: int = 2) -> Path:
    """A folder with a folder of videos for each class."""
    for name in classes:
        for number in range(each):
            film(folder / name / f"{name}_{number}.mp4", "mpeg4", frames=4, between=0)
    return folder


def test_folders_give_videos_with_the_label_of_their_class(tmp_path):
    furnish(tmp_path)
    (tmp_path / "run" / "old.wmv").write_bytes(b"")
    (tmp_path / "._run").write_bytes(b"")
    source = Videos(path=str(tmp_path))
    assert source.fields == ("video", "label") and source.classes == ["jump", "run"]
    assert source.labels() == [0, 0, 1, 1] and source.left_out[".wmv"] == 1
    sample = source[3]
    assert sample["key"] == "run/run_1.mp4" and sample["label"] == 1
    assert sample["video"].frames == 4 and sample["video"].key == sample["key"]
    assert set(source.only(["label"])[0]) == {"key", "label"}
    flat = Videos(path=str(tmp_path / "run"))
    assert len(flat) == 2 and flat.fields == ("video",)
    turned = Videos(path=str(tmp_path), classes=["run", "jump"])
    assert turned.labels() == [0, 0, 1, 1] and turned.fingerprint != source.fingerprint
    with pytest.raises(ValueError, match="swim: is a class of the card or a folder, and not both"):
        Videos(path=str(tmp_path), classes=["jump", "run", "swim"])


def test_folders_of_frames_are_videos_in_the_order_of_their_numbers(tmp_path):
    for name in ("a/one", "b/two"):
        (tmp_path / name).mkdir(parents=True)
        for number in range(12):
            shown = Image.fromarray(picture(number, 20, 30))
            shown.save(tmp_path / name / f"img_{number}.png")
    with pytest.raises(ValueError, match="folder of frames.*Set source.rate"):
        Videos(path=str(tmp_path))
    source = Videos(path=str(tmp_path), rate=5)
    video = source[1]["video"]
    assert source.key(1) == "b/two" and source.classes == ["a", "b"]
    assert (video.frames, video.rate, video.seconds, video.size) == (12, 5, 2.4, (20, 30))
    expected = np.stack([picture(number, 20, 30) for number in (10, 2)])
    assert np.array_equal(video.read([10, 2]).permute(0, 2, 3, 1), expected)
    Image.new("RGB", (8, 8)).save(tmp_path / "b/two/img_3.png")
    with pytest.raises(BadImage, match="b/two: frames of several sizes"):
        video.read([2, 3])
    (tmp_path / "b/two/img_4.png").write_bytes(b"no image")
    with pytest.raises(BadImage, match="b/two: unreadable: img_4.png"):
        video.read([4])
    with pytest.raises(BadImage, match="no frame"):
        RawFrames(tmp_path, 5)


def test_tar_shards_with_video_members_give_handles_that_read_within_them(tmp_path):
    film(tmp_path / "a.mp4"), film(tmp_path / "b.webm", "libvpx-vp9", between=0)
    with tarfile.open(tmp_path / "0.tar", "w") as shard:
        for number, name in enumerate(("a.mp4", "b.webm")):
            shard.add(tmp_path / name, name)
            (tmp_path / "cls").write_text(str(number))
            shard.add(tmp_path / "cls", f"{name[0]}.cls")
    source = Shards(path=str(tmp_path / "0.tar"))
    assert source.fields == ("video", "label") and source.labels() == [0, 1]
    for number, name in enumerate(("a.mp4", "b.webm")):
        video = source[number]["video"]
        assert video.key == name[0] and video.frames == 24
        assert torch.equal(video.read([20, 3]), Video(tmp_path / name).read([20, 3]))


LISTS = {
    "numbers": ("list.txt", "jump/jump_0.mp4 0\nrun/run_1.mp4 1\n"),
    "numbers from 1, as UCF101": ("list.txt", "jump/jump_0.mp4 1\nrun/run_1.mp4 2\n"),
    "commas": ("list.csv", "jump/jump_0.mp4,0\nrun/run_1.mp4,1\n"),
    "paths alone": ("list.txt", "jump/jump_0.mp4\nrun/run_1.mp4\n"),
}


@pytest.mark.parametrize("form", LISTS)
def test_a_list_of_lines_is_read(tmp_path, form):
    furnish(tmp_path)
    name, content = LISTS[form]
    (tmp_path / name).write_text(content)
    source = Videos(path=str(tmp_path), listing=str(tmp_path / name), classes=["jump", "run"])
    assert [source.key(i) for i in range(2)] == ["jump/jump_0.mp4", "run/run_1.mp4"]
    assert source.labels() == [0, 1]


def test_kinetics_table_finds_its_videos_wherever_they_lie(tmp_path):
    for place in ("flat_000003_000013.mp4", "long jump/-x_y_000010_000020.mkv"):
        film(tmp_path / "train" / place, frames=2)
    header = ["label", "youtube_id", "time_start", "time_end", "split", "is_cc"]
    rows = [["run", "flat", 3, 13, "train", 0], ["long jump", "-x_y", 10, 20, "train", 0]]
    with open(tmp_path / "train.csv", "w", newline="") as file:
        csv.writer(file).writerows([header, *rows, ["run", "gone", 0, 10, "train", 0]])
    given = {"path": str(tmp_path / "train"), "listing": str(tmp_path / "train.csv")}
    given["classes"] = ["long jump", "run"]
    with pytest.raises(ValueError, match="1 of its 3 videos are not below.*: gone_000000_000010. "):
        Videos(**given)
    source = Videos(**given, absent="leave_out")
    assert [source.key(i) for i in range(2)] == [
        "flat_000003_000013.mp4",
        "long jump/-x_y_000010_000020.mkv",
    ]
    assert source.labels() == [1, 0] and sum(source.left_out.values()) == 1


def test_something_somethings_templates_are_its_classes(tmp_path):
    film(tmp_path / "videos/7.webm", "libvpx-vp9", frames=2, between=0)
    row = {"id": "7", "label": "holding a box", "template": "Holding [something]"}
    (tmp_path / "train.json").write_text(json.dumps([row]))
    given = {"path": str(tmp_path / "videos"), "listing": str(tmp_path / "train.json")}
    source = Videos(**given, classes=["Dropping something", "Holding something"])
    assert source.labels() == [1] and source.key(0) == "7.webm"
    with pytest.raises(ValueError, match="1 of its classes are not among.*: Holding something"):
        Videos(**given, classes=["Dropping something"])


def test_hmdb51s_lists_mark_what_is_for_training_and_what_for_the_test(tmp_path):
    furnish(tmp_path / "videos")
    for name in ("jump", "run"):
        lines = f"{name}_0.mp4 1 \n{name}_1.mp4 2 \n"
        (tmp_path / f"{name}_test_split1.txt").write_text(lines)
    given = {"path": str(tmp_path / "videos"), "listing": str(tmp_path / "*_test_split1.txt")}
    train, test = (Videos(**given, marked=number) for number in (1, 2))
    assert [train.key(i) for i in range(2)] == ["jump/jump_0.mp4", "run/run_0.mp4"]
    assert test.key(1) == "run/run_1.mp4" and test.labels() == [0, 1]
    with pytest.raises(ValueError, match="source.marked"):
        Videos(**given)


WRONG = {
    "missing files": (
        "jump/a.mp4 0\nrun/run_1.mp4 1\nrun/b.mp4 1\n",
        "2 of its 3.*jump/a.mp4, run/b.mp4",
    ),
    "labels outside": (
        "x.mp4 0\ny.mp4 2\nz.mp4 7\n",
        "2 of its labels.* 2 classes.*y.mp4 2, z.mp4 7",
    ),
    "a label that is not its folder": (
        "jump/jump_0.mp4 0\nrun/run_1.mp4 0\n",
        "run/run_1.mp4 0.*place",
    ),
    "a line without a label": ("jump/jump_0.mp4 0\nrun/run_1.mp4\n", "1 of 2 lines.*run/run_1.mp4"),
    "a video twice": ("run/run_1.mp4 1\nrun/run_1.mp4 1\n", "'run/run_1.mp4' twice"),
    "a path out of the folder": ("../run_1.mp4 1\n", "outside of the folder"),
    "nothing": ("\n", "names no video"),
}


HEADER = "label,youtube_id,time_start,time_end\n"
BROKEN = {
    "no time": ("list.csv", HEADER + "run,x,1,11\nrun,y,1\n", "line 3 has no numbers"),
    "no label": ("list.csv", HEADER + ",x,1,11\n", "line 2 has no label"),
    "other letters": ("list.csv", HEADER.encode() + b"\xff,x,1,11\n", "not readable as CSV"),
    "no list": ("list.json", '{"id": 3}', "no list of id and template"),
    "no json": ("list.json", "[", "no list of id and template"),
    "no template": ("list.json", '[{"id": "3"}]', "no list of id and template.*KeyError"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_table_is_an_error_that_names_the_file(tmp_path, fault):
    name, content, message = BROKEN[fault]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        Videos(path=str(tmp_path), listing=str(tmp_path / name))


@pytest.mark.parametrize("fault", WRONG)
def test_what_is_wrong_with_a_list_is_said_of_all_its_lines_at_once(tmp_path, fault):
    content, message = WRONG[fault]
    furnish(tmp_path / "videos")
    (tmp_path / "list.txt").write_text(content)
    with pytest.raises(ValueError, match=message):
        Videos(
            path=str(tmp_path / "videos"),
            listing=str(tmp_path / "list.txt"),
            classes=["jump", "run"],
        )


def test_a_card_gives_its_classes_to_videos(tmp_path, monkeypatch):
    monkeypatch.setenv("PREPRETRAIN_DATA", str(tmp_path))
    furnish(tmp_path / "films")
    card = "classes: [run, jump]\ntrain: {source: video, path: films, images: 4}\n"
    (tmp_path / "mine.yaml").write_text(card)
    assert load_card(tmp_path / "mine.yaml").open("train").labels() == [0, 0, 1, 1]


def test_without_pyav_the_source_says_how_to_install_it(tmp_path, monkeypatch):
    furnish(tmp_path, each=1)
    monkeypatch.setattr(container.plugin.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r'needs the package av.*pip install "prepretrain\[video\]"'
    ):
        Videos(path=str(tmp_path))


# --- loading ---


def first_and_random(sample: dict) -> dict:
    """A row of the first frame and of a random one."""
    video = sample["video"]
    numbers = [0, int(sample["random"]("clip").integers(video.frames))]
    return {"clip": video.read(numbers), "label": sample["label"]}


def test_workers_give_the_same_clips_and_a_bad_one_is_replaced_and_counted(tmp_path):
    furnish(tmp_path, each=4)
    (tmp_path / "run" / "run_0.mp4").write_bytes(b"")
    source = Videos(path=str(tmp_path))
    read = []
    for workers in (0, 2):
        stream = Stream(
            source, first_and_random, batch_size=8, seed=0, workers=workers, rank=0, world=1
        )
        batches = stream.batches()
        read.append([next(batches) for _ in range(2)])
        batches.close()
    for alone, shared in zip(*read):
        assert alone["key"] == shared["key"] and torch.equal(alone["clip"], shared["clip"])
    (bad,) = read[0][0]["bad"]
    assert bad["cause"] == "unreadable" and bad["key"] == "run/run_0.mp4"
    with pytest.raises(ValueError, match="run/run_0.mp4: unreadable"):
        list(evaluation_batches(source, first_and_random, batch_size=8, rank=0, world=1))


# --- cards ---

LAYOUTS = {
    "k400": ("abseiling/x_000001_000011.mp4", "k400/val", 0),
    "k600": ("x_000001_000011.mp4", "k600/val", 1),
    "k700": ("x_000001_000011.mkv", "k700/val", 699),
    "ssv2": ("12.webm", "ssv2/20bn-something-something-v2", 173),
    "ucf101": ("YoYo/v_YoYo_g01_c01.avi", "ucf101/UCF-101", 100),
    "hmdb51": ("wave/a_wave_1.avi", "hmdb51/videos", 50),
}


def listed(folder: Path, name: str, video: str, category: str) -> None:
    """Writes the list of a data set's split `val` in its makers' form."""
    stem = Path(video).stem
    if name == "ssv2":
        row = {"id": stem, "template": category.replace("something", "[something]")}
        path, content = "something-something-v2-validation.json", json.dumps([row])
    elif name == "ucf101":
        path, content = "ucfTrainTestlist/testlist01.txt", f"{video}\n"
    elif name == "hmdb51":
        path = f"testTrainMulti_7030_splits/{category}_test_split1.txt"
        content = f"{Path(video).name} 2 \nanother.avi 1 \n"
    else:
        row = f'"{category}",{stem[:-14]},1,11,validate,0\n'
        path = "annotations/val.csv"
        content = "label,youtube_id,time_start,time_end,split,is_cc\n" + row
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_text(content)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_card_opens_its_data_set_as_its_makers_lay_it(tmp_path, monkeypatch, name):
    video, folder, label = LAYOUTS[name]
    path = tmp_path / folder / video
    film(path, "mpeg4" if path.suffix != ".webm" else "libvpx", frames=2, between=0)
    card = load_card(name)
    listed(tmp_path / folder.partition("/")[0], name, video, card.classes[label])
    monkeypatch.setenv("PREPRETRAIN_DATA", str(tmp_path))
    source = card.open("val")
    assert len(source) == 1 and source[0]["label"] == label and source[0]["video"].frames == 2


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_cards_classes_are_those_of_the_published_list(name):
    lists = _SHARED / "video" / "labels"
    if not lists.is_dir():
        pytest.skip("no ../shared/data/video")
    published = lists / f"label_map_{'sthv2' if name == 'ssv2' else name}.txt"
    assert (
        load_card(name).classes == published.read_text().split("\n")[: len(load_card(name).classes)]
    )


def test_a_census_counts_videos_and_names_what_is_bad(tmp_path, monkeypatch, capsys):
    furnish(tmp_path / "films")
    (tmp_path / "films/run/run_0.mp4").write_bytes(b"")
    (tmp_path / "mine.yaml").write_text("train: {source: video, path: films}\n")
    monkeypatch.setenv("PREPRETRAIN_DATA", str(tmp_path))
    script = Path(__file__).parents[1] / "datasets" / "videos.py"
    for more in ([], ["--decode"]):
        arguments = [str(tmp_path / "mine.yaml"), "--out", str(tmp_path / "sheet.png"), *more]
        monkeypatch.setattr("sys.argv", [str(script), *arguments])
        runpy.run_path(str(script), run_name="__main__")
        said = capsys.readouterr().out
        assert "4 videos, 1 of them bad" in said and "1 bad: unreadable" in said
        assert "bad: run/run_0.mp4: unreadable: 0 bytes" in said and "25 frames a second" in said
        assert Image.open(tmp_path / "sheet.png").size[0] > 200
