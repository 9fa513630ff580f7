"""The command line ``python -m benchmark.data``, and the parser that all command lines share."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmark.cli import Parser, main_guard
from benchmark.data.__main__ import build_parser, main
from benchmark.errors import RunError, UserError


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["simulate", "x", "--imges", "y"], "error: unknown option '--imges' (did you mean '--images'?)"),
        (["simulate", "x", "--subject=2"], "error: unknown option '--subject' (did you mean '--subjects'?)"),
        (["simulat", "x"], "error: unknown command 'simulat' (did you mean 'simulate'?)"),
        (["simulate", "x", "--qqq"], "error: unknown option '--qqq'; see python -m benchmark.data --help"),
        (["simulate", "x", "y"], "error: unexpected argument 'y'; see python -m benchmark.data --help"),
        (["simulate"], "the following arguments are required: DIR"),
        (["simulate", "x", "--seed", "one"], "argument --seed: invalid int value: 'one'"),
    ],
)
def test_a_slip_is_answered_in_one_line(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        build_parser().parse_args(words)
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert says in text and len(text.splitlines()) == 1


def test_choices_are_listed_where_none_is_near(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser(prog="p")
    parser.add_argument("--mode", choices=["cached", "force"])
    with pytest.raises(SystemExit):
        parser.parse_args(["--mode", "zzz"])
    assert capsys.readouterr().err == "error: unknown --mode 'zzz'; choose from cached, force\n"


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def raising(error: BaseException):  # type: ignore[no-untyped-def]
        def fn() -> int:
            raise error

        return fn

    assert main_guard(lambda: None) == 0
    assert main_guard(lambda: 1) == 1
    assert main_guard(raising(UserError("wrong"))) == 2
    assert main_guard(raising(RunError("failed"))) == 1
    assert main_guard(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "error: wrong\nerror: failed\ninterrupted: type the same command to go on\n"
    with pytest.raises(ZeroDivisionError):
        main_guard(raising(ZeroDivisionError()))


def test_simulate_says_what_it_made(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    words = ["simulate", str(tmp_path / "d"), "--subjects", "1", "--size", "32", "--shared", "2", "--unique", "4"]
    words += ["--external", "1", "--voxels", "60"]
    assert main(words) == 0
    assert (
        "6 images (2 shared), 1 external, 1 subjects with 18 trials in 6 sessions; made in" in capsys.readouterr().out
    )
    assert main(words) == 0
    assert "already there, unchanged" in capsys.readouterr().out


def test_help_needs_nothing_heavy() -> None:
    code = "import sys, benchmark.data.__main__ as m; m.build_parser().format_help(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"numpy", "torch", "h5py", "rich"} & set(loaded)
