"""Which images of a training set a low-shot evaluation learns from: drawn by a seed, or those of
published lists."""

import glob
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prepretrain.data.sources.base import Source
from prepretrain.distributed import group as distributed

SHOWN = 20  # names in an error; all of them are in a file


def choose(
    labels: Tensor,
    classes: int,
    shots: int,
    seed: int,
    *,
    at_most: bool = False,
    data: str = "the data",
) -> Tensor:
    """Positions of `shots` images of each class, a pure function of the labels, `shots` and
    `seed`."""
    sizes = torch.bincount(labels, minlength=classes).tolist()
    if not at_most:
        few = [c for c, size in enumerate(sizes) if size < shots]
        if few:
            raise ValueError(
                f"lowshot.shots: {data}:train has fewer than {shots} images in {len(few)} of "
                f"{classes} classes (class {few[0]} has {sizes[few[0]]}). Ask for "
                "fewer shots, or set lowshot.at_most=true to take what there is."
            )
    return _drawn(labels, sizes, [shots] * classes, seed)


def choose_percent(labels: Tensor, classes: int, percent: float, seed: int) -> Tensor:
    """Positions of that share of each class, rounded, and at least one image of it. The choice for
    less is part of that for more, and of `choose`'s for more."""
    sizes = torch.bincount(labels, minlength=classes).tolist()
    return _drawn(labels, sizes, [max(1, round(size * percent / 100)) for size in sizes], seed)


def _drawn(labels: Tensor, sizes: list[int], counts: list[int], seed: int) -> Tensor:
    by_class = torch.argsort(labels, stable=True).split(sizes)
    taken = [
        rows[torch.from_numpy(_generator(seed, c).permutation(len(rows))[:count])]
        for c, (rows, count) in enumerate(zip(by_class, counts))
    ]
    return torch.cat(taken)


def _generator(seed: int, label: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=(seed << 32) + label))


def read_lists(where: str) -> dict[str, list[str]]:
    """The names in each list of a folder (`*.txt`, below it too), a file or a glob pattern, one name
    a line, by the list's path. Raises ValueError for none, an empty one, or a name twice in one."""
    folder = Path(where).is_dir()
    paths = sorted(Path(where).rglob("*.txt") if folder else map(Path, glob.glob(where)))
    if not paths:
        raise ValueError(f"lowshot.lists: {where}: there is no list here (*.txt, or a pattern).")
    lists = {}
    for path in paths:
        names = path.read_text().split()
        if not names or len(set(names)) < len(names):
            twice = next((n for n in names if names.count(n) > 1), None)
            what = f"names {twice} twice" if names else "is empty"
            raise ValueError(f"lowshot.lists: {path} {what}. Correct the list.")
        lists[str(path)] = names
    return lists


def find(source: Source, lists: dict[str, list[str]], *, data: str, folder: Path) -> dict:
    """Positions of each list's images, found by the name of the file, with or without its extension,
    or by the whole key.

    data: what errors call the source. Raises one ValueError for all names that are not there, or are
    there more than once, and writes them to `<folder>/missing.txt`.
    """
    wanted = {name for names in lists.values() for name in names}
    by_name: dict[str, list[int]] = {name: [] for name in wanted}
    bare = {name.rpartition(".")[0]: name for name in wanted}  # the keys of shards
    for index in range(len(source)):
        key = source.key(index)
        last = key.rpartition("/")[2]
        name = next((n for n in (key, last, bare.get(key), bare.get(last)) if n in wanted), None)
        if name is not None:
            by_name[name].append(index)
    _check_found(by_name, data, folder, list(lists))
    return {
        path: torch.tensor([by_name[name][0] for name in names]) for path, names in lists.items()
    }


def _check_found(by_name: dict[str, list[int]], data: str, folder: Path, paths: list[str]) -> None:
    wrong = [f"{name} ({len(at)} times)" if at else name for name, at in by_name.items()]
    wrong = sorted(w for w, at in zip(wrong, by_name.values()) if len(at) != 1)
    if wrong:
        report = folder / "missing.txt"
        if distributed.is_main():
            folder.mkdir(parents=True, exist_ok=True)
            report.write_text("\n".join(wrong) + "\n")
        more = f", … (all in {report})" if len(wrong) > SHOWN else ""
        raise ValueError(
            f"lowshot.lists: {data}: {len(wrong)} of the {len(by_name)} images named in "
            f"{len(paths)} lists ({paths[0]}, …) are not there exactly once: "
            f"{', '.join(wrong[:SHOWN])}{more}. Complete the data, or leave those lists out."
        )


def per_class(labels: Tensor, classes: int) -> tuple[int, int]:
    """(fewest, most) images that these labels hold of a class."""
    sizes = torch.bincount(labels, minlength=classes)
    return int(sizes.min()), int(sizes.max())
