"""Which labels of a vocabulary a class stands for, by WordNet."""

from collections.abc import Collection
from dataclasses import dataclass

from prepretrain.data.tags.spelling import spelled
from prepretrain.data.tags.vocabulary import Vocabulary
from prepretrain.data.tags.wordnet import Nouns


@dataclass(frozen=True)
class Nearest:
    """The labels of a class, by their ids, and how many steps they lie below (or, where below there is
    none as near, above) it; 0 for its own. Without any: [] and None."""

    ids: list[int]
    distance: int | None


class Labels:
    """The labels of a vocabulary, by their spelling and by their synset."""

    def __init__(self, vocabulary: Vocabulary, nouns: Nouns):
        self.vocabulary, self.nouns = vocabulary, nouns
        self.spelled: dict[str, set[int]] = {}
        self.of_synset: dict[str, set[int]] = {}
        for number, label in enumerate(vocabulary.tags):
            self.spelled.setdefault(spelled(label), set()).add(number)
            if (synset := self._synset(label)) is not None:
                self.of_synset.setdefault(synset, set()).add(number)
        self.spelled.pop("", None)  # emoji

    def nearest(self, names: Collection[str], reach: int) -> Nearest:
        """The labels of a class with these names, at most `reach` steps away; a name is the synset that a
        hashtag of its spelling is, or one itself (n02084071). What the vocabulary has as a tag is known
        without WordNet."""
        own = set(self.vocabulary.ids(names))
        own |= {number for name in names for number in self.spelled.get(spelled(name), ())}
        below = above = {self._synset(name) for name in names} - {None}
        own |= self._ids(below)
        if own:
            return Nearest(sorted(own), 0)
        for distance in range(1, reach + 1):
            below = {lower for one in below for lower in self.nouns.below(one)}
            above = {upper for one in above for upper in self.nouns.above.get(one, ())}
            if found := self._ids(below) or self._ids(above):
                return Nearest(sorted(found), distance)
        return Nearest([], None)

    def _synset(self, name: str) -> str | None:
        """What a name or a label is a word of; of several synsets the likeliest."""
        if name in self.nouns.words:
            return name
        return next(iter(self.nouns.of_tag(name)), None)

    def _ids(self, synsets: Collection[str]) -> set[int]:
        return {i for one in synsets for i in self.of_synset.get(one, ())}
