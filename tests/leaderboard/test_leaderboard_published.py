"""The published rows: the paper's tables come out of them digit by digit, and nothing is guessed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from leaderboard.published import ROWS, published, read_published
from metrics.cards import CARDS
from metrics.protocols import PROTOCOLS

GOLDEN = Path(__file__).parent / "golden" / "brain_it_tables.txt"


def printed() -> Iterator[tuple[str, str, str, str]]:
    """Table, row id, metric, what is printed."""
    table, keys = "", []
    for line in GOLDEN.read_text().splitlines():
        if line.startswith("["):
            table, _, head = line[1:].partition("] ")
            keys = head.split()
        elif not line.startswith("#"):
            row, *cells = (cell.strip() for cell in line.split("|"))
            assert len(cells) == len(keys), line
            yield from ((table, row, key, cell) for key, cell in zip(keys, cells, strict=True))


def test_the_papers_tables_come_out_digit_by_digit() -> None:
    cells = list(printed())
    assert {table for table, *_ in cells} == {"Table 1", "Table 2", *(f"Table T{k}" for k in range(1, 8))}
    wrong = [(t, row, key, cell) for t, row, key, cell in cells if published()[row].cell(key) != cell]
    assert not wrong


def test_there_are_121_rows_and_each_has_a_source() -> None:
    rows = read_published()
    assert len(rows) == 121
    assert all(row.source and row.test_trials for row in rows)


def test_a_row_that_was_not_read_has_no_numbers_and_every_other_has_some() -> None:
    for row in read_published():
        assert (row.evidence == "not_read") == (not row.metrics and not row.other_metrics), row.id


def test_protocols_are_those_of_the_metrics_and_only_papers_own_procedures_are_certain() -> None:
    for row in read_published():
        assert row.protocol is None or row.protocol in PROTOCOLS, row.id
        assert not row.protocol_inferred or row.protocol is not None, row.id


def test_the_two_dream_rows_conflict_and_say_so() -> None:
    a, b = published()["dream_a"], published()["dream_b"]
    assert a.metrics != b.metrics
    assert a.conflicts and b.conflicts


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"metrics": {"PixCor": 0.3}}, "unknown metric PixCor"),
        ({"metrics": {"CLIP": 96.4}}, "CLIP is 96.4, outside"),
        ({"metrics": {"PixCorr": "?"}}, "metrics.PixCorr"),
        ({"evidence": "seen somewhere"}, "evidence"),
        ({"source": ""}, "source"),
        ({"extra": 1}, "extra"),
    ],
)
def test_a_wrong_row_is_refused_by_name(tmp_path: Path, change: dict[str, object], told: str) -> None:
    row = json.loads(ROWS.read_text())["rows"][0] | change
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"rows": [row]}))
    with pytest.raises(ValueError, match="row brainit_40h") as refused:
        read_published(file)
    assert told in str(refused.value)


def test_two_rows_of_one_id_are_refused(tmp_path: Path) -> None:
    row = json.loads(ROWS.read_text())["rows"][0]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"rows": [row, row]}))
    with pytest.raises(ValueError, match="two rows have the id"):
        read_published(file)


def test_every_metric_that_brain_it_printed_has_a_card() -> None:
    assert {key for row in read_published() for key in row.metrics} == set(CARDS)
