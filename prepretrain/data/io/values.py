"""What a field of a sample may be made of, whichever file it comes from: each value has one meaning,
or raises BadImage."""

import json
import re
import unicodedata
from typing import Any

from prepretrain.data.transforms import BadImage

# NFKC has made ASCII of the wide forms of these before.
_BETWEEN_TAGS = re.compile(r"[\s,;|、،]+|(?<=[^\s#])(?=#[^\s#])")
_INNER_HASH = re.compile(r"(?<=[^#])(?=#[^\s#])")
_INT64 = 1 << 63


def mapping(data: bytes | None) -> dict[str, Any]:
    """A json member; {} where there is none."""
    if data is None:
        return {}
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadImage("bad metadata", f"json: {error}") from error
    if not isinstance(value, dict):
        raise BadImage("bad metadata", f"json: a {type(value).__name__}, not a mapping")
    return value


def hashtags(found: Any) -> list[str]:
    """A list of tags, or a string of them, separated by spaces, commas and the like; #red#blue are
    two tags, also in a list. A string that is a JSON list is that list."""
    if not isinstance(found, list):
        written = _written(found, "hashtags")
        several = _json_list(written)
        if several is None:
            return [tag for tag in _BETWEEN_TAGS.split(_folded(written or "")) if tag]
        found = several
    tags = (_written(tag, "hashtags") for tag in found)
    return [part for tag in tags if tag for part in _INNER_HASH.split(_folded(tag))]


def text(found: Any) -> str:
    """A text; "" where there is none."""
    return _written(found, "text") or ""


def captions(found: Any) -> list[str]:
    """A list of texts, or one text; [] where there is none."""
    several = found if isinstance(found, list) else [found]
    written = [_written(caption, "captions") for caption in several]
    return [caption for caption in written if caption is not None]


def label(found: Any) -> int | None:
    """A whole number, or one in digits; None where there is none."""
    if _is_none(found):
        return None
    try:
        number = int(found)
    except (ValueError, TypeError, OverflowError) as error:
        raise _bad("label", found, "number") from error
    if isinstance(found, float) and number != found or not -_INT64 <= number < _INT64:
        raise _bad("label", found, "whole number of 64 bits")
    return number


CONVERT = {"hashtags": hashtags, "text": text, "captions": captions, "label": label}


def _written(found: Any, field: str) -> str | None:
    """What somebody wrote; null, and the NaN that tables have in its place, are None."""
    if _is_none(found):
        return None
    if isinstance(found, bytes):
        try:
            found = found.decode()
        except UnicodeDecodeError as error:
            raise BadImage("bad metadata", f"{field}: {error}") from error
    if not isinstance(found, str):
        raise _bad(field, found, "text")
    return found.removeprefix("\ufeff")  # a byte order mark, which a tokenizer would read


def _is_none(found: Any) -> bool:
    return found is None or isinstance(found, float) and found != found


def _json_list(written: str | None) -> list | None:
    if written is None or not written.lstrip().startswith("["):
        return None
    try:
        found = json.loads(written)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, list) else None


def _folded(written: str) -> str:
    """With one sign for each of # and comma, however wide it was written."""
    return written if written.isascii() else unicodedata.normalize("NFKC", written)


def _bad(field: str, found: Any, what: str) -> BadImage:
    return BadImage("bad metadata", f"{field}: {str(found)[:80]!r} is no {what}")
