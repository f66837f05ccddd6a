"""Files in object stores and on web servers, through fsspec: which there are, and their bytes."""

import base64
import errno
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from prepretrain.files import offline

# What each kind of address needs beside fsspec. A card may be a stranger's: there are no others.
PACKAGES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "hf": "huggingface_hub",
    "https": "aiohttp",
    "http": "aiohttp",
}
_WEB = ("https", "http")  # servers of files, which do not say what there is
_TOGETHER = 16  # not from the paper: requests at the same time
_REFUSED = (401, 403)
_AGAIN = (408, 425, 429)  # statuses below 500 after which a server wants to be asked again
_MD5 = re.compile(r"[0-9a-f]{32}")


class Unreachable(OSError):
    """What a store would not give; `lasting` where asking again would not help."""

    def __init__(self, message: str, lasting: bool):
        super().__init__(errno.EREMOTEIO, message)
        self.lasting = lasting

    def __reduce__(self) -> tuple[type, tuple[str, bool]]:
        return type(self), (str(self), self.lasting)

    def __str__(self) -> str:
        return str(self.args[1])


@dataclass(frozen=True, repr=False)
class Remote:
    """A file as a store listed it. Its URL may hold a password or a signature: str() has neither."""

    url: str
    size: int
    version: str  # the store's ETag, or another sign of this content
    md5: str | None = None  # that the store states, as far as it is known
    sha256: str | None = None

    def __str__(self) -> str:
        return shown(self.url)

    __repr__ = __str__

    @property
    def name(self) -> str:
        return _split(self.url)[1]

    @property
    def stem(self) -> str:
        return PurePosixPath(self.name).stem

    def read(self, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each (start, end), asked for together: as many from the first on as have come.
        Raises Unreachable if that is none. A server that only gives whole files gives the first."""
        system, path = _system(self.url)
        starts, ends = zip(*spans)
        answers = _ask(self, lambda: system.cat_ranges([path] * len(spans), starts, ends))
        pieces = []
        for (start, end), answer in zip(spans, answers):
            if isinstance(answer, bytes) and len(answer) == end - start:
                pieces.append(answer)
            elif isinstance(answer, bytes) and len(answer) == self.size:
                pieces.append(answer[start:end])
            elif pieces:
                break
            elif isinstance(answer, Exception):
                raise _failure(self, answer) from None
            else:
                what = f"sends {len(answer):,} bytes where {end - start:,} were asked for"
                raise Unreachable(f"{self}: the server {what} (at {start:,})", lasting=False)
        return pieces

    def beside(self, name: str) -> "Remote | None":
        """The file of this name beside it; None where there is none that may be read."""
        folder, _, query = _split(self.url)
        try:
            return _look(folder + name + query)
        except Unreachable as error:
            if error.lasting:
                return None
            raise

    def check_unchanged(self) -> None:
        """Raises Unreachable if the store has another content under this name by now."""
        now = _look(self.url)
        if (now.size, now.version) != (self.size, self.version):
            what = f"has changed since it was listed ({self.size:,} bytes then, {now.size:,} now)"
            raise Unreachable(f"{self}: {what}. Start again: these are other data.", lasting=True)


def is_remote(path: str) -> bool:
    """Whether a path is a URL that is not a local file's."""
    return "://" in path and not path.startswith("file://")


def shown(url: str) -> str:
    """A URL as it may be printed: without user, password and query, on one line."""
    parts = urlsplit("".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in url))
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _split(url: str) -> tuple[str, str, str]:
    """(the folder with its slash, the name, the query with its mark) of a URL."""
    mark = "?" if url.startswith(_WEB) else "\0"  # in a key of a store it is a sign as any other
    path, mark, query = url.partition(mark)
    folder, slash, name = path.rpartition("/")
    return folder + slash, name, mark + query


def check(url: str) -> str:
    """The protocol of a URL. Raises ValueError for one that is not read, or while offline."""
    protocol = url.partition("://")[0]
    if protocol not in PACKAGES or "::" in url:
        raise ValueError(
            f"{shown(url)}: shards are read from local disks and {', '.join(PACKAGES)}."
        )
    if offline():
        raise ValueError(f"{shown(url)}: PREPRETRAIN_OFFLINE forbids the network. Unset it.")
    return protocol


def can_list(url: str) -> bool:
    """Whether the store of a URL can say which files there are."""
    return check(url) not in _WEB


def listed(folder: str) -> list[Remote]:
    """The files directly in a folder of a store."""
    system, path = _system(folder)
    found = _ask(folder, lambda: system.ls(path, detail=True))
    return [_of(system, info) for info in found if info["type"] == "file"]


def matching(pattern: str) -> list[Remote]:
    """The files that a glob stands for, sorted as local ones are."""
    system, path = _system(pattern)
    found = _ask(pattern, lambda: system.glob(path, detail=True))
    files = [info for info in found.values() if info["type"] == "file"]
    return [_of(system, info) for info in sorted(files, key=lambda i: i["name"].split("/"))]


def named(urls: Sequence[str]) -> list[Remote]:
    """These files, all of which must be there; one listing of a folder says it of many."""
    by_folder: dict[str, list[str]] = defaultdict(list)
    for url in urls:
        by_folder[url.rpartition("/")[0]].append(url)
    found: dict[str, Remote] = {}
    for folder, inside in by_folder.items():
        if len(inside) > _TOGETHER and can_list(folder):
            found |= {remote.url: remote for remote in listed(folder)}
    with ThreadPoolExecutor(_TOGETHER) as threads:
        look = lambda url: found[url] if url in found else _look(url)
        return list(threads.map(look, urls))


def _look(url: str) -> Remote:
    system, path = _system(url)
    info = _ask(url, lambda: system.info(path))
    return _of(system, info | {"name": path})


def _of(system: Any, info: dict[str, Any]) -> Remote:
    url = system.unstrip_protocol(info["name"])
    size = info.get("size")
    if size is None:
        raise Unreachable(f"{shown(url)}: the server does not say how large it is.", lasting=True)
    # The first is enough: stores give times with and without fractions of a second.
    names = ("ETag", "md5Hash", "blob_id", "etag", "Last-Modified", "LastModified", "mtime")
    version = next((str(info[name]).strip('"') for name in names if info.get(name)), "")
    md5 = base64.b64decode(info["md5Hash"]).hex() if info.get("md5Hash") else None
    if url.startswith("s3://") and _MD5.fullmatch(version):
        md5 = version
    sha256 = info["lfs"]["sha256"] if info.get("lfs") else None
    return Remote(url, int(size), version, md5, sha256)


def _system(url: str) -> tuple[Any, str]:
    """The file system of a URL and the path in it; asked for anew each time, as none of them outlives
    a fork. Raises ValueError where a package is missing."""
    protocol = check(url)
    try:
        from fsspec.core import url_to_fs

        system, path = url_to_fs(url)
    except ImportError as error:
        raise ValueError(
            f"{shown(url)}: {protocol}:// is read by {PACKAGES[protocol]}, which is not installed: "
            f"pip install 'prepretrain[remote]' ({error})."
        ) from error
    system.invalidate_cache()  # of listings
    return system, path


def _ask(what: object, question: Callable[[], Any]) -> Any:
    try:
        return question()
    except Exception as error:  # each package has errors of its own
        raise _failure(what, error) from None  # the original one holds the URL


def _failure(what: object, error: Exception) -> Unreachable:
    """What a store's refusal means, without anything secret that the error may hold."""
    name = shown(what) if isinstance(what, str) else str(what)
    if name.startswith(_WEB) and isinstance(error, FileNotFoundError):
        error = error.__cause__ or error  # fsspec says it of whatever a web server answers
    status = getattr(error, "status", None)
    if isinstance(error, FileNotFoundError) or status == 404:
        return Unreachable(f"{name}: there is no such file (404).", lasting=True)
    denied = isinstance(error, PermissionError) or "Credentials" in type(error).__name__
    if denied or status in _REFUSED:
        return Unreachable(
            f"{name}: access is refused (403). Are the credentials of this store set (for s3, "
            "AWS_ACCESS_KEY_ID or AWS_PROFILE), and may they read this?",
            lasting=True,
        )
    said = re.sub(r"\?[^\s'\"<>)]*", "?…", re.sub(r"//[^/@\s]*@", "//", str(error)))[:300]
    lasting = status is not None and status < 500 and status not in _AGAIN
    return Unreachable(f"{name}: {type(error).__name__}: {said or 'nothing more is said'}", lasting)
