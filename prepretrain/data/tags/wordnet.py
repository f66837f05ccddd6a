"""WordNet's nouns: the synsets of a word, of a hashtag and of a caption's words."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from prepretrain.data.tags.spelling import spelled

FOLDER = Path("/usr/share/wordnet")  # where Debian's wordnet-base puts it
_LARGEST = 256 << 20  # bytes of a file; WordNet 3.0's largest has 15 million
_SYNSET = re.compile(r"[0-9a-z][0-9a-z_.:-]*[0-9a-z]")
# A plural's ending, and its singular's, in WordNet's order
_ENDINGS = (("s", ""), ("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z"))
_ENDINGS += (("ches", "ch"), ("shes", "sh"), ("men", "man"), ("ies", "y"))


class Nouns:
    """A list of noun synsets with the words of each, and what lies above each where it is known.

    A synset is a text, as ImageNet's n02132136. A word's synsets are in the order of its senses.
    """

    def __init__(self, source: str):
        self.source = source  # as `open` takes it
        self.senses: dict[str, list[str]] = {}  # of a word, in lower case, with spaces
        self.words: dict[str, list[str]] = {}  # of a synset; the first is its name
        self.above: dict[str, list[str]] = {}  # hypernyms of a synset
        self.exceptions: dict[str, list[str]] = {}  # irregular plurals
        self.ordered = False  # by frequency, so that a word's first sense is the usual one
        # of a word's senses, in the texts that WordNet's makers tagged
        self.counts: dict[tuple[str, int], int] = {}
        self._spelled: dict[str, tuple[int, list[str]]] = {}
        self._below: dict[str, list[str]] = {}

    @classmethod
    def open(cls, source: str) -> "Nouns":
        """Reads `timm` (its list of 21,844 synsets), `wordnet` (Debian's package wordnet-base), a folder
        with WordNet's index.noun, data.noun, noun.exc and cntlist.rev, or a text file, with a line for each
        synset: its id, a tab, its words with commas between; and, if known, a tab and the ids above it.

        Raises ValueError, which names file and line, for anything else.
        """
        nouns = cls(source)
        if source == "timm":
            nouns._read_lines(_timms())
        elif source == "wordnet" and not FOLDER.is_dir():
            raise ValueError(
                f"synsets: there is no {FOLDER}. Install it (apt install wordnet-base), or give a folder "
                f"with WordNet's data.noun, a file of your own, or timm."
            )
        elif (folder := FOLDER if source == "wordnet" else Path(source)).is_dir():
            nouns._read_wordnet(folder)
        else:
            nouns._read_lines(Path(source))
        if not nouns.words:
            raise ValueError(f"{source}: holds no synset.")
        return nouns

    def _read_lines(self, path: Path) -> None:
        for where, line in _lines(path):
            synset, *rest = line.split("\t")
            words = [word.strip() for word in rest[0].split(",")] if rest else []
            words = [word for word in words if word]
            if not _SYNSET.fullmatch(synset) or not words or len(rest) > 2:
                raise ValueError(
                    f"{where}: {line[:60]!r} is no synset: an id (a to z, 0 to 9, _ . : - in it), a tab, "
                    f"its words, and perhaps a tab and the ids above it."
                )
            if synset in self.words:
                raise ValueError(f"{where}: {synset} is there twice.")
            self.words[synset] = words
            self.above[synset] = rest[1].split() if len(rest) == 2 else []
            for word in words:
                senses = self.senses.setdefault(_plain(word), [])
                if synset not in senses:
                    senses.append(synset)
        for synset, above in self.above.items():
            if unknown := [one for one in above if one not in self.words]:
                raise ValueError(f"{path}: {synset}: there is no synset {unknown[0]} above it.")

    def _read_wordnet(self, folder: Path) -> None:
        """Reads WordNet's own files, whose format is described in its wndb(5)."""
        self.ordered = True
        for where, line in _lines(folder / "data.noun"):
            if line.startswith(" "):  # the licence
                continue
            try:
                self._add_synset(line.split(" | ")[0].split(" "))
            except (ValueError, IndexError) as error:
                raise ValueError(f"{where}: is no line of WordNet's data.noun.") from error
        for where, line in _lines(folder / "index.noun"):
            if line.startswith(" "):
                continue
            parts = line.split()
            try:
                count = int(parts[2])
                senses = [_id(offset) for offset in parts[-count:]]
                if len(parts) < count + 4 or not all(one in self.words for one in senses):
                    raise ValueError
            except (ValueError, IndexError) as error:
                raise ValueError(
                    f"{where}: is no line of the index.noun that goes with this data.noun."
                ) from error
            self.senses[_plain(parts[0])] = senses
        for where, line in _lines(folder / "noun.exc"):
            plural, *singulars = map(_plain, line.split())
            if not singulars:
                raise ValueError(f"{where}: {line[:60]!r} is no plural with its singular.")
            self.exceptions[plural] = singulars
        for where, line in _lines(folder / "cntlist.rev"):
            try:
                key, sense, count = line.split()
                if key.partition("%")[2].startswith("1:"):  # nouns
                    word = _plain(key.partition("%")[0])
                    self.counts[word, int(sense) - 1] = int(count)
            except ValueError as error:
                raise ValueError(f"{where}: is no line of WordNet's cntlist.rev.") from error

    def _add_synset(self, parts: list[str]) -> None:
        synset, count = _id(parts[0]), int(parts[3], 16)
        self.words[synset] = [word.replace("_", " ") for word in parts[4 : 4 + 2 * count : 2]]
        start = 5 + 2 * count
        pointers = range(start, start + 4 * int(parts[start - 1]), 4)
        self.above[synset] = [_id(parts[i + 1]) for i in pointers if parts[i] in ("@", "@i")]

    def __len__(self) -> int:
        return len(self.words)

    def below(self, synset: str) -> list[str]:
        """The hyponyms of a synset."""
        if not self._below:
            for one, above in self.above.items():
                for other in above:
                    self._below.setdefault(other, []).append(one)
        return self._below.get(synset, [])

    def of_tag(self, tag: str) -> list[str]:
        """The synsets of a hashtag or a name, the likeliest first; [] where it is none.

        Blanks, signs between letters and diacritics count for nothing, so that #brownbear is a brown
        bear and #cafe a café. What is a word and another's plural (shoes, hearts) is the one whose first
        sense WordNet counts more often in its tagged texts, and the word as it is where it counts none.
        """
        key = spelled(tag)
        if len(key) < 2:  # one sign is a unit or a chemical symbol there
            return []
        if not self._spelled:
            self._index()
        forms = [
            self._spelled[form] for form in (key, *self._singulars(key)) if form in self._spelled
        ]
        return max(forms, key=lambda form: form[0])[1] if forms else []

    def _index(self) -> None:
        """By spelling, the synsets of all words that are spelled so: by count, first senses first."""
        ranked: dict[str, list[tuple[int, int, str]]] = {}
        for word, senses in self.senses.items():
            rows = ((-self.counts.get((word, i), 0), i, synset) for i, synset in enumerate(senses))
            ranked.setdefault(spelled(word), []).extend(rows)
        for key, rows in ranked.items():
            rows.sort(key=lambda row: row[:2])
            self._spelled[key] = -rows[0][0], list(dict.fromkeys(row[2] for row in rows))

    def _singulars(self, plural: str) -> list[str]:
        """What a word may be the plural of: no ending leaves fewer than three letters."""
        regular = [one for one in _singulars(plural) if len(one) > 2]
        return [spelled(one) for one in self.exceptions.get(plural, [])] + regular

    def of_word(self, word: str) -> str | None:
        """The synset that CatLIP labels a word of a caption with, if any (its section 3.2 and its code):
        the first sense of the noun that WordNet's lemmatizer makes of it, and only if that synset is
        named after this very noun (`dog.n.01`)."""
        lemma = self._lemma(word)
        synset = self.senses[lemma][0] if lemma in self.senses else None
        return synset if synset and self.words[synset][0].lower() == lemma else None

    def _lemma(self, word: str) -> str:
        """As nltk's lemmatizer: the shortest noun that a word is a form of; the word itself if none."""
        word = _plain(word)
        if word in self.exceptions:
            forms = [word, *self.exceptions[word]]
            return min((one for one in forms if one in self.senses), key=len, default=word)
        forms = [word, *_singulars(word)]
        while forms:
            if found := [one for one in forms if one in self.senses]:
                return min(found, key=len)
            forms = [single for one in forms if one != word for single in _singulars(one)]
        return word


def _singulars(plural: str) -> list[str]:
    return [plural[: -len(old)] + new for old, new in _ENDINGS if plural.endswith(old)]


def _plain(word: str) -> str:
    return word.lower().replace("_", " ")


def _id(offset: str) -> str:
    """A synset's id: ImageNet's, of WordNet 3.0's byte offset."""
    if len(offset) != 8 or not offset.isdecimal():
        raise ValueError(offset)
    return f"n{offset}"


def _timms() -> Path:
    found = importlib.util.find_spec("timm")
    return Path(found.origin).parent / "data" / "_info" / "imagenet_synset_to_lemma.txt"


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """(file and line for errors, the line) of a text file, without those that are empty."""
    try:
        size = path.stat().st_size
        if size > _LARGEST:
            raise ValueError(f"{path}: has {size} bytes; a list of synsets has {_LARGEST} at most.")
        text = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}).") from error
    for number, line in enumerate(text.split(b"\n"), 1):
        where = f"{path}: line {number}"
        try:
            decoded = line.decode().rstrip("\r")
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: is not UTF-8 ({error.reason}).") from error
        if decoded.strip():
            yield where, decoded
