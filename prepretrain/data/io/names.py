"""What the name of a file says: whether it is an image, and what other programs leave behind."""

import logging
import re
from collections.abc import Mapping

logger = logging.getLogger(__name__)

# The first four are what shards are made of; where a sample has one of them, others are previews.
USUAL = ("jpg", "jpeg", "png", "webp")
IMAGES = (*USUAL, "jpe", "jfif", "gif", "bmp", "tif", "tiff", "avif", "ppm", "pgm")
# A gif is an image in shards, and among videos a video.
VIDEOS = ("mp4", "m4v", "mov", "avi", "mkv", "webm", "gif")
_UNREAD_VIDEOS = {"mpg", "mpeg", "wmv", "flv", "ts", "m2ts", "3gp", "ogv", "vob", "rm", "rmvb"}
_UNREAD = {"heic", "heif", "jxl", "jp2", "svg", "psd", "ico", "tga", "dng", "cr2", "nef", "arw"}
_DIGITS = re.compile(r"([0-9]+)")
_LITTER = {"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"}


def extension(name: str) -> str:
    """What follows the last dot of a name, in small letters."""
    return name.rpartition(".")[2].lower()


def is_image(name: str) -> bool:
    """Whether a file of this name is read as an image; a hidden one is not."""
    return extension(name) in IMAGES and "." in name and not name.startswith(".")


def is_video(name: str) -> bool:
    """Whether a file of this name is read as a video; a hidden one is not."""
    return extension(name) in VIDEOS and "." in name and not name.startswith(".")


def natural_order(name: str) -> list:
    """What to sort names by, so that frame10 comes after frame9."""
    return [int(part) if part.isdecimal() else part for part in _DIGITS.split(name)]


def is_litter(path: str) -> bool:
    """Whether this is what macOS, a NAS or a file system leaves beside what people put there."""
    if "/" not in path:  # as in most archives, of which each member's name is asked about
        return path.startswith("._") or path in _LITTER
    *folders, name = path.split("/")
    return name.startswith("._") or name in _LITTER or not _LITTER.isdisjoint(folders)


def left_out(path: str) -> str | None:
    """What a file that is not read is counted as, where somebody may take it for an image."""
    if is_litter(path):
        return "left by other programs (._*, __MACOSX, …)"
    ending = extension(path)
    return f".{ending}" if ending in _UNREAD else None


def left_out_of_videos(path: str) -> str | None:
    """What a file that is not read is counted as, where somebody may take it for a video."""
    if is_litter(path):
        return "left by other programs (._*, __MACOSX, …)"
    ending = extension(path)
    return f".{ending}" if ending in _UNREAD_VIDEOS else None


def say_left_out(where: object, counts: Mapping[str, int]) -> None:
    """Logs how many files are not read, if any."""
    if counts:
        said = ", ".join(f"{count:,} {what}" for what, count in sorted(counts.items()))
        logger.warning("%s: is read without these files: %s", where, said)
