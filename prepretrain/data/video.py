"""Handles of videos that decode only the frames that are asked for, at the container's time stamps."""

import functools
import os
from bisect import bisect_right
from collections.abc import Container, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prepretrain import plugin
from prepretrain.data.names import is_image, natural_order
from prepretrain.data.transforms import MAX_PIXELS, MAX_SIDE, BadImage, decode, header

MAX_FRAMES = 10_000_000  # not from the paper: of a video, four days at 30 a second
# What FFmpeg may open: no playlists, nor other files or addresses that a file names.
CONTAINERS = ("mov", "matroska", "avi", "gif")
DECODERS = tuple(
    "h264 hevc libdav1d av1 vp8 vp9 libvpx libvpx-vp9 mpeg4 msmpeg4v1 msmpeg4v2 msmpeg4 mpeg1video "
    "mpeg2video h263 mjpeg gif ffv1 rawvideo".split()
)
# Of these, frames that no other one needs can be skipped, and the others come out as they would.
_SKIPPING = ("h264", "hevc", "mpeg4", "mpeg1video", "mpeg2video")
_OPTIONS = {
    "format_whitelist": ",".join(CONTAINERS),
    "codec_whitelist": ",".join(DECODERS),
    "protocol_whitelist": "none",
    "max_pixels": str(MAX_PIXELS),
}
_BUFFER = 1 << 16  # bytes that FFmpeg reads at a time
_RATE = 30  # not from the paper: of a video of one frame whose container says none


class Clip:
    """A video of which single frames can be read.

    times: float64 [frames], when each frame is shown, in seconds after the first; frames are numbered
    in this order. seconds: from the first to the end of the last. rate: the mean number of frames a
    second. size: (height, width), upright.
    """

    key: str
    times: np.ndarray
    seconds: float
    rate: float
    size: tuple[int, int]

    @property
    def frames(self) -> int:
        """How many frames there are."""
        return len(self.times)

    def read(self, numbers: Sequence[int]) -> Tensor:
        """The frames of these numbers, which may repeat, uint8 [T, 3, H, W]."""
        raise NotImplementedError

    def _numbers(self, numbers: Sequence[int]) -> list[int]:
        asked = [int(number) for number in numbers]
        if not asked or min(asked) < 0 or max(asked) >= self.frames:
            raise ValueError(f"{self.key}: frames {asked} of {self.frames}: 0 is the first.")
        return asked


class Video(Clip):
    """A video file, or a part of a file (a member of a tar); opened when it is first asked something.

    Frames count that decode: packets that are damaged, that an edit list leaves out, or that come before
    the first key frame are none. A file that breaks off has the frames before the cut; without any it is
    bad. Rotation and mirroring by a display matrix are applied; pixels stay as wide as they are stored.
    The copy in another process opens the file anew. All that is wrong raises BadImage.
    """

    def __init__(self, path: str | Path, *, span: tuple[int, int] | None = None, key: str = ""):
        """span: (offset, size) in bytes, of a part of the file."""
        self.path, self.span, self.key = Path(path), span, key or str(path)
        self._opened: _OpenFile | None = None
        self._index: _Index | None = None
        self._size: tuple[int, int] | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_opened": None}

    @property
    def times(self) -> np.ndarray:
        """See Clip."""
        return self._indexed().times

    @property
    def seconds(self) -> float:
        """See Clip."""
        return self._indexed().seconds

    @property
    def rate(self) -> float:
        """See Clip."""
        return self._indexed().rate

    @property
    def size(self) -> tuple[int, int]:
        """See Clip; decodes a frame."""
        if self._size is None:
            self.read([0])
        return self._size

    def read(self, numbers: Sequence[int]) -> Tensor:
        """See Clip. Decoding starts from the key frame before each run of frames."""
        asked = self._numbers(numbers)
        clip = None
        try:
            for number, picture in self._pictures(sorted(set(asked))):
                if clip is None:
                    clip = np.empty((len(asked), *picture.shape), dtype=np.uint8)
                for place in (i for i, other in enumerate(asked) if other == number):
                    clip[place] = picture
        except _av().error.FFmpegError as error:
            raise self._unreadable(error) from error
        self._size = clip.shape[1:3]
        return torch.from_numpy(clip).permute(0, 3, 1, 2)

    def close(self) -> None:
        """Closes the file, which happens by itself when nothing refers to the video any more."""
        if self._opened is not None:
            self._opened.close()
        self._opened = None

    def _pictures(self, wanted: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        """(number, uint8 [H, W, 3]) of each frame that is wanted, in rising order."""
        index, convert = self._indexed(), _Converter()
        stamps = set(index.stamps[wanted].tolist())
        frames, last, frame = iter(()), -1, None
        for number in wanted:
            if last < 0 or index.key_before(number) > last:
                frames, last = self._from_key(number, stamps), -1
            while last < number:
                last, frame = next(frames, (index.count, None))
            if last > number:
                raise self._bad("undecodable frame", f"frame {number} of {index.count}")
            yield number, convert(frame)

    def _from_key(self, number: int, stamps: set[int]) -> Iterator[tuple[int, Any]]:
        """(number, frame) of frames from the key frame before this one on; those that no other frame is
        decoded from are left out where they are not of `stamps`."""
        index, container = self._indexed(), self._container()
        key = index.keys[0] if index.in_order else index.keys[index.place_before(number)]
        packets = container.packets_from(key)
        if packets is None:
            container = self._container(afresh=True)
            packets = container.packets()
        if index.in_order:
            return enumerate(container.decoded(packets))
        return index.numbered(container.decoded(packets, stamps))

    def _indexed(self) -> "_Index":
        if self._index is None:
            try:
                self._index = _Index(self._container())
            except _av().error.FFmpegError as error:
                raise self._unreadable(error) from error
            except BadImage as error:
                raise self._bad(error.cause, error.detail) from error
        return self._index

    def _container(self, afresh: bool = False) -> "_OpenFile":
        opened = self._opened
        if afresh or opened is None or opened.process != os.getpid():
            self._opened = None
            try:
                self._opened = _OpenFile(self.path, self.span)
            except _av().error.FFmpegError as error:
                raise self._unreadable(error) from error
            except BadImage as error:
                raise self._bad(error.cause, error.detail) from error
        return self._opened

    def _unreadable(self, error: Exception) -> BadImage:
        """What an error of FFmpeg says of this file; an error of the machine is raised on."""
        if isinstance(error, MemoryError):
            raise error
        said = getattr(error, "strerror", None) or str(error)
        read = "mp4, mov, mkv, webm, avi and gif are read"
        return self._bad("unreadable", f"{_size(self.path, self.span):,} bytes: {said} ({read})")

    def _bad(self, cause: str, detail: str) -> BadImage:
        return BadImage(cause, detail, self.key)


class RawFrames(Clip):
    """A video as a folder of image files, a frame each, in the order of the numbers in their names."""

    def __init__(self, path: str | Path, rate: float, *, key: str = ""):
        """rate: frames a second, which image files do not say."""
        self.path, self.key, self.rate = Path(path), key or str(path), rate
        names = (entry.name for entry in os.scandir(path))
        self._names = sorted((name for name in names if is_image(name)), key=natural_order)
        if not self._names:
            raise BadImage("no frame", f"{path} holds no image", self.key)
        self.times = np.arange(len(self._names)) / rate
        self.seconds = len(self._names) / rate

    @property
    def size(self) -> tuple[int, int]:
        """See Clip."""
        width, height = header((self.path / self._names[0]).read_bytes()).size
        return height, width

    def read(self, numbers: Sequence[int]) -> Tensor:
        """See Clip."""
        asked = self._numbers(numbers)
        frames = {number: self._frame(number) for number in set(asked)}
        if len(sizes := {tuple(frame.shape) for frame in frames.values()}) > 1:
            said = " and ".join(f"{height} x {width}" for _, height, width in sorted(sizes))
            raise BadImage("frames of several sizes", said, self.key)
        return torch.stack([frames[number] for number in asked])

    def _frame(self, number: int) -> Tensor:
        try:
            return decode((self.path / self._names[number]).read_bytes())
        except BadImage as error:
            detail = f"{self._names[number]}: {error.detail}"
            raise BadImage(error.cause, detail, self.key) from error


class _Index:
    """The time stamps of a video's frames and which of them are key frames; nothing is decoded."""

    def __init__(self, container: "_OpenFile"):
        stamps, keys, last, self.in_order = _scanned(container)
        if not len(stamps):
            raise BadImage("no frame", "there is no packet from which one could be decoded")
        self.stamps, self.count, self.keys = stamps, len(stamps), keys
        self.key_numbers = np.searchsorted(stamps, keys).tolist()
        # of fractions, so that 30 frames a second are exactly 30: sampling rounds multiples of it down
        unit = container.time_base or 1 / Fraction(container.rate)
        span = int(stamps[-1] - stamps[0]) * unit
        rate = (self.count - 1) / span if span else 1 / (last * unit) if last else container.rate
        self.times = (stamps - stamps[0]) * float(unit)
        self.rate, self.seconds = float(rate), float(self.count / Fraction(rate))

    def key_before(self, number: int) -> int:
        """The number of the frame from which decoding leads to this one."""
        return 0 if self.in_order else self.key_numbers[self.place_before(number)]

    def place_before(self, number: int) -> int:
        """Which key frame is the last before this frame, or this frame."""
        return bisect_right(self.key_numbers, number) - 1

    def numbered(self, frames: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """(number, frame), without frames that have no number."""
        last = -1
        for frame in frames:
            if frame.pts is None:
                continue
            number = int(np.searchsorted(self.stamps, frame.pts))
            if number == last:  # two frames with one stamp
                number += 1
            if number < self.count and self.stamps[number] == frame.pts:
                last = number
                yield number, frame


def _scanned(container: "_OpenFile") -> tuple[np.ndarray, list[int], int, bool]:
    """(sorted stamps of the frames, of the key frames, duration of the last, whether frames must be
    counted from the first, because no stamps tell them apart or each depends on all before)."""
    stamps, keys, last = [], [], 0
    in_order, reordered = container.kind == "gif", False
    for packet in container.packets():
        if not packet.size or packet.is_corrupt:
            continue
        reordered |= packet.pts != packet.dts
        stamp = container.stamp(packet)
        if stamp is None:
            stamp, in_order = (stamps[-1] + 1 if stamps else 0), True
        if packet.is_keyframe:
            keys.append(stamp)
        if not packet.is_discard and (keys or container.kind == "gif"):
            stamps.append(stamp)
            last = packet.duration or 0
        if len(stamps) > MAX_FRAMES:
            raise BadImage("too long", f"more than {MAX_FRAMES:,} frames")
    if container.kind == "gif" and not container.ends_with(b";"):
        del stamps[-1:]  # the file breaks off within the last frame, which GIF does not mark
    stamps = np.sort(np.array(stamps, dtype=np.int64))
    first = keys[0] if keys else 0  # what is shown before cannot be decoded
    return (
        stamps if container.kind == "gif" else stamps[stamps >= first],
        sorted(set(keys)),
        last,
        in_order or container.kind == "avi" and reordered,
    )


class _OpenFile:
    """An open file, its best video stream, and the decoder."""

    def __init__(self, path: Path, span: tuple[int, int] | None):
        av = _av()
        self.process = os.getpid()
        self._file = _Part(path, span)
        self._input = av.open(self._file, options=_OPTIONS, buffer_size=_BUFFER)
        pictures = av.stream.Disposition.attached_pic  # the cover of a song
        streams = [one for one in self._input.streams.video if not one.disposition & pictures]
        if not streams:
            raise BadImage("no video stream", f"{self._input.format.name}")
        self._stream = max(streams, key=lambda one: (one.width * one.height, -one.index))
        self._check()
        self.kind = self._input.format.name
        self.time_base = self._stream.time_base
        self.rate = self._stream.average_rate or _RATE

    def _check(self) -> None:
        context = self._stream.codec_context
        if context is None or context.codec.name not in DECODERS:
            name = self._stream.codec_tag if context is None else context.codec.name
            raise BadImage("unreadable codec", f"{name}; read are {', '.join(DECODERS)}")
        width, height = context.width, context.height
        if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
            limit = f"the limit is {MAX_PIXELS}, and {MAX_SIDE} a side"
            raise BadImage("too large", f"frames of {width} x {height} pixels, {limit}")
        context.options = {"max_pixels": str(MAX_PIXELS)}
        context.thread_type, context.thread_count = "NONE", 1

    def __del__(self):
        self.close()

    def close(self) -> None:
        """Frees the decoder and the file, of which PyAV's objects would hold each other."""
        if hasattr(self, "_input"):
            self._input.close()
        self._file.close()

    def ends_with(self, data: bytes) -> bool:
        """Whether these are the file's last bytes."""
        return self._file.last(len(data)) == data

    def packets(self) -> Iterator[Any]:
        """The packets from here to the end, or to where the file breaks off."""
        try:
            yield from self._input.demux(self._stream)
        except _av().error.InvalidDataError:
            return

    def stamp(self, packet: Any) -> int | None:
        """When a packet's frame is shown; of AVI FFmpeg guesses it, and when it is decoded counts."""
        return packet.dts if self.kind == "avi" or packet.pts is None else packet.pts

    def packets_from(self, key: int) -> Iterator[Any] | None:
        """The packets from the key frame of this stamp on, or from an earlier one; None if the file
        cannot be sought in: a gif, or one whose index is broken or lacks."""
        if self.kind == "gif":
            return None
        try:
            self._input.seek(key, stream=self._stream)
        except _av().error.FFmpegError:
            return None
        packets = self.packets()
        first = next((one for one in packets if one.size), None)
        stamp = None if first is None else self.stamp(first)
        if stamp is None or stamp > key or not first.is_keyframe:
            return None
        return _chained(first, packets)

    def decoded(
        self, packets: Iterable[Any], stamps: Container[int] | None = None
    ) -> Iterator[Any]:
        """The frames of packets; a packet that does not decode gives none. With `stamps`, frames that are
        not of them may be left out: B-frames, which no other frame is decoded from."""
        context, invalid = self._stream.codec_context, _av().error.InvalidDataError
        skips = stamps is not None and context.codec.name in _SKIPPING
        for packet in packets:
            if skips:
                context.skip_frame = "DEFAULT" if packet.pts in stamps else "NONREF"
            try:
                yield from self._stream.decode(packet if packet.size else None)
            except invalid:
                continue
            except EOFError:
                return


def _chained(first: Any, rest: Iterable[Any]) -> Iterator[Any]:
    yield first
    yield from rest


class _Part:
    """A file, or a part of one, as PyAV reads it."""

    def __init__(self, path: Path, span: tuple[int, int] | None):
        self._file = open(path, "rb", buffering=0)
        self._start, self._bytes = (span or (0, 0))[0], _size(path, span)
        self._at = 0

    def read(self, size: int) -> bytes:
        size = min(size, self._bytes - self._at)
        data = os.pread(self._file.fileno(), size, self._start + self._at) if size > 0 else b""
        self._at += len(data)
        return data

    def last(self, size: int) -> bytes:
        """The last bytes."""
        return os.pread(self._file.fileno(), size, self._start + max(0, self._bytes - size))

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, self._bytes)[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        self._file.close()


def _size(path: Path, span: tuple[int, int] | None) -> int:
    """The bytes of a file, or of a part of it."""
    return os.stat(path).st_size if span is None else span[1]


class _Converter:
    """Frames to upright RGB, all of the size of the first."""

    def __init__(self):
        self._reformatter, self._size = _av().video.reformatter.VideoReformatter(), None

    def __call__(self, frame: Any) -> np.ndarray:
        self._size = self._size or (frame.width, frame.height)
        width, height = self._size
        # bicubic, as FFmpeg's command and torchcodec; it makes a difference to 10 bits
        plain = self._reformatter.reformat(
            frame, width, height, "rgb24", interpolation="BICUBIC", threads=1
        )
        return _upright(plain.to_ndarray(), frame)


def _upright(picture: np.ndarray, frame: Any) -> np.ndarray:
    """Turned and mirrored as the frame's display matrix says, by quarter turns."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return picture
    a, b, _, c, d = np.frombuffer(bytes(data), dtype=np.int32)[:5].tolist()
    if abs(a) + abs(d) < abs(b) + abs(c):
        picture, a, d = picture.transpose(1, 0, 2), c, b
    if a < 0:
        picture = picture[:, ::-1]
    return picture[::-1] if d < 0 else picture


def require() -> None:
    """Raises ValueError where PyAV, which decodes, is not installed."""
    plugin.require("av", "video", "videos")


@functools.cache
def _av() -> Any:
    require()
    import av

    return av
