"""The documentation points at what is there: files, headings, commands, options and public
names.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import workbench
from workbench.cli import COMMANDS_FROM_SETTINGS, _built_command, app

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
SPAN = re.compile(r"`[^`]+`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
COMMAND = re.compile(r"(?<!import)(?:^|[\s`/])workbench ([a-z][a-z-]*)", re.M)
COMMANDS = {
    **typer.main.get_command(app).commands,  # type: ignore[attr-defined]
    **{name: _built_command(name) for name in COMMANDS_FROM_SETTINGS},
}


def _text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def _blocks(page: Path, *languages: str) -> list[str]:
    return [code for language, code in FENCE.findall(_text(page)) if language in languages]


def _anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    found: dict[str, int] = {}
    anchors = set()
    for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", _text(page)), re.M):
        plain = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        number = found[plain] = found.get(plain, -1) + 1
        anchors.add(f"{plain}-{number}" if number else plain)
    return anchors


def _links(page: Path) -> list[str]:
    prose = SPAN.sub("", FENCE.sub("", _text(page)))
    return [link for link in LINK.findall(prose) if not re.match(r"https?:", link)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_and_picture_exists(page: Path) -> None:
    wrong = []
    for link in _links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            wrong.append(link)
    assert not wrong


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen, waiting = set(), [README]
    while waiting:
        page = waiting.pop()
        if page not in seen:
            seen.add(page)
            targets = [(page.parent / link.partition("#")[0]).resolve() for link in _links(page)]
            waiting += [target for target in targets if target.suffix == ".md" and target.exists()]
    assert not set(PAGES) - seen


def test_the_readme_is_short() -> None:
    lines = _text(README).splitlines()
    assert len(lines) <= 160
    prose = [line for line in lines if not line.startswith("|") and "https://" not in line]
    assert not [line for line in prose if len(line) > 100]


def _named(page: Path) -> set[str]:
    """The commands that a page names in its code."""
    code = [*SPAN.findall(FENCE.sub("", _text(page))), *_blocks(page, "console", "bash", "sh")]
    return {name for text in code for name in COMMAND.findall(text)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_exists(page: Path) -> None:
    assert not _named(page) - set(COMMANDS) - {"plain"}  # the example of an own experiment


def test_every_command_is_documented() -> None:
    assert _named(ROOT / "docs" / "commands.md") >= set(COMMANDS)


def _calls() -> Iterator[tuple[Path, str, set[str]]]:
    """Page, command and options of every call of the command line in a block."""
    for page in PAGES:
        for block in _blocks(page, "console"):
            for line in block.replace("\\\n", "").splitlines():
                words = shlex.split(line, comments=True)
                if words and words[0].rpartition("/")[2] == "workbench":
                    options = {word for word in words[2:] if word.startswith("--")}
                    yield page, words[1], options


def test_every_option_exists() -> None:
    calls = list(_calls())
    assert calls
    wrong = []
    for page, command, options in calls:
        parameters = COMMANDS[command].params
        known = {
            "--plugin",
            *(name for one in parameters for name in (*one.opts, *one.secondary_opts)),
        }
        wrong += [f"{page.name}: {command} {option}" for option in sorted(options - known)]
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_compiles_and_takes_public_names(page: Path) -> None:
    for code in _blocks(page, "python"):
        compile(code, str(page), "exec")
        assert not set(re.findall(r"\bwb\.(\w+)", code)) - set(workbench.__all__)
