"""Indexes and counts as maps over shards, and what img2dataset writes beside them."""

import json
import os
import re
import runpy
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_sources import flat, jpeg, open_shards, write_tar

from prepretrain.data.shards import columns, img2dataset, opened, tar_index
from prepretrain.data.shards.indexing import index_shards, read_heads
from prepretrain.data.sources import shards as shards_module
from prepretrain.data.sources.base import Source
from prepretrain.data.tags import counting
from prepretrain.data.tags.vocabulary import Vocabulary

JPEG = jpeg()


def described(key, content, text="a thing"):
    """The members of a sample with this json member."""
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return [(f"{key}.jpg", JPEG), (f"{key}.json", data), (f"{key}.txt", text.encode())]


def by_one(source, of="hashtags"):
    """The tags of each image, read one by one, and whose cannot be read."""
    tags = Source.tags_of_group(source, 0, of)
    return rows_of(tags), [str(error) for error in tags.bad]


def by_map(source, of="hashtags"):
    """The same from a map over the source's only shard."""
    tags = source.tags_of_group(0, of)
    return rows_of(tags), [str(error) for error in tags.bad]


def rows_of(tags):
    pairs = Counter(zip(tags.rows.tolist(), (tags.names[i] for i in tags.ids.tolist())))
    assert set(pairs.values()) <= {1}
    return [{tag for at, tag in pairs if at == row} for row in range(tags.images)]


# Indexes.


@pytest.fixture
def shards(tmp_path):
    """Five shards of three samples."""
    return [
        write_tar(
            tmp_path / f"{shard:05d}.tar",
            flat(
                *(
                    described(f"{shard}{i}", {"hashtags": [f"#Tag{i}", "all"], "url": "x"})
                    for i in range(3)
                )
            ),
        )
        for shard in range(5)
    ]


def sidecars(shards):
    return [shard.with_name(f"{shard.name}.index") for shard in shards]


def test_an_index_is_the_same_whichever_process_builds_it(shards):
    heads = read_heads(shards, processes=1)
    alone = [file.read_bytes() for file in sidecars(shards)]
    for build in (
        lambda: read_heads(shards, processes=3),
        lambda: [index_shards(shards, rank, 2) for rank in (1, 0)],
    ):
        for file in sidecars(shards):
            file.unlink()
        build()
        assert [file.read_bytes() for file in sidecars(shards)] == alone
    assert [head["digest"] for head in read_heads(shards)] == [head["digest"] for head in heads]


def test_a_half_built_set_of_indexes_is_completed(shards, monkeypatch):
    index_shards(shards, 0, 2)
    walks, walk = [], tar_index.walk
    monkeypatch.setattr(tar_index, "walk", lambda path: walks.append(path.name) or walk(path))
    assert len(read_heads(shards)) == 5
    assert walks == ["00001.tar", "00003.tar"]


def test_another_shard_of_the_same_size_and_time_is_indexed_anew(shards):
    before, state = read_heads(shards), os.stat(shards[0])
    content = shards[0].read_bytes().replace(b"00.jpg", b"zz.jpg").replace(b"00.json", b"zz.json")
    shards[0].write_bytes(content)
    os.utime(shards[0], ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(ValueError, match="00000.tar: at offset 0: a bad header"):
        read_heads(shards)
    assert before[0]["ends"] != tar_index._asked(shards[0])["ends"]


def test_what_is_wrong_with_a_shard_is_said_by_a_process_of_many_too(shards):
    shards[3].write_bytes(shards[3].read_bytes()[:700])
    with pytest.raises(ValueError, match="00003.tar: at offset 0: .* is truncated"):
        read_heads(shards, processes=2)
    assert sum(file.exists() for file in sidecars(shards)) >= 3


# Counts.

ODD = {
    "plain": [{"hashtags": ["#Red", "red", "#a#b"]}, {"hashtags": []}, {"hashtags": None}, {}],
    "texts": [{"hashtags": "#red, Blue #x#y"}, {"hashtags": '["Red", "a b"]'}, {"hashtags": ""}],
    "lists in texts": [{"hashtags": '["Red", "a b"]'}, {"hashtags": ' ["x", null] '}],
    "a broken list in a text": [{"hashtags": '["Red", "a b"'}, {"hashtags": '["x"]'}],
    "nulls": [{"hashtags": ["a", None]}, {"hashtags": ["\ufeffa", "ﬁsh", "  "]}],
    "mixed": [{"hashtags": ["a"]}, {"hashtags": "b c"}, {"hashtags": 5}, {"hashtags": {"a": 1}}],
    "numbers": [{"hashtags": [1, "a"]}, {"hashtags": ["b"]}],
    "twice": [b'{"hashtags": ["a"], "hashtags": ["b"]}', {"hashtags": ["c"]}],
    "inside": [b'{"x": {"hashtags": ["n"]}, "hashtags": ["b"], "y": "\\"hashtags\\": [1]"}'],
    "printed": [json.dumps({"hashtags": ["a", "b"], "x": [1]}, indent=4).encode() + b"\n", {}],
    "nan": [b'{"hashtags": ["a"], "x": NaN}', {"hashtags": float("nan")}],
    "nan elsewhere": [b'{"hashtags": ["a"], "x": NaN}', b'{"hashtags": ["b"], "x": -Infinity}'],
    "a long number": [b'{"hashtags": ["a"], "x": %s}' % (b"9" * 5000), {"hashtags": ["b"]}],
    "a long number of tags": [b'{"hashtags": %s}' % (b"9" * 5000), {"hashtags": ["b"]}],
    "a large number": [b'{"hashtags": ["a"], "x": 1e400, "y": %s}' % (b"9" * 4000)],
    "numbers that are none": [b'{"hashtags": ["a"], "x": 01}', b'{"hashtags": ["a"], "x": 1.}'],
    "deep": [b'{"hashtags": ["a"], "x": %s}' % (b"[" * 90 + b"]" * 90)],
    "a mark before": [b'\xef\xbb\xbf{"hashtags": ["a"]}', {"hashtags": ["b"]}],
    "nul": [b'{"hashtags": ["a"]}\0', b'{\0"hashtags": ["b"]}', {"hashtags": ["c"]}],
    "no object": [b"null", b'["hashtags"]', b'"hashtags"', b"5", {"hashtags": ["c"]}],
    "lines": [b'{"hashtags":\n["a",\r\n"b"]}\n', b'{\t"hashtags" : [ "a\\n" ] } \r\n'],
    "no json": [b"{", {"hashtags": ["a"]}, b"", b"[]", b'{"hashtags": ["b"]} {"hashtags": ["c"]}'],
    "two and none": [b'{"hashtags": ["a"]}\n{"hashtags": ["b"]}', b" ", {"hashtags": ["c"]}],
    "not utf-8": [b'{"hashtags": ["a"], "x": "\xff"}', {"hashtags": ["a"]}],
    "half a pair": [b'{"hashtags": ["lov\\ud83d"]}', {"hashtags": ["a\\u0000"]}],
    "escaped": [b'{"h\\u0061shtags": ["a"]}', {"hashtags": ["東京", "＃東京"]}],
    "cut between two": [b'{"hashtags": ["a"], "x": {}', b'{"y": 1}}', {"hashtags": ["c"]}],
}


@pytest.mark.parametrize("name", ODD)
def test_a_map_counts_what_reading_one_by_one_does(tmp_path, name):
    samples = flat(*(described(f"k{i}", content) for i, content in enumerate(ODD[name])))
    write_tar(tmp_path / "0.tar", samples + [("last.jpg", JPEG)])
    source = open_shards(tmp_path)
    source.fields = ("image", "hashtags")
    assert by_map(source) == by_one(source)
    assert name not in FAST or source.column(0, "hashtags")[0] is not None


FAST = ("plain", "texts", "lists in texts", "nulls", "twice", "inside", "printed", "nan elsewhere")
FAST += ("escaped", "a large number", "deep", "lines")


def test_a_member_that_is_too_large_to_be_read_one_by_one_has_no_tags(tmp_path, monkeypatch):
    samples = [{"hashtags": ["a"], "x": "y" * 600}, {"hashtags": ["b"]}]
    write_tar(tmp_path / "0.tar", flat(*(described(f"k{i}", s) for i, s in enumerate(samples))))
    source = open_shards(tmp_path)
    assert by_map(source)[0] == [{"a"}, {"b"}]
    monkeypatch.setattr(opened, "MAX_MEMBER", 500)
    assert by_map(source) == by_one(source) and by_map(source)[0] == [set(), {"b"}]


def test_json_members_that_are_parsed_in_parts_are_the_same(tmp_path, monkeypatch):
    samples = [{"hashtags": [f"t{i}"]} if i % 3 else {} for i in range(20)]
    members = [one for i, s in enumerate(samples) for one in described(f"k{i:02d}", s)]
    write_tar(tmp_path / "0.tar", [m for m in members if m[0] not in ("k03.json", "k19.json")])
    source, whole = open_shards(tmp_path), by_map(open_shards(tmp_path))
    monkeypatch.setattr(columns, "_AT_ONCE", 100)
    assert by_map(source) == by_one(source) == whole
    assert source.column(0, "hashtags")[0] is not None


@pytest.mark.parametrize("texts", [("Red, blue", "#x#y", ""), (b"\xff", "a"), ("\ufeffa b",)])
@pytest.mark.parametrize("of", ["hashtags", "captions"])
def test_words_of_txt_members_are_counted_as_they_are_read(tmp_path, texts, of):
    members = [
        [(f"k{i}.jpg", JPEG), (f"k{i}.txt", text if isinstance(text, bytes) else text.encode())]
        for i, text in enumerate(texts)
    ]
    write_tar(tmp_path / "0.tar", flat(*members) + [("last.jpg", JPEG)])
    source = open_shards(tmp_path, hashtags="txt")
    assert by_map(source, of) == by_one(source, of)


def test_captions_count_where_there_are_some_and_else_the_text(tmp_path):
    samples = [{"captions": ["A dog", "two dogs"]}, {"captions": []}, {}]
    write_tar(tmp_path / "0.tar", flat(*(described(f"k{i}", s) for i, s in enumerate(samples))))
    assert by_map(open_shards(tmp_path), "captions")[0] == [
        {"a", "dog", "two", "dogs"},
        {"a", "thing"},
        {"a", "thing"},
    ]


def test_counts_are_the_same_for_any_number_of_ranks_and_processes(shards, tmp_path):
    source = open_shards(tmp_path)
    whole = Vocabulary.count(
        map(source.hashtags, range(len(source))), source=source.fingerprint, min_count=2
    )
    for processes in (1, 3):
        vocabulary, rarest, counts = counting.count(
            source, tmp_path / "out", min_count=2, processes=processes
        )
        assert vars(vocabulary) == vars(whole)
        assert rarest.tolist() == [whole.rarest(source.hashtags(i)) for i in range(15)]
        assert list((tmp_path / "out").iterdir()) == []
    merged = counting.Counts()
    for rank in (2, 0, 1):
        merged.add(counting.count_groups(source, rank, 3))
    assert merged.tags == counts.tags == {"all": 15, "tag0": 5, "tag1": 5, "tag2": 5}
    assert merged.images == 15


def test_a_label_that_several_tags_share_counts_an_image_once(shards, tmp_path):
    source = open_shards(tmp_path)
    names = {"all": None, "tag0": "few", "tag1": "few", "tag2": "two"}
    vocabulary, *_ = counting.count(
        source, tmp_path / "out", min_count=1, label=lambda tag, uses: names[tag]
    )
    assert dict(zip(vocabulary.tags, vocabulary.counts)) == {"few": 10, "two": 5}


# Files of img2dataset.


def parquet(shard, rows, **columns):
    """Writes the file that img2dataset has beside a shard: a row for each URL that was asked."""
    defaults = {"status": "success", "caption": "a thing", **columns}
    pq.write_table(
        pa.Table.from_pylist([defaults | row for row in rows]), shard.with_suffix(".parquet")
    )


ROWS = [{"key": f"0{i}", "hashtags": [f"#Tag{i}", "all"]} for i in range(3)]
FAILED = {"key": "09", "hashtags": ["none"], "status": "failed_to_download"}


@pytest.mark.parametrize(
    "rows",
    [
        ROWS,
        [FAILED, *ROWS[::-1]],
        [row | {"hashtags": json.dumps(row["hashtags"])} for row in ROWS],
        [row | {"hashtags": " ".join(row["hashtags"])} for row in ROWS],
    ],
)
def test_tags_come_from_the_parquet_file_alone_where_it_agrees(shards, tmp_path, rows, monkeypatch):
    source, plain = open_shards(tmp_path), by_one(open_shards(tmp_path))[0][:3]
    parquet(shards[0], rows)
    monkeypatch.setattr(shards_module, "read_column", None)
    assert by_map(source)[0] == plain == [{"tag0", "all"}, {"tag1", "all"}, {"tag2", "all"}]
    assert source.tags_of_group(0, "captions").said == ""


@pytest.mark.parametrize(
    "rows, said",
    [
        (ROWS[:2], "2 successful rows, and the shard 3 samples, of which 1 have no row"),
        ([*ROWS, {**FAILED, "status": "success"}], "4 successful rows, and the shard 3 samples"),
        (
            [*ROWS[:2], {**ROWS[2], "hashtags": ["other"]}],
            r"of '02' is \['other'\], and in the shard",
        ),
        ([*ROWS[:2], {**ROWS[2], "key": "9"}], "of which 1 have no row"),
        (None, "not readable as Parquet"),
    ],
)
def test_a_parquet_file_that_disagrees_is_said_and_not_counted(
    shards, tmp_path, rows, said, caplog
):
    source, plain = open_shards(tmp_path), by_one(open_shards(tmp_path))[0]
    if rows is None:
        shards[0].with_suffix(".parquet").write_bytes(b"PAR1 torn")
    else:
        parquet(shards[0], rows)
    assert by_map(source)[0] == plain
    counting.count(source, tmp_path / "out", min_count=1)[2].log()
    assert "the tags of 1 shards come from their members" in caplog.text
    assert re.search(said, caplog.text)


def test_a_parquet_file_of_something_else_is_not_read(shards, tmp_path):
    pq.write_table(pa.table({"image": [b""]}), shards[0].with_suffix(".parquet"))
    pq.write_table(
        pa.table({"key": ["10"], "status": ["success"]}), shards[1].with_suffix(".parquet")
    )
    source = open_shards(tmp_path)
    assert [source.tags_of_group(group).said for group in range(2)] == ["", ""]


def stats(shard, **counts):
    content = {"count": 5, "successes": 3, "failed_to_download": 2, "failed_to_resize": 0}
    content |= {"status_dict": {"success": 3, "HTTP Error 404": 2}, **counts}
    shard.with_name(f"{shard.stem}_stats.json").write_text(json.dumps(content))


def test_failures_of_the_download_are_added_up_and_wrong_counts_are_said(shards):
    stats(shards[0])
    stats(shards[1])
    stats(shards[2], successes=4)
    stats(shards[3], count="many")
    total, wrong = img2dataset.downloads(shards, [3] * 5)
    assert total["count"] == 15 and total["failed_to_download"] == 6
    assert total["status: HTTP Error 404"] == 6
    assert re.search("00002_stats.json: counts 4 images, and .*00002.tar holds 3", wrong[0])
    assert "00003_stats.json: count: 'many' is no count" in wrong[1]


def test_the_command_indexes_a_share_and_says_what_there_is(shards, tmp_path, monkeypatch, capsys):
    card = tmp_path / "crawl.yaml"
    card.write_text(
        f"train: {{source: shards, path: {tmp_path}}}\nval: {{source: parquet, path: x}}\n"
    )
    stats(shards[3])
    script = str(Path(__file__).parents[1] / "datasets/index.py")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["index.py", *arguments])
        runpy.run_path(script, run_name="__main__")

    run(str(card), "--rank", "1", "--world", "2", "--processes", "2")
    assert [file.exists() for file in sidecars(shards)] == [False, True, False, True, False]
    printed = capsys.readouterr().out
    assert "2 shards, 6 samples" in printed and "2  status: HTTP Error 404" in printed
    for arguments, message in [
        ((str(card), "--rank", "2", "--world", "2"), "--rank 2: must lie between 0 and 1"),
        ((f"{card}:val",), "val: is read by parquet, not from shards"),
    ]:
        with pytest.raises(SystemExit, match=message):
            run(*arguments)
