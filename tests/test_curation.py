"""Curation: a table for each shard and stage, the same bytes whoever makes them."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from prepretrain.curation import commands
from prepretrain.curation.engine import Machines

pytest.importorskip("datatrove", reason="the extra `data` is not installed")
HERE = Machines()


def jpeg(seed: int, size: tuple[int, int] = (48, 40)) -> bytes:
    """A smooth picture of its own for each seed."""
    coarse = np.random.default_rng(seed).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


def write_shard(path: Path, samples: list[dict[str, bytes]], keys: list[str] | None = None) -> None:
    """A tar of samples {ending: bytes}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, sample in enumerate(samples):
            key = keys[number] if keys else f"{number:04d}"
            for ending, data in sample.items():
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def write_yaml(path: Path, content: dict) -> str:
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(path)


@pytest.fixture
def card(tmp_path) -> str:
    """A card of three shards of four images; the last image of each shard is the same."""
    for shard in range(3):
        samples = [
            {"jpg": jpeg(99 if row == 3 else 10 * shard + row), "txt": f"picture {row}".encode()}
            for row in range(4)
        ]
        write_shard(tmp_path / "shards" / f"{shard:05d}.tar", samples)
    split = {"source": "shards", "path": str(tmp_path / "shards")}
    return write_yaml(tmp_path / "card.yaml", {"train": split})


def recipe(folder: Path, **stages: dict) -> str:
    return write_yaml(folder / "recipe.yaml", stages)


def tables(out: Path) -> dict[str, bytes]:
    """The bytes of all tables."""
    return {str(f.relative_to(out)): f.read_bytes() for f in sorted(out.rglob("[0-9]*.parquet"))}


def column(out: Path, table: str, name: str) -> list:
    """A column of all shards' tables, one after another."""
    files = sorted((out / table).glob("*.parquet"))
    return [value for file in files for value in pq.read_table(file)[name].to_pylist()]


EXACT = """
import pyarrow as pa
from prepretrain.curation.stages.base import Stage

class Exact(Stage):
    kind = "reduce"
    reads = {"meta": ("sha256",)}
    columns = {"reason": pa.string()}

    def reduce(self, tables):
        return tables.query(
            "SELECT shard, row, 'copy' AS reason FROM meta "
            "QUALIFY row_number() OVER (PARTITION BY sha256 ORDER BY shard, row) > 1"
        )
"""


def test_a_reduction_sees_all_shards_and_what_is_kept_says_why(card, tmp_path, monkeypatch):
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab/exact.py").write_text(EXACT)
    monkeypatch.syspath_prepend(tmp_path)
    copies = {"name": "lab.exact"}
    stages = {"meta": {}, "copies": copies, "keep": {"name": "decide", "reasons": ["copies"]}}
    commands.run(card, recipe(tmp_path, **stages), tmp_path / "out", None, HERE)
    reasons = column(tmp_path / "out", "keep", "reason")
    assert reasons == [None] * 7 + ["copies: copy"] + [None] * 3 + ["copies: copy"]
    assert column(tmp_path / "out", "keep", "weight") == [float(r is None) for r in reasons]
    assert column(tmp_path / "out", "keep", "row") == [0, 1, 2, 3] * 3


def test_two_and_four_workers_write_the_bytes_of_one(card, tmp_path):
    chosen = recipe(tmp_path, meta={}, keep={"name": "decide", "reasons": []})
    made = []
    for workers in (1, 2, 4):
        out = tmp_path / f"out{workers}"
        commands.run(card, chosen, out, None, Machines(workers=workers))
        made.append(tables(out))
    assert len(made[0]) == 6
    assert made[0] == made[1] == made[2]
