"""Shards in object stores and on web servers: a local S3 server, and a web server with faults."""

import http.server
import importlib.util
import json
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_sources import flat, open_shards, sample, write_tar

from prepretrain.curation import commands
from prepretrain.data import loader
from prepretrain.data.io import remote as remotes
from prepretrain.data.io.paths import find_shards
from prepretrain.data.io.remote import Remote, Unreachable
from prepretrain.data.loader import Stream
from prepretrain.data.order import Order
from prepretrain.data.sampling.mix import Mix
from prepretrain.data.shards import cache as shard_cache
from prepretrain.data.shards import indexing
from prepretrain.data.shards.cache import CacheFull, NoSpace, ShardCache
from prepretrain.data.shards.indexing import read_heads
from prepretrain.data.tags import counting
from prepretrain.runs.launch import launch

SECRET = "abc123secret"
needs_web = pytest.mark.skipif(
    not importlib.util.find_spec("aiohttp"),
    reason="needs aiohttp: pip install 'prepretrain[remote]'",
)
pytestmark = needs_web


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the files of `server.folder`, in part too; `server.fault` says what goes wrong."""

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        file = self.server.folder / unquote(self.path.partition("?")[0]).lstrip("/")
        fault = self.server.fault(self) if file.suffix == ".tar" else None
        if isinstance(fault, int) or not file.is_file():
            return self.send_error(fault or 404)
        data, status, headers = file.read_bytes(), 200, {"ETag": f'"{file.stat().st_mtime_ns}"'}
        if fault == "longer":
            headers["ETag"], data = "longer", data + b"\0"
        if (span := self.headers.get("Range")) and fault != "whole":
            start, end = map(int, span.removeprefix("bytes=").split("-"))
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            data, status = data[start : end + 1], 206
        if fault == "half":
            data = data[: len(data) // 2]
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            data = data[: len(data) // 2] if fault == "cut" else data
            self.server.sent += len(data)
            self.wfile.write(data)
            if fault == "stall":
                self.wfile.flush()
                self.server.stalled.wait(30)
        if fault == "cut":
            self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def folder(tmp_path):
    """Four shards of five samples, here."""
    folder = tmp_path / "web"
    folder.mkdir()
    for shard in range(4):
        samples = (sample(f"{shard}{i}", label=i, tags=[f"t{i}"]) for i in range(5))
        write_tar(folder / f"{shard:05d}.tar", flat(*samples))
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache; nothing waits before it tries again."""
    monkeypatch.setenv("PREPRETRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PREPRETRAIN_CACHE_GB", raising=False)
    monkeypatch.delenv("PREPRETRAIN_OFFLINE", raising=False)
    monkeypatch.setattr(shard_cache, "_pause", lambda tries: None)
    monkeypatch.setattr(shard_cache, "_CHUNK", 5000)
    return tmp_path / "cache" / "shards"


@pytest.fixture
def web(folder, cache):
    """A web server of the folder."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.folder, server.sent, server.fault = folder, 0, lambda request: None
    server.stalled = threading.Event()
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.stalled.set()
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def s3():
    """A client of an S3-compatible server with an empty bucket."""
    pytest.importorskip("s3fs", reason="needs s3fs: pip install 'prepretrain[remote]'")
    moto = pytest.importorskip(
        "moto.server", reason="needs a local S3 server: pip install 'moto[server]'"
    )
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port()),
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        import boto3

        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        yield client
    server.stop()


def shards_of(web, count=4):
    return find_shards([f"{web.url}/{shard:05d}.tar" for shard in range(count)])


def read(handle):
    try:
        return os.pread(handle, 1 << 24, 0)
    finally:
        os.close(handle)


def kept(cache):
    """The files of the cache, but for its lock and indexes."""
    return sorted(f.name for f in cache.iterdir() if f.suffix in (".tar", ".part"))


# What is read.


@pytest.mark.parametrize("path", ["", "/0000?.tar", "/{00000..00003}.tar"])
def test_shards_of_a_bucket_are_those_of_a_folder(folder, cache, s3, path):
    for file in sorted(folder.iterdir()):
        s3.upload_file(str(file), "bucket", f"web/{file.name}")
    here, there = open_shards(folder), open_shards(f"s3://bucket/web{path}")
    assert there.fingerprint == here.fingerprint and there.fields == here.fields
    assert [there[i] for i in (19, 0, 7)] == [here[i] for i in (19, 0, 7)]
    assert there.tags_of_group(1).counts() == here.tags_of_group(1).counts()
    assert there.stamp == open_shards(f"s3://bucket/web{path}").stamp != here.stamp


def test_shards_of_a_web_server_are_named_by_braces(folder, web):
    here, there = open_shards(folder), open_shards(web.url + "/{00000..00003}.tar?sig=" + SECRET)
    assert there.fingerprint == here.fingerprint
    assert [one["key"] for one in there] == [one["key"] for one in here]
    assert open_shards(f"file://{folder}").fingerprint == here.fingerprint
    sent = web.sent
    assert len(open_shards(web.url + "/{00000..00003}.tar?sig=" + SECRET)) == 20
    assert web.sent == sent
    with pytest.raises(ValueError, match="a web server does not say which files it has"):
        open_shards(f"{web.url}/*.tar")


def test_indexes_of_shards_in_a_store_are_built_by_several_processes(folder, web, cache):
    here = read_heads(sorted(folder.glob("*.tar")))
    assert [head["digest"] for head in read_heads(shards_of(web), processes=2)] == [
        head["digest"] for head in here
    ]
    web.fault = lambda request: 500 if request.command == "GET" else None
    with pytest.raises(Unreachable, match="00000.tar: .*500"):
        read_heads([Remote(shard.url, shard.size, "2") for shard in shards_of(web)], processes=2)


def test_an_index_that_lies_in_the_store_is_taken_from_there(folder, web, cache):
    read_heads(sorted(folder.iterdir()))
    (folder / "00002.tar.index").write_bytes((folder / "00003.tar.index").read_bytes())
    (folder / "00001.tar.index").write_bytes((folder / "00001.tar.index").read_bytes()[:-9])
    heads = read_heads(shards_of(web))
    assert [head["digest"] for head in heads] == [
        head["digest"] for head in read_heads(sorted(folder.glob("*.tar")))
    ]
    assert len(kept(cache)) == 2  # those whose index did not fit
    there = open_shards(web.url + "/{00000..00003}.tar")
    assert len(kept(cache)) == 2 and there[0]["key"] == "00"


@pytest.mark.parametrize("window, workers", [(0, 0), (1, 2)])
def test_training_reads_the_same_batches_from_afar(folder, web, window, workers):
    def keys(source):
        stream = Stream(
            source, lambda s: {"n": len(s["image"])}, batch_size=4, seed=0, window=window
        )
        stream.workers = workers
        batches = stream.batches()
        found = [next(batches)["key"] for _ in range(11)]
        batches.close()
        return found

    assert keys(open_shards(web.url + "/{00000..00003}.tar")) == keys(open_shards(folder))


def test_shards_that_come_next_are_fetched_while_others_are_read(folder, web, cache):
    source = open_shards(web.url + "/{00000..00003}.tar")
    for file in cache.glob("*.tar"):
        file.unlink()
    assert source.reads_ahead and not open_shards(folder).reads_ahead
    source.read_ahead(np.array([19, 2, 3]))
    wanted = {ShardCache().path(source.paths[number]) for number in (0, 3)}
    deadline = time.monotonic() + 20
    while not all(path.exists() for path in wanted):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert len(kept(cache)) == 2


def test_an_evaluation_fetches_ahead_the_shard_that_comes_next(folder, web, monkeypatch):
    source, asked = open_shards(web.url + "/{00000..00003}.tar"), []
    monkeypatch.setattr(source, "read_ahead", lambda indexes: asked.append(indexes.tolist()))
    few = {"batch_size": 4, "rank": 0, "world": 2}
    keys = [key for batch in evaluated(source, **few) for key in batch["key"]]
    assert keys == [source.key(index) for index in range(10)] + ["", ""]
    assert asked == [[9] * 4, [9] * 4, [9] * 2]  # no images of another process
    monkeypatch.setattr(loader, "_AHEAD", 1)
    asked.clear()
    list(evaluated(source, **few | {"world": 1}))
    assert asked[:2] == [[5, 6, 7, 8], [9, 10, 11, 12]] and asked[-1] == [19] * 4


def evaluated(source, **how):
    return loader.evaluation_batches(source, lambda s: {"n": len(s["image"])}, **how)


def test_counting_by_parquet_files_and_indexes_in_a_store_fetches_no_shard(web, cache):
    for shard in range(4):
        rows = [{"key": f"{shard}{row}", "hashtags": ["all", f"t{row}"]} for row in range(5)]
        members = [
            (f"{row['key']}.{ending}", content)
            for row in rows
            for ending, content in (("jpg", b"x"), ("json", json.dumps(row).encode()))
        ]
        write_tar(web.folder / f"{shard:05d}.tar", members)
        table = pa.Table.from_pylist([row | {"status": "success"} for row in rows])
        pq.write_table(table, web.folder / f"{shard:05d}.parquet")
    read_heads(sorted(web.folder.glob("*.tar")))
    pq.write_table(table, web.folder / "00002.parquet")  # another shard's
    source = open_shards(web.url + "/{00000..00003}.tar")
    tags = [source.tags_of_group(group) for group in range(4)]
    assert [one.counts() for one in tags] == [{"all": 5} | {f"t{row}": 1 for row in range(5)}] * 4
    assert [bool(one.said) for one in tags] == [False, False, True, False]
    there = [ShardCache().path(shard).exists() for shard in source.paths]
    assert there == [False, False, True, False]


# What goes wrong on the way.


def test_a_connection_that_is_cut_goes_on_where_it_was(web, cache):
    shard, asked = shards_of(web, 1)[0], []

    def fault(request):
        asked.append(request.headers.get("Range"))
        return "cut" if asked[-1] and asked.count(asked[-1]) <= cuts.get(asked[-1], 0) else None

    cuts = {"bytes=5000-9999": 2, "bytes=25000-29999": 1}
    web.fault = fault
    assert read(ShardCache().open(shard)) == (web.folder / "00000.tar").read_bytes()
    assert [asked.count(span) for span in ("bytes=0-4999", *cuts)] == [1, 3, 2]
    assert kept(cache) == [ShardCache().path(shard).name]


def test_a_server_that_only_gives_whole_files_is_read(web):
    shard = shards_of(web, 1)[0]
    web.fault = lambda request: "whole"
    assert read(ShardCache().open(shard)) == (web.folder / "00000.tar").read_bytes()


@pytest.mark.parametrize(
    "fault, message",
    [
        (403, "00000.tar: access is refused .403.. Are the credentials"),
        (404, "00000.tar: there is no such file .404."),
        (410, "00000.tar: ClientResponseError: 410"),
        (500, "00000.tar: .*500"),
        ("cut", "00000.tar: ClientPayloadError"),
        ("half", "00000.tar: the server sends 2,500 bytes where 5,000 were asked for"),
        ("longer", "00000.tar: has changed since it was listed"),
    ],
)
def test_what_a_server_does_not_give_is_said_without_secrets(web, cache, fault, message):
    url = f"{web.url.replace('//', f'//user:{SECRET}@')}/00000.tar?sig={SECRET}"
    shard = find_shards(url)[0]
    web.fault = lambda request: fault
    with pytest.raises(Unreachable, match=message) as raised:
        ShardCache().open(shard)
    assert SECRET not in "".join(traceback.format_exception(raised.value)) + str(shard) + repr(
        shard
    )
    assert not any(name.endswith(".tar") for name in kept(cache))
    web.fault = lambda request: None
    assert len(read(ShardCache().open(shard))) == shard.size


@pytest.mark.parametrize("fault", [403, 404, 500])
def test_a_source_whose_shards_cannot_be_had_is_a_plain_error(web, fault):
    web.fault = lambda request: fault
    with pytest.raises(ValueError, match="00000.tar: .*" + str(fault)) as raised:
        open_shards(f"{web.url}/00000.tar?sig={SECRET}")
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize(
    "path, said",
    [
        ("refused/00000.tar", "refused/00000.tar: access is refused .403."),
        ("{00000..00004}.tar", "00004.tar: there is no such file .404."),
        ("", ": a web server does not say which files it has"),
        ("torn.tar", "torn.tar: .*truncated"),
    ],
)
def test_a_run_a_dry_run_and_a_curation_refuse_shards_that_cannot_be_had(
    place, web, group, path, said
):
    (web.folder / "torn.tar").write_bytes((web.folder / "00000.tar").read_bytes()[:2000])
    web.fault = lambda request: 403 if "refused" in request.path else None
    Path("look.yaml").write_text("meta: {}\n")
    Path("datasets/far.yaml").write_text(f'train: {{source: shards, path: "{web.url}/{path}"}}\n')
    with pytest.raises(ValueError, match=said):
        launch("small.yaml", ["data.train=far"], dry_run=True)
    with pytest.raises(ValueError, match=said):
        launch("small.yaml", ["data.train=far"], out="runs/far")
    assert not list(Path("runs").rglob("metrics.jsonl"))
    with pytest.raises(ValueError, match=said):
        commands.plan("far", "look.yaml", Path("curated"), None, commands.Machines())


def test_shards_of_a_store_are_not_curated(place, web):
    Path("datasets/far.yaml").write_text(f"train: {{source: shards, path: {web.url}/00000.tar}}\n")
    Path("look.yaml").write_text("meta: {}\n")
    for act in (commands.plan, commands.run):
        with pytest.raises(ValueError, match="00000.tar: shards are curated on disks of their own"):
            act("far", "look.yaml", Path("curated"), None, commands.Machines())
    assert not Path("curated").exists()


def test_half_a_tar_in_a_store_is_said_with_its_address(web):
    (web.folder / "00000.tar").write_bytes((web.folder / "00000.tar").read_bytes()[:2000])
    with pytest.raises(ValueError, match=f"{web.url}/00000.tar: .*truncated"):
        open_shards(f"{web.url}/00000.tar")


def test_bytes_that_are_not_those_of_the_etag_are_fetched_again(
    folder, cache, s3, monkeypatch, caplog
):
    s3.upload_file(str(folder / "00000.tar"), "bucket", "md5/00000.tar")
    shard, calls, ask = find_shards("s3://bucket/md5/00000.tar")[0], [], Remote.read

    def damaged(wrong):
        def pieces(self, spans):
            found = ask(self, spans)
            calls.append(0)
            return [bytes([found[0][0] ^ wrong(len(calls))]) + found[0][1:], *found[1:]]

        return pieces

    monkeypatch.setattr(Remote, "read", damaged(lambda call: call == 1))
    assert read(ShardCache().open(shard)) == (folder / "00000.tar").read_bytes()
    (cache / ShardCache().path(shard).name).unlink()
    monkeypatch.setattr(Remote, "read", damaged(lambda call: call % 251 + 1))
    with pytest.raises(Unreachable, match="twice other bytes came than its ETag"):
        ShardCache().open(shard)
    monkeypatch.setattr(Remote, "read", damaged(lambda call: 1))
    monkeypatch.setattr(shard_cache, "_no_md5", set())
    os.close(ShardCache().open(shard))  # as of a bucket that is encrypted by a key
    assert "its ETag is no MD5" in caplog.text


# Room.


def test_the_shards_that_were_opened_last_are_kept(web, cache):
    shards = shards_of(web)
    small = ShardCache(cache, 3 * shards[0].size)
    for number in (0, 1, 2, 0, 3):
        os.close(small.open(shards[number]))
    assert kept(cache) == sorted(small.path(shards[number]).name for number in (0, 2, 3))


def test_a_shard_stays_while_it_is_read_and_a_full_cache_says_so(web, cache):
    shards = shards_of(web)
    small = ShardCache(cache, 2 * shards[0].size)
    held = [small.open(shards[0]), small.open(shards[1])]
    with pytest.raises(CacheFull, match="bytes are in use in .*Raise PREPRETRAIN_CACHE_GB"):
        small.open(shards[2])
    assert len(kept(cache)) == 2
    os.close(held.pop())
    os.close(small.open(shards[2]))
    assert kept(cache) == sorted(small.path(shards[number]).name for number in (0, 2))
    os.close(held.pop())


def test_a_source_with_room_for_one_shard_reads_all(folder, web, cache, monkeypatch):
    size = (folder / "00000.tar").stat().st_size
    monkeypatch.setenv("PREPRETRAIN_CACHE_GB", str(1.5 * size / 1e9))
    source = open_shards(web.url + "/{00000..00003}.tar")
    assert source.open_at_once == 1
    assert [source[i]["key"] for i in (0, 19, 5, 1)] == ["00", "34", "10", "01"]
    monkeypatch.setenv("PREPRETRAIN_CACHE_GB", str(0.5 * size / 1e9))
    with pytest.raises(ValueError, match="the cache .* holds .*Raise PREPRETRAIN_CACHE_GB"):
        open_shards(web.url + "/{00000..00003}.tar?other")


def room(monkeypatch, size):
    monkeypatch.setenv("PREPRETRAIN_CACHE_GB", str((size + 1) / 1e9))


def test_a_cache_that_is_too_small_for_all_processes_is_refused_with_the_size_that_will_do(
    folder, web, cache, monkeypatch
):
    source = open_shards(web.url + "/{00000..00003}.tar")
    size = (folder / "00000.tar").stat().st_size
    stream = lambda **how: Stream(
        source, lambda s: {"n": len(s["image"])}, batch_size=4, seed=0, window=2, **how
    )
    room(monkeypatch, 2 * size)
    small = f"CACHE_GB: .*: 2 processes .* up to {size:,} bytes. Set at least 0.001,"
    with pytest.raises(ValueError, match=small):
        stream(workers=2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=small):
        list(evaluated(source, batch_size=4))
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    room(monkeypatch, 4 * size)
    assert [source[index]["key"] for index in (0, 5)] == ["00", "10"]  # what this process holds
    batches = stream(workers=2).batches()
    keys = [key for _ in range(15) for key in next(batches)["key"]]
    batches.close()
    order = Order(source.groups, seed=0, window=2)
    assert keys == [source.key(index) for index in order(np.arange(60))[1].tolist()]


def test_as_many_processes_count_shards_of_a_store_as_the_cache_has_room_for(
    folder, web, cache, monkeypatch, tmp_path
):
    size, here = (folder / "00000.tar").stat().st_size, open_shards(folder)
    monkeypatch.setattr(indexing, "cores", lambda: 3)
    monkeypatch.setattr(counting, "cores", lambda: 3)
    assert shard_cache.readers(0) > 1000
    for room_for, processes in ((1.5, 1), (4, 2)):
        room(monkeypatch, room_for * size)
        assert shard_cache.readers(size) == processes
        there = open_shards(f"{web.url}/{{00000..00003}}.tar?{processes}")
        counts = [counting.count(source, tmp_path / "out", min_count=1) for source in (here, there)]
        assert counts[0][2] == counts[1][2] and (counts[0][1] == counts[1][1]).all()


def test_parts_of_a_mix_share_the_cache(folder, web, cache, monkeypatch):
    parts = [open_shards(f"{web.url}/{{0000{a}..0000{a + 1}}}.tar") for a in (0, 2)]
    size = (folder / "00000.tar").stat().st_size
    mix = Mix(["one", "two"], parts)
    assert mix.cached == 2 * size
    room(monkeypatch, 2.5 * size)
    for source in parts:
        source.keep_open(2)  # as if each had the cache for itself
    keys = [mix[index]["key"] for index in (0, 10, 5, 15, 0)]
    assert keys == ["one/00", "two/20", "one/10", "two/30", "one/00"]


def test_a_shard_stays_in_the_cache_as_long_as_there_is_a_handle_of_one_of_its_videos(
    folder, web, cache, monkeypatch
):
    pytest.importorskip("av")
    for number in range(3):
        write_tar(web.folder / f"{number:05d}.tar", [(f"{number}.mp4", b"x" * 9000)])
    room(monkeypatch, 2.5 * (folder / "00000.tar").stat().st_size)
    source = open_shards(web.url + "/{00000..00002}.tar")
    assert source.open_at_once == 1
    held = source[0]["video"]
    for index in (1, 2, 1):
        source[index]
    assert held.path.exists()
    path = held.path
    del held
    source[2], source[1]
    assert not path.exists()


@pytest.mark.parametrize("given", ["many", "0", "-1", "nan", "inf"])
def test_a_limit_that_is_no_number_is_refused(cache, monkeypatch, given):
    monkeypatch.setenv("PREPRETRAIN_CACHE_GB", given)
    with pytest.raises(ValueError, match=f"PREPRETRAIN_CACHE_GB: '{given}' is no number"):
        ShardCache()


def forked(function, *arguments):
    """Starts a copy of this process that does something."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


def test_where_the_disk_is_full_it_is_said_and_what_came_is_kept(web, cache):
    shard, said = shards_of(web, 1)[0], cache.parent / "said"

    def open_in_vain():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))
        try:
            ShardCache().open(shard)
        except NoSpace as error:
            said.write_text(str(error))

    forked(open_in_vain).join()
    assert f"no space for its {shard.size:,} bytes in {cache}" in said.read_text()
    assert (cache / kept(cache)[0]).stat().st_size == 12_000
    sent = web.sent
    assert read(ShardCache().open(shard)) == (web.folder / "00000.tar").read_bytes()
    assert web.sent - sent == shard.size - 12_000


def test_a_cache_that_cannot_be_written_ends_a_run_and_is_no_bad_image(web, cache):
    cache.parent.mkdir()
    cache.write_text("a file")
    with pytest.raises(Unreachable, match="cannot be kept in .*PREPRETRAIN_CACHE"):
        ShardCache().open(shards_of(web, 1)[0])


# Several readers.


def test_processes_that_want_the_same_shard_fetch_it_once(web, cache):
    shard = shards_of(web, 1)[0]
    sizes = multiprocessing.get_context("fork").SimpleQueue()
    readers = [forked(lambda: sizes.put(len(read(ShardCache().open(shard))))) for _ in range(3)]
    assert [sizes.get() for _ in readers] == [shard.size] * 3
    for reader in readers:
        reader.join()
    assert web.sent == shard.size


def test_what_a_killed_process_had_fetched_is_used_by_the_next(web, cache):
    shard = shards_of(web, 1)[0]
    web.fault = lambda request: "stall" if web.sent > shard.size // 2 else None
    reader = forked(lambda: ShardCache().open(shard))
    deadline = time.monotonic() + 20
    while web.sent <= shard.size // 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    reader.kill()
    reader.join()
    have, sent = (cache / kept(cache)[0]).stat().st_size, web.sent
    web.fault = lambda request: None
    assert read(ShardCache().open(shard)) == (web.folder / "00000.tar").read_bytes()
    assert have > 0 and web.sent - sent == shard.size - have


# Addresses.


@pytest.mark.parametrize("key", ["../../x.tar", "a\nb.tar", "/etc/x.tar", "..", "a/../../../b.tar"])
def test_no_name_leads_out_of_the_cache(cache, key):
    path = ShardCache().path(Remote(f"s3://bucket/{key}", 10, "v"))
    assert path.parent == cache and path.resolve().parent == cache.resolve()
    assert "\n" not in str(Remote(f"s3://bucket/{key}", 10, "v"))


def test_a_name_with_dots_and_a_new_line_is_read_within_the_cache(web, cache):
    (web.folder / "00000.tar").rename(web.folder / "a\nb..tar")
    source = open_shards(f"{web.url}/a%0Ab..tar")
    assert source[0]["key"] == "00" and "\n" not in str(source.paths[0])
    written = [p for p in cache.parent.parent.rglob("*") if web.folder not in p.parents]
    assert {p.parent for p in written if p.is_file()} == {cache}


def test_the_same_url_with_another_content_is_another_shard(web):
    before = open_shards(f"{web.url}/00000.tar")
    write_tar(web.folder / "00000.tar", flat(sample("new")))
    after = open_shards(f"{web.url}/00000.tar")
    assert [one["key"] for one in after] == ["new"] and len(before) == 5
    assert after.fingerprint != before.fingerprint and after.stamp != before.stamp


@pytest.mark.parametrize(
    "path, message",
    [
        ("ftp://host/x.tar", "ftp://host/x.tar: shards are read from local disks and s3, gs, hf"),
        ("simplecache::s3://bucket/x.tar", "shards are read from local disks"),
        ("https://host/a?token=" + SECRET, "https://host/a: a web server does not say"),
    ],
)
def test_an_address_that_is_not_read_is_refused(cache, path, message):
    with pytest.raises(ValueError, match=message) as raised:
        open_shards(path)
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize(
    "protocol, package", [("s3", "s3fs"), ("gs", "gcsfs"), ("hf", "huggingface_hub")]
)
def test_a_package_that_is_missing_is_named_with_the_extra(cache, monkeypatch, protocol, package):
    from fsspec.registry import _registry

    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(_registry, protocol, raising=False)
    with pytest.raises(ValueError, match=rf"{package}, which is not installed: pip .*\[remote\]"):
        open_shards(f"{protocol}://bucket/x.tar")


def test_offline_no_store_is_asked(cache, monkeypatch):
    monkeypatch.setenv("PREPRETRAIN_OFFLINE", "1")
    with pytest.raises(ValueError, match="PREPRETRAIN_OFFLINE forbids the network"):
        open_shards("s3://bucket/web")


def test_a_sha256_that_a_store_states_is_checked(web, monkeypatch):
    look = remotes._look

    def stated(url):
        found = look(url)
        return Remote(found.url, found.size, found.version, sha256="0" * 64)

    monkeypatch.setattr(remotes, "_look", stated)
    with pytest.raises(Unreachable, match="its sha256 is not the store's"):
        ShardCache().open(shards_of(web, 1)[0])


def test_a_mix_fetches_ahead_what_each_of_its_parts_reads_next(folder, web, cache):
    there, here = open_shards(web.url + "/{00000..00001}.tar"), open_shards(folder)
    mix, asked = Mix(["here", "there"], [here, there]), []
    there.read_ahead = lambda indexes: asked.extend(indexes.tolist())
    mix.read_ahead(np.array([0, 19, 20, 29]))
    assert mix.reads_ahead and asked == [0, 9]
    assert mix.tags_of_group(5).counts() == there.tags_of_group(1).counts()
