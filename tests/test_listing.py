"""What `tools/launch.py --list` says of stages, parts, sizes and cards, and what a shell is offered."""

import os
import subprocess
import sys

import pytest
from conftest import command

from prepretrain.plugin import KINDS, names
from prepretrain.runs.listing import listing


def entries(text: str) -> dict[str, str]:
    """{name: sentence} of an overview's lines."""
    lines = [line.strip() for line in text.splitlines() if line.startswith("  ")]
    return {name: sentence.strip() for name, _, sentence in (line.partition(" ") for line in lines)}


def test_the_command_lists_every_kind_and_each_line_says_what_it_is():
    said = command("launch.py", "--list")
    assert said.returncode == 0, said.stderr
    heads = [line[:-1] for line in said.stdout.splitlines() if line and line[0] != " "]
    assert heads == ["stages", *KINDS, "sizes", "cards"]
    lines = [line for line in said.stdout.splitlines() if line.startswith("  ")]
    empty = [line for line in lines if len(line.split()) < 2]
    assert not empty
    assert not [line for line in lines if "tools/launch.py" in line]  # the sentence alone


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_lists_each_of_its_parts(kind):
    assert list(entries(listing(kind))) == names(kind)


def test_a_part_shows_its_options_with_their_defaults():
    text = listing("hashtag")
    assert text.startswith("objectives: hashtag\n  Softmax cross-entropy")
    assert "  vocabulary: str | None = None\n" in text and "(required)" in listing("upernet")
    assert "  tags: int | None = None\n" in text
    assert "vocabulary: the file that datasets/hashtags.py wrote" in text


def test_a_size_shows_the_options_that_it_stands_for():
    assert "  depth: int = 24\n" in listing("vit_l16")


def test_a_name_of_two_kinds_shows_both():
    text = listing("mae")
    assert "stages: mae\n" in text and "    encoder: vit_l16\n" in text
    assert "objectives: mae\n" in text and "  mask_ratio: float = 0.75\n" in text


def test_a_card_and_a_stage_of_the_current_folder_are_listed_too(place):
    place.joinpath("configs").mkdir()
    place.joinpath("small.yaml").rename("configs/small.yaml")
    assert entries(listing("cards"))["colours"] == "three colours"
    assert "small" in entries(listing("stages"))
    assert "val: {'source': 'folder', 'path': 'photos'}" in listing("colours")


def test_an_unknown_name_is_an_error_that_offers_the_nearest():
    with pytest.raises(ValueError, match="--list: there is no 'vit_l15'. Did you mean 'vit_l16'?"):
        listing("vit_l15")


@pytest.mark.parametrize(
    "line, offered",
    [
        ("prepretrain --stage demo/", {"demo/mae", "demo/wsp"}),
        ("prepretrain --dry", {"--dry-run "}),
        ("prepretrain-plan --stage demo/m", {"demo/mae "}),
        ("prepretrain-zoo v", {"verify "}),
        ("prepretrain-report t", {"table "}),
        ("prepretrain-export --o", {"--out "}),
    ],
)
def test_a_shell_is_offered_the_stages_and_flags_that_a_command_line_may_go_on_with(
    line, offered, tmp_path
):
    pytest.importorskip("argcomplete")
    name = line.partition(" ")[0].removeprefix("prepretrain").strip("-") or "launch"
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line))}
    asked |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "said"), "_ARGCOMPLETE_IFS": "\n"}
    code = f"from prepretrain import command; command.{name}()"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **asked}, check=True)
    assert set((tmp_path / "said").read_text().split("\n")) == offered
