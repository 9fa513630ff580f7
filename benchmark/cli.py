"""What every command line of this project shares: a parser that answers a slip in one line, and exit codes."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from benchmark.errors import RunError, UserError, did_you_mean
from metrics.added import MetricFileError


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with the nearest option where one is near, and exit code 2.

    Options are never abbreviated: a command in somebody's notes must not change its meaning when an option is added.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Print ``error: message`` on one line and exit with code 2."""
        self.exit(2, f"error: {_one_line(message, self)}\n")


def positive(text: str) -> int:
    """Read an option's whole number from 1; for ``type=``."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, not '{text}'")
    return value


def from_zero(text: str) -> int:
    """Read an option's whole number from 0; for ``type=``."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number from 0, not '{text}'")
    return int(text)


def distinct(text: str) -> list[int]:
    """Read an option's whole numbers from 0, different ones with commas between; for ``type=``."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words) or len({int(word) for word in words}) < len(words):
        raise argparse.ArgumentTypeError(f"expected whole numbers from 0, each once, e.g. 0,1,2, not '{text}'")
    return [int(word) for word in words]


def _parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Walk ``parser`` and the parsers of its subcommands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from _parsers(child)


def _one_line(message: str, parser: argparse.ArgumentParser) -> str:
    """Rewrite argparse's message: name the thing, suggest the nearest, say where help is."""
    message = " ".join(message.split())
    see_help = f"; see {parser.prog} --help"
    if unknown := re.match(r"unrecognized arguments: (.+)", message):
        words = unknown.group(1).split()
        word = next((w for w in words if w.startswith("-")), words[0])
        if not word.startswith("-"):
            return f"unexpected argument '{word}'{see_help}"
        name = word.split("=")[0]
        known = [option for p in _parsers(parser) for option in p._option_string_actions if option.startswith("--")]
        return f"unknown option '{name}'{did_you_mean(name, known) or see_help}"
    if choice := re.match(r"argument (.+?): invalid choice: '?(.*?)'? \(choose from (.+)\)$", message):
        options = [option.strip(" '") for option in choice.group(3).split(",")]
        name = choice.group(1).split("/")[0].lower()
        hint = did_you_mean(choice.group(2), options) or f"; choose from {', '.join(options)}"
        return f"unknown {name} '{choice.group(2)}'{hint}"
    return message + see_help


def main_guard(fn: Callable[[], int | None]) -> int:
    """Call ``fn`` and return the exit code for the shell: 0 fine, 1 the run failed, 2 the call or its input is wrong.

    ``UserError``, also of a metric of the user's own, and ``RunError`` become one line (or two) on stderr; Ctrl-C says
    how to go on and gives 130. Any other exception is a defect and keeps its traceback.
    """
    try:
        return fn() or 0
    except (UserError, MetricFileError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever read the output has seen enough, as head does
        sys.stdout = open(os.devnull, "w")  # or Python complains when it flushes at the end
        return 0
    except KeyboardInterrupt:
        print("interrupted: type the same command to go on", file=sys.stderr)
        return 130
