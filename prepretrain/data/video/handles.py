"""Handles of videos that decode only the frames that are asked for, at the container's time stamps."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prepretrain.data.io.names import is_image, natural_order
from prepretrain.data.transforms import BadImage, decode, header
from prepretrain.data.video.container import Index, OpenFile, pyav, size_of

MAX_RUN = 50_000  # not from the paper: frames that are decoded for the sake of one


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

    def __init__(
        self,
        path: str | Path,
        *,
        span: tuple[int, int] | None = None,
        key: str = "",
        held: object = None,
    ):
        """span: (offset, size) in bytes, of a part of the file. held: what keeps the file in its place
        as long as the video is there."""
        self.path, self.span, self.key = Path(path), span, key or str(path)
        self._held = held
        self._opened: OpenFile | None = None
        self._index: Index | None = None
        self._size: tuple[int, int] | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_opened": None, "_held": None}

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
        except pyav().error.FFmpegError as error:
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
            if number - index.key_before(number) > MAX_RUN:
                detail = f"frame {number}; the limit is {MAX_RUN:,} frames"
                raise self._bad("too far from a key frame", detail)
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

    def _indexed(self) -> "Index":
        if self._index is None:
            try:
                self._index = Index(self._container())
            except pyav().error.FFmpegError as error:
                raise self._unreadable(error) from error
            except BadImage as error:
                raise self._bad(error.cause, error.detail) from error
        return self._index

    def _container(self, afresh: bool = False) -> "OpenFile":
        opened = self._opened
        if afresh or opened is None or opened.process != os.getpid():
            self._opened = None
            try:
                self._opened = OpenFile(self.path, self.span)
            except pyav().error.FFmpegError as error:
                raise self._unreadable(error) from error
            except BadImage as error:
                raise self._bad(error.cause, error.detail) from error
        return self._opened

    def _unreadable(self, error: Exception) -> BadImage:
        """What an error of FFmpeg says of this file; "cannot allocate" is one, too, of sizes in it that are
        none. Errors of the machine are those of reading it, which are no errors of FFmpeg."""
        said = getattr(error, "strerror", None) or str(error)
        read = "mp4, mov, mkv, webm, avi and gif are read"
        return self._bad("unreadable", f"{size_of(self.path, self.span):,} bytes: {said} ({read})")

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


class _Converter:
    """Frames to upright RGB, all of the size of the first."""

    def __init__(self):
        self._reformatter, self._size = pyav().video.reformatter.VideoReformatter(), None

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
