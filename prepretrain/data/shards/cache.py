"""A folder of whole shards from elsewhere, of a limited size, which the processes of a machine share.

Nothing but the folder's files says what is in it: <key>-<size>.tar, where the key is a hash of the URL
and the version that the store states; <key>-<size>.tar.part while it is fetched; and the index beside
it, which stays when the shard goes. Who reads a shard holds a shared lock of the file, who fetches one
an exclusive one; both end with the process, however it ends.
"""

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from prepretrain.data.io.remote import Remote, Unreachable
from prepretrain.files import cache_folder

logger = logging.getLogger(__name__)

_GB = 100.0  # not from the paper: of shards that are kept, unless PREPRETRAIN_CACHE_GB says so
_CHUNK = 1 << 23  # not from the paper: bytes of one request
_TOGETHER = 4  # not from the paper: requests at the same time, after a first one
_TRIES = 6  # not from the paper: in a row without a byte, the last after 31 seconds
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_no_md5: set[str] = set()  # buckets whose ETags were seen to be no MD5s


class NoSpace(OSError):
    """A shard does not fit into the cache."""

    def __init__(self, message: str):
        super().__init__(errno.ENOSPC, message)

    def __str__(self) -> str:
        return self.strerror or ""

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return type(self), (str(self),)


class CacheFull(NoSpace):
    """All that is in the cache is in use; later there may be room."""


class ShardCache:
    """Shards by their URL and version; the least recently opened ones make room for others."""

    def __init__(self, folder: Path | None = None, limit: int | None = None):
        self.folder = cache_folder() / "shards" if folder is None else folder
        self.limit = _limit() if limit is None else limit

    def path(self, remote: Remote) -> Path:
        """Where a shard lies, if it is there; its index lies beside it."""
        key = hashlib.sha256(f"{remote.url}\n{remote.version}".encode(errors="surrogatepass"))
        return self.folder / f"{key.hexdigest()[:32]}-{remote.size}.tar"

    def open(self, remote: Remote, *, wait: float = 0.0) -> int:
        """A file descriptor of the whole shard, fetched if need be, which stays while it is open.

        Raises CacheFull where others take all the room for longer than `wait` seconds, Unreachable
        for what the store does not give, NoSpace where it can never fit.
        """
        path, end = self.path(remote), time.monotonic() + wait
        while (handle := self._opened(path, remote.size)) is None:
            try:
                self._fetch(remote, path, wait=True)
            except CacheFull:
                if time.monotonic() > end:
                    raise
                time.sleep(0.2)
        return handle

    def fetch(self, remote: Remote) -> None:
        """Sees that a shard is there, for later; another process that fetches it is not waited for."""
        if not self.path(remote).exists():
            self._fetch(remote, self.path(remote), wait=False)

    def _opened(self, path: Path, size: int) -> int | None:
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except (FileNotFoundError, NotADirectoryError):  # of the latter more where it is written
            return None
        fcntl.flock(handle, fcntl.LOCK_SH)
        state = os.fstat(handle)
        if not state.st_nlink or state.st_size != size:
            if state.st_nlink:
                path.unlink(missing_ok=True)  # somebody has cut or lengthened it
            os.close(handle)
            return None
        with contextlib.suppress(PermissionError):  # another user's, who is not asked
            os.utime(handle, ns=(time.time_ns(), 0))  # an index counts for one time of change
        return handle

    def _fetch(self, remote: Remote, path: Path, *, wait: bool) -> None:
        if remote.size > self.limit:
            raise NoSpace(
                f"{remote}: has {remote.size:,} bytes, and the cache {self.folder} holds "
                f"{self.limit:,}. Raise PREPRETRAIN_CACHE_GB."
            )
        try:
            handle = self._begin(remote, path, wait)
            if handle is None:
                return
            try:
                _fill(handle, remote)
                _verify(handle, remote)
                os.fsync(handle)
                os.utime(handle, ns=(time.time_ns(), 0))
                os.replace(_part(path), path)
            finally:
                os.close(handle)
        except OSError as error:
            if isinstance(error, (NoSpace, Unreachable)):
                raise
            if error.errno not in _NO_SPACE:
                said = (
                    f"cannot be kept in {self.folder} ({error}). Name another, PREPRETRAIN_CACHE."
                )
                raise Unreachable(f"{remote}: {said}", lasting=True) from error
            raise NoSpace(
                f"{remote}: no space for its {remote.size:,} bytes in {self.folder} "
                f"({os.strerror(error.errno or 0)}). Make room, name another folder with "
                f"PREPRETRAIN_CACHE, or keep less with PREPRETRAIN_CACHE_GB (now {self.limit / 1e9:g})."
            ) from error

    def _begin(self, remote: Remote, path: Path, wait: bool) -> int | None:
        """The locked file to write to, with room for all of the shard; None where another process has
        fetched it, which is waited for if `wait`."""
        with self._locked():
            if path.exists():
                return None
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
            handle = os.open(_part(path), flags, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._make_room(remote, _part(path))
                return handle
            except BlockingIOError:
                pass
            except CacheFull:
                if not os.fstat(handle).st_size:
                    _part(path).unlink()
                os.close(handle)
                raise
        try:
            if wait:
                fcntl.flock(handle, fcntl.LOCK_SH)
        finally:
            os.close(handle)
        return None

    def _make_room(self, remote: Remote, own: Path) -> None:
        """Removes the least recently used shards that nobody holds until all others fit."""
        files = []
        for entry in os.scandir(self.folder):
            if entry.name.endswith((".tar", ".part")):
                with contextlib.suppress(FileNotFoundError):
                    files.append((entry.stat().st_atime_ns, _size(entry.name), Path(entry.path)))
        total = sum(size for _, size, _ in files)
        for _, size, file in sorted(files):
            if total <= self.limit:
                return
            if file != own and _removed(file):
                total -= size
        if total > self.limit:
            raise CacheFull(
                f"{remote}: {total:,} bytes are in use in {self.folder}, which holds {self.limit:,}. "
                f"Raise PREPRETRAIN_CACHE_GB, or read fewer shards at a time (data.window, data.workers)."
            )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among those who look for room."""
        self.folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def readers(size: int) -> int:
    """How many processes can read shards of this size at the same time, where each of them holds one and
    fetches another; any number of shards that lie here, whose size in the cache is 0."""
    return max(1, ShardCache().limit // (2 * size)) if size else sys.maxsize


def _limit() -> int:
    given = os.environ.get("PREPRETRAIN_CACHE_GB") or str(_GB)
    try:
        limit = float(given) * 1e9
        if not 0 < limit < 1e18:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"PREPRETRAIN_CACHE_GB: {given!r} is no number of gigabytes, such as 200."
        ) from None
    return int(limit)


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _size(name: str) -> int:
    """The bytes that a file of the cache has, or will have, by its name."""
    digits = name.partition("-")[2].partition(".")[0]
    return int(digits) if digits.isdigit() else 0


def _removed(file: Path) -> bool:
    """Removes a file unless somebody holds it."""
    try:
        handle = os.open(file, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return not file.exists()
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.unlink(missing_ok=True)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def _fill(handle: int, remote: Remote) -> None:
    """Appends what is still missing of a shard, and tries again where a connection fails."""
    tries = 0
    if os.fstat(handle).st_size > remote.size:
        os.ftruncate(handle, 0)
    while (have := os.fstat(handle).st_size) < remote.size:
        count = _TOGETHER if have else 1
        starts = range(have, min(have + count * _CHUNK, remote.size), _CHUNK)
        try:
            pieces = remote.read([(start, min(start + _CHUNK, remote.size)) for start in starts])
        except Unreachable as error:
            tries += 1
            if error.lasting or tries == _TRIES:
                raise
            logger.info("%s; tries again from byte %d on", error, have)
            _pause(tries)
            continue
        tries = 0
        for piece in pieces:
            _write(handle, piece, have)
            have += len(piece)


def _pause(tries: int) -> None:
    time.sleep(2 ** (tries - 1))


def _write(handle: int, data: bytes, at: int) -> None:
    left = memoryview(data)
    while left:
        written = os.pwrite(handle, left, at)
        at, left = at + written, left[written:]


def _verify(handle: int, remote: Remote) -> None:
    """Raises Unreachable for a file that is not what the store says, and empties it, so that it is
    fetched anew."""
    remote.check_unchanged()
    if remote.sha256 is not None and _digest(handle, "sha256") != remote.sha256:
        os.ftruncate(handle, 0)
        raise Unreachable(f"{remote}: its sha256 is not the store's, {remote.sha256}.", False)
    bucket = remote.url.split("/")[2]
    if remote.md5 is None or bucket in _no_md5 or (first := _digest(handle, "md5")) == remote.md5:
        return
    os.ftruncate(handle, 0)
    _fill(handle, remote)
    if (second := _digest(handle, "md5")) == remote.md5:
        return
    if first != second:
        os.ftruncate(handle, 0)
        raise Unreachable(f"{remote}: twice other bytes came than its ETag {remote.md5}.", False)
    logger.warning("%s: its ETag is no MD5 (it may be encrypted by a key), and not checked", remote)
    _no_md5.add(bucket)


def _digest(handle: int, name: str) -> str:
    digest, at = hashlib.new(name), 0
    while data := os.pread(handle, _CHUNK, at):
        digest.update(data)
        at += len(data)
    return digest.hexdigest()
