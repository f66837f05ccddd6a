import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from prepretrain.data.sources.base import Source
from prepretrain.data.tags import rarest, spelling
from prepretrain.data.tags.spelling import canonical
from prepretrain.data.tags.vocabulary import Vocabulary
from prepretrain.data.transforms import BadImage


@pytest.mark.parametrize(
    "written, one",
    [
        ("#Red", "red"),
        ("  RED! ", "red"),
        ("##sun_set", "sun_set"),
        ("_x_", "x"),
        ("C++", "c++"),
        ("ﬁsh", "fish"),
        ("STRASSE", "strasse"),
        ("Straße", "strasse"),
        ("＃東京", "東京"),
        ("café", "café"),
        ("cafe\u0301", "café"),
        ("new\t york", "new york"),
        ("don't", "don't"),
        ("#❤", "❤"),
        ("lov\ud83de", "love"),
        ("#\udce9", ""),
        ("#", ""),
        (" ...", ""),
        ("", ""),
    ],
)
def test_spellings_of_one_tag_become_one(written, one):
    assert canonical(written) == one
    assert canonical(canonical(written)) == canonical(written)


def test_ascii_tags_are_spelt_as_any_others_are():
    signs = [chr(i) for i in range(128)]
    tags = [a + b for a in signs for b in signs]
    generator = random.Random(0)
    tags += ["".join(generator.choices(signs, k=9)) for _ in range(5000)]
    assert [canonical(tag) for tag in tags] == [spelling._canonical(tag) for tag in tags]


def vocabulary(min_count=2):
    images = [["#Red", "red", "dog"], ["RED", "cat"], [], ["dog", "red", "rare", "#"]]
    return Vocabulary.count(images, source="abc", min_count=min_count)


def test_a_vocabulary_counts_images_not_mentions_and_sorts_by_frequency():
    found = vocabulary()
    assert found.tags == ["red", "dog"] and found.counts == [3, 2]
    assert found.images == 4 and len(found) == 2
    assert vocabulary(1).tags == ["red", "dog", "cat", "rare"]


def test_ids_are_sorted_unique_and_leave_out_unknown_tags():
    found = vocabulary()
    assert found.ids(["Dog", "#red", "RED", "zebra", ""]) == [0, 1]
    assert found.ids([]) == [] and found.ids(["zebra"]) == []


def test_a_vocabulary_survives_being_saved(tmp_path):
    file = tmp_path / "deep" / "tags.json"
    Vocabulary.count([["東京", "a"], ["東京"]], source="f", min_count=1).save(file)
    loaded = Vocabulary.load(file)
    assert loaded.tags == ["東京", "a"] and loaded.counts == [2, 1]
    assert (loaded.source, loaded.images, loaded.min_count) == ("f", 2, 1)
    assert [p.name for p in file.parent.iterdir()] == ["tags.json"]


def test_a_vocabulary_from_other_data_is_refused():
    vocabulary().check(SimpleNamespace(fingerprint="abc"))
    with pytest.raises(ValueError, match="from data abc, and this data is xyz.*hashtags.py"):
        vocabulary().check(SimpleNamespace(fingerprint="xyz"))


def test_data_without_frequent_tags_gives_no_vocabulary():
    with pytest.raises(ValueError, match="in 9 of 4 images.*'red', is in 3.*Lower min_count"):
        vocabulary(9)
    with pytest.raises(ValueError, match="have none"):
        Vocabulary.count([[], ["#"]], source="x", min_count=1)


GOOD = {
    "format": "prepretrain vocabulary 1",
    "source": "x",
    "images": 3,
    "min_count": 1,
    "tags": {"red": 2},
}


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "JSON"),
        ("[]", "no dict"),
        (json.dumps({**GOOD, "format": "?"}), "no vocabulary"),
        (json.dumps({**GOOD, "tags": {}}), "no tags"),
        (json.dumps({**GOOD, "tags": {"Red": 2}}), "'Red'"),
        (json.dumps({**GOOD, "tags": {"red": 0}}), "'red': 0"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "source"}), "lacks source"),
    ],
)
def test_a_bad_vocabulary_file_is_refused_by_name(tmp_path, content, message):
    file = tmp_path / "tags.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=f"tags.json: .*{message}"):
        Vocabulary.load(file)


def test_a_missing_vocabulary_says_how_to_make_one(tmp_path):
    with pytest.raises(ValueError, match="no such vocabulary.*datasets/hashtags.py"):
        Vocabulary.load(tmp_path / "none.json")


def test_hashtags_that_cannot_be_read_are_none_and_told(caplog):
    class Some(Source):
        groups, fingerprint = [3], "some"

        def hashtags(self, index):
            if index == 1:
                raise BadImage("bad metadata", "json: deep", "k1")
            return ["red"]

    vocabulary = Vocabulary.count([["red"]], source="some", min_count=1)
    assert rarest.read(Path("absent/tags.json"), vocabulary, Some()).tolist() == [0, -1, 0]
    assert "1 images cannot be read, and are none: k1: bad metadata: json: deep" in caplog.text
