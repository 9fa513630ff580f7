"""``docs/extending.md`` is executed: its files are written, its commands typed, what they print is compared."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "extending.md"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Command:
    """What is typed, and what the page says that it prints."""

    typed: str
    printed: str

    @property
    def pattern(self) -> re.Pattern[str]:
        """``...`` on a line of its own stands for any lines, or none; within a line for any characters."""
        lines = [re.escape(line.rstrip()) for line in self.printed.splitlines()]
        parts = [r"(?:.*\n)*?" if line == r"\.\.\." else line.replace(r"\.\.\.", ".*?") + r" *\n" for line in lines]
        return re.compile("".join(parts))


def files(page: str) -> dict[str, str]:
    """Path -> text of the files that the page shows, each path on the first line."""
    blocks = [text for kind, text in FENCE.findall(page) if kind in ("python", "yaml")]
    found = {}
    for block in blocks:
        first, text = block.split("\n", 1)
        assert first.startswith("# "), first
        found[first.removeprefix("# ")] = text
    return found


def commands(page: str) -> Iterator[Command]:
    """The commands of the page in order, each with what follows it."""
    for kind, block in FENCE.findall(page):
        if kind == "console":
            for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
                typed, printed = part.split("\n", 1)
                yield Command(typed, printed)


def test_the_elisions_are_no_blank_cheque() -> None:
    command = Command("x", "a ... c\n...\nend\n")
    assert command.pattern.fullmatch("a b c\nend\n") and command.pattern.fullmatch("a b c\nmore\nlines\nend\n")
    assert not command.pattern.fullmatch("a b d\nend\n") and not command.pattern.fullmatch("a b c\nend\nmore\n")


def test_the_page_shows_one_file_of_each() -> None:
    shown = files(PAGE.read_text())
    assert {Path(path).parent.name for path in shown} == {"methods", "metrics", "mine"}
    assert all(path.startswith("mine/") for path in shown)


@pytest.mark.timeout(3000)  # about a minute of processor time, on a busy machine much more of the clock's
def test_the_page_does_what_it_says(tmp_path: Path) -> None:
    page = PAGE.read_text()
    for path, text in files(page).items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    binaries = tmp_path / "bin"
    binaries.mkdir()
    (binaries / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (binaries / "python").chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "120",
    }
    typed = list(commands(page))
    assert len(typed) >= 8
    for command in typed:
        if command.typed.startswith("export "):
            name, _, value = command.typed.removeprefix("export ").partition("=")
            environment[name] = value
            continue
        done = subprocess.run(
            ["bash", "-c", command.typed],
            cwd=tmp_path,
            env=environment,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert command.pattern.fullmatch(done.stdout), f"$ {command.typed}\n{done.stdout}"
        assert done.returncode == (2 if command.printed.startswith("error: ") else 0), command.typed
