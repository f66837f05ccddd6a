"""Videos in folders or of a list, as files or as folders of frames; decoded when their frames are read."""

import os
from collections import Counter
from collections.abc import Iterator
from typing import Literal

from prepretrain.data.io.names import VIDEOS, is_image, is_video, left_out_of_videos, say_left_out
from prepretrain.data.sources.base import Files, fingerprint_of
from prepretrain.data.video import handles
from prepretrain.data.video.container import require
from prepretrain.data.video.lists import read_list, shown


class Video(Files):
    """`<path>/<class>/**/*.mp4`, labelled by class, or `<path>/*.mp4`, without labels; or the videos of a
    list. A video is a file (mp4, m4v, mov, avi, mkv, webm, gif), or a folder that holds its frames as
    images. Videos in tar shards are read by the source `shards`.

    listing  a list of videos: lines "path label" or "path"; or Kinetics' .csv, Something-Something's
             .json, or a glob of HMDB51's lists, whose videos may lie anywhere below `path`
    suffix   what lines leave out at the end of each path, such as .mp4
    marked   of HMDB51's lists, the number behind the videos that are read: 1 to train, 2 to test
    classes  the names of the classes in label order (the card's key `classes`); without it, the sorted
             folders
    absent   what to do about videos that a list names and that are not there: "refuse", or "leave_out"
    rate     frames a second of folders of frames, which do not say it
    """

    def __init__(
        self,
        *,
        path: str,
        listing: str | None = None,
        suffix: str = "",
        marked: int | None = None,
        classes: list[str] | None = None,
        absent: Literal["refuse", "leave_out"] = "refuse",
        rate: float | None = None,
    ):
        require()
        if not os.path.isdir(path):
            raise ValueError(f"{path}: is no folder; looked at {os.path.abspath(path)}.")
        self.left_out, self.rate = Counter(), rate
        if listing is None:
            names, labels, self.classes = _in_folders(path, classes, self.left_out)
        else:
            names, labels, self.classes, missing = read_list(
                listing, path, classes, suffix=suffix, marked=marked
            )
            self._check_missing(path, listing, names, missing, absent)
        say_left_out(path, self.left_out)
        super().__init__(path, names, labels)
        folders = [name for name in names if not is_video(name)]
        _check_folders(path, folders, rate)
        sizes = (
            self.fingerprint if not folders else fingerprint_of(names)
        )  # a folder's size says nothing
        self.fingerprint = fingerprint_of([sizes, *(labels or ()), rate])
        self.fields = ("video", *self.fields[1:])

    def __getitem__(self, index: int) -> dict:
        name = self.key(index)
        sample = {"key": name}
        if "video" in self.fields:
            place = self.path / name
            sample["video"] = (
                handles.Video(place, key=name)
                if is_video(name)
                else handles.RawFrames(place, self.rate, key=name)
            )
        return sample | {"label": self.label(index)} if "label" in self.fields else sample

    def _check_missing(
        self, path: str, listing: str, names: list[str], missing: list[str], absent: str
    ) -> None:
        if missing and (absent == "refuse" or not names):
            raise ValueError(
                f"{listing}: {len(missing):,} of its {len(names) + len(missing):,} videos are not below "
                f"{path}: {shown(missing)}. Fetch them, or set absent: leave_out, which counts them."
            )
        if missing:
            self.left_out["that the list names and that are not there"] = len(missing)


def _in_folders(
    path: str, classes: list[str] | None, others: Counter
) -> tuple[list[str], list[int] | None, list[str] | None]:
    """(names, labels, classes) of videos that lie in a folder for each class, or without classes."""
    folders, clips = _inside(path, ".", others)
    if clips and folders:
        raise ValueError(
            f"{path}: holds folders ({folders[0]}, …) and videos ({clips[0]}, …). A labelled set has one "
            f"folder a class, an unlabelled set none."
        )
    if not clips and not folders:
        raise ValueError(f"{path}: holds no video.")
    if clips:
        return clips, None, None
    if classes and set(classes) != set(folders):
        odd = sorted(set(classes) ^ set(folders))
        raise ValueError(
            f"{path}: {shown(odd)}: is a class of the card or a folder, and not both; there are "
            f"{len(classes):,} classes and {len(folders):,} folders."
        )
    classes = classes or folders
    found = [list(_below(path, name, others)) for name in classes]
    if empty := [name for name, clips in zip(classes, found) if not clips]:
        raise ValueError(f"{path}: no video is in {shown(empty)}.")
    labels = [label for label, clips in enumerate(found) for _ in clips]
    return [name for clips in found for name in clips], labels, classes


def _below(path: str, folder: str, others: Counter) -> Iterator[str]:
    """The videos of a folder and those below it."""
    folders, clips = _inside(path, folder, others)
    yield from clips
    for name in folders:
        yield from _below(path, name, others)


def _inside(path: str, folder: str, others: Counter) -> tuple[list[str], list[str]]:
    """The folders and the videos that lie directly in a folder, sorted; a folder with images is a video."""
    folders, clips = [], []
    for entry in sorted(os.scandir(os.path.join(path, folder)), key=lambda entry: entry.name):
        name = os.path.normpath(os.path.join(folder, entry.name))
        if reason := left_out_of_videos(entry.name):
            others[reason] += 1
        elif entry.name.startswith("."):
            continue
        elif entry.is_dir():
            (clips if _holds_images(entry.path) else folders).append(name)
        elif is_video(entry.name):
            clips.append(name)
    return folders, clips


def _holds_images(folder: str) -> bool:
    return any(is_image(entry.name) and not is_video(entry.name) for entry in os.scandir(folder))


def _check_folders(path: str, folders: list[str], rate: float | None) -> None:
    if odd := [name for name in folders if not os.path.isdir(os.path.join(path, name))]:
        raise ValueError(
            f"{path}: {shown(odd)}: neither a folder of frames nor of a kind that is read "
            f"({', '.join(VIDEOS)})."
        )
    if folders and not rate:
        raise ValueError(
            f"{path}: {folders[0]} is a folder of frames, which do not say how many are shown a second. "
            f"Set source.rate, such as rate: 25."
        )
