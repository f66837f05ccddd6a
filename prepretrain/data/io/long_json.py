"""Reads a JSON file that is larger than memory: what its lists hold, one after the other."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

_BLOCK = 1 << 22  # bytes that are read at once
_LARGEST = 1 << 28  # not from the paper: bytes of one value, past which the file is damaged

_decode = json.JSONDecoder().raw_decode


def elements(path: str | Path) -> Iterator[tuple[str, Any, int, int]]:
    """(key, element, start, end) of each element of each list in the mapping that a file holds.

    [start, end) are the bytes of the element in the file. A value of the mapping that is no list
    comes as one element. Raises ValueError, which names the file and the byte, for anything else
    than JSON in UTF-8.
    """
    with open(path, "rb") as file:
        text = _Text(file)
        try:
            yield from _mapping(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path}: not readable as JSON at byte {text.position:,}: {error}"
            ) from error


class _Text:
    """A file as text of one character a byte, of which a part at a time is held."""

    def __init__(self, file: BinaryIO):
        self.file, self.text, self.place, self.passed = file, "", 0, 0
        if self.peek() == "\xef" and self.text.startswith("\xef\xbb\xbf"):  # a byte order mark
            self.place = 3

    @property
    def position(self) -> int:
        """The bytes before the next character."""
        return self.passed + self.place

    def peek(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            while self.place < len(self.text):
                if self.text[self.place] not in " \t\r\n":
                    return self.text[self.place]
                self.place += 1
            if not self._more():
                return ""

    def take(self, wanted: str) -> str:
        """Goes past the next character, which must be one of those wanted."""
        found = self.peek()
        if not found or found not in wanted:
            raise ValueError(f"{found!r} stands where {' or '.join(wanted)} must")
        self.place += 1
        return found

    def value(self) -> tuple[Any, int, int]:
        """Goes past a value: it, and the bytes [start, end) of it."""
        self.peek()
        while True:
            start = self.place
            try:
                value, end = _decode(self.text, start)
            except ValueError:
                # cut off by the end of the part, or no JSON at all
                if len(self.text) - start > _LARGEST or not self._more():
                    raise
                continue
            if len(self.text) - end < 4 and self._more():  # a number may go on, as in 1e-5
                continue
            self.place = end
            if not self.text[start:end].isascii():
                value = json.loads(self.text[start:end].encode("latin-1"))
            return value, self.passed + start, self.passed + end

    def _more(self) -> bool:
        """Reads on, as much as is held, so that a long value is not looked at too often."""
        block = self.file.read(max(_BLOCK, len(self.text) - self.place))
        if block:
            self.passed += self.place
            self.text, self.place = self.text[self.place :] + block.decode("latin-1"), 0
        return bool(block)


def _mapping(text: _Text) -> Iterator[tuple[str, Any, int, int]]:
    text.take("{")
    while text.peek() == '"':
        key, _, _ = text.value()
        text.take(":")
        if text.peek() != "[":
            yield key, *text.value()
        else:
            for element in _list(text):
                yield key, *element
        if text.take(",}") == "}":
            return
    text.take("}")


def _list(text: _Text) -> Iterator[tuple[Any, int, int]]:
    text.take("[")
    if text.peek() == "]":
        text.take("]")
        return
    while True:
        yield text.value()
        if text.take(",]") == "]":
            return
