"""Images in folders: one folder a class, or one folder of unlabelled images."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from prepretrain.sources.base import Source, fingerprint_of

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class Folder(Source):
    """`<path>/<class>/**/*.jpg`, labelled by sorted class; or `<path>/*.jpg`, without labels."""

    def __init__(self, *, path: str, classes: list[str] | None = None):
        """`classes` fixes the label order, and names the folders that are read."""
        self.path = Path(path)
        if not self.path.is_dir():
            raise ValueError(f"{path}: is no folder.")
        folders = sorted(e.name for e in os.scandir(path) if e.is_dir() and e.name[0] != ".")
        loose = sorted(e.name for e in os.scandir(path) if e.is_file() and _is_image(e.name))
        if loose and folders:
            raise ValueError(
                f"{path}: holds folders ({folders[0]}, …) and images ({loose[0]}, …). "
                "A labelled set has one folder a class, an unlabelled set none."
            )
        if classes is not None and (absent := sorted(set(classes) - set(folders))):
            raise ValueError(
                f"{path}: there is no folder for the classes {', '.join(absent)}. "
                f"There are: {', '.join(folders) or 'none'}."
            )
        self._read(loose, classes or folders)

    def _read(self, loose: list[str], classes: list[str]) -> None:
        names, labels = loose, None
        if classes:
            names, labels = [], []
            for label, folder in enumerate(classes):
                found = sorted(_images_below(self.path, folder))
                names += found
                labels += [label] * len(found)
            self.classes, self.fields = classes, ("image", "label")
        sizes = (os.path.getsize(self.path / name) for name in names)
        self.fingerprint = fingerprint_of(f"{n} {s}" for n, s in zip(names, sizes))
        self.groups = [len(names)]
        # Arrays, not lists: a list's reference counts make every forked worker copy its pages.
        encoded = [os.fsencode(name) for name in names]
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        self._names = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._labels = None if labels is None else np.array(labels, dtype=np.int32)

    def __getitem__(self, index: int) -> dict:
        start = self._ends[index - 1] if index else 0
        name = os.fsdecode(self._names[start : self._ends[index]].tobytes())
        sample = {"key": name, "image": (self.path / name).read_bytes()}
        return sample if self._labels is None else sample | {"label": self.label(index)}

    def label(self, index: int) -> int:
        return int(self._labels[index])


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def _images_below(path: Path, folder: str) -> Iterator[str]:
    for at, _, names in os.walk(path / folder):
        inside = os.path.relpath(at, path)
        yield from (os.path.join(inside, name) for name in names if _is_image(name))
