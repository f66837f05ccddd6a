"""Merges hashtags, or words of captions, of one synset into one label, by a rule that is kept with the
vocabulary."""

from collections import Counter
from collections.abc import Collection
from typing import Literal

from prepretrain.data.tags.vocabulary import Merged
from prepretrain.data.tags.wordnet import Nouns


class Synsets:
    """The label of each tag by WordNet's nouns, and what was done to the tags so far.

    Of captions this is CatLIP's rule (arXiv 2404.15653, section 3.2 and its code): a word is a noun if
    WordNet has it as one, whatever it is in its sentence, and counts if its first sense is named after it.
    """

    def __init__(
        self,
        nouns: Nouns,
        *,
        of: Literal["hashtags", "captions"] = "hashtags",
        ambiguous: Literal["first", "drop"] = "first",
        unmapped: Literal["keep", "drop"] = "keep",
    ):
        """ambiguous: what becomes of a hashtag of several synsets: the first sense is taken (of a list
        without order: the first in the file), or it has no label. unmapped: what becomes of one of none:
        it is a label of its own, or has none."""
        if of == "captions" and not nouns.ordered:
            raise ValueError(
                f"synsets: {nouns.source} does not say which sense of a word is the first, by which words "
                f"of captions are labelled. Take WordNet: --synsets wordnet (apt install wordnet-base)."
            )
        self.nouns, self.of, self.ambiguous, self.unmapped = nouns, of, ambiguous, unmapped
        self.labels: dict[str, str | None] = {}  # of each tag that came
        self.several: set[str] = set()  # those of several synsets
        self.uses: Counter[str] = Counter()  # how many images have each

    def label(self, tag: str, uses: int = 1) -> str | None:
        """A synset, or the tag itself; None if it has no label. `uses` images have the tag."""
        self.uses[tag] += uses
        if tag not in self.labels:
            self.labels[tag] = self._label(tag)
        return self.labels[tag]

    def _label(self, tag: str) -> str | None:
        if self.of == "captions":
            return self.nouns.of_word(tag)
        found = self.nouns.of_tag(tag)
        if len(found) > 1:
            self.several.add(tag)
            return found[0] if self.ambiguous == "first" else None
        return found[0] if found else tag if self.unmapped == "keep" else None

    def without(self) -> list[str]:
        """The tags without a synset, the most frequent first."""
        found = [tag for tag in self.uses if self.labels[tag] not in self.nouns.words]
        return sorted(set(found) - self.several, key=lambda tag: (-self.uses[tag], tag))

    def merged(self, kept: Collection[str]) -> Merged:
        """What a vocabulary of the labels `kept` remembers of the rule."""
        groups = {"seen": self.uses, "without_synset": self.without()}
        rule = {"synsets": self.nouns.source, "synsets_in_list": len(self.nouns)}
        if self.of == "hashtags":
            rule |= {"ambiguous": self.ambiguous, "unmapped": self.unmapped}
            groups["of_several_synsets"] = self.several
        for name, tags in groups.items():
            rule[name] = {"tags": len(tags), "uses": sum(self.uses[tag] for tag in tags)}
        labels = {tag: label for tag, label in self.labels.items() if label in kept}
        names = {one: self.nouns.words[one][0] for one in kept if one in self.nouns.words}
        return Merged(self.of, rule, labels, names)
