"""README and docs/: every command parses, every stage and key in it exists, every link leads on."""

import argparse
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import prepretrain
from prepretrain import config

ROOT = Path(__file__).parents[1]
README, DOCS = ROOT / "README.md", sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, *DOCS, ROOT / "datasets/README.md", ROOT / "CONTRIBUTING.md"]
LINKS = [*PAGES, ROOT / "MODEL_ZOO.md"]
COMMAND = re.compile(
    r"(?:python |torchrun .*?)?(?P<path>(?:tools|datasets)/\w+\.py)(?=\s|$)(?P<path_line>.*)"
    r"|(?<![\w./])prepretrain(?:(?= -)|(?P<tool>-[a-z]+)(?= ))(?P<tool_line>.*)"
)
PLACEHOLDERS = ("…", "RUN", "NAME", "CARD", "STAGE", "FOLDER")


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """(script, its arguments) of each command in a page's indented and inline code."""
    text = page.read_text().replace("\\\n", " ")
    code = [line for line in text.splitlines() if line.startswith("    ")]
    code += re.findall(r"`([^`\n]+)`", re.sub(r"^    .*$", "", text, flags=re.MULTILINE))
    found = []
    for match in filter(None, map(COMMAND.search, code)):
        script = match["path"] or f"tools/{(match['tool'] or '-launch')[1:]}.py"
        line = match["path_line"] if match["path"] else match["tool_line"]
        found.append((script, shlex.split(line, comments=True)))
    return [
        (script, arguments)
        for script, arguments in found
        if arguments and not any(word in a for a in arguments for word in PLACEHOLDERS)
    ]


COMMANDS = [
    pytest.param(*command, id=f"{page.name}: {' '.join([command[0], *command[1]])[:90]}")
    for page in PAGES
    for command in commands(page)
]


class Parsed(Exception):
    """Ends a tool once its options were understood."""


def stopping(name: str) -> Callable:
    """A parser's method that raises Parsed with what it would have returned."""
    original = getattr(argparse.ArgumentParser, name)

    def parse(self, *arguments):
        raise Parsed(original(self, *arguments))

    return parse


def parsed(script: str, arguments: list[str], monkeypatch) -> argparse.Namespace:
    """The options that a tool's own parser makes of a command's arguments."""
    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, stopping(name))
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.setenv(
        "WDS_SECURE", "1"
    )  # which make_shards.py sets, and other tests shall not inherit
    with pytest.raises(Parsed) as options:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return options.value.args[0]


def test_commands_are_found():
    assert len(COMMANDS) > 40


@pytest.mark.parametrize("script, arguments", COMMANDS)
def test_a_command_of_the_docs_parses_and_its_stage_has_its_keys(
    script, arguments, monkeypatch, capsys
):
    try:
        options = parsed(script, arguments, monkeypatch)
    except SystemExit:
        pytest.fail(capsys.readouterr().err)
    if getattr(options, "stage", None):
        config.load(options.stage, options.overrides)  # raises for an unknown stage or key


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", LINKS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_within_the_repository_lead_somewhere(page):
    prose = re.sub(r"^    .*$", "", page.read_text(), flags=re.MULTILINE)
    for target in re.findall(r"\]\((?!https?:)([^)\s]*)\)", prose):
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), target
        assert not anchor or anchor in slugs(there), target


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_a_page_of_docs_links_back_and_is_linked_from_the_readme(page):
    assert "](../README.md)" in page.read_text()
    assert f"](docs/{page.name})" in README.read_text()


def test_the_names_that_the_readme_takes_from_the_package_are_public():
    names = set(re.findall(r"\bpp\.(\w+)", README.read_text()))
    assert {"load", "evaluate"} <= names <= set(prepretrain.__all__)
