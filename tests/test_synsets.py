"""Tags and captions to WordNet's synsets: the rules, their counts, bad files, CatLIP's golden labels."""

import json
import os
import runpy
from pathlib import Path

import pytest

from prepretrain.data.tags import wordnet
from prepretrain.data.tags.spelling import caption_words, spelled
from prepretrain.data.tags.synsets import Synsets
from prepretrain.data.tags.vocabulary import Vocabulary
from prepretrain.data.tags.wordnet import Nouns

ROOT = Path(__file__).parents[1]
GOLDEN = Path(os.environ.get("PREPRETRAIN_GOLDEN", Path(__file__).parent / "golden"))
GOLDEN /= "catlip_captions.json"

# (offset, words, offset above)
SYNSETS = [
    ("00000100", ["animal"], None),
    ("00000200", ["bear"], "00000100"),
    ("00000300", ["brown_bear", "bruin", "Ursus_arctos"], "00000200"),
    ("00000400", ["dog", "domestic_dog"], "00000100"),
    ("00000500", ["frump", "dog"], None),
    ("00000600", ["shoe"], None),
    ("00000700", ["place", "shoes"], None),
    ("00000800", ["spectacles", "glasses"], None),
    ("00000900", ["goose"], "00000100"),
    ("00001000", ["cafe", "coffeehouse"], None),
]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with WordNet's files, small ones."""
    data, senses = ["  1 a licence"], {}
    for offset, words, above in SYNSETS:
        said = " ".join(f"{word} 0" for word in words)
        pointers = f"001 @ {above} n 0000" if above else "000"
        data.append(f'{offset} 05 n {len(words):02x} {said} {pointers} | what it means; "so"')
        for word in words:
            senses.setdefault(word.lower(), []).append(offset)
    index = [f"{w} n {len(s)} 1 @ {len(s)} 0 {' '.join(s)}  " for w, s in sorted(senses.items())]
    place = tmp_path / "wordnet"
    place.mkdir()
    (place / "data.noun").write_text("\n".join(data) + "\n")
    (place / "index.noun").write_text("\n".join(index) + "\n")
    (place / "noun.exc").write_text("geese goose\n")
    (place / "cntlist.rev").write_text(
        "shoe%1:06:00:: 1 27\nshoes%1:26:00:: 1 1\nbe%2:42:00:: 1 9\n"
    )
    return place


def named(nouns: Nouns, tag: str) -> str | None:
    found = nouns.of_tag(tag)
    return nouns.words[found[0]][0] if found else None


@pytest.mark.parametrize(
    "tag, name",
    [
        ("#brownbear", "brown bear"),
        ("BrownBears", "brown bear"),
        ("ursus_arctos", "brown bear"),
        ("bruin", "brown bear"),
        ("café", "cafe"),
        ("cafe\u0301s", "cafe"),
        ("dog", "dog"),
        ("#DOGS!", "dog"),
        ("geese", "goose"),
        ("shoes", "shoe"),
        ("glasses", "spectacles"),
        ("#dog2", None),
        ("c++", None),
        ("❤", None),
        ("犬", None),
        ("s", None),
    ],
)
def test_a_tag_is_the_synset_that_it_spells(folder, tag, name):
    assert named(Nouns.open(str(folder)), tag) == name


def test_timms_list_comes_with_it_and_has_imagenets_names():
    nouns = Nouns.open("timm")
    assert len(nouns) == 21844 and nouns.of_tag("#goldenretriever") == ["n02099601"]
    assert nouns.of_tag("brownbears") == nouns.of_tag("Ursus arctos") == ["n02132136"]


IMAGES = [["#brownbear", "BRUIN", "dog"], ["Ursus arctos", "selfie"], ["dogs"], ["❤"]]


def counted(nouns: Nouns, **how) -> Vocabulary:
    rule = Synsets(nouns, **how)
    counting = {"source": "abc", "min_count": 1, "label": rule.label, "merged": rule.merged}
    return Vocabulary.count(IMAGES, **counting)


def test_tags_of_one_synset_are_one_label_and_the_rule_is_kept(folder, tmp_path):
    made = counted(Nouns.open(str(folder)))
    assert dict(zip(made.tags, made.counts)) == {
        "n00000300": 2,
        "n00000400": 2,
        "selfie": 1,
        "❤": 1,
    }
    assert made.merged.names == {"n00000300": "brown bear", "n00000400": "dog"}
    assert made.merged.rule == {
        "synsets": str(folder),
        "synsets_in_list": 10,
        "ambiguous": "first",
        "unmapped": "keep",
        "seen": {"tags": 7, "uses": 7},
        "without_synset": {"tags": 2, "uses": 2},
        "of_several_synsets": {"tags": 2, "uses": 2},
    }
    made.save(tmp_path / "tags.json")
    loaded = Vocabulary.load(tmp_path / "tags.json")
    assert vars(loaded) == vars(made) and loaded.ids(["bruin", "#URSUS arctos", "zebra"]) == [0]


def test_tags_without_a_synset_or_with_several_are_left_out_where_asked(folder):
    nouns = Nouns.open(str(folder))
    assert set(counted(nouns, unmapped="drop").tags) == {"n00000300", "n00000400"}
    assert set(counted(nouns, ambiguous="drop").tags) == {"n00000300", "selfie", "❤"}


def test_a_vocabulary_without_synsets_is_the_file_that_it_was(tmp_path):
    Vocabulary.count(IMAGES, source="abc", min_count=1).save(tmp_path / "tags.json")
    found = json.loads((tmp_path / "tags.json").read_text())
    assert list(found) == ["format", "source", "images", "min_count", "tags"]
    assert found["format"] == "prepretrain vocabulary 1"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"of": "videos"}, "of: 'videos' is neither"),
        ({"rule": None}, "rule: 'None' is no mapping"),
        ({"labels": {"Dog": "dog"}}, "'Dog': 'dog' is no tag"),
        ({"labels": {"dog": "cat"}}, "'dog': 'cat' is no tag"),
        ({"names": {"dog": 3}}, "'dog': 3 is no label"),
    ],
)
def test_a_bad_file_of_merged_tags_is_refused_by_name(tmp_path, change, message):
    content = {"format": "prepretrain vocabulary 2", "source": "x", "images": 3, "min_count": 1}
    content |= {"tags": {"dog": 2}, "of": "hashtags", "rule": {}, "labels": {}, "names": {}}
    (tmp_path / "tags.json").write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match=f"tags.json: .*{message}"):
        Vocabulary.load(tmp_path / "tags.json")


@pytest.mark.parametrize(
    "text, message",
    [
        (b"n1\tdog\nn1\tcat\n", "line 2: n1 is there twice"),
        (b"n1\tdog\n\nn2 cat\n", "line 3: 'n2 cat' is no synset"),
        (b"n1\tdog\n../x\tcat\n", "line 2: .* is no synset"),
        (b"n1\tdog\n\xff\tcat\n", "line 2: is not UTF-8"),
        (b"n1\tdog\tn9\n", "n1: there is no synset n9 above it"),
        (b"n1\t , \n", "line 1: .* is no synset"),
        (b"\n", "holds no synset"),
        (b"n1\tdog\n" * 9, "has 63 bytes; a list of synsets has 40 at most"),
    ],
)
def test_a_bad_list_of_synsets_is_refused_with_its_line(tmp_path, monkeypatch, text, message):
    monkeypatch.setattr(wordnet, "_LARGEST", 40)
    (tmp_path / "mine.txt").write_bytes(text)
    with pytest.raises(ValueError, match=f"mine.txt: .*{message}"):
        Nouns.open(str(tmp_path / "mine.txt"))
    with pytest.raises(ValueError, match="none.txt: cannot be read"):
        Nouns.open(str(tmp_path / "none.txt"))


@pytest.mark.parametrize("file", ["data.noun", "index.noun", "noun.exc", "cntlist.rev"])
def test_a_torn_wordnet_is_refused_with_file_and_line(folder, file):
    with (folder / file).open("ab") as stream:
        stream.write(b"torn\n")
    with pytest.raises(ValueError, match=f"{file}: line .*is no"):
        Nouns.open(str(folder))


def test_a_list_of_ones_own_may_say_what_lies_above(tmp_path):
    (tmp_path / "mine.txt").write_text("brand:acme\tAcme, acme corp\tthing\nthing\tthing\n")
    nouns = Nouns.open(str(tmp_path / "mine.txt"))
    assert nouns.of_tag("#acmecorp") == ["brand:acme"] and nouns.below("thing") == ["brand:acme"]


def test_words_of_captions_are_what_the_lemmatizer_and_the_first_sense_say(folder):
    nouns = Nouns.open(str(folder))
    labels = [
        nouns.of_word(word) for word in caption_words("<b>Geese</b>+and the dogs&#39; glasses")
    ]
    assert labels == [
        "n00000900",
        None,
        None,
        "n00000400",
        None,
    ]  # spectacles.n.01 is no glasses.n.01
    (folder / "mine.txt").write_text("n1\tdog\n")
    with pytest.raises(ValueError, match="mine.txt does not say which sense.*wordnet-base"):
        Synsets(Nouns.open(str(folder / "mine.txt")), of="captions")


def test_captions_are_counted_as_words_and_labelled_so(folder):
    rule = Synsets(Nouns.open(str(folder)), of="captions")
    tags = [caption_words(text) for text in ("Two dogs", "a dog and geese", "nothing")]
    counting = {"source": "abc", "min_count": 1, "label": rule.label, "merged": rule.merged}
    made = Vocabulary.count(tags, **counting)
    assert made.tags == ["n00000400", "n00000900"] and made.counts == [2, 1]
    assert made.of == "captions" and set(made.merged.labels) == {"dog", "dogs", "geese"}
    assert made.merged.rule["without_synset"] == {"tags": 4, "uses": 4}
    assert Vocabulary.count(tags, **counting, most=1).tags == ["n00000400"]


@pytest.mark.skipif(not GOLDEN.exists(), reason=f"no {GOLDEN}")
@pytest.mark.skipif(not wordnet.FOLDER.exists(), reason=f"no {wordnet.FOLDER}: wordnet-base")
def test_labels_of_captions_are_catlips():
    nouns, others = Nouns.open("wordnet"), []
    for row in json.loads(GOLDEN.read_text())["captions"]:
        want = {token["wnid"] for token in row["tokens"] if "wnid" in token}
        found = {nouns.of_word(word) for word in caption_words(row["caption"])} - {None}
        if found != want:
            others.append(row["caption"])
    # nltk keeps a quote at the front of a word, which is then no noun
    assert others == ["“Smart quotes” and ‘single’ quotes — with a dash…"]


def test_spellings_hold_letters_and_digits_alone():
    assert spelled("#Brown-Bear_2 ") == "brownbear2" and spelled("Ångström") == "angstrom"
    assert spelled("c++") == spelled("...") == ""


def test_the_script_merges_counts_and_says_what_has_no_synset(tmp_path, monkeypatch, capsys):
    card, out = tmp_path / "scenes.yaml", tmp_path / "synsets.json"
    card.write_text("train: {source: synthetic, images: 40, size: 16, seed: 0}\n")
    asked = ["hashtags.py", str(card), "--synsets", "timm", "--min-count", "1", "--out", str(out)]
    monkeypatch.setattr("sys.argv", asked)
    runpy.run_path(str(ROOT / "datasets" / "hashtags.py"), run_name="__main__")
    said, made = capsys.readouterr().out, Vocabulary.load(out)
    assert made.merged.rule["synsets"] == "timm" and "forest" in made.tags
    assert "without a synset, tags of their own: " in said
    seen = made.merged.rule["seen"]
    assert f"seen: {seen['tags']} tags, {seen['uses']} times" in said
    assert f"{len(made)} tags in at least 1 of 40 images" in said
