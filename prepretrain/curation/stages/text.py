"""Reads what people wrote beside each image: made clean, its language, and which words it holds."""

import re
import string
import unicodedata
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from prepretrain.curation.shard import Shard
from prepretrain.curation.stages.base import Stage
from prepretrain.data.tags.spelling import caption_words
from prepretrain.data.tags.wordnet import Nouns
from prepretrain.data.transforms import BadImage
from prepretrain.plugin import require

_URL = re.compile(r"(?:https?://|www\.)\S+", re.IGNORECASE)
_HANDLE = re.compile(r"(?<![\w.])@\w+")
_SPACES = re.compile(r"\s+")
_MARKS, _APART = re.compile(r"([,.;:?!`])"), r" \1 "  # as MetaCLIP does (substr_matching.py)
_BREAKS = re.compile(r"[\t\n\r]")
# Scripts written without spaces: Thai, Lao, Tibetan, Burmese, Khmer, and Chinese characters.
_SPACELESS = ("\u0e00-\u0eff", "\u0f00-\u0fff", "\u1000-\u109f", "\u1780-\u17ff", "\u3400-\u9fff")
_EDGE = re.compile(f"[{''.join(_SPACELESS)}{re.escape(string.punctuation)}]")


class Text(Stage):
    """Of each sample's text, or of its captions joined: `clean` (mojibake and entities mended by ftfy,
    URLs and @handles taken out, spaces made one), `length` in characters, `words`, `language` and
    `language_p` (py3langid; null for a text without letters), and `matches`, the numbers of the
    entries of a list that are in it, and how many these are, `matched`.

    entries: a file, an entry a line, matched as MetaCLIP does: between spaces, case counts; an entry
    that begins or ends with a punctuation mark or in a script without spaces needs none there.
    languages: the only ones that are taken into account, as [en, de]; all by default.
    synsets: a list of WordNet's nouns with the order of senses (data/tags/wordnet.py), as wordnet; the
    column `synsets` then has the synset of each noun, each once, by CatLIP's rule.
    """

    columns = {
        "clean": pa.string(),
        "length": pa.int32(),
        "words": pa.int32(),
        "language": pa.string(),
        "language_p": pa.float32(),
        "matches": pa.list_(pa.int32()),
        "matched": pa.int32(),
        "synsets": pa.list_(pa.string()),
        "error": pa.string(),
    }
    images_a_second = 6_000  # curate_speed.json: captions of a sentence

    def __init__(
        self,
        *,
        entries: str | None = None,
        languages: list[str] | None = None,
        synsets: str | None = None,
    ):
        for package in ("ftfy", "py3langid", "ahocorasick"):
            require(package, "data", "text")
        self.entries, self.languages, self.synsets = entries, languages, synsets
        if entries is not None and not Path(entries).is_file():
            raise ValueError(f"text.entries: there is no file {entries}.")

    def __getstate__(self) -> dict[str, Any]:
        options = ("entries", "languages", "synsets")
        return {name: vars(self)[name] for name in options}

    def check(self) -> None:
        """See Stage.check: the list of synsets is there, and says which sense of a word is the first."""
        if self._nouns is not None and not self._nouns.ordered:
            raise ValueError(
                f"text.synsets: {self.synsets} does not say which sense of a word is the first. Take "
                f"wordnet (apt install wordnet-base)."
            )

    @cached_property
    def _nouns(self) -> Nouns | None:
        return None if self.synsets is None else Nouns.open(self.synsets)

    @cached_property
    def _identifier(self) -> Any:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        identifier.set_languages(self.languages)
        return identifier

    @cached_property
    def _matcher(self) -> Any:
        return matcher(Path(self.entries).read_text().splitlines()) if self.entries else None

    def shard(self, shard: Shard) -> dict[str, list[Any]]:
        rows = [self._row(shard, row) for row in range(len(shard))]
        return {name: [row.get(name) for row in rows] for name in self.columns}

    def _row(self, shard: Shard, row: int) -> dict[str, Any]:
        try:
            texts = shard.texts(row)
        except BadImage as error:
            return {"error": str(error)}
        clean = cleaned(texts["text"] if texts.get("text") else " ".join(texts.get("captions", ())))
        found: dict[str, Any] = {"clean": clean, "length": len(clean), "words": len(clean.split())}
        if self._matcher is not None:
            found["matches"] = matches(self._matcher, clean)
            found["matched"] = len(found["matches"])
        if self._nouns is not None:
            synsets = map(self._nouns.of_word, caption_words(clean))
            found["synsets"] = [synset for synset in dict.fromkeys(synsets) if synset]
        if any(map(str.isalpha, clean)):
            found["language"], found["language_p"] = self._identifier.classify(clean)
        return found


def cleaned(text: str) -> str:
    """A text as it was meant, without addresses."""
    import ftfy

    text = _HANDLE.sub(" ", _URL.sub(" ", ftfy.fix_text(text, unescape_html=True)))
    return _SPACES.sub(" ", text).strip()


def matcher(entries: list[str]) -> Any:
    """What finds all entries of a list in one pass over a text; the number of an entry is its line."""
    import ahocorasick

    automaton = ahocorasick.Automaton()
    for number, entry in enumerate(entries):
        if entry.strip():
            automaton.add_word(_spaced(entry), number)
    automaton.make_automaton()
    return automaton


def _spaced(entry: str) -> str:
    """An entry with the spaces that must be around it."""
    before, after = (" " if not _is_edge(sign) else "" for sign in (entry[0], entry[-1]))
    return f"{before}{entry}{after}"


def _is_edge(sign: str) -> bool:
    return bool(_EDGE.match(sign)) or unicodedata.category(sign).startswith("P")


def matches(automaton: Any, text: str) -> list[int]:
    """The numbers of the entries in a text, each once, in order."""
    spaced = f" {_BREAKS.sub(' ', _MARKS.sub(_APART, text.strip()))} "
    return sorted({number for _, number in automaton.iter(spaced)})
