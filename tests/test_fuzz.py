"""Random data of strangers: damaged tars, sidecars, Parquet files and cards, and values of every kind in
whole ones. Each input is read, sample by sample, or refused by its name; nothing else may happen.

`make test-faults` tries thousands of each family, in processes of their own, whose memory is bounded.
"""

import json
import math
import random
import resource
import shutil
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import processes
from test_sources import jpeg, write_tar

from prepretrain import plugin
from prepretrain.data.card import load_card
from prepretrain.data.loader import evaluation_batches
from prepretrain.data.transforms import decode

LONGEST = 60  # seconds that an input may take
MEMORY = 3_000_000_000  # bytes that a process may grow by

VALUES = [
    *(None, True, 0, 1, -1, 2.0, 0.5, math.nan, math.inf, 10**20, 2**63, -(2**63)),
    *("", " ", "a b", "#a#b", "\ud83d", "\ufeffa", "[" * 2000, '["a", 1]', "3", "9" * 5000, "\0"),
    *([], ["a"], ["a", None], [1], [[]], [{}], {}, {"raw": "a"}, {"bytes": "a"}),
]


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The bytes with one to four flaws: flipped, overwritten, cut, lost, doubled or joined ones."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        length = rng.choice([1, 8, 100, 512, 1024])
        flaw = rng.randrange(7)
        if flaw == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif flaw == 1:
            data[at : at + length] = rng.randbytes(length)
        elif flaw == 2:
            data[at : at + length] = bytes(length)
        elif flaw == 3:
            del data[at : at + length]
        elif flaw == 4:
            data[at:at] = data[at : at + length]
        elif flaw == 5 and rng.random() < 0.3:
            del data[at:]
        elif at < len(data):  # where numbers are written
            data[at] = rng.choice(b'\0\xff019-+ /.{}[]"')
    return bytes(data)


def tar(rng: random.Random) -> list[tuple[str, bytes]]:
    """The members of a small shard, with odd names and values among them."""
    members = []
    for number in range(rng.randint(1, 4)):
        key = rng.choice(["", "./", "d/", "__MACOSX/", "._"]) + str(number)
        details = {name: rng.choice(VALUES) for name in ("hashtags", "captions", "url")}
        files = [
            (f"{key}.{rng.choice(['jpg', 'png', 'gif', 'heic', 'JPEG'])}", jpeg(number, 8)),
            (f"{key}.json", json.dumps(details).encode()),
            (f"{key}.cls", rng.choice([b"1", b"-1", b"x", b"9" * 30, b"", b"\xff"])),
            (f"{key}.txt", rng.choice([b"a", b"", b"\xff\xfe", b"\xef\xbb\xbfa", b"\0"])),
        ]
        members += [file for file in files if rng.random() < 0.8]
    return members


def a_tar(folder: Path, rng: random.Random) -> tuple[str, dict]:
    path = write_tar(folder / "x.tar", tar(rng), format=rng.randrange(3))
    if rng.random() < 0.7:
        path.write_bytes(damaged(path.read_bytes(), rng))
    return "shards", {"path": str(path)}


TYPES = [
    *(pa.int64(), pa.int8(), pa.float32(), pa.bool_(), pa.string(), pa.binary(), pa.null()),
    *(pa.list_(pa.string()), pa.list_(pa.int64()), pa.struct({"raw": pa.string()})),
    *(pa.dictionary(pa.int8(), pa.string()), pa.large_list(pa.large_string()), pa.date32()),
]


def a_sidecar(folder: Path, rng: random.Random) -> tuple[str, dict]:
    path = write_tar(folder / "x.tar", tar(rng))
    try:
        plugin.build("sources", "shards", path=str(path))
    except ValueError:  # a key that comes twice
        return "shards", {"path": str(path)}
    index = folder / "x.tar.index"
    if rng.random() < 0.5:
        index.write_bytes(damaged(index.read_bytes(), rng))
    else:
        line, _, body = index.read_bytes().partition(b"\n")
        head = json.loads(line)
        head[rng.choice(list(head))] = rng.choice(VALUES)
        index.write_bytes(json.dumps(head).encode() + b"\n" + body)
    return "shards", {"path": str(path)}


TEXTS = [pa.string(), pa.list_(pa.string()), pa.large_list(pa.large_string()), pa.binary()]
USUAL = {
    "label": [pa.int64(), pa.int8(), pa.float32(), pa.bool_(), pa.null()],
    "text": [pa.string(), pa.binary(), pa.dictionary(pa.int8(), pa.string())],
    "captions": TEXTS,
    "hashtags": TEXTS,
    "path": [pa.string(), pa.binary(), pa.int64(), pa.date32()],
}


def a_parquet(folder: Path, rng: random.Random) -> tuple[str, dict]:
    rows = rng.randint(1, 5)
    images = [rng.choice([jpeg(i, 8), b"", None]) for i in range(rows)]
    if rng.random() < 0.5:
        images = [{"bytes": image, "path": "x"} for image in images]
    columns = {"image": pa.array(images)}
    for name, usual in USUAL.items():
        kind = rng.choice(TYPES if rng.random() < 0.05 else usual)
        for _ in range(20):  # until there are values of that type
            try:
                columns[name] = pa.array([rng.choice(VALUES) for _ in range(rows)], kind)
                break
            except (pa.ArrowException, TypeError, ValueError, OverflowError):
                columns[name] = pa.nulls(rows, kind)
    how = {"compression": rng.choice(["snappy", "none", "zstd", "gzip"])}
    path = folder / "x.parquet"
    pq.write_table(pa.table(columns), path, row_group_size=2, write_page_checksum=True, **how)
    if rng.random() < 0.6:
        path.write_bytes(damaged(path.read_bytes(), rng))
    return "parquet", {"path": str(path)}


def a_card(folder: Path, rng: random.Random) -> tuple[str, dict]:
    """A card, some of whose values are others, or whose text is damaged."""
    for name in ("photos/cat/1.jpg", "photos/dog/2.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(1, 8))
    (folder / "list.txt").write_text(
        rng.choice(["cat/1.jpg 0\n", "cat/1.jpg\n", "x 99999999999 \0"])
    )
    photos = f"{folder}/photos"
    card = {"train": {"source": "folder", "path": photos}, "val": {"source": "folder"}}
    card["val"]["path"] = rng.choice(
        [photos, photos, f"{folder}/*", [f"{folder}/{{0..2}}"], "a{,b}"]
    )
    card |= {"classes": ["cat", "dog"], "licence": "x"}
    if rng.random() < 0.3:
        card["val"] |= {"source": "listed", "listing": f"{folder}/list.txt"}
    for place in (card, card["train"], card["val"]):
        if rng.random() < 0.25:
            place[rng.choice([*place, "names", "templates", "groups", "labels", "border"])] = (
                rng.choice([*VALUES, {"of": "demo", "classes": [1]}, ["{}"]])
            )
    try:
        text = yaml.safe_dump(card)
    except yaml.YAMLError:
        text = repr(card)
    written = text.encode(errors="replace")
    (folder / "card.yaml").write_bytes(damaged(written, rng) if rng.random() < 0.25 else written)
    return "card", {"path": str(folder / "card.yaml")}


FAMILIES = {"tar": a_tar, "sidecar": a_sidecar, "parquet": a_parquet, "card": a_card}


def opened(kind: str, options: dict) -> list:
    """The sources that an input gives."""
    if kind != "card":
        return [plugin.build("sources", kind, **options)]
    card = load_card(options["path"])
    return [card.open(split) for split in card.splits]


def pixels(sample: dict) -> dict:
    """A transform that looks at all that a sample holds."""
    decode(sample["image"])
    for name in ("text", "captions", "hashtags"):
        assert all(isinstance(text, str) for text in sample.get(name, ()))
    assert type(sample.get("label", 0)) is int
    return {"label": sample.get("label", 0)}


def outcome(family: str, seed: int, folder: Path) -> str:
    """What becomes of one input: it is refused, or each of its samples is read or left out."""
    rng = random.Random(f"{family} {seed}")
    kind, options = FAMILIES[family](folder, rng)
    try:
        sources = opened(kind, options)
    except ValueError as error:
        assert folder.name in str(error) or "mine" in str(error), f"names no file: {error}"
        return "refused"
    seen = Counter()
    for source in sources:
        if not len(source):
            continue
        try:
            for batch in evaluation_batches(source, pixels, batch_size=8, leave_out=True):
                seen.update(
                    batch["mask"].tolist()[: sum(place >= 0 for place in batch["position"])]
                )
        except ValueError as error:
            assert "none of the" in str(error), error
            seen[False] += len(source)
    assert sum(seen.values()) == sum(map(len, sources)), "samples were lost"
    return "all read" if not seen[False] else "some bad"


def _try(rank: int, family: str, first: int, count: int, where: str) -> None:
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found, slowest = Counter(), 0.0
    for seed in range(first, first + count):
        folder = Path(where, f"{family}{seed}")
        folder.mkdir()
        begin = time.monotonic()
        try:
            found[outcome(family, seed, folder)] += 1
        except Exception as error:
            raise AssertionError(f"outcome({family!r}, {seed}, …): {error!r}") from error
        slowest = max(slowest, time.monotonic() - begin)
        shutil.rmtree(folder)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - size
    assert slowest < LONGEST and grown < MEMORY, f"{slowest} s, {grown} bytes"
    assert len(found) > 1, found  # some of them are read
    Path(where, "said").write_text(f"{dict(found)}, {slowest:.2f} s at most, {grown >> 20} MiB")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_strangers_wrote_is_read_or_refused_by_name(family, tmp_path):
    _try(0, family, 0, 40, str(tmp_path))


@pytest.mark.faults
@pytest.mark.parametrize("family", FAMILIES)
def test_of_thousands_of_inputs_none_is_lost_or_ends_a_process(family, tmp_path):
    processes(1, _try, family, 40, 7000, str(tmp_path))
    print(family, Path(tmp_path, "said").read_text())
