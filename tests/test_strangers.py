"""Files that strangers wrote: what they may hold, how they may lie, and what is said where they cannot
be read."""

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_sources import (
    flat,
    jpeg,
    naturalist,
    open_folder,
    open_list,
    open_shards,
    parquet,
    put,
    sample,
    write_tar,
)

from prepretrain import config, plugin
from prepretrain.data.loader import Stream
from prepretrain.data.transforms import BadImage, decode
from prepretrain.runs.plan import Plan

# What strangers' files hold: each value has one meaning, in shards and in Parquet files alike.


def as_shard(folder, field, value):
    """A shard whose first sample has a value in its json; the second has a good one."""
    good = {"hashtags": ["a"], "text": "a", "captions": ["a"], "label": 1}
    members = []
    for key, written in (("0", value), ("1", good[field])):
        members += [(f"{key}.jpg", jpeg()), (f"{key}.json", json.dumps({field: written}).encode())]
    place = {} if field in ("hashtags", "captions") else {field: f"json.{field}"}
    return open_shards(write_tar(folder / "x.tar", members), **place)


def as_parquet(folder, field, value):
    return parquet(folder / "x.parquet", [{"image": jpeg(), field: value}])


@pytest.mark.parametrize("build", [as_shard, as_parquet])
@pytest.mark.parametrize(
    "field, written, meant",
    [
        ("hashtags", "blue, #red|green", ["blue", "#red", "green"]),
        ("hashtags", "#red#blue C# c", ["#red", "#blue", "C#", "c"]),
        ("hashtags", "＃赤＃青 緑、白，黒；灰", ["#赤", "#青", "緑", "白", "黒", "灰"]),
        ("hashtags", '["red", null, "dark green"]', ["red", "dark green"]),
        ("hashtags", "[red] [", ["[red]", "["]),
        ("hashtags", ["dark green", None, "#a#b", ""], ["dark green", "#a", "#b"]),
        ("hashtags", None, []),
        ("text", "\ufeffa cat", "a cat"),
        ("text", None, ""),
        ("text", "NaN", "NaN"),
        ("captions", "one text", ["one text"]),
        ("captions", ["one", None, "two"], ["one", "two"]),
        ("captions", None, []),
        ("label", 3.0, 3),
        ("label", float("nan"), None),
        ("label", None, None),
        ("label", True, 1),
    ],
)
def test_a_value_means_the_same_in_every_source(tmp_path, build, field, written, meant):
    source = build(tmp_path, field, written)
    assert source[0].get(field) == meant
    if field == "hashtags":
        assert source.hashtags(0) == meant
    elif field in ("text", "captions"):
        assert source.texts(0) == {field: meant}
    elif meant is None:
        with pytest.raises(BadImage, match="no label"):
            source.label(0)
    else:
        assert source.label(0) == meant


@pytest.mark.parametrize(
    "field, written",
    [
        ("text", True),
        ("text", 5),
        ("text", ["a"]),
        ("captions", 5),
        ("captions", [{"raw": "a"}]),
        ("hashtags", [1]),
        ("hashtags", {"a": 1}),
        ("label", "dog"),
        ("label", 0.5),
        ("label", 10**20),
        ("label", float("inf")),
        ("label", [1]),
    ],
)
def test_a_value_without_a_meaning_is_a_bad_image(tmp_path, field, written):
    source = as_shard(tmp_path, field, written)
    with pytest.raises(BadImage) as caught:
        source[0]
    assert (caught.value.cause, caught.value.key) == ("bad metadata", "0")
    assert len(source[1]["image"]) > 0 and source.only(["image"])[0].keys() == {"key", "image"}


@pytest.mark.parametrize("deep", [b"[" * 3000, b'{"hashtags": ' * 2000])
def test_metadata_nested_without_end_costs_one_image(tmp_path, deep):
    path = write_tar(tmp_path / "x.tar", [*sample("a"), ("b.jpg", jpeg()), ("b.json", deep)])
    source = open_shards(path)
    with pytest.raises(BadImage, match="b: bad metadata: json: "):
        source[1]
    assert source.only(["image"])[1]["image"] == jpeg()  # stage one loses nothing


def test_stage_one_loses_no_image_to_a_broken_caption(place):
    members = flat(*(sample(str(number)) for number in range(8)))
    broken = [(name, b"{" if name.endswith("json") else data) for name, data in members]
    write_tar(Path("data/x.tar"), [*broken, *sample("9")])
    Path("datasets/crawl.yaml").write_text("train: {source: shards, path: x.tar}")
    _, source, _ = Plan(config.load("small.yaml", ["data.train=crawl"]), 1).open_data()
    assert source.fields == ("image",) and len(source) == 9
    assert {tuple(source[index]) for index in range(9)} == {("key", "image")}


def test_what_may_be_named_by_default_is_looked_for_in_all_shards(tmp_path):
    for shard in range(3):
        tags = None if shard < 2 else ["late"]
        members = flat(*(sample(f"{shard}{i:03d}", tags=tags, text="alt") for i in range(120)))
        write_tar(tmp_path / f"{shard}.tar", members)
    assert "hashtags" in open_shards(tmp_path).fields


def test_a_place_that_is_named_is_a_field_or_an_error(tmp_path):
    members = []
    for number in range(300):  # the last alone has it
        details = {"url": "x"} | ({"tags": ["a"]} if number == 299 else {})
        members += [(f"{number}.jpg", b"1"), (f"{number}.json", json.dumps(details).encode())]
    write_tar(tmp_path / "x.tar", members)
    assert open_shards(tmp_path, hashtags="json.tags").fields == ("image", "hashtags")
    with pytest.raises(ValueError, match=r"no json.captoin \(source.text\).* json.tags, json.url"):
        open_shards(tmp_path, text="json.captoin")
    with pytest.raises(ValueError, match=r"no txt \(source.hashtags\).*There are: jpg, json"):
        open_shards(tmp_path, hashtags="txt")


# Which files are images.


def test_images_of_every_extension_are_read_from_shards_and_folders_alike(tmp_path):
    written = {"jpg": "JPEG", "jfif": "JPEG", "jpe": "JPEG", "gif": "GIF", "bmp": "BMP"}
    written |= {"tif": "TIFF", "tiff": "TIFF", "ppm": "PPM", "png": "PNG", "WEBP": "WEBP"}
    members = []
    for extension, kind in written.items():
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, kind)
        members.append((f"{len(members)}.{extension}", file.getvalue()))
    folder = tmp_path / "in" / "cat"
    folder.mkdir(parents=True)
    for name, data in members:
        (folder / name).write_bytes(data)
    for source in (open_shards(write_tar(tmp_path / "x.tar", members)), open_folder(folder.parent)):
        assert len(source) == len(members) and not source.left_out
        assert {decode(source[i]["image"]).shape for i in range(len(source))} == {(3, 8, 8)}


def test_files_of_other_programs_and_of_formats_that_are_not_read_are_counted(tmp_path, caplog):
    members = [("._a.jpg", b"x"), ("__MACOSX/a.jpg", b"x"), ("a.jpg", jpeg()), ("b.heic", b"x")]
    source = open_shards(write_tar(tmp_path / "x.tar", members))
    litter = "left by other programs (._*, __MACOSX, …)"
    assert len(source) == 1 and source.left_out == {litter: 2, ".heic": 1}
    assert "x.tar: is read without these files: 1 .heic, 2 left by other programs" in caplog.text
    put(tmp_path / "in", "cat/._a.jpg", "cat/a.jpg", "cat/.Trash/a.jpg", "cat/b.HEIC", "cat/x.txt")
    put(tmp_path / "in", "__MACOSX/cat/a.jpg", "lost+found/a.jpg")
    source = open_folder(tmp_path / "in")
    assert source.classes == ["cat"] and source.left_out == {litter: 3, ".heic": 1}
    only = open_shards(write_tar(tmp_path / "y.tar", [("b.heic", b"x")]))
    with pytest.raises(ValueError, match="holds no image.*1 .heic"):
        Stream(only, dict, batch_size=1, seed=0)


def test_a_preview_beside_an_image_is_left_out_whatever_its_place(tmp_path):
    members = [("a.gif", b"1"), ("a.jpg", jpeg()), ("b.jpg", jpeg()), ("b.bmp", b"1")]
    source = open_shards(write_tar(tmp_path / "x.tar", members))
    assert [source[i]["image"] for i in range(2)] == [jpeg()] * 2
    assert source.left_out == {"previews beside another image": 2}


def test_a_class_without_an_image_is_refused_unless_the_classes_are_listed(tmp_path):
    put(tmp_path, "cat/1.jpg", "dog/1.jpg", "emu/notes.txt")
    with pytest.raises(ValueError, match="no image is in emu.*source.classes"):
        open_folder(tmp_path)
    assert len(open_folder(tmp_path, classes=["cat", "dog", "emu"])) == 2
    (tmp_path / "cat_stats.json").write_text("{}")
    with pytest.raises(ValueError, match="img2dataset wrote.*output_format=webdataset"):
        open_folder(tmp_path)


def test_links_are_followed_once_and_those_to_nothing_are_named(tmp_path):
    put(tmp_path / "far", "1.jpg", "2.jpg")
    put(tmp_path / "in", "cat/0.jpg")
    (tmp_path / "in/cat/more").symlink_to(tmp_path / "far")
    (tmp_path / "in/cat/back").symlink_to(tmp_path / "in")
    source = open_folder(tmp_path / "in")
    keys = {source.key(i) for i in range(len(source))}
    assert {"cat/0.jpg", "cat/more/1.jpg", "cat/more/2.jpg"} <= keys and len(keys) < 5
    for broken in (tmp_path / "in/cat/9.jpg", tmp_path / "far/9.jpg"):
        broken.symlink_to("nowhere")
        with pytest.raises(ValueError, match="9.jpg: is a link to nothing"):
            open_folder(broken.parent if broken.parent.name == "far" else tmp_path / "in")
        broken.unlink()
    os.mkfifo(tmp_path / "far/pipe.jpg")
    with pytest.raises(ValueError, match="pipe.jpg: is no file"):
        open_folder(tmp_path / "far")


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    put(tmp_path, "cat/deep/1.jpg")
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(ValueError, match="cat/deep: cannot be read: Permission denied"):
        open_folder(tmp_path)


def test_names_that_are_not_utf8_are_read(tmp_path):
    put(tmp_path, "cat/a.jpg")
    name = os.fsencode(tmp_path) + b"/cat/\xe9.jpg"
    with open(name, "wb") as file:
        file.write(jpeg(1))
    source = open_folder(tmp_path)
    assert os.fsencode(source.key(1)) == b"cat/\xe9.jpg" and source[1]["image"] == jpeg(1)
    assert source.fingerprint != open_folder(tmp_path, border=1).fingerprint
    (tmp_path / "list").write_bytes(b"cat/\xe9.jpg 0\n")
    listed = plugin.build("sources", "listed", path=str(tmp_path), listing=str(tmp_path / "list"))
    assert listed[0]["image"] == jpeg(1)


@pytest.mark.parametrize(
    "text, name, message",
    [
        ("a/1.jpg 99999999999999999999\n", "list.txt", "has a label past 999,999,999"),
        ("[" * 3000, "list.json", "not readable as JSON"),
        (naturalist(images=[3]), "list.json", "is not as iNaturalist's files are: TypeError"),
        (naturalist(categories=[{}]), "list.json", "is not as iNaturalist's files are: KeyError"),
    ],
)
def test_a_list_of_a_stranger_is_refused_by_name(tmp_path, text, name, message):
    put(tmp_path / "in", "a/1.jpg")
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        open_list(tmp_path, text, name)


# Which files a path names.


@pytest.mark.parametrize("kind, ending", [("shards", "tar"), ("parquet", "parquet")])
def test_files_are_named_by_glob_braces_and_lists(tmp_path, kind, ending):
    place = tmp_path / "[set]"
    names = ("train-0", "train-1", "val-0", "deep/er/more")
    for name in names:
        file = place / f"{name}.{ending}"
        file.parent.mkdir(parents=True, exist_ok=True)
        if kind == "shards":
            write_tar(file, [("a.jpg", jpeg())])
        else:
            parquet(file, [{"image": jpeg()}])

    def opened(path):
        path = [str(place / one) for one in path] if isinstance(path, list) else str(place / path)
        return plugin.build("sources", kind, path=path)

    counts = {
        f"train-*.{ending}": 2,
        f"train-{{0..1}}.{ending}": 2,
        f"{{train,val}}-0.{ending}": 2,
        f"**/*.{ending}": 4,
        f"val-0.{ending}": 1,
        "deep/er": 1,
    }
    assert {path: len(opened(path)) for path in counts} == counts
    assert [path.stem for path in opened([f"val-0.{ending}", f"train-*.{ending}"]).paths] == [
        "val-0",
        "train-0",
        "train-1",
    ]
    for path, message in [
        ("", "holds several splits .*train: train-0.*validation: val-0.*train-"),
        ([f"val-0.{ending}", f"val-*.{ending}"], "twice"),
        (f"train-{{0..2}}.{ending}", "train-2.* there is no such"),
        ("deep", rf"here. There are some below it: path: .*\*\*/\*.{ending}"),
    ]:
        with pytest.raises(ValueError, match=message):
            opened(path)
    (place / f"folder.{ending}").mkdir()
    with pytest.raises(ValueError, match=f"folder.{ending}: is a folder, not a"):
        opened(f"f*.{ending}")


@pytest.mark.parametrize(
    "start, said",
    [
        (gzip.compress(b"x"), "gunzip"),
        (lzma.compress(b"x"), "unxz"),
        (b"PK\3\4", "zip archive"),
        (bz2.compress(b"x"), "bunzip2"),
        (b"\r\n<!DOCTYPE html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_what_is_no_plain_tar_is_refused_with_the_way_out(tmp_path, start, said):
    (tmp_path / "x.tar").write_bytes(start + bytes(2000))
    with pytest.raises(ValueError, match=f"x.tar: is no plain tar: .*{said}"):
        open_shards(tmp_path)


def test_links_and_labels_that_are_no_images_lose_no_shard(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, kind in (("label", b"V"), ("latest", tarfile.SYMTYPE), ("a.jpg", b"7")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "elsewhere" if kind == tarfile.SYMTYPE else ""
            info.size = len(jpeg()) if name == "a.jpg" else 0
            tar.addfile(info, io.BytesIO(jpeg()))
    source = open_shards(tmp_path)
    assert len(source) == 1 and source[0]["image"] == jpeg()


def test_half_an_end_marker_after_whole_members_loses_no_shard(tmp_path):
    path = write_tar(tmp_path / "x.tar", sample("a"))
    data = path.read_bytes().rstrip(b"\0")
    path.write_bytes(data + bytes(-len(data) % 512 + 512))
    assert open_shards(path).key(0) == "a"


# Parquet files of strangers.


def table(path, column, kind, name, **options):
    images = pa.array([jpeg()] * len(column), pa.binary())
    columns = {"image": images, name: pa.array(column, kind)}
    pq.write_table(pa.table(columns), path)
    return plugin.build("sources", "parquet", path=str(path), **options)


@pytest.mark.parametrize(
    "name, kind, value, meant",
    [
        ("hashtags", pa.large_list(pa.large_string()), ["a", None], ["a"]),
        ("hashtags", pa.list_(pa.binary()), [b"a"], ["a"]),
        ("hashtags", pa.dictionary(pa.int32(), pa.string()), "a b", ["a", "b"]),
        ("text", pa.binary(), b"\xef\xbb\xbfa", "a"),
        ("text", pa.null(), None, ""),
        ("label", pa.float32(), 2.0, 2),
        ("label", pa.int8(), 2, 2),
    ],
)
def test_columns_of_every_type_with_one_meaning_are_read(tmp_path, name, kind, value, meant):
    assert table(tmp_path / "x.parquet", [value], kind, name)[0][name] == meant


@pytest.mark.parametrize(
    "name, kind, value, message",
    [
        ("label", pa.string(), "dog", "column 'label' is string, not a number of a class"),
        ("captions", pa.list_(pa.struct({"raw": pa.string()})), [], "'captions' is list<.*struct"),
        ("hashtags", pa.list_(pa.int64()), [1], "'hashtags' is list<.*int64>, not text"),
        ("text", pa.int64(), 1, "'text' is int64"),
        ("path", pa.list_(pa.string()), ["a"], "'path' is list"),
    ],
)
def test_columns_of_other_types_are_refused_when_they_are_opened(
    tmp_path, name, kind, value, message
):
    with pytest.raises(ValueError, match=f"x.parquet: .*{message}.*source."):
        table(tmp_path / "x.parquet", [value], kind, name)
    pq.write_table(pa.table({"image": ["a.jpg"]}), tmp_path / "y.parquet")
    with pytest.raises(ValueError, match="column 'image' is string, not bytes, or a struct"):
        plugin.build("sources", "parquet", path=str(tmp_path / "y.parquet"))


def test_a_column_that_is_not_wanted_is_left_out(tmp_path):
    source = table(tmp_path / "x.parquet", ["dog"], pa.string(), "label", label=None)
    assert source.fields == ("image",) and source[0].keys() == {"key", "image"}


def test_a_list_of_texts_in_the_column_of_the_text_are_captions(tmp_path):
    source = table(tmp_path / "x.parquet", [["a", "b"]], pa.list_(pa.string()), "raw", text="raw")
    assert source.fields == ("image", "captions") and source[0]["captions"] == ["a", "b"]


def test_types_are_looked_at_in_every_file_of_a_folder(tmp_path):
    table(tmp_path / "0.parquet", [1], pa.int64(), "label")
    pq.write_table(pa.table({"image": [b"1"], "label": ["dog"]}), tmp_path / "1.parquet")
    with pytest.raises(ValueError, match="1.parquet: column 'label' is string"):
        plugin.build("sources", "parquet", path=str(tmp_path))
    (tmp_path / "1.parquet").write_bytes(b"PAR1 junk")
    with pytest.raises(ValueError, match="1.parquet: not readable as Parquet"):
        plugin.build("sources", "parquet", path=str(tmp_path))


def hub(path, names):
    rows = pa.table({"image": [jpeg()], "label": [0]})
    features = {"label": {"names": names, "_type": "ClassLabel"}}
    written = json.dumps({"info": {"features": features}})
    pq.write_table(rows.replace_schema_metadata({"huggingface": written}), path)


def test_class_names_come_from_hugging_faces_metadata(tmp_path):
    hub(tmp_path / "train-0.parquet", ["cat", "dog"])
    build = lambda path: plugin.build("sources", "parquet", path=str(tmp_path / path))
    assert build("train-0.parquet").classes == ["cat", "dog"]
    hub(tmp_path / "train-1.parquet", ["dog", "cat"])
    with pytest.raises(ValueError, match="train-1.parquet: its class names are not those of"):
        build("train-*.parquet")
    for odd in (None, "cat", [1], []):
        hub(tmp_path / "odd.parquet", odd)
        assert build("odd.parquet").classes is None


def test_a_row_group_of_structs_larger_than_can_be_decoded_at_once_is_read(tmp_path, monkeypatch):
    from prepretrain.data.sources import parquet as module

    images = [{"bytes": jpeg(i), "path": f"{i}"} for i in range(9)]
    pq.write_table(pa.table({"image": images}), tmp_path / "x.parquet", use_dictionary=True)
    monkeypatch.setattr(module, "_ROWS", 2)
    source = plugin.build("sources", "parquet", path=str(tmp_path))
    assert source.groups == [9] and [source[i]["image"] for i in range(9)] == [
        jpeg(i) for i in range(9)
    ]
    monkeypatch.setattr(module, "_GROUP", 1000)
    with pytest.raises(ValueError, match="x.parquet: row group 0 holds more than 1,000.*row_group"):
        plugin.build("sources", "parquet", path=str(tmp_path))


def test_memory_is_counted_by_what_rows_take_not_by_how_small_they_are_encoded(
    tmp_path, monkeypatch
):
    from prepretrain.data.sources import parquet as module

    same = pa.table({"image": [b"x" * 10_000] * 50})  # 50 times the same bytes, encoded as one
    pq.write_table(same, tmp_path / "x.parquet", row_group_size=10)
    monkeypatch.setattr(module, "_IN_MEMORY", 250_000)
    source = plugin.build("sources", "parquet", path=str(tmp_path))
    assert sum(source._bytes.values()) <= 250_000 and len(source._kept) == 2
    assert [len(source[i]["image"]) for i in range(50)] == [10_000] * 50
    assert sum(source._bytes.values()) <= 250_000


@pytest.mark.parametrize("codec", ["snappy", "none"])
def test_a_damaged_page_makes_bad_images_that_name_file_and_group(tmp_path, codec):
    file = tmp_path / "x.parquet"
    rows = pa.table({"image": [jpeg(i) for i in range(4)], "label": [0, 1, 2, 3]})
    how = {"compression": codec, "write_page_checksum": True, "use_dictionary": False}
    pq.write_table(rows, file, row_group_size=2, **how)
    group = pq.ParquetFile(file).metadata.row_group(1).column(0)
    data = bytearray(file.read_bytes())
    at = group.data_page_offset + group.total_compressed_size - 200
    data[at : at + 100] = bytes(100)
    file.write_bytes(data)
    source = plugin.build("sources", "parquet", path=str(tmp_path))
    assert source[1]["image"] == jpeg(1)
    for read in (source.__getitem__, source.label):
        with pytest.raises(BadImage, match="x/2: unreadable: .*x.parquet: row group 1: "):
            read(2)
