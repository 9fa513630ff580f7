"""Progress for people: a bar on a terminal, sparse plain lines in a log, all of it on stderr.

What takes less than two seconds says nothing in a log and leaves nothing behind on a terminal.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    import rich.progress

QUIET_S = 2.0
EVERY_S = 10.0


class Progress:
    """Makes bars that share a prefix, such as ``[7/48] lowlevel clusters=128``.

    Args:
        prefix: shown before every title.
        enabled: False shows nothing at all.
        stream: where to write; standard error by default.
        clock: seconds since some moment; tests hand in their own.
    """

    def __init__(
        self,
        prefix: str = "",
        enabled: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.prefix = prefix
        self.enabled = enabled
        self._stream = stream
        self._clock = clock
        self._display: rich.progress.Progress | None = None
        self._open = 0

    @property
    def stream(self) -> TextIO:
        """Where this writes (looked up late, for standard error may be replaced after this object was made)."""
        return self._stream or sys.stderr

    @property
    def on_terminal(self) -> bool:
        """Whether bars can be drawn."""
        return self.stream.isatty() and os.environ.get("TERM") != "dumb"

    def bar(self, title: str, total: int | None = None, start: int = 0, share: bool = False) -> Bar:
        """Return a bar to use in a ``with`` block; ``start`` is what a resumed run has done already.

        ``share`` shows percent and the time left instead of a count, for steps that mean nothing to a reader.
        """
        return Bar(self, title, total, start, share)

    def message(self, text: str) -> None:
        """Print one line, above the bars where there are any."""
        if self.enabled:
            self._line(f"{self.prefix}: {text}" if self.prefix else text)

    def _line(self, text: str) -> None:
        if self._display is not None:
            self._display.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self.stream, flush=True)

    def _acquire(self) -> rich.progress.Progress | None:
        """Return the terminal display, started with the first bar; None where plain lines are wanted."""
        if not (self.enabled and self.on_terminal):
            return None
        if self._display is None:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Display

            self._display = Display(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[count]}", markup=False),
                TimeElapsedColumn(),
                console=Console(file=self.stream),
                transient=True,
                refresh_per_second=5,
                # A library's print() must not be caught: results go to stdout, which may be a pipe.
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._display.start()
        self._open += 1
        return self._display

    def _release(self) -> None:
        self._open -= 1
        if self._open == 0 and self._display is not None:
            self._display.stop()
            self._display = None


class Bar:
    """One task's progress; made by :meth:`Progress.bar`."""

    def __init__(self, progress: Progress, title: str, total: int | None, start: int, share: bool) -> None:
        self.title = " ".join(part for part in (progress.prefix, title) if part)
        self.total = total
        self.done = start
        self._start = start
        self._share = share
        self._text = ""
        self._progress = progress
        self._display: rich.progress.Progress | None = None
        self._started = self._said = 0.0
        self._first = True
        self._told = start

    def __enter__(self) -> Bar:
        self._started = self._said = self._progress._clock()
        self._display = self._progress._acquire()
        if self._display is not None:
            self._task = self._display.add_task(self.title, total=self.total, completed=self.done, count=self._count())
        return self

    def advance(self, steps: int = 1, text: str = "") -> None:
        """Count ``steps`` more; ``text`` (such as ``loss 0.12``) replaces the text shown."""
        self.done += steps
        self._text = text or self._text
        if self._display is not None:
            self._display.update(self._task, completed=self.done, count=self._count())
        elif self._progress.enabled:
            now = self._progress._clock()
            if now - self._said >= (QUIET_S if self._first else EVERY_S):
                self._say(now)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        now = self._progress._clock()
        if self._display is not None:
            self._display.remove_task(self._task)
        # The last state stays on the screen or in the log, for work that took a while; a failure speaks for itself.
        told = not self._first and self.done == self._told
        if kind is None and self._progress.enabled and now - self._started >= QUIET_S and not told:
            self._say(now)
        if self._display is not None:
            self._progress._release()
            self._display = None

    def _say(self, now: float) -> None:
        self._said = now
        self._first = False
        self._told = self.done
        self._progress._line(f"{self.title}  {self._count()}  {clock_time(now - self._started)}")

    def _count(self) -> str:
        count = f"{self.done}/{self.total}" if self.total is not None else f"{self.done}"
        if self._share and self.total:
            count = f"{100 * self.done // self.total} %{self._left()}"
        return f"{count} {self._text}".rstrip()

    def _left(self) -> str:
        if self.total is None or not self._start < self.done < self.total:
            return ""
        each = (self._progress._clock() - self._started) / (self.done - self._start)
        return f", about {clock_time(each * (self.total - self.done))} left"


def clock_time(seconds: float) -> str:
    """Return ``0:41`` or ``1:02:03``."""
    hours, rest = divmod(int(seconds), 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"
