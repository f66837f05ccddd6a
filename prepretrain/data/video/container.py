"""An open video file: its packets, when their frames are shown, and its decoder, within what is allowed."""

import functools
import os
from bisect import bisect_right
from collections.abc import Container, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from prepretrain import plugin
from prepretrain.data.transforms import MAX_PIXELS, MAX_SIDE, BadImage

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


class Index:
    """The time stamps of a video's frames and which of them are key frames; nothing is decoded."""

    def __init__(self, container: "OpenFile"):
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


def _scanned(container: "OpenFile") -> tuple[np.ndarray, list[int], int, bool]:
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


class OpenFile:
    """An open file, its best video stream, and the decoder."""

    def __init__(self, path: Path, span: tuple[int, int] | None):
        av = pyav()
        self.process = os.getpid()
        self._file = _Part(path, span)
        how = {"buffer_size": _BUFFER, "metadata_errors": "replace"}
        self._input = av.open(self._file, options=_OPTIONS, **how)
        pictures = av.stream.Disposition.attached_pic  # the cover of a song
        streams = [one for one in self._input.streams.video if not one.disposition & pictures]
        if not streams:
            raise BadImage("no video stream", self._input.format.name)
        self._stream = max(
            _decodable(streams), key=lambda one: (one.width * one.height, -one.index)
        )
        self._prepare(self._stream.codec_context)
        self.kind = self._input.format.name
        self.time_base = self._stream.time_base
        self.rate = self._stream.average_rate or _RATE

    def _prepare(self, context: Any) -> None:
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
        for part in ("_input", "_file"):  # which are not there if it could not be opened
            if hasattr(self, part):
                getattr(self, part).close()

    def ends_with(self, data: bytes) -> bool:
        """Whether these are the file's last bytes."""
        return self._file.last(len(data)) == data

    def packets(self) -> Iterator[Any]:
        """The packets from here to the end, or to where the file breaks off."""
        try:
            yield from self._input.demux(self._stream)
        except pyav().error.FFmpegError:
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
        except pyav().error.FFmpegError:
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
        context, invalid = self._stream.codec_context, pyav().error.InvalidDataError
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


def _decodable(streams: list[Any]) -> list[Any]:
    """The streams of which a decoder is known and allowed; raises BadImage if there is none."""
    names = {}  # FFmpeg itself does not know the codecs of some
    for stream in streams:
        context = stream.codec_context
        names[stream.index] = context.codec.name if context is not None else "unknown"
    if not (known := [stream for stream in streams if names[stream.index] in DECODERS]):
        detail = f"{', '.join(map(str, names.values()))}; read are {', '.join(DECODERS)}"
        raise BadImage("unreadable codec", detail)
    return known


def _chained(first: Any, rest: Iterable[Any]) -> Iterator[Any]:
    yield first
    yield from rest


class _Part:
    """A file, or a part of one, as PyAV reads it."""

    def __init__(self, path: Path, span: tuple[int, int] | None):
        self._file = open(path, "rb", buffering=0)
        self._start, self._bytes = (span or (0, 0))[0], size_of(path, span)
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


def size_of(path: Path, span: tuple[int, int] | None) -> int:
    """The bytes of a file, or of a part of it."""
    return os.stat(path).st_size if span is None else span[1]


def require() -> None:
    """Raises ValueError where PyAV, which decodes, is not installed."""
    plugin.require("av", "video", "videos")


@functools.cache
def pyav() -> Any:
    """The package av."""
    require()
    import av

    return av
