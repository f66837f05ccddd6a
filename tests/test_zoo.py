"""The zoo: downloads against a server that misbehaves, files that must not be trusted, keys of
every release."""

import argparse
import contextlib
import csv
import errno
import functools
import hashlib
import importlib.util
import io
import json
import os
import pickle
import re
import stat
import subprocess
import sys
import threading
import types
import urllib.request
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch.testing import assert_close
from torchvision import transforms

import prepretrain
from prepretrain.data.transforms import squash
from prepretrain.files import cache_folder
from prepretrain.models import model as models
from prepretrain.models import weights
from prepretrain.models.export import save
from prepretrain.models.load import open_weights
from prepretrain.models.model import Model
from prepretrain.models.weights import Weights
from prepretrain.runs.launch import launch
from prepretrain.zoo import catalogue, download
from prepretrain.zoo import releases as zoo
from prepretrain.zoo.download import Expected

ROOT = Path(__file__).parents[1]
GOLDEN = Path(os.environ.get("PREPRETRAIN_GOLDEN", Path(__file__).parent / "golden"))
BODY = b"PK" + bytes(range(256)) * 1500


class Server(ThreadingHTTPServer):
    """Serves `files` by path, each with one of the faults that `Handler` knows."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, str] = {}
        self.asked: list[tuple[str, str | None]] = []  # (path, the Range header)
        self.tag = '"one"'

    def put(self, path: str, body: bytes, fault: str = "") -> str:
        """The URL of a new file."""
        self.files[path], self.faults[path] = body, fault
        return f"http://127.0.0.1:{self.server_port}{path}"


class Handler(BaseHTTPRequestHandler):
    """HTTP with ranges, and what can go wrong with it."""

    def do_GET(self):
        server, path = self.server, self.path.partition("?")[0]
        fault, body = server.faults.get(path, "404"), server.files.get(path, b"")
        before = sum(p == path for p, _ in server.asked)
        server.asked.append((path, self.headers["Range"]))
        if fault.isdigit():
            return self.send_error(int(fault))
        if fault == "busy once" and before == 0:
            return self.send_error(503)
        if fault == "elsewhere":
            self.send_response(302)
            self.send_header("Location", "http://example.invalid/x.pt")
            return self.end_headers()
        if fault == "changes" and before == 1:
            server.tag, server.files[path] = '"two"', body[::-1]
            body = body[::-1]
        if fault == "slow":
            threading.Event().wait(1.5)
        start = 0
        ranged = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        if ranged and "ignores" not in fault and self.headers["If-Range"] == server.tag:
            start = int(ranged[1])
        self.send_response(206 if start else 200)
        if start:
            first = 0 if fault == "cuts, other range" else start
            self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        rest = body[start:]
        said = fault.removeprefix("says ") if fault.startswith("says ") else str(len(rest))
        self.send_header("Content-Length", said)
        if "untagged" not in fault:
            self.send_header("ETag", server.tag)
        self.end_headers()
        if fault == "drips":
            with contextlib.suppress(ConnectionError):  # whom it serves has had enough
                for byte in rest[:100]:
                    self.wfile.write(bytes([byte]))
                    threading.Event().wait(0.02)
            return None
        cut = "always cuts" in fault or (fault.startswith(("cuts", "changes")) and before == 0)
        self.wfile.write(rest[: len(rest) // 2] if cut else rest)
        self.close_connection = True

    def log_message(self, *_):
        """Silence."""


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server, an empty cache, and no patience."""
    monkeypatch.setenv("PREPRETRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PREPRETRAIN_OFFLINE", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "PAUSE", 0.01)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def tiny(server, monkeypatch):
    """tiny(content, **fields): a release `tiny/vit` whose file holds that content."""

    def build(content, **fields) -> zoo.Release:
        file = io.BytesIO()
        torch.save(content, file)
        given = {
            "name": "tiny/vit",
            "url": server.put("/tiny/vit.pt", file.getvalue()),
            "encoder": "vit_test8",
            "options": {},
            "preprocessing": {"image_size": 32},
            "licence": "made by the tests",
            "metric": {"name": "none", "value": 0.0},
            "source": "the tests",
        }
        row = zoo.Release(**{**given, **fields})
        monkeypatch.setattr(zoo, "releases", lambda: {row.name: row})
        return row

    return build


def vit(**options) -> Model:
    """A tiny model with random weights."""
    torch.manual_seed(0)
    model = Model(encoder="vit_test8", **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def images(size: int = 32) -> torch.Tensor:
    """uint8 [2, 3, size, size]."""
    torch.manual_seed(1)
    return torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)


def leftovers(path: Path) -> list[str]:
    """What lies beside a fetched file and should not."""
    beside = [p.name for p in path.parent.iterdir() if p.name.startswith(".")]
    return sorted(beside) + [p.name for p in download._parts().iterdir()]


# --- the download ---


@pytest.mark.parametrize(
    "fault, requests",
    [
        ("", [None]),
        ("cuts", [None, f"bytes={len(BODY) // 2}-"]),
        ("cuts, ignores ranges", [None, f"bytes={len(BODY) // 2}-"]),
        ("cuts, untagged", [None, None]),  # nothing says that it is still the same file
        ("cuts, other range", [None, f"bytes={len(BODY) // 2}-", None]),
        ("busy once", [None, None]),
    ],
)
def test_the_file_is_right_whatever_the_server_does(server, fault, requests):
    url = server.put("/a/x.pt", BODY, fault)
    path = download.fetch(url)
    assert path.read_bytes() == BODY and leftovers(path) == []
    assert [r for _, r in server.asked] == requests
    record = json.loads(Path(f"{path}.json").read_text())
    assert record["size"] == len(BODY) and record["url"] == url and record["date"]
    assert record["sha256"] == hashlib.sha256(BODY).hexdigest()


def test_a_file_that_changes_while_it_comes_is_fetched_anew(server):
    path = download.fetch(server.put("/a/x.pt", BODY, "changes"))
    assert path.read_bytes() == BODY[::-1]


def test_a_later_process_continues_where_an_earlier_one_gave_up(server):
    url = server.put("/a/x.pt", BODY, "always cuts")
    with pytest.raises(OSError, match="ended after"):
        download.fetch(url)
    assert not download.place(url).exists()
    server.faults["/a/x.pt"] = ""
    assert download.fetch(url).read_bytes() == BODY
    assert server.asked[-1][1] is not None


@pytest.mark.parametrize(
    "fault, said",
    [
        ("404", "the server answered 404 Not Found"),
        ("403", "the server answered 403 Forbidden"),
        ("500", "the server answered 500"),
        ("always cuts, ignores ranges", "the connection ended after"),
    ],
)
def test_an_error_names_the_address_and_where_to_put_the_file(server, fault, said):
    url = server.put("/a/x.pt", BODY, fault)
    with pytest.raises(OSError, match=said) as raised:
        download.fetch(url)
    assert f"{url}: " in str(raised.value)
    assert f"Download it by hand and put it at {download.place(url)}" in str(raised.value)
    assert not download.place(url).exists()
    if fault.startswith("40"):
        assert len(server.asked) == 1  # asking again would not help


def test_no_network_says_what_to_download_and_where_to_put_it(server):
    url = server.put("/a/x.pt", BODY)
    server.server_close()
    server.shutdown()
    with pytest.raises(OSError, match="cannot be reached .no network.*by hand and put it at"):
        download.fetch(url.replace(f":{server.server_port}", ":9"))


def test_offline_nothing_is_asked_and_a_file_put_there_by_hand_is_taken(server, monkeypatch):
    url = server.put("/a/x.pt", BODY)
    monkeypatch.setenv("PREPRETRAIN_OFFLINE", "1")
    with pytest.raises(OSError, match="PREPRETRAIN_OFFLINE is set. Download it by hand"):
        download.fetch(url)
    place = download.place(url)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(BODY)
    assert download.fetch(url).read_bytes() == BODY
    assert server.asked == [] and download.recorded(place)["size"] == len(BODY)


@pytest.mark.parametrize(
    "expected",
    [Expected(size=len(BODY) + 1), Expected(sha256="0" * 64), Expected(md5="abcdef")],
)
def test_a_file_other_than_the_published_one_is_refused_and_not_kept(server, expected):
    url = server.put("/a/x.pt", BODY)
    with pytest.raises(ValueError, match="Download it by hand"):
        download.fetch(url, expected)
    assert not download.place(url).exists() and leftovers(download.place(url)) == []
    right = Expected(len(BODY), hashlib.sha256(BODY).hexdigest(), hashlib.md5(BODY).hexdigest()[:6])
    assert download.fetch(url, right).read_bytes() == BODY


def test_a_flipped_byte_is_found_ever_after(server):
    url = server.put("/a/x.pt", BODY)
    path = download.fetch(url)
    assert download.fetch(url) == path and len(server.asked) == 1
    damaged = bytearray(BODY)
    damaged[1000] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=f"its sha256 is .* was recorded on .* Delete {path}"):
        download.fetch(url)
    path.unlink()  # and a server that now has another file is not believed either
    server.files["/a/x.pt"] = bytes(damaged)
    with pytest.raises(ValueError, match="If it was replaced and you trust it, delete .*json"):
        download.fetch(url)
    Path(f"{path}.json").unlink()
    assert download.fetch(url).read_bytes() == damaged


def test_a_damaged_record_is_an_error_that_names_it(server):
    url = server.put("/a/x.pt", BODY)
    record = Path(f"{download.fetch(url)}.json")
    record.write_text("{")
    with pytest.raises(ValueError, match=f"{record}: is no record of a download"):
        download.fetch(url)


def test_two_processes_get_one_download(server):
    url = server.put("/a/x.pt", BODY, "slow")
    code = "import sys; from prepretrain.zoo import download; print(download.fetch(sys.argv[1]))"
    started = [
        subprocess.Popen([sys.executable, "-c", code, url], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=60)[0].strip() for process in started]
    assert said == [str(download.place(url))] * 2 and len(server.asked) == 1


def test_files_of_the_same_name_do_not_meet_in_the_cache(server):
    urls = [server.put(p, BODY + p.encode()) for p in ("/maws/b.pt", "/mae/b.pt", "/b.pt")]
    urls += [f"{urls[0]}?version=2"]
    places = [download.fetch(url) for url in urls]
    assert len(set(places)) == 4 and all(p.suffix == ".pt" for p in places)
    assert [p.read_bytes()[len(BODY) :] for p in places[:3]] == [
        b"/maws/b.pt",
        b"/mae/b.pt",
        b"/b.pt",
    ]
    assert len({row.place for row in zoo.releases().values()}) == len(zoo.releases())


@pytest.mark.parametrize(
    "url", ["http://example.org/x.pt", "file:///etc/passwd", "ftp://example.org/x.pt", "x.pt"]
)
def test_only_https_is_fetched(server, url):
    with pytest.raises(ValueError, match="is not https"):
        download.fetch(url)


@pytest.mark.parametrize("url", ["https://example.org/../x.pt", "https://example.org"])
def test_an_address_cannot_leave_the_cache(url):
    with pytest.raises(ValueError, match="is not the address of a file"):
        download.place(url)


def test_a_redirect_away_from_https_is_not_followed(server):
    with pytest.raises(ValueError, match="http://example.invalid/x.pt: is not https"):
        download.fetch(server.put("/a/x.pt", BODY, "elsewhere"))


def test_a_redirect_from_https_to_this_machine_is_not_followed():
    asked = urllib.request.Request("https://example.org/x.pt")
    with pytest.raises(ValueError, match="http://127.0.0.1:8080/admin: is not https"):
        redirect = download._OnlyHttps().redirect_request
        redirect(asked, None, 302, "Found", {}, "http://127.0.0.1:8080/admin")


def test_an_address_with_a_password_is_refused_without_printing_it():
    with pytest.raises(ValueError, match="holds a name or a password") as caught:
        download.fetch("https://me:secret@example.org/x.pt")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("length", ["-5", "many", "1e9"])
def test_a_length_that_is_no_number_ends_the_download(server, length, monkeypatch):
    monkeypatch.setattr(download, "TRIES", 1)
    with pytest.raises(OSError, match="Content-Length: '" + length):
        download.fetch(server.put("/a/x.pt", BODY, f"says {length}"))


def test_a_server_that_drips_is_given_up(server, monkeypatch):
    monkeypatch.setattr(download, "TRIES", 2)
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    with pytest.raises(OSError, match="less than 30720 bytes came in 0.2 seconds"):
        download.fetch(server.put("/a/x.pt", BODY, "drips"))


def test_what_comes_in_part_is_kept_where_nobody_else_can_lay_a_link(server, tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    url = server.put("/a/x.pt", BODY)
    path = download.place(url)
    path.parent.mkdir(parents=True)
    for name in (".part", ".json.tmp", ".part.json.tmp", ".json"):
        Path(f"{path}{name}").symlink_to(victim)
    with pytest.raises(ValueError, match="x.pt.json: is no record of a download"):
        download.fetch(url)
    Path(f"{path}.json").unlink()
    assert download.fetch(url).read_bytes() == BODY
    assert victim.read_bytes() == b"mine"
    assert stat.S_IMODE(download._parts().stat().st_mode) & 0o077 == 0


@pytest.mark.parametrize("how", ["a link", "open to others"])
def test_a_folder_of_parts_that_is_not_ones_own_is_refused(server, tmp_path, how):
    place = cache_folder() / f".parts-{os.getuid()}"
    place.parent.mkdir(parents=True)
    if how == "a link":
        (tmp_path / "elsewhere").mkdir()
        place.symlink_to(tmp_path / "elsewhere")
    else:
        place.mkdir()
        place.chmod(0o777)
    with pytest.raises(OSError, match="no folder that only user .* Remove it, or name another"):
        download.fetch(server.put("/a/x.pt", BODY))


def test_whose_a_file_is_that_nothing_published_tells_of_is_said(server, monkeypatch, caplog):
    url = server.put("/a/x.pt", BODY)
    download.fetch(url)
    monkeypatch.setattr(download.os, "getuid", lambda: 12345)
    download.fetch(url)
    assert (os.geteuid() == 0) == ("belongs to user" not in caplog.text)
    caplog.clear()
    download.fetch(url, Expected(sha256=hashlib.sha256(BODY).hexdigest()))
    assert "belongs to user" not in caplog.text


@pytest.mark.parametrize("record", ["[]", "{}", '{"size": 1, "sha256": "x"}', "{", "[" * 100_000])
def test_a_damaged_record_is_refused_by_name(server, record):
    url = server.put("/a/x.pt", BODY)
    path = download.fetch(url)
    Path(f"{path}.json").write_text(record)
    with pytest.raises(ValueError, match="x.pt.json: is no record of a download. Delete it"):
        download.fetch(url)


def test_a_file_over_the_limit_is_refused_before_it_comes(server, monkeypatch):
    url = server.put("/a/x.pt", BODY)
    monkeypatch.setattr(download, "LIMIT", 1000)
    with pytest.raises(ValueError, match=f"has {len(BODY)} bytes, more than the limit of 1000"):
        download.fetch(url)


def test_a_full_disk_is_named(server, monkeypatch):
    url = server.put("/a/x.pt", BODY)
    usage = types.SimpleNamespace(free=10)
    with monkeypatch.context() as patch:
        patch.setattr(download.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(OSError, match="bytes more, and .* has 10 free.*PREPRETRAIN_CACHE"):
            download.fetch(url)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download.os, "fsync", full)
    monkeypatch.setattr(download, "write_json", lambda *_: None)
    with pytest.raises(OSError, match="cannot be written to .*parts.*No space left"):
        download.fetch(url)


def test_a_cache_that_cannot_be_made_is_named(server, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PREPRETRAIN_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match="Name another folder with PREPRETRAIN_CACHE"):
        download.fetch(server.put("/a/x.pt", BODY))


# --- files that are not what they should be ---


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda body: b"<html>Please log in</html>", "is no file of weights: it begins with"),
        (lambda body: body[: len(body) // 2], "is cut: its end is missing"),
        (lambda body: b"", "is no file of weights"),
    ],
)
def test_a_body_that_is_no_file_of_weights_is_refused_and_not_kept(tiny, server, damage, said):
    row = tiny(vit().encoder.state_dict())
    server.files["/tiny/vit.pt"] = damage(server.files["/tiny/vit.pt"])
    with pytest.raises(ValueError, match=f"{row.url}: .*{said}.*put it at {row.place}"):
        prepretrain.load("tiny/vit")
    assert not row.place.exists() and leftovers(row.place) == []


def test_a_cut_file_put_there_by_hand_is_refused_and_not_recorded(tiny, server):
    row = tiny(vit().encoder.state_dict())
    row.place.parent.mkdir(parents=True)
    row.place.write_bytes(server.files["/tiny/vit.pt"][:-100])
    with pytest.raises(ValueError, match=f"{row.place}: is cut: its end is missing"):
        prepretrain.load("tiny/vit")
    assert download.recorded(row.place) is None


# --- files of others ---


def prefixed(prefix: str, state: dict) -> dict:
    """The tensors under other names."""
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize("flat", [True, False])
def test_the_encoder_of_a_file_is_taken_with_all_that_it_has(tmp_path, flat):
    state = vit(depth=3).encoder.state_dict()
    torch.save(state if flat else prefixed("encoder.", state), tmp_path / "x.pth")
    for source in (tmp_path / "x.pth", f"{tmp_path}/x.pth:encoder"):
        with pytest.raises(
            ValueError, match=r"(?s)left over encoder.blocks.2.*right model.encoder\?"
        ):
            prepretrain.load(str(source), encoder="vit_test8")


def test_of_a_flat_file_the_encoder_is_taken_without_the_modules_of_a_decoder(tmp_path):
    model = vit()
    more = {"decoder_blocks.0.weight": torch.ones(2), "mask_token": torch.ones(1)}
    torch.save(model.encoder.state_dict() | more, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="left over .*mask_token"):
        prepretrain.load(str(tmp_path / "x.pth"), encoder="vit_test8")
    found = prepretrain.load(f"{tmp_path}/x.pth:encoder", encoder="vit_test8")
    assert torch.equal(found(images()), model(images()))
    torch.save(prefixed("encoder.", model.encoder.state_dict() | more), tmp_path / "x.pth")
    with pytest.raises(ValueError, match="left over encoder.decoder_blocks"):
        prepretrain.load(f"{tmp_path}/x.pth:encoder", encoder="vit_test8")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "module.module."])
@pytest.mark.parametrize("wrapped", [True, False])
def test_what_ddp_and_compilation_put_before_names_does_not_matter(tmp_path, prefix, wrapped):
    model = vit()
    state = prefixed(prefix, model.encoder.state_dict())
    torch.save({"model": state} if wrapped else state, tmp_path / "x.pth")
    found = prepretrain.load(str(tmp_path / "x.pth"), encoder="vit_test8")
    assert torch.equal(found(images()), model(images()))


@pytest.mark.parametrize(
    "content, way",
    [
        (lambda s: prefixed("model.", s), "model"),
        (lambda s: {"model": prefixed("teacher.backbone.", s)}, "teacher.backbone"),
        (lambda s: prefixed("a.", s) | prefixed("b.", {k: v + 1 for k, v in s.items()}), "a"),
        (lambda s: {"model_ema": s, "epoch": 3}, "model_ema"),
        (lambda s: {"teacher": prefixed("backbone.", s), "epoch": 3}, "teacher"),
    ],
)
def test_an_error_says_the_prefix_under_which_the_tensors_lie(tmp_path, content, way):
    model, path = vit(), tmp_path / "x.pth"
    torch.save(content(model.encoder.state_dict()), path)
    with pytest.raises(ValueError, match=f"write {path}:{way}[.]") as caught:
        prepretrain.load(str(path), encoder="vit_test8")
    if way == "teacher":
        with pytest.raises(ValueError, match=f"write {path}:teacher.backbone[.]") as caught:
            prepretrain.load(f"{path}:teacher", encoder="vit_test8")
    told = str(caught.value).rpartition("write ")[2].rstrip(".")
    assert torch.equal(prepretrain.load(told, encoder="vit_test8")(images()), model(images()))


def test_a_folder_of_weights_in_pieces_says_so(tmp_path):
    for number in (1, 2):
        (tmp_path / f"model-0000{number}-of-00002.safetensors").touch()
    with pytest.raises(ValueError, match="holds weights in 2 pieces, as model-00001-of-00002"):
        prepretrain.load(str(tmp_path))


class Bomb:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch exploded",)


@pytest.mark.parametrize(
    "content", [Bomb(), {"model": {}, "extra": Bomb()}], ids=["bare", "beside"]
)
def test_a_pickle_bomb_is_refused_and_does_not_go_off(tiny, content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny(content)
    with pytest.raises(ValueError, match="cannot be read with weights_only"):
        prepretrain.load("tiny/vit")
    Path("raw.pth").write_bytes(pickle.dumps(content, 2))
    with pytest.raises(ValueError, match="cannot be read with weights_only"):
        prepretrain.load("raw.pth", encoder="vit_test8")
    assert not Path("exploded").exists()


def settings(monkeypatch) -> dict:
    """What SimMIM's and MAE's code save beside the weights, with yacs's class of that name."""

    class CfgNode(dict):
        """As yacs's: a dict with attributes of its own."""

        def __init__(self, values):
            super().__init__(values)
            self.__dict__["__deprecated_keys__"] = set()
            raise_if_loaded.append(True)

    raise_if_loaded: list[bool] = []
    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    fake = types.ModuleType("yacs.config")
    fake.CfgNode = CfgNode
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", fake)
    config = CfgNode({"MODEL": CfgNode({"NAME": "swinv2", "DEPTHS": [2, 2]}), "LR": 0.1})
    return {"config": config, "args": argparse.Namespace(lr=0.1), "epoch": 3, "optimizer": {}}


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_flat_and_wrapped_files_load_and_settings_beside_the_weights_stay_inert(
    tiny, server, monkeypatch, wrapper, zipped
):
    model, file = vit(), io.BytesIO()
    state = model.encoder.state_dict()
    content = state if wrapper is None else {wrapper: state, **settings(monkeypatch)}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    for name in ("yacs", "yacs.config"):  # the machine that loads has no yacs
        monkeypatch.delitem(sys.modules, name, raising=False)
    tiny(state)
    server.files["/tiny/vit.pt"] = file.getvalue()
    loaded = prepretrain.load("tiny/vit")
    assert_close(loaded.features(images()), model.features(images()), rtol=0, atol=0)
    assert not any(name.startswith("yacs") for name in sys.modules)


# --- loading by name ---


def test_a_release_loads_by_its_name_with_other_options(tiny):
    model = vit()
    tiny({"model": model.encoder.state_dict()})
    loaded = prepretrain.load("tiny/vit")
    assert loaded.options["encoder"] == "vit_test8" and not loaded.training
    assert_close(loaded.features(images()), model.features(images()), rtol=0, atol=0)
    larger = prepretrain.load("tiny/vit", image_size=64)
    assert larger.encoder.pos_embed.shape == (1, 65, 32)
    assert larger.features(images(64)).isfinite().all()
    assert_close(larger.encoder.pos_embed[:, 0], model.encoder.pos_embed[:, 0])


def test_a_path_comes_before_a_release(tiny, tmp_path, monkeypatch, server):
    monkeypatch.chdir(tmp_path)
    tiny(vit().encoder.state_dict())
    save(vit(), Path("tiny/vit"), "here")
    prepretrain.load("tiny/vit")
    assert server.asked == []


def test_an_unknown_name_offers_the_nearest(monkeypatch):
    with pytest.raises(ValueError, match="maws/vit_l61: no such run or file.*mean 'maws/vit_l16'"):
        prepretrain.load("maws/vit_l61")
    with pytest.raises(ValueError, match="no released model 'mae/vith14'.*mean 'mae/vit_h14'"):
        zoo.fetch("mae/vith14")


def test_a_key_that_no_pattern_names_is_an_error(tiny):
    state = {**vit().encoder.state_dict(), "tail.weight": torch.zeros(10, 32)}
    tiny(state)
    with pytest.raises(ValueError, match="left over encoder.tail.weight"):
        prepretrain.load("tiny/vit")
    tiny(state, unused=(r"tail\.(weight|bias)",))
    assert prepretrain.load("tiny/vit").encoder.width == 32
    tiny(state, unused=(r"tail",))  # a pattern matches whole keys
    with pytest.raises(ValueError, match="left over encoder.tail.weight"):
        prepretrain.load("tiny/vit")


def test_a_classifier_that_was_not_asked_for_is_an_error_that_says_how_to_leave_it(tiny):
    state = vit().encoder.state_dict()
    tiny({**state, "head.weight": torch.zeros(10, 32), "head.bias": torch.zeros(10)})
    with pytest.raises(ValueError, match="tiny/vit: ends with a head of 10 classes, and the"):
        prepretrain.load("tiny/vit")
    assert prepretrain.load("tiny/vit:encoder").encoder.width == 32
    assert prepretrain.load("tiny/vit", head={"classes": 10}).head.classes == 10
    with pytest.raises(
        ValueError, match="of 10 classes, and the model asked for has a head of 7 classes"
    ):
        prepretrain.load("tiny/vit", head={"classes": 7})


def test_two_keys_that_become_one_are_an_error():
    found = Weights("file", {"a": (1,), "b": (1,)}, {}.__getitem__)
    with pytest.raises(ValueError, match="file: b and a both become c"):
        found.renamed([("[ab]", "c")])


def test_a_stage_starts_from_a_release(tiny, place, capsys):
    tiny(vit().encoder.state_dict())
    launch("small.yaml", [], init="tiny/vit", dry_run=True)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["encoder"] == "vit_test8"
    with pytest.raises(ValueError, match="asks for vit_ti16, and tiny/vit holds vit_test8"):
        launch("small.yaml", ["model.encoder=vit_ti16"], init="tiny/vit", dry_run=True)


def swag(state: dict, ours: bool) -> dict:
    """torchvision's state dict under SWAG's own names, if ours; the head as the row expects it."""
    named = {}
    for key, value in state.items():
        key = key.replace("heads.head", "head.layers.head")
        if ours:
            key = key.replace("encoder_layer_", "layer_")
            key = key.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2.")
            value = value.transpose(0, 1) if key.endswith("pos_embedding") else value
        named[key] = value
    return named


@pytest.mark.parametrize("ours", [True, False], ids=["swag", "torchvision"])
def test_swags_files_give_the_features_of_torchvisions_vit(tiny, ours):
    torch.manual_seed(0)
    reference = torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 128, num_classes=10).eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    row = zoo.releases()["swag/vit_b16_ft_in1k"]
    tiny(swag(reference.state_dict(), ours), rename=row.rename, classes=10)
    model = prepretrain.load("tiny/vit")
    assert_close(model.scores(images()), reference(model.normalise(images())), rtol=1e-4, atol=1e-4)
    reference.heads = torch.nn.Identity()
    expected = reference(model.normalise(images()))
    assert_close(model.features(images()), expected, rtol=1e-4, atol=1e-4)


def test_a_fine_tuned_mae_gives_the_scores_of_timms_vit(tiny):
    torch.manual_seed(0)
    norm = functools.partial(torch.nn.LayerNorm, eps=1e-6)
    reference = timm.models.VisionTransformer(
        32,
        8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=10,
        global_pool="avg",
        norm_layer=norm,
    ).eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    row = zoo.releases()["mae/vit_b16_ft_in1k"]
    tiny({"model": reference.state_dict()}, options=row.options, pool=row.pool, classes=10)
    model = prepretrain.load("tiny/vit")
    assert_close(model.scores(images()), reference(model.normalise(images())), rtol=1e-4, atol=1e-4)


def test_maws_fine_tuned_files_at_512_px_give_timms_logits_with_its_scripts_preprocessing(tiny):
    """The architecture and shapes of maws/vit_b16_ft_in1k, weights drawn at random; the script
    resizes to 512 x 512 without keeping the aspect."""
    shapes = manifest()["maws/vit_b16_ft_in1k"]["shapes"]
    generator = torch.Generator().manual_seed(0)
    state = {k: torch.randn(s, generator=generator) * 0.03 for k, s in shapes.items()}
    reference = timm.create_model("vit_base_patch16_224", img_size=512, num_classes=1000).eval()
    reference.load_state_dict(state, strict=True)
    row = zoo.releases()["maws/vit_b16_ft_in1k"]
    given = {"encoder": "vit_b16", "options": row.options, "classes": row.classes}
    tiny(state, **given)
    model = prepretrain.load("tiny/vit")
    size = row.preprocessing["resize"]
    assert size == [512, 512] and row.preprocessing["crop"] is None
    photo = torch.randint(0, 256, (3, 300, 700), generator=generator, dtype=torch.uint8)
    script = transforms.Compose(
        [
            transforms.Resize(size, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize(row.preprocessing["mean"], row.preprocessing["std"]),
        ]
    )
    theirs = script(transforms.ToPILImage()(photo))[None]
    ours = squash(photo, 512)[None]
    with torch.no_grad():
        exact = model.head(model.encode(theirs))
        assert_close(exact, reference(theirs), rtol=1e-4, atol=1e-4)
        pixels = (model.normalise(ours) - theirs).abs() * 255 * 0.225
        assert pixels.max() <= 2.1  # both resize in two passes, each rounded to a level of 8 bits
        assert_close(model.scores(ours), exact, rtol=0, atol=0.05 * exact.std().item())


@pytest.mark.parametrize("tuned", [False, True])
def test_simmims_files_load_under_their_own_names(tiny, monkeypatch, tuned):
    torch.manual_seed(0)
    model = Model(encoder="swinv2_test8").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    state = model.encoder.release(model.encoder.state_dict())
    state = {k.replace("cpb_mlp", "rpe_mlp"): v.clone() for k, v in state.items()}
    if tuned:
        state |= {"head.weight": torch.ones(10, model.encoder.width), "head.bias": torch.zeros(10)}
    else:
        state = {
            f"encoder.{k}": v for k, v in {**state, "mask_token": torch.zeros(1, 1, 16)}.items()
        }
        state |= {"decoder.0.weight": torch.zeros(3, 32, 1, 1), "decoder.0.bias": torch.zeros(3)}
    row = zoo.releases()["simmim/swinv2_b_1k_125k" + ("_ft_in1k" if tuned else "")]
    given = {"unused": row.unused, "pool": row.pool, "classes": 10 if tuned else None}
    tiny({"model": state, **settings(monkeypatch)}, encoder="swinv2_test8", **given)
    loaded = prepretrain.load("tiny/vit")
    if tuned:
        mean = model.features(images(), "mean")
        assert_close(loaded.scores(images()), mean.sum(1, keepdim=True).expand(-1, 10))
    assert_close(loaded.features(images(), "mean"), model.features(images(), "mean"))


# --- the table ---


def built(row: zoo.Release) -> Model:
    """A release's model on the meta device."""
    with torch.device("meta"):
        return models.Model(**row.model)


def manifest() -> dict:
    """MAWS's 21 files: {its own name: {"url", "params", "shapes"}}."""
    return json.loads((GOLDEN / "maws_manifest.json").read_text())


@pytest.mark.parametrize("name", manifest())
def test_the_architecture_has_exactly_the_keys_and_shapes_of_maws_files(name, monkeypatch):
    known = manifest()[name]
    (row,) = [r for r in zoo.releases().values() if r.url == known["url"]]
    check_release(row, {k: tuple(s) for k, s in known["shapes"].items()}, monkeypatch)


def check_release(row: zoo.Release, shapes: dict[str, tuple], monkeypatch) -> None:
    """Checks a release's model against a file of such keys and shapes."""
    found = Weights(row.url, shapes, lambda k: torch.empty(shapes[k], device="meta"))
    monkeypatch.setattr(zoo, "fetch", lambda _: Path("file.pt"))
    monkeypatch.setattr(weights, "open_file", lambda _: found)
    weights.check(built(row), open_weights(row.name))


@pytest.mark.parametrize("size", ["vit_b_16", "vit_l_16", "vit_h_14"])
@pytest.mark.parametrize("tuned", [False, True])
def test_the_architecture_has_the_keys_of_swags_vits(size, tuned, monkeypatch):
    row = zoo.releases()["swag/" + size[:5] + size[6:] + ("_ft_in1k" if tuned else "")]
    with torch.device("meta"):
        reference = getattr(torchvision.models, size)(image_size=row.preprocessing["image_size"])
    if not tuned:
        reference.heads = torch.nn.Identity()
    state = swag(reference.state_dict(), True)
    check_release(row, {k: tuple(v.shape) for k, v in state.items()}, monkeypatch)


def test_the_figures_of_swags_probes_are_torchvisions():
    for size, cls in (("b16", "ViT_B_16"), ("l16", "ViT_L_16"), ("h14", "ViT_H_14")):
        published = getattr(torchvision.models, f"{cls}_Weights").IMAGENET1K_SWAG_LINEAR_V1
        metric = zoo.releases()[f"swag/vit_{size}"].metric
        assert metric["value"] == published.meta["_metrics"]["ImageNet-1K"]["acc@1"]


def test_the_runs_of_the_data_scaling_study_are_all_here_as_published():
    rows = {r.url: r for r in zoo.releases().values()}
    runs = list(csv.DictReader((GOLDEN / "simmim_scaling_runs.csv").open()))
    assert len(runs) == 63
    for run in runs:
        pretrained, tuned = rows[run["pretrain_url"]], rows[run["finetune_url"]]
        assert tuned.name == pretrained.name + "_ft_in1k"
        assert pretrained.metric["value"] == float(run["val_loss"])
        assert tuned.metric["value"] == float(run["top1"])
        assert pretrained.encoder == "swinv2_" + run["model"].partition("-")[2][0].lower()
        assert pretrained.name.endswith("_" + run["iterations"])


def test_every_release_is_complete_and_can_be_built():
    rows = list(zoo.releases().values())
    assert Counter(r.group for r in rows) == {
        "maws": 10, "maws_clip": 4, "mae_ig3b": 5, "mae_in1k": 1, "mae_in21k": 1, "mae": 6,
        "swag": 6, "simmim": 126,
    }  # fmt: skip
    assert len({r.url for r in rows}) == len(rows)
    models_built = {}
    for row in rows:
        assert row.url.startswith("https://") and row.source and row.licence
        key = json.dumps(row.model, sort_keys=True)
        if key not in models_built:
            models_built[key] = built(row)
        assert models_built[key].encoder.image_size == (row.preprocessing["image_size"],) * 2
        assert (row.pool == "class") <= (models_built[key].encoder.prefix == 1)


def test_model_zoo_md_is_current():
    text = (ROOT / "MODEL_ZOO.md").read_text()
    assert text == catalogue.markdown(), "run `python tools/zoo.py write`"
    for row in zoo.releases().values():
        assert row.group in text


# --- the command and torch.hub ---


@pytest.fixture
def command(monkeypatch, capsys):
    """command("list", …): what tools/zoo.py prints."""
    spec = importlib.util.spec_from_file_location("zoo_tool", ROOT / "tools" / "zoo.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["zoo.py", *arguments])
        tool.main()
        return capsys.readouterr().out

    return run


def test_the_command_lists_every_release(command):
    listed = json.loads(command("list", "--json"))
    keys = {"name", "url", "architecture", "preprocessing", "licence", "metric", "source"}
    assert len(listed) == 159 and all(keys <= set(row) for row in listed)
    table = command("list")
    assert all(row["name"] in table for row in listed)


def test_the_command_fetches_and_verifies(command, tiny, tmp_path):
    row = tiny(vit().encoder.state_dict())
    with pytest.raises(SystemExit, match="zoo: tiny/vit: is not here yet"):
        command("verify", "tiny/vit")
    path = Path(command("fetch", "tiny/vit").strip())
    assert path == row.place
    assert json.loads(command("list", "--json"))[0]["size"] == path.stat().st_size
    for source in ("tiny/vit", str(path)):
        said = json.loads(command("verify", source))
        assert said["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(SystemExit, match="zoo: no released model 'tiny/vitt'.*'tiny/vit'"):
        command("fetch", "tiny/vitt")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(SystemExit, match="zoo: .*sha256"):
        command("verify", "tiny/vit")
    stranger = tmp_path / "stranger.pt"
    torch.save({}, stranger)
    with pytest.raises(SystemExit, match="nothing to verify it against"):
        command("verify", str(stranger))


def test_the_command_writes_the_page(command, tmp_path):
    command("write", "--out", str(tmp_path / "page.md"))
    assert (tmp_path / "page.md").read_text() == catalogue.markdown()


def test_torch_hub_loads_a_release(tiny):
    model = vit()
    tiny(model.encoder.state_dict())
    loaded = torch.hub.load(str(ROOT), "tiny_vit", source="local")
    assert_close(loaded.features(images()), model.features(images()))
    loaded = torch.hub.load(str(ROOT), "load", "tiny/vit", source="local", image_size=64)
    assert loaded.encoder.image_size == (64, 64)


def test_torch_hubs_dependencies_are_what_loading_imports():
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "import prepretrain.models.load; prepretrain.models.load.encoders.sizes()\n"
        "print(*{m.partition('.')[0] for m in set(sys.modules) - before})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    setup = (ROOT / "setup.py").read_text().partition("install_requires")[2].partition("]")[0]
    modules = {"open_clip_torch": "open_clip", "pillow": "PIL", "scikit-learn": "sklearn"}
    required = {modules.get(n, n) for n in re.findall(r'"([a-z_-]+)', setup)}
    spec = importlib.util.spec_from_file_location("hubconf", ROOT / "hubconf.py")
    hub = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hub)
    assert required & set(done.stdout.split()) <= set(hub.dependencies)


def test_only_the_two_classes_of_settings_are_stood_in_for():
    assert {name for _, name in weights._INERT} == {"yacs.config.CfgNode", "argparse.Namespace"}
    assert weights._Inert("touch exploded") == {}


def test_the_tokenizer_of_a_released_text_tower_is_found_in_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("PREPRETRAIN_CACHE", str(tmp_path))
    monkeypatch.setenv("PREPRETRAIN_OFFLINE", "1")
    with pytest.raises((OSError, ValueError), match=zoo.TOKENIZER):
        zoo.tokenizer("maws_clip/vit_l16_xlmr_l")
    file = zoo.find("maws_clip/vit_l16_xlmr_l").place.parent / "xlmr_tokenizer" / zoo.TOKENIZER
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"put there by hand")
    assert zoo.tokenizer("maws_clip/vit_l16_xlmr_l") == file
    with pytest.raises(ValueError, match="maws/vit_l16: has no text tower"):
        zoo.tokenizer("maws/vit_l16")
