"""Progress: bars on a terminal, sparse lines in a log, never both."""

from __future__ import annotations

import io

import pytest

from benchmark.progress import Progress, clock_time


class Clock:
    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def steps(progress: Progress, clock: Clock, count: int, seconds: float, total: int | None = None) -> None:
    with progress.bar("", total=total) as bar:
        for index in range(count):
            clock.time += seconds
            bar.advance(1, f"loss {1 / (index + 1):.2f}")


def test_a_log_gets_the_first_some_and_the_last_line() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress("[7/48] lowlevel clusters=128", stream=stream, clock=clock)
    steps(progress, clock, 400, 0.1025, total=400)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "[7/48] lowlevel clusters=128  20/400 loss 0.05  0:02"
    assert lines[-1] == "[7/48] lowlevel clusters=128  400/400 loss 0.00  0:41"
    assert len(lines) == 5  # at 2, 12, 22, 32 seconds, and at the end
    assert "\x1b" not in stream.getvalue()


def test_short_work_says_nothing() -> None:
    stream, clock = io.StringIO(), Clock()
    steps(Progress("p", stream=stream, clock=clock), clock, 19, 0.1)
    assert stream.getvalue() == ""


def test_nested_bars_resumed_counts_and_unknown_totals() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(stream=stream, clock=clock)
    with progress.bar("outer", total=2, start=1) as outer:
        with progress.bar("inner") as inner:
            clock.time += 3
            inner.advance(5)
        outer.advance()
    assert stream.getvalue().splitlines() == ["inner  5  0:03", "outer  2/2  0:03"]


def test_disabled_says_nothing_and_messages_carry_the_prefix() -> None:
    stream, clock = io.StringIO(), Clock()
    silent = Progress("p", enabled=False, stream=stream, clock=clock)
    steps(silent, clock, 3, 10)
    silent.message("hello")
    assert stream.getvalue() == ""
    Progress("p", stream=stream).message("hello")
    Progress(stream=stream).message("there")
    assert stream.getvalue() == "p: hello\nthere\n"


def test_a_failure_leaves_no_last_line() -> None:
    stream, clock = io.StringIO(), Clock()
    with pytest.raises(KeyError), Progress(stream=stream, clock=clock).bar("x", total=9) as bar:
        clock.time += 3
        bar.advance()
        clock.time += 30
        raise KeyError
    assert stream.getvalue().splitlines() == ["x  1/9  0:03"]


def test_a_terminal_gets_a_bar_and_keeps_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    stream, clock = Terminal(), Clock()
    progress = Progress("[1/2] low", stream=stream, clock=clock)
    with progress.bar("train", total=4) as bar:
        for _ in range(4):
            clock.time += 1
            bar.advance(1, "loss [0.5]")
        progress.message("half-way [x]")
        with progress.bar("inner", total=1) as inner:
            inner.advance()
    shown = stream.getvalue()
    assert "\x1b[" in shown and "━" in shown
    assert "[1/2] low: half-way [x]\n" in shown.replace("\r", "")
    assert "[1/2] low train  4/4 loss [0.5]  0:04" in shown
    assert "inner  1/1" not in shown  # took no time: leaves nothing


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream, clock = Terminal(), Clock()
    steps(Progress(stream=stream, clock=clock), clock, 3, 1.0, total=3)
    assert "\x1b" not in stream.getvalue() and stream.getvalue().endswith("3/3 loss 0.33  0:03\n")


@pytest.mark.parametrize("seconds, text", [(0, "0:00"), (41.9, "0:41"), (3599, "59:59"), (3723, "1:02:03")])
def test_clock_time(seconds: float, text: str) -> None:
    assert clock_time(seconds) == text


def test_shares_show_percent_and_the_time_left() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(stream=stream, clock=clock).bar("scoring", total=1000, share=True) as bar:
        clock.time += 30
        bar.advance(250, "CLIP 8/32")
        clock.time += 90
        bar.advance(750, "CLIP 32/32")
    assert stream.getvalue().splitlines() == [
        "scoring  25 %, about 1:30 left CLIP 8/32  0:30",
        "scoring  100 % CLIP 32/32  2:00",
    ]
