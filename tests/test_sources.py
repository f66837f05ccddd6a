import io
import json
import os
import resource
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import processes
from PIL import Image

from prepretrain import plugin
from prepretrain.data.loader import Stream
from prepretrain.data.shards import opened, tar_index
from prepretrain.data.transforms import BadImage, decode


def jpeg(seed=0, size=16):
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def write_tar(path, members, **options):
    """A tar of (name, bytes) in this order."""
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(key, *, image=True, tags=("red",), text="a thing", label=3):
    members = [(f"{key}.jpg", jpeg(len(key)))] if image else []
    if label is not None:
        members.append((f"{key}.cls", str(label).encode()))
    members.append(
        (f"{key}.json", json.dumps({} if tags is None else {"hashtags": list(tags)}).encode())
    )
    return members + [(f"{key}.txt", text.encode())]


def flat(*samples):
    return [member for one in samples for member in one]


def open_shards(path, **options):
    return plugin.build("sources", "shards", path=str(path), **options)


@pytest.fixture
def two_shards(tmp_path):
    for shard in range(2):
        write_tar(
            tmp_path / f"0000{shard}.tar",
            flat(*(sample(f"{shard}{i}", label=i, tags=[f"t{i}"]) for i in range(5 - shard))),
        )
    return tmp_path


# Shards: what is read.


def test_shards_give_the_fields_of_every_image_in_order(two_shards):
    source = open_shards(two_shards)
    assert len(source) == 9 and source.groups == [5, 4]
    assert set(source.fields) == {"image", "label", "hashtags", "text"}
    assert [source[i]["key"] for i in range(9)] == [
        "00",
        "01",
        "02",
        "03",
        "04",
        "10",
        "11",
        "12",
        "13",
    ]
    assert source[7] | {"image": None} == {
        "key": "12",
        "image": None,
        "label": 2,
        "hashtags": ["t2"],
        "text": "a thing",
    }
    assert decode(source[7]["image"]).shape == (3, 16, 16)
    assert source.label(7) == 2 and source.hashtags(7) == ["t2"]
    with pytest.raises(IndexError):
        source[9]


@pytest.mark.parametrize("path", ["", "*.tar", "{00000..00001}.tar", "0000[01].tar"])
def test_shards_are_named_by_folder_glob_or_range(two_shards, path):
    assert len(open_shards(two_shards / path)) == 9


@pytest.mark.parametrize(
    "path, message",
    [
        ("{00000..00002}.tar", "00002.tar: there is no such .tar shard"),
        ("no*.tar", "no .tar"),
        ("{00003..00001}.tar", "range .* is empty"),
        ("none.tar", "no such .tar shard"),
    ],
)
def test_missing_shards_are_an_error_that_names_them(two_shards, path, message):
    with pytest.raises(ValueError, match=message):
        open_shards(two_shards / path)


def test_parquet_files_of_a_store_are_refused():
    with pytest.raises(ValueError, match="s3://bucket/x.parquet: .*local"):
        plugin.build("sources", "parquet", path="s3://bucket/x.parquet")


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no .tar shard"):
        open_shards(tmp_path)


def test_keys_end_at_the_last_dot_so_that_no_two_images_merge(tmp_path):
    write_tar(
        tmp_path / "x.tar",
        [
            ("a/img.v1.jpg", jpeg(1)),
            ("a/img.v1.txt", b"one"),
            ("a/img.v2.jpg", jpeg(2)),
            ("a/img.v2.txt", b"two"),
        ],
    )
    source = open_shards(tmp_path)
    assert [(source[i]["key"], source[i]["text"]) for i in range(2)] == [
        ("a/img.v1", "one"),
        ("a/img.v2", "two"),
    ]
    assert source[0]["image"] == jpeg(1) and source[1]["image"] == jpeg(2)


def test_only_known_fields_are_read_and_no_pickle_is_ever_opened(tmp_path):
    write_tar(
        tmp_path / "x.tar",
        [
            ("a.jpg", jpeg()),
            ("a.pkl", b"cos\nsystem\n(S'false'\ntR."),
            ("a.pyd", b"x"),
            ("README", b"x"),
            ("b.pth", b"x"),
        ],
    )
    source = open_shards(tmp_path)
    assert len(source) == 1 and source[0].keys() == {"key", "image"}
    assert source.fields == ("image",)


def test_hashtags_text_and_label_are_found_where_the_options_say(tmp_path):
    details = json.dumps({"caption": "hello", "tags": "#a, b c", "class": "7"}).encode()
    write_tar(tmp_path / "x.tar", [("1.png", jpeg()), ("1.json", details), ("1.txt", b"x y")])
    source = open_shards(tmp_path, hashtags="json.tags", text="json.caption", label="json.class")
    assert source[0] | {"image": 0} == {
        "key": "1",
        "image": 0,
        "hashtags": ["#a", "b", "c"],
        "text": "hello",
        "label": 7,
    }
    assert open_shards(tmp_path, hashtags="txt")[0]["hashtags"] == ["x", "y"]
    with pytest.raises(ValueError, match="source.text: 'caption' is no place"):
        open_shards(tmp_path, text="caption")


def test_a_sample_without_tags_has_an_empty_list_and_without_a_text_an_empty_one(tmp_path):
    write_tar(
        tmp_path / "x.tar",
        flat(sample("a"), sample("b", tags=None, label=None), [("c.jpg", jpeg())]),
    )
    source = open_shards(tmp_path)
    assert source[1]["hashtags"] == source[2]["hashtags"] == []
    assert source[2]["text"] == "" and "label" not in source[2]


def test_a_sample_without_an_image_is_a_bad_image_with_its_key(tmp_path):
    write_tar(tmp_path / "x.tar", flat(sample("a"), sample("b", image=False)))
    source = open_shards(tmp_path)
    with pytest.raises(BadImage, match="b: no image") as caught:
        source[1]
    assert (caught.value.cause, caught.value.key) == ("no image", "b")


@pytest.mark.parametrize(
    "member",
    [
        ("a.json", b"{"),
        ("a.json", b"[1]"),
        ("a.json", b'{"hashtags": 3}'),
        ("a.cls", b"dog"),
        ("a.txt", b"\xff\xfe"),
    ],
)
def test_unreadable_metadata_is_a_bad_image(tmp_path, member):
    write_tar(tmp_path / "x.tar", flat([("a.jpg", jpeg()), member], sample("b")))
    source = open_shards(tmp_path)
    with pytest.raises(BadImage) as caught:
        source[0]
    assert (caught.value.cause, caught.value.key) == ("bad metadata", "a")
    assert source[1]["key"] == "b"


def test_a_member_past_the_size_limit_is_not_read(tmp_path, monkeypatch):
    write_tar(tmp_path / "x.tar", [("a.jpg", jpeg() + b"\0" * 5000)])
    monkeypatch.setattr(opened, "MAX_MEMBER", 4000)
    with pytest.raises(BadImage) as caught:
        open_shards(tmp_path)[0]
    assert caught.value.cause == "too large"


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_dialect_is_read_with_long_and_foreign_names(tmp_path, format):
    names = ["d/" * 30 + "x" * 60, "süß/東京" if format != tarfile.USTAR_FORMAT else "plain"]
    if format != tarfile.USTAR_FORMAT:
        names.append("long" * 80)
    write_tar(tmp_path / "x.tar", flat(*(sample(name) for name in names)), format=format)
    source = open_shards(tmp_path)
    assert [source[i]["key"] for i in range(len(source))] == names


# Shards: what is rejected, with file and offset.


def broken(tmp_path, change, *, members=None):
    path = write_tar(tmp_path / "x.tar", members or flat(*(sample(str(i)) for i in range(4))))
    data = bytearray(path.read_bytes())
    path.write_bytes(change(data))
    return path


def header(data, number):
    """The offset of the n-th member's header."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getmembers()[number].offset


def flip_header(data):
    data[header(data, 5) + 3] ^= 1
    return data


def zero_block(data):
    at = header(data, 5)
    data[at : at + 1024] = bytes(1024)
    return data


def one_zero_block(data):
    at = header(data, 5)
    data[at : at + 512] = bytes(512)
    return data


@pytest.mark.parametrize(
    "change, message, offset",
    [
        (flip_header, "bad header", lambda d: header(d, 5)),
        (lambda d: d[: header(d, 5)], "end marker is missing", lambda d: header(d, 5)),
        (lambda d: d[: header(d, 4) + 600], "goes past the end", lambda d: header(d, 4)),
        (lambda d: d[: header(d, 5) + 100], "end marker is missing", lambda d: header(d, 5)),
        (zero_block, "not zero after the end marker", lambda d: header(d, 5) + 1024),
        (one_zero_block, "not zero after the end marker", lambda d: header(d, 5) + 512),
        (lambda d: d + b"\0" * 100 + b"x", "not zero after the end marker", lambda d: len(d) + 100),
        (lambda d: d + d, "not zero after the end marker", lambda d: len(d)),
        (lambda d: b"", "file is empty", lambda d: 0),
        (lambda d: b"\0" * 512, "truncated", lambda d: 0),
        (lambda d: b"not a tar at all" * 100, "bad header", lambda d: 0),
    ],
    ids=[
        "header",
        "cut between",
        "cut inside",
        "cut header",
        "zeros",
        "zero block",
        "tail",
        "joined",
        "empty",
        "half end",
        "no tar",
    ],
)
def test_a_damaged_shard_is_rejected_with_file_and_offset(tmp_path, change, message, offset):
    whole = flat(*(sample(str(i)) for i in range(4)))
    intact = bytearray(write_tar(tmp_path / "intact", whole).read_bytes())
    path = broken(tmp_path, change, members=whole)
    with pytest.raises(ValueError, match=message) as caught:
        open_shards(path)
    assert str(caught.value).startswith(f"{path}: at offset {offset(intact)}")
    assert not path.with_name("x.tar.index").exists()


def test_a_shard_cut_in_the_middle_of_its_data_is_rejected(tmp_path):
    big = [("a.jpg", jpeg(size=200))]
    path = broken(tmp_path, lambda d: d[:3000], members=big)
    with pytest.raises(ValueError, match=r"at offset 0: member 'a.jpg' of \d+ bytes goes past"):
        open_shards(path)


@pytest.mark.parametrize(
    "members, message",
    [
        ([("a.jpg", b"1"), ("b.jpg", b"1"), ("a.txt", b"1")], "the key 'a' comes back"),
        ([("a.jpg", b"1"), ("a.jpg", b"2")], "a second jpg for the key 'a'"),
        ([("a.jpg", b"1"), ("a.png", b"2")], "a second png for the key 'a'"),
    ],
)
def test_members_that_would_merge_or_split_images_are_rejected(tmp_path, members, message):
    with pytest.raises(ValueError, match=message):
        open_shards(write_tar(tmp_path / "x.tar", members))


def test_a_link_is_rejected(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(ValueError, match="only files are read"):
        open_shards(tmp_path)


def forged(name=b"a.bin", size=b"%011o\0" % 0, kind=b"0"):
    """A tar header with a right checksum, whatever it says."""
    block = bytearray(512)
    block[: len(name)], block[124:136], block[156:157] = name, size, kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b"%06o\0 " % (sum(block) + 8 * 32)
    return bytes(block)


@pytest.mark.parametrize(
    "size",
    [b"-0000001000\0", b"-1\0".rjust(12), b"size=x".ljust(12), b"0o17".ljust(12), b"1_0".ljust(12)]
    + [b"\xff" * 12, b"\x81" + b"\0" * 11, b"9".rjust(12)],
)
@pytest.mark.parametrize("name", [b"a.bin", b"a.jpg"])
def test_a_size_that_is_no_number_is_refused_at_its_offset(tmp_path, name, size):
    path = tmp_path / "x.tar"
    path.write_bytes(forged(name, size) + b"\0" * 2048)
    with pytest.raises(ValueError, match="x.tar: at offset 0: a member with the size"):
        tar_index.walk(path)


@pytest.mark.parametrize("size", ["-1000", "1e3", "0x10", "9" * 30, " 5"])
def test_a_pax_size_that_is_no_number_is_refused(tmp_path, size):
    line = f" size={size}\n"
    record = f"{len(line) + 2}{line}".encode()
    body = forged(kind=b"x", size=b"%011o\0" % len(record)) + record.ljust(512, b"\0")
    (tmp_path / "x.tar").write_bytes(body + forged() + b"\0" * 1024)
    with pytest.raises(ValueError, match="x.tar: at offset 0: a member with the size"):
        tar_index.walk(tmp_path / "x.tar")


def test_extended_headers_take_a_time_in_proportion_to_their_length(tmp_path):
    path = tmp_path / "x.tar"
    for count, refused in ((200_000, False), (400_000, True)):
        records = b"4 =\n" * count  # a copy of the rest for each would be 80 GB
        size = b"%011o\0" % len(records)
        body = forged(kind=b"x", size=size) + records + b"\0" * (-len(records) % 512)
        path.write_bytes(body + forged() + b"\0" * 1024)
        if refused:
            with pytest.raises(ValueError, match="extended header of 1600000 bytes; the limit"):
                tar_index.walk(path)
        else:
            assert tar_index.walk(path) == ([], [], {})


@pytest.mark.parametrize(
    "records", [b"3 =", b"0 a=b\n", b"99 a=b\n", b"-6 a=b\n", b"6 a=bX", b"a=b\n"]
)
def test_a_bad_extended_header_is_refused(tmp_path, records):
    body = forged(kind=b"x", size=b"%011o\0" % len(records)) + records.ljust(512, b"\0")
    (tmp_path / "x.tar").write_bytes(body + forged() + b"\0" * 1024)
    with pytest.raises(ValueError, match="at offset 0: a bad extended header"):
        tar_index.walk(tmp_path / "x.tar")


# Shards: the sidecar.


def test_the_index_is_written_once_and_again_when_the_shard_changed(two_shards, monkeypatch):
    open_shards(two_shards)
    assert (two_shards / "00000.tar.index").exists()
    walks = []
    walk = tar_index.walk
    monkeypatch.setattr(tar_index, "walk", lambda path: walks.append(path.name) or walk(path))
    open_shards(two_shards)
    assert walks == []
    write_tar(two_shards / "00001.tar", flat(sample("new")))
    os.utime(two_shards / "00001.tar", ns=(1, 1))
    source = open_shards(two_shards)
    assert walks == ["00001.tar"] and len(source) == 6 and source[5]["key"] == "new"


@pytest.mark.parametrize("content", [b"", b"{}\n", b"junk", b'{"version": 1}\n' + b"\0" * 90])
def test_a_damaged_index_is_built_again(two_shards, content):
    before = open_shards(two_shards).fingerprint
    (two_shards / "00000.tar.index").write_bytes(content)
    assert open_shards(two_shards).fingerprint == before
    whole = (two_shards / "00000.tar.index").read_bytes()
    (two_shards / "00000.tar.index").write_bytes(whole[:-3])
    assert open_shards(two_shards)[0]["key"] == "00"
    assert (two_shards / "00000.tar.index").read_bytes() == whole


def test_an_index_in_which_a_byte_changed_is_built_again(two_shards):
    before = [(one["key"], one["label"], one["image"]) for one in open_shards(two_shards)]
    index, draws = two_shards / "00000.tar.index", np.random.default_rng(0)
    whole = index.read_bytes()
    for number in range(60):
        content = bytearray(whole)
        content[draws.integers(len(content))] ^= 1 << draws.integers(8)
        index.write_bytes(content)
        os.utime(index, ns=(number, number))  # within a tick of the clock two files look alike
        source = open_shards(two_shards)
        assert [(one["key"], one["label"], one["image"]) for one in source] == before
    assert index.read_bytes() == whole


def test_two_spans_of_an_index_that_were_exchanged_are_noticed(two_shards):
    index = two_shards / "00000.tar.index"
    labels = [open_shards(two_shards).label(i) for i in range(5)]
    content = bytearray(index.read_bytes())
    start = content.index(b"\n") + 1
    column = sorted(
        json.loads(content[:start])["fields"].index("cls") * 16 + start + row for row in (0, 64)
    )
    for at in range(16):
        first, second = column[0] + at, column[1] + at
        content[first], content[second] = content[second], content[first]
    index.write_bytes(content)
    assert [open_shards(two_shards).label(i) for i in range(5)] == labels


@pytest.mark.parametrize(
    "span", [(-1, 5), (600, -5), (1 << 40, 5), (600, 1 << 40), (600, (1 << 63) - 1)]
)
def test_an_index_that_names_bytes_outside_of_its_shard_is_built_again(
    two_shards, span, monkeypatch
):
    index = two_shards / "00000.tar.index"
    packed, whole = tar_index._packed, [open_shards(two_shards)[i]["image"] for i in range(5)]
    walk = tar_index.walk

    def spans(path):
        keys, found, others = walk(path)
        return keys, [{**fields, "jpg": span} for fields in found], others

    with monkeypatch.context() as patch:
        patch.setattr(tar_index, "walk", spans)
        index.write_bytes(
            packed(two_shards / "00000.tar", tar_index._asked(two_shards / "00000.tar"))
        )
    assert [open_shards(two_shards)[i]["image"] for i in range(5)] == whole


def test_where_the_folder_cannot_be_written_the_index_goes_to_the_cache(
    two_shards, monkeypatch, tmp_path_factory
):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    (two_shards / "00000.tar.index" / "blocked").mkdir(parents=True)
    (two_shards / "00001.tar.index" / "blocked").mkdir(parents=True)
    assert open_shards(two_shards)[8]["key"] == "13"
    assert len(list((cache / "prepretrain" / "index").iterdir())) == 2
    monkeypatch.setattr(tar_index, "walk", None)
    assert len(open_shards(two_shards)) == 9


def test_the_fingerprint_is_the_datas_not_the_paths(two_shards, tmp_path_factory):
    first = open_shards(two_shards).fingerprint
    moved = tmp_path_factory.mktemp("elsewhere")
    for number, name in enumerate(["a.tar", "b.tar"]):
        (moved / name).write_bytes((two_shards / f"0000{number}.tar").read_bytes())
    assert open_shards(moved).fingerprint == first
    write_tar(moved / "b.tar", flat(sample("other")))
    assert open_shards(moved).fingerprint != first


def test_a_damaged_header_is_what_is_named_whatever_its_values_lead_to(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, [("a.jpg", jpeg(1)), ("b.jpg", jpeg(2))])
    whole, second = path.read_bytes(), 512 + -(-len(jpeg(1)) // 512) * 512
    for place in range(124, 157):  # size, time of change, checksum and type
        data = bytearray(whole)
        data[second + place] ^= 4
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"at offset {second}: a bad header"):
            tar_index.walk(path)


def _read_within(_: int, files: tuple[int, int], folder: Path, still_open: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, files)
    source = open_shards(folder)
    for _ in range(2):
        assert [source[i]["key"] for i in range(30)] == [f"{i:02d}" for i in range(30)]
    assert len(source._opened) == still_open
    for _ in range(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2):
        os.open(folder, os.O_RDONLY)  # half of them are left to others


@pytest.mark.parametrize(("files", "still_open"), [((40, 400), 30), ((160, 160), 20)])
def test_as_many_shards_stay_open_as_the_limit_of_files_bears(tmp_path, files, still_open):
    for i in range(30):
        write_tar(tmp_path / f"{i:02d}.tar", [(f"{i:02d}.jpg", jpeg(i))])
    processes(1, _read_within, files, tmp_path, still_open)


def test_forked_workers_read_the_same_bytes_through_the_same_files(two_shards):
    source = open_shards(two_shards)
    size = lambda s: {"size": len(s["image"]), "label": s["label"]}
    rows = {}
    for workers in (0, 3):
        batches = Stream(source, size, batch_size=9, seed=0, workers=workers).batches()
        rows[workers] = [next(batches)["size"].tolist() for _ in range(6)]
    assert rows[0] == rows[3]


def test_a_shard_cut_while_it_is_read_is_an_error_not_a_bad_image(two_shards):
    source = open_shards(two_shards)
    source[0]
    os.truncate(two_shards / "00000.tar", 5000)
    with pytest.raises(OSError, match="00000.tar.*cut since it was opened"):
        source[4]


# Folders.


def test_a_folder_of_class_folders_is_labelled_in_sorted_order(tmp_path):
    for name in ("dog/1.jpg", "cat/deep/2.JPEG", "cat/1.png", "cat/.hidden.jpg", "cat/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(jpeg())
    source = plugin.build("sources", "folder", path=str(tmp_path))
    assert [(source[i]["key"], source[i]["label"]) for i in range(len(source))] == [
        ("cat/1.png", 0),
        ("cat/deep/2.JPEG", 0),
        ("dog/1.jpg", 1),
    ]
    assert source.classes == ["cat", "dog"] and source.fields == ("image", "label")
    turned = plugin.build("sources", "folder", path=str(tmp_path), classes=["dog", "cat"])
    assert [turned.label(i) for i in range(3)] == [0, 1, 1]
    assert turned.fingerprint != source.fingerprint
    with pytest.raises(ValueError, match="no folder for the classes bird.*cat, dog"):
        plugin.build("sources", "folder", path=str(tmp_path), classes=["bird", "dog"])


def test_loose_images_have_no_label_and_do_not_mix_with_classes(tmp_path):
    (tmp_path / "b.jpg").write_bytes(jpeg())
    (tmp_path / "a.jpg").write_bytes(jpeg())
    source = plugin.build("sources", "folder", path=str(tmp_path))
    assert [source[i]["key"] for i in range(2)] == ["a.jpg", "b.jpg"]
    assert source.fields == ("image",) and "label" not in source[0]
    (tmp_path / "cat").mkdir()
    with pytest.raises(ValueError, match=r"folders \(cat.*images \(a.jpg"):
        plugin.build("sources", "folder", path=str(tmp_path))
    with pytest.raises(ValueError, match="is no folder"):
        plugin.build("sources", "folder", path=str(tmp_path / "none"))


def put(folder, *names):
    for number, name in enumerate(names):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(jpeg(number))


def open_folder(path, **options):
    return plugin.build("sources", "folder", path=str(path), **options)


def test_folders_that_are_numbers_are_never_sorted_as_words(tmp_path):
    put(tmp_path, *(f"{number}/a.jpg" for number in range(11)))
    with pytest.raises(ValueError, match="'10' comes before '2'.*source.labels: number"):
        open_folder(tmp_path)
    source = open_folder(tmp_path, labels="number", classes=11)
    assert [(source.key(i), source.label(i)) for i in (2, 10)] == [("2/a.jpg", 2), ("10/a.jpg", 10)]
    listed = open_folder(tmp_path, classes=["10", "2"])
    assert [listed.key(i) for i in range(2)] == ["10/a.jpg", "2/a.jpg"]
    with pytest.raises(ValueError, match="source.labels: number orders the folders, and so does"):
        open_folder(tmp_path, labels="number", classes=["10", "2"])


@pytest.mark.parametrize(
    "folders, found", [(("0", "1", "3"), "3"), (("0", "n01"), "n01"), (("1", "2"), "2"), ((), "no")]
)
def test_labels_by_number_want_the_numbers_from_zero_without_a_gap(tmp_path, folders, found):
    put(tmp_path, *(f"{name}/a.jpg" for name in folders))
    with pytest.raises(ValueError, match=f"called 0, 1, 2, … without a gap, and there is {found}"):
        open_folder(tmp_path, labels="number")


@pytest.mark.parametrize(
    "names, found",
    [
        (("a/1.jpg", "b/1.jpg"), r"found 2 \(a, b\)"),
        (("1.jpg", "2.jpg"), r"found none, but 2 images that lie flat \(1.jpg, …\)"),
        (("n01.tar", "n02.tar"), r"found none, but 2 other files \(n01.tar, …\)"),
        ((), "found nothing"),
    ],
)
def test_a_wrong_layout_is_an_error_that_says_what_was_found(tmp_path, names, found):
    put(tmp_path, *names)
    with pytest.raises(ValueError, match=f"expected 1,000 folders, one a class, and {found}"):
        open_folder(tmp_path, classes=1000)


def test_the_border_is_cut_off_without_loss_and_counts_as_other_data(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    (tmp_path / "chair").mkdir()
    Image.fromarray(pixels).save(tmp_path / "chair" / "a.png")
    source = open_folder(tmp_path, border=2)
    inner = decode(source[0]["image"]).permute(1, 2, 0).numpy()
    assert (inner == pixels[2:-2, 2:-2]).all() and source[0]["label"] == 0
    assert source.fingerprint != open_folder(tmp_path).fingerprint
    with pytest.raises(BadImage, match="chair/a.png: all border"):
        open_folder(tmp_path, border=10)[0]
    (tmp_path / "chair" / "a.png").write_bytes(b"junk")
    with pytest.raises(BadImage, match="chair/a.png: "):
        open_folder(tmp_path, border=2)[0]
    with pytest.raises(ValueError, match="source.border: -1"):
        open_folder(tmp_path, border=-1)


# Lists.


def open_list(folder, text, name="list.txt", **options):
    (folder / name).write_text(text)
    options |= {"path": str(folder / "in"), "listing": str(folder / name)}
    return plugin.build("sources", "listed", **options)


def seen(source):
    return [(source.key(i), source[i]["label"]) for i in range(len(source))]


def test_a_list_of_paths_and_labels_is_read_in_its_order(tmp_path):
    put(tmp_path / "in", "a/1.jpg", "b/c/2 x.jpg", "d/3.jpg")
    source = open_list(tmp_path, "/d/3.jpg 7\nb/c/2 x.jpg 0\n\n")
    assert seen(source) == [("d/3.jpg", 7), ("b/c/2 x.jpg", 0)]
    assert source.fields == ("image", "label") and source[0]["image"] == jpeg(2)
    other = open_list(tmp_path, "d/3.jpg 6\nb/c/2 x.jpg 0\n")
    assert source.fingerprint != other.fingerprint


def test_a_list_of_paths_labels_by_folder_as_the_folder_source_does(tmp_path):
    put(tmp_path / "in", "apple_pie/1.jpg", "beignets/2.jpg", "waffles/3.jpg")
    source = open_list(tmp_path, "waffles/3\nbeignets/2\n", suffix=".jpg")
    assert seen(source) == [("waffles/3.jpg", 2), ("beignets/2.jpg", 1)]
    assert (
        source.classes
        == ["apple_pie", "beignets", "waffles"]
        == open_folder(tmp_path / "in").classes
    )


def naturalist(**changes):
    content = {
        "images": [{"id": 5, "file_name": "t/x.jpg"}, {"id": 3, "file_name": "t/y.jpg"}],
        "annotations": [{"image_id": 3, "category_id": 40}, {"image_id": 5, "category_id": 20}],
        "categories": [
            {"id": 40, "name": "owl"},
            {"id": 10, "name": "ant"},
            {"id": 20, "name": "bee"},
        ],
    }
    return json.dumps(content | changes)


def test_inaturalists_official_files_are_lists(tmp_path):
    put(tmp_path / "in", "t/x.jpg", "t/y.jpg")
    source = open_list(tmp_path, naturalist(), "train2018.json")
    assert seen(source) == [("t/x.jpg", 1), ("t/y.jpg", 2)]
    assert source.classes == ["ant", "bee", "owl"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"annotations": [{"image_id": 5, "category_id": 20}]}, "1 images have no annotation: t/y"),
        ({"annotations": [{"image_id": 5, "category_id": 20}] * 2}, "image 5 has several annot"),
        (
            {"annotations": [{"image_id": 5, "category_id": 2}]},
            "image 5 is of category 2, which is",
        ),
    ],
)
def test_annotations_that_are_no_labels_are_refused(tmp_path, changes, message):
    put(tmp_path / "in", "t/x.jpg", "t/y.jpg")
    with pytest.raises(ValueError, match=f"train2018.json: {message}"):
        open_list(tmp_path, naturalist(**changes), "train2018.json")


@pytest.mark.parametrize(
    "text, name, message",
    [
        ("a/1.jpg 0\na/2.jpg\n", "list.txt", "'a/2.jpg' has no label, and other lines have one"),
        ("c/1.jpg\n", "list.txt", "'c/1.jpg' names no folder of .*in, where there are 2: a, b"),
        ("a/1.jpg\na/1.jpg\n", "list.txt", "names 'a/1.jpg' twice"),
        ("a/../../1.jpg 0\n", "list.txt", "'a/../../1.jpg' lies outside"),
        ("\n", "list.txt", "names no image"),
        ("{", "list.json", "not readable as JSON"),
        ("[]", "list.json", "is no mapping with images, annotations, categories"),
    ],
)
def test_a_list_that_cannot_be_read_is_refused_by_line(tmp_path, text, name, message):
    put(tmp_path / "in", "a/1.jpg", "a/2.jpg", "b/1.jpg")
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        open_list(tmp_path, text, name)


def test_all_missing_images_of_a_list_are_counted_and_some_named(tmp_path):
    put(tmp_path / "in", "a/1.jpg")
    text = "".join(f"a/{number}.jpg 0\n" for number in range(1, 7))
    with pytest.raises(
        ValueError, match="5 of its 6 images are not below .*: a/2.jpg, a/3.jpg, a/4"
    ):
        open_list(tmp_path, text)
    with pytest.raises(ValueError, match="none.txt: is no file"):
        plugin.build("sources", "listed", path=str(tmp_path), listing=str(tmp_path / "none.txt"))


def test_every_source_gives_a_key_alone(two_shards):
    source = open_shards(two_shards)
    assert [source.key(i) for i in range(9)] == [source[i]["key"] for i in range(9)]


# Parquet.


def parquet(path, rows, row_group_size=3):
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return plugin.build("sources", "parquet", path=str(path))


def test_parquet_rows_are_images_with_the_columns_there_are(tmp_path):
    rows = [
        {
            "image": jpeg(i),
            "label": i,
            "path": f"p{i}",
            "hashtags": ["a"] if i else None,
            "text": "hi",
        }
        for i in range(8)
    ]
    source = parquet(tmp_path / "x.parquet", rows)
    assert len(source) == 8 and source.groups == [3, 3, 2]
    assert source[4] == {"key": "p4", "image": jpeg(4), "label": 4, "hashtags": ["a"], "text": "hi"}
    assert source[0]["hashtags"] == [] and source.label(7) == 7
    assert source.hashtags(4) == ["a"] and source.hashtags(0) == []
    assert set(source.fields) == {"image", "label", "text", "hashtags"}


def test_images_in_structs_of_bytes_and_path_are_read(tmp_path):
    rows = [{"image": {"bytes": jpeg(i) if i != 1 else None, "path": "x"}} for i in range(2)]
    source = parquet(tmp_path / "x.parquet", rows)
    assert source[0]["image"] == jpeg(0) and source[0]["key"] == "x/0"
    with pytest.raises(BadImage, match="x/1: no image"):
        source[1]
    assert source.fields == ("image",)


def test_a_folder_of_parquet_files_is_read_in_order_with_little_memory(tmp_path, monkeypatch):
    from prepretrain.data.sources import parquet as module

    monkeypatch.setattr(module, "_IN_MEMORY", 1)
    for number in range(3):
        rows = [{"image": jpeg(i), "path": f"{number}-{i}"} for i in range(5)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{number}.parquet", row_group_size=2)
    source = plugin.build("sources", "parquet", path=str(tmp_path))
    assert [source[i]["key"] for i in (14, 0, 7, 14)] == ["2-4", "0-0", "1-2", "2-4"]
    assert len(source._kept) == 1


def test_parquet_errors_name_the_file_and_the_columns(tmp_path):
    build = lambda **options: plugin.build("sources", "parquet", **options)
    parquet(tmp_path / "x.parquet", [{"image": jpeg(), "label": 1}])
    with pytest.raises(ValueError, match="no column 'fine'.*source.label.*image, label"):
        build(path=str(tmp_path), label="fine")
    with pytest.raises(ValueError, match="no such .parquet file"):
        build(path=str(tmp_path / "none.parquet"))
    (tmp_path / "y.parquet").write_bytes(b"junk")
    with pytest.raises(ValueError, match="not readable as Parquet"):
        build(path=str(tmp_path / "y.parquet"))


# Scenes.


def test_scenes_are_the_same_whenever_and_in_whatever_order_they_are_made():
    make = lambda **k: plugin.build("sources", "synthetic", images=50, size=32, **k)
    source, again = make(), make()
    assert [source[i] for i in (3, 7)] == [again[i] for i in (7, 3)][::-1]
    assert make(seed=1)[3]["image"] != source[3]["image"]
    assert source.fingerprint == again.fingerprint != make(seed=1).fingerprint
    assert decode(source[3]["image"]).shape == (3, 32, 32)
    assert all(
        source.label(i) == source[i]["label"] and source.hashtags(i) == source[i]["hashtags"]
        for i in range(10)
    )


def test_scenes_have_clean_labels_and_noisy_long_tailed_tags():
    from collections import Counter

    from prepretrain.data.tags.spelling import canonical

    source = plugin.build("sources", "synthetic", images=2000, size=16)
    labels = Counter(source.label(i) for i in range(2000))
    assert sorted(labels) == list(range(10)) and min(labels.values()) > 140
    tags = Counter(canonical(tag) for i in range(2000) for tag in source.hashtags(i))
    assert tags.most_common(1)[0][1] > 100
    assert sum(n == 1 for n in tags.values()) > 20
    named = [source[i]["text"].find(source.classes[source[i]["label"]]) >= 0 for i in range(40)]
    assert all(named)
    moons = [i for i in range(2000) if source.label(i) == source.classes.index("moon")]
    right = np.mean(
        [
            bool({"moon", "crescent", "moons"} & {canonical(t) for t in source.hashtags(i)})
            for i in moons
        ]
    )
    assert 0.5 < right < 0.9


def test_scenes_refuse_what_cannot_be_drawn():
    for options in ({"images": 0}, {"images": 5, "size": 4}, {"images": 5, "noise": 0.9}):
        with pytest.raises(ValueError, match="source"):
            plugin.build("sources", "synthetic", **options)
