"""Fetches a file once and for all: resumed where it was cut, whole or not there, checked ever
after."""

import contextlib
import functools
import hashlib
import http.client
import logging
import os
import re
import shutil
import stat
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from prepretrain.files import cache_folder, create, offline, read_json, write_json

logger = logging.getLogger(__name__)

LIMIT = 64 * 2**30  # bytes of one file; a 6.5B model in float32, the largest released, has 26e9
TIMEOUT = 30.0  # seconds in which nothing comes, or less than SLOW
SLOW = 30 * 2**10  # bytes; not from the paper: a server that drips would hold the lock for ever
TRIES = 5  # connections in a row that bring less than SLOW
PAUSE = 2.0  # seconds between them
BLOCK = 1 << 20
_RECORDED = {"url": str, "size": int, "sha256": str}
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Expected:
    """What is known of a file beforehand; None is not known."""

    size: int | None = None  # bytes
    sha256: str | None = None
    md5: str | None = None  # the first digits of it, where no more was published


class _Cut(Exception):
    """A connection failed, and another may not."""


def place(url: str) -> Path:
    """Where a URL's file lies: under its host and whole path, because different releases have files
    of the same name (maws/vit_b16.pt, mae/vit_b16.pt).

    Raises ValueError for an address that is not https, holds a password, or has no plain path.
    """
    _check_address(url)
    parts = urllib.parse.urlsplit(url)
    names = [urllib.parse.quote(n, safe="") for n in (parts.netloc, *parts.path.split("/")) if n]
    if len(names) < 2 or not all(n.strip(".") for n in names):
        raise ValueError(f"{url}: is not the address of a file.")
    if parts.query:
        last, mark = Path(names[-1]), hashlib.sha256(parts.query.encode()).hexdigest()[:8]
        names[-1] = f"{last.stem}.{mark}{last.suffix}"
    return cache_folder().joinpath(*names)


def _check_address(url: str) -> None:
    parts = urllib.parse.urlsplit(url)
    if "@" in parts.netloc:  # they would stand in messages and in the cache's folder names
        raise ValueError(
            f"{parts.scheme}://…@{parts.hostname}{parts.path}: holds a name or a password, which are "
            f"not sent. Download the file by hand."
        )
    if parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in LOOPBACK):
        return
    raise ValueError(f"{url}: is not https, and nothing else is fetched.")


def fetch(
    url: str, expected: Expected = Expected(), accept: Callable[[Path], None] | None = None
) -> Path:
    """The file of a URL, from the cache or the network; its size and sha256 are recorded beside it
    and checked each time.

    accept: looks at a new file and raises ValueError if it cannot be what was asked for. Processes
    that ask at once wait for one download. Raises OSError where it cannot be had, ValueError where
    it is not what is expected; both name the URL and where to put a file that was fetched by hand.
    """
    path = place(url)
    with _alone(path):
        if path.exists():
            _warn_of_owner(path, expected)
            if accept is not None and recorded(path) is None:  # put there by hand
                accept(path)
            verify(path, url, expected)
        else:
            _Download(url, path, expected).run(accept)
    return path


def _warn_of_owner(path: Path, expected: Expected) -> None:
    """Says whose a file in a shared cache is, where nothing published tells that it is the right
    one: its record was written by the same hand."""
    owner = path.stat().st_uid
    if owner not in (0, os.getuid()) and expected.sha256 is None and expected.md5 is None:
        logger.warning(
            "%s: belongs to user %d, and no checksum of it was published: they are trusted to have "
            "put the right weights there.",
            path,
            owner,
        )


def _parts() -> Path:
    """The folder of files that came in part: this user's own, since their names can be guessed, and
    who may write there could lay links that lead a download elsewhere."""
    place = cache_folder() / f".parts-{os.getuid()}"
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    state = place.lstat()
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid() or state.st_mode & 0o022:
        raise OSError(f"it is no folder that only user {os.getuid()} may write to")
    return place


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time; a cache that only others may write needs no lock."""
    if path.exists() and not os.access(path.parent, os.W_OK):
        yield
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.lock")
        try:
            lock.acquire(timeout=1)
        except Timeout:
            logger.info("%s: waiting for another process that is fetching it", path)
            lock.acquire()
    except OSError as error:
        raise OSError(
            f"{path}: cannot be written ({error}). Name another folder with PREPRETRAIN_CACHE."
        ) from error
    try:
        yield
    finally:
        lock.release()


def verify(path: Path, url: str, expected: Expected = Expected()) -> dict[str, Any]:
    """{"url", "size", "sha256", "date"} of a cached file, which are recorded if they were not yet.

    Raises ValueError if the file is not the one expected or not the one recorded.
    """
    found = _describe(path)
    known = recorded(path)
    _compare(path, found, expected, known, f"Delete {path} and fetch {url} again.")
    if known is not None:
        return known
    record = {"url": url, **found, "date": _now()}
    if os.access(path.parent, os.W_OK):
        write_json(_record(path), record)
    return record


def recorded(path: Path) -> dict[str, Any] | None:
    """What was recorded of a file when it came, or None. Raises ValueError for a damaged record."""
    place = _record(path)
    if not place.exists():
        return None
    try:
        known = read_json(place)
    except ValueError:
        known = {}
    if all(isinstance(known.get(k), kind) for k, kind in _RECORDED.items()):
        return known
    raise ValueError(f"{place}: is no record of a download. Delete it to record the file anew.")


def _record(path: Path) -> Path:
    return Path(f"{path}.json")


def _compare(
    path: Path, found: dict, expected: Expected, known: dict[str, Any] | None, remedy: str
) -> None:
    published = {"size": expected.size, "sha256": expected.sha256}
    for source, wanted in (("published", published), ("recorded", known)):
        for key in ("size", "sha256"):
            value = wanted.get(key) if wanted else None
            if value is not None and found[key] != value:
                when = f" on {known.get('date')}" if source == "recorded" else ""
                raise ValueError(
                    f"{path}: its {key} is {found[key]}, and {value} was {source}{when}. {remedy}"
                )
    if expected.md5 and not _digest(path, "md5", _state(path)).startswith(expected.md5):
        raise ValueError(f"{path}: its md5 does not begin with {expected.md5}. {remedy}")


def _describe(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": _digest(path, "sha256", _state(path))}


def _state(path: Path) -> tuple[int, ...]:
    now = path.stat()
    return now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino


@functools.lru_cache(maxsize=256)
def _digest(path: Path, kind: str, state: tuple[int, ...]) -> str:
    """A file's digest in hex; computed once in a process while its state is the same, for a run
    opens its weights several times."""
    digest = hashlib.new(kind)
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


class _Download:
    """What it takes to bring one file into the cache."""

    def __init__(self, url: str, path: Path, expected: Expected):
        self.url, self.path, self.expected = url, path, expected
        try:
            self.part = _parts() / hashlib.sha256(str(path).encode()).hexdigest()[:32]
        except OSError as error:
            raise OSError(
                f"{cache_folder() / f'.parts-{os.getuid()}'}: cannot be used ({error}). Remove it, or name "
                f"another folder with PREPRETRAIN_CACHE."
            ) from error

    def run(self, accept: Callable[[Path], None] | None) -> None:
        """Connects until the file is whole, then checks, records and names it."""
        if offline():
            raise OSError(self.by_hand("is not here, and PREPRETRAIN_OFFLINE is set"))
        known = recorded(self.path)
        most = failures = 0
        while True:
            try:
                self.connect()
                break
            except _Cut as error:
                size = self.part.stat().st_size if self.part.exists() else 0
                failures = 0 if size >= most + SLOW else failures + 1
                most = max(most, size)
                if failures >= TRIES:
                    raise OSError(self.by_hand(str(error))) from error
                time.sleep(PAUSE)
        found = self.check(known, accept)
        write_json(_record(self.path), {"url": self.url, **found, "date": _now()})
        os.replace(self.part, self.path)
        self.forget()

    def check(self, known: dict | None, accept: Callable[[Path], None] | None) -> dict[str, Any]:
        """Size and sha256 of what came. Raises ValueError, and forgets it, if it is wrong."""
        found = _describe(self.part)
        remedy = self.by_hand("the server sent something else")
        if known is not None:
            remedy += f" If it was replaced and you trust it, delete {_record(self.path)}."
        try:
            _compare(self.part, found, self.expected, known, remedy)
            if accept is not None:
                accept(self.part)
        except ValueError as error:
            self.forget()  # a wrong file is not to be continued
            text = str(error)
            raise ValueError(text if self.url in text else self.by_hand(text)) from error
        return found

    def connect(self) -> None:
        """One connection: adds what is missing. Raises _Cut if that may be tried again."""
        begun = self.begun()
        have = self.part.stat().st_size if begun else 0
        if begun and begun["total"] == have:
            return
        headers = {"User-Agent": "prepretrain", "Accept-Encoding": "identity"}
        if begun and have:  # If-Range: all of it, should the file have changed since
            headers |= {"Range": f"bytes={have}-", "If-Range": begun["validator"]}
        with self.open(headers) as response:
            start, total = self.extent(response, have, begun)
            self.check_size(start, total)
            validator = response.headers.get("ETag") or ""
            if not validator or validator.startswith("W/"):
                validator = response.headers.get("Last-Modified") or ""
            write_json(_record(self.part), {"validator": validator, "total": total})
            try:
                self.receive(response, start, total)
            except OSError as error:  # a full disk; the network's errors are _Cut by now
                what = f"cannot be written to {self.part} ({error})"
                raise OSError(self.by_hand(what)) from error

    def begun(self) -> dict[str, Any] | None:
        """What is known of a file that came in part; None if it cannot be continued safely."""
        try:
            begun = read_json(_record(self.part))
        except (OSError, ValueError):
            return None
        texts, total = begun.get("validator"), begun.get("total")
        safe = isinstance(texts, str) and texts and type(total) is int and total > 0
        return begun if safe and self.part.exists() else None

    def open(self, headers: dict[str, str]) -> Any:
        """The server's response. Raises OSError for an answer that will not change."""
        request = urllib.request.Request(self.url, headers=headers)
        try:
            return urllib.request.build_opener(_OnlyHttps).open(request, timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            error.close()
            what = f"the server answered {error.code} {error.reason}"
            if error.code == 416:  # what is here is longer than the file is there
                self.forget()
            if error.code in (408, 416, 429) or error.code >= 500:
                raise _Cut(what) from error
            raise OSError(self.by_hand(what)) from error
        except urllib.error.URLError as error:
            raise _Cut(f"cannot be reached (no network? {error.reason})") from error
        except (OSError, http.client.HTTPException) as error:
            raise _Cut(f"the connection failed ({error!r})") from error

    def extent(self, response: Any, have: int, begun: dict | None) -> tuple[int, int | None]:
        """(first byte, size of the whole file) of a response: a range may be answered with all."""
        if response.status == 200:
            length = response.headers.get("Content-Length")
            if length is None:
                return 0, None
            if not re.fullmatch(r"[0-9]{1,19}", length):
                raise _Cut(f"the server said Content-Length: {length[:40]!r}")
            return 0, int(length)
        said = response.headers.get("Content-Range", "")
        if (
            response.status == 206
            and begun
            and said == f"bytes {have}-{begun['total'] - 1}/{begun['total']}"
        ):
            return have, begun["total"]
        self.forget()
        raise _Cut(f"the server answered {response.status} with '{said}', which was not asked for")

    def check_size(self, start: int, total: int | None) -> None:
        """Raises before a byte is read if the file is the wrong one, or too large."""
        if total is None:
            return
        if self.expected.size not in (None, total):
            self.forget()
            what = (
                f"the server's file has {total} bytes and was published with {self.expected.size}"
            )
            raise ValueError(self.by_hand(what))
        if total > LIMIT:
            raise ValueError(f"{self.url}: has {total} bytes, more than the limit of {LIMIT}.")
        free = shutil.disk_usage(self.path.parent).free
        if total - start > free:
            what = f"needs {total - start} bytes more, and {self.path.parent} has {free} free"
            raise OSError(self.by_hand(what) + " PREPRETRAIN_CACHE names another folder.")

    def receive(self, response: Any, start: int, total: int | None) -> None:
        """Writes the body from byte `start` on, and sees to it that all of it came."""
        name, position = self.path.name, start
        bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=name, disable=None)
        if not start:
            self.part.unlink(missing_ok=True)
            os.close(create(self.part))
        pace = _Pace(position)
        with self.part.open("r+b") as file, bar:
            file.seek(start)
            while block := _read(response, position):
                position += len(block)
                if position > LIMIT:
                    raise ValueError(f"{self.url}: has more than the limit of {LIMIT} bytes.")
                file.write(block)
                bar.update(len(block))
                pace.check(position)
            file.flush()
            os.fsync(file.fileno())
        if total is not None and position != total:
            raise _Cut(f"the connection ended after {position} of {total} bytes")

    def by_hand(self, what: str) -> str:
        """An error text with the way out."""
        known = [f"{k} {v}" for k, v in vars(self.expected).items() if v is not None and k != "md5"]
        known += [f"md5 {self.expected.md5}…"] if self.expected.md5 else []
        return (
            f"{self.url}: {what}. Download it by hand and put it at {self.path}"
            f"{' (' + ', '.join(known) + ')' if known else ''}."
        )

    def forget(self) -> None:
        """Removes what came in part."""
        for file in (self.part, _record(self.part)):
            file.unlink(missing_ok=True)


class _Pace:
    """Ends a connection over which less than SLOW bytes came in TIMEOUT seconds."""

    def __init__(self, position: int):
        self.position, self.since = position, time.monotonic()

    def check(self, position: int) -> None:
        """Raises _Cut if it is too slow; position: how far it has come."""
        now = time.monotonic()
        if now - self.since < TIMEOUT:
            return
        if position - self.position < SLOW:
            raise _Cut(f"less than {SLOW} bytes came in {TIMEOUT:g} seconds")
        self.position, self.since = position, now


class _OnlyHttps(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req, fp, code, msg, headers, newurl):
        """Refuses to be sent where `fetch` would not go."""
        _check_address(newurl)
        if req.type == "https" and urllib.parse.urlsplit(newurl).scheme != "https":
            raise ValueError(f"{newurl}: is not https, and {req.full_url} leads there.")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _read(response: Any, position: int) -> bytes:
    try:
        return response.read1(BLOCK)  # what there is: `read` waits until a whole block is there
    except (OSError, http.client.HTTPException) as error:
        raise _Cut(f"the connection was cut after {position} bytes ({error!r})") from error


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
