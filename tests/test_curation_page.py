"""The page of a curation: all that went in is accounted for, and what it shows cannot be markup."""

import re
from html.parser import HTMLParser

import pytest
from test_copies import encoded, picture
from test_curation import recipe, write_shard, write_yaml

from prepretrain.curation import commands
from prepretrain.curation.engine import Machines
from prepretrain.reports.curation_page import report

pytest.importorskip("datatrove", reason="the extra `data` is not installed")
HERE = Machines()
EVIL = '<script>alert("1")</script><img src=x onerror=alert(2)>'


class Tags(HTMLParser):
    """The elements of a page, each with its attributes."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def named(self, name: str) -> list[dict]:
        return [attributes for tag, attributes in self.found if tag == name]


@pytest.fixture(scope="module")
def curated(tmp_path_factory):
    """A curation of 30 samples, of which two are copies, three are blank, and one cannot be read."""
    folder = tmp_path_factory.mktemp("page")
    files = [encoded(picture(number)) for number in range(24)]
    files += [files[0], files[1]] + [encoded(picture(0).resize((1, 1)).resize((64, 64)))] * 3
    samples = [{"jpg": data, "txt": f"{EVIL} {row}".encode()} for row, data in enumerate(files)]
    samples.append({"jpg": b"no picture", "txt": b"nothing"})
    keys = [f"{row:02d}" for row in range(29)] + [EVIL.replace("/", "") + "\x01\u202e"]
    write_shard(folder / "shards/00000.tar", samples, keys)
    evaluated = folder / "val"
    evaluated.mkdir()
    (evaluated / "one.jpg").write_bytes(encoded(picture(5), quality=60))
    write_yaml(folder / "pets.yaml", {"val": {"source": "folder", "path": str(evaluated)}})
    split = {"source": "shards", "path": str(folder / "shards")}
    card = write_yaml(folder / "web.yaml", {"train": split})
    rules = {"look.error": {"null": True}, "look.entropy": {"above": 1.0}}
    stages = {
        "meta": {},
        "look": {},
        "filter": {"rules": rules},
        "duplicates": {"after": ["filter"]},
        "leaks": {"against": [f"{folder / 'pets.yaml'}:val"]},
        "keep": {"name": "decide", "reasons": ["filter", "duplicates"]},
    }
    commands.run(card, recipe(folder, **stages), folder / "out", None, HERE)
    return folder


def test_the_page_adds_up_and_shows_pictures_of_each_reason(curated):
    page = report(curated / "out").read_text()
    rows = re.findall(r'<th scope="row">([^<]*)</th><td class="number">([\d,]+)</td>', page)
    assert rows == [
        ("went in", "30"),
        *(("filter", "4"), ("look.entropy &lt;= 1", "3"), ("look.error", "1")),
        *(("duplicates", "2"), ("same file", "2"), ("kept", "24")),
    ]
    pictures = [one for one in Tags(page).named("img")]
    assert len(pictures) == 20 + 3 + 2 + 4 + 2  # kept, reasons, groups, a leak
    assert all(one["src"].startswith("data:image/jpeg;base64,") for one in pictures)
    assert re.search(r"pets:val, \d+ of 256 bits", page)


def test_texts_and_keys_are_no_markup_and_the_page_needs_nothing_else(curated):
    page = report(curated / "out", curated / "other.html").read_text()
    tags = Tags(page)
    assert not tags.named("script") and not tags.named("link")
    assert not any(name.startswith("on") for _, attributes in tags.found for name in attributes)
    assert "\x01" not in page and "\u202e" not in page and "&lt;script&gt;" in page
    (policy,) = [one for one in tags.named("meta") if "http-equiv" in one]
    assert policy["content"].startswith("default-src 'none'")


def test_the_page_is_the_same_every_time(curated):
    pages = [report(curated / "out", curated / f"{n}.html").read_bytes() for n in range(2)]
    assert pages[0] == pages[1]


def test_a_curation_that_has_not_ended_has_no_page(curated, tmp_path):
    table = curated / "out/look/00000.parquet"
    table.rename(tmp_path / "kept")
    try:
        with pytest.raises(ValueError, match="1 of 1 tables 'look' are missing"):
            report(curated / "out")
    finally:
        (tmp_path / "kept").rename(table)
