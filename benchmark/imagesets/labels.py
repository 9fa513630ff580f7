"""Which image is which: ids and subjects in file names, in lists of ids, and the subset that others score."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmark.errors import UserError
from benchmark.imagesets.npy import read_small_array
from benchmark.imagesets.wording import counted, damaged, one_line, place, unreadable

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
ID_SUFFIXES = (".txt", ".json", ".npy", ".csv", ".tsv")
COMPANIONS = (".ids.txt", ".ids.json", ".ids.npy")
FIRST_TRIALS = 37 * 750
"""Trials of the 37 sessions that every subject of the earlier releases had: their images are the 982."""

NSD_IMAGES = 73_000

_SUBJECT = re.compile(r"(?:^|(?<=[_\-. ]))(?:subject|subj|sub)[_-]?([0-9]{1,4})(?:[_\-. ]|$)", re.IGNORECASE)
_NSD = re.compile(r"(?:.*[^a-z0-9])?nsd[_-]?([0-9]{1,18})(?:[^a-z0-9].*)?", re.IGNORECASE | re.DOTALL)
_NUMBER = re.compile(r"[0-9]{1,18}")  # what fits an int64
_HEADINGS = {"id", "ids", "index", "image", "image_id", "name", "file", "filename", "stem", "nsdid", "nsd_id"}
_LARGEST_LIST = 64 * 2**20  # bytes
_LONGEST_ID = 200

Label = tuple[int | None, int | str]  # subject, id


@dataclass(frozen=True)
class Labels:
    """The ids of a set's images, and their subjects where names tell them."""

    ids: tuple[int | str, ...]
    subjects: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.ids)


def parse_label(text: str) -> Label:
    """Return subject and id that a name tells.

    ``subj01_nsd00034`` is subject 1, image 34; ``train-0001_nsd-00012`` image 12; ``0034`` image 34; ``subj02_cat``
    subject 2, image "cat"; other names are ids as they stand.
    """
    subject, rest = None, text
    if found := _SUBJECT.search(text):
        left = (text[: found.start()] + text[found.end() :]).strip("_-. ")
        if left:
            subject, rest = int(found[1]), left
    if nsd := _NSD.fullmatch(rest):
        return subject, int(nsd[1])
    return subject, int(rest) if _NUMBER.fullmatch(rest) else rest


def parse_subject(name: str) -> int | None:
    """Return the subject of a folder named like ``subj01``, or None."""
    found = _SUBJECT.fullmatch(name)
    return int(found[1]) if found else None


def joined(labels: Sequence[Label], name: Callable[[int], str], where: str) -> Labels:
    """Return labels as one set's, after checking that all or none tell a subject and that none occurs twice.

    Args:
        labels: subject and id of each image.
        name: what messages call image k.
        where: what messages call the whole.
    """
    telling = [s is not None for s, _ in labels]
    if any(telling) and not all(telling):
        raise UserError(
            f"{where}: {name(telling.index(True))} tells its subject, {name(telling.index(False))} does not; "
            "name all like subj01_nsd00034, or none"
        )
    first: dict[Label, int] = {}
    for k, label in enumerate(labels):
        if (other := first.setdefault(label, k)) != k:
            of = "" if label[0] is None else f" of subject {label[0]}"
            raise UserError(
                f"{where}: {name(other)} and {name(k)} are both image {one_line(label[1])}{of}; "
                "expected each once; remove one"
            )
    subjects = tuple(s for s, _ in labels if s is not None)
    return Labels(tuple(i for _, i in labels), subjects if subjects else None)


def labels_of(values: Iterable[object], where: str) -> Labels:
    """Return the labels that a list of ids tells: whole numbers from 0, or names.

    Raises:
        UserError: an entry is something else, or occurs twice.
    """
    labels: list[Label] = []
    for k, value in enumerate(values):
        if isinstance(value, int | np.integer) and not isinstance(value, bool) and 0 <= int(value) < 10**18:
            labels.append((None, int(value)))
            continue
        text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
        if not isinstance(text, str) or not text.strip() or len(text) > _LONGEST_ID or not text.strip().isprintable():
            raise UserError(
                f"{where}: id {k + 1} is {one_line(repr(value), 60)}; expected whole numbers from 0, or names"
            )
        text = text.strip()
        stem = text[: text.rindex(".")] if text.lower().endswith(IMAGE_SUFFIXES) else text
        labels.append(parse_label(stem))
    if not labels:
        raise UserError(f"{where}: holds no ids; expected one an image")
    return joined(labels, lambda k: f"entry {k + 1}", where)


def read_ids(path: str | Path) -> tuple[int | str, ...]:
    """Read a list of image ids: text with one a line, a JSON list, ``.npy``, or the first column of ``.csv``.

    Ids are read as file names are: ``nsd00034`` is 34.

    Raises:
        UserError: the file is missing or malformed, or an id occurs twice.
    """
    return read_labels(path).ids


def read_labels(path: str | Path) -> Labels:
    """Read a list of ids as :func:`read_ids`, with subjects where it tells them (``subj01_nsd00034``).

    A ``.npy`` of two columns holds subject and id.
    """
    file, where = Path(path), place(path)
    kind = file.suffix.lower()
    try:
        if not file.is_file():
            raise UserError(f"{where}: no such file; expected a list of image ids (text with one id a line)")
        if kind not in ID_SUFFIXES:
            raise UserError(
                f"{where}: unknown kind of list '{one_line(kind)}'; expected one of {', '.join(ID_SUFFIXES)}"
            )
        if file.stat().st_size > _LARGEST_LIST:
            raise UserError(f"{where}: {file.stat().st_size} bytes; expected a list of image ids; check the path")
        if kind == ".npy":
            with file.open("rb") as stream:
                return labels_of_array(read_small_array(stream, where), where)
        text = file.read_text(encoding="utf-8-sig")
        if kind == ".json":
            entries = json.loads(text)
            if not isinstance(entries, list):
                raise UserError(f"{where}: holds no JSON list; expected one, such as [34, 57, 98]")
            return labels_of(entries, where)
        if kind == ".txt":
            lines = (line.strip() for line in text.splitlines())
            return labels_of([line for line in lines if line and not line.startswith("#")], where)
        rows = csv.reader(text.splitlines(), delimiter="\t" if kind == ".tsv" else ",")
        column = [row[0].strip() for row in rows if row and row[0].strip()]
        return labels_of(column[1:] if column and column[0].lower() in _HEADINGS else column, where)
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError, csv.Error) as error:
        raise damaged(path, error, f"a {kind} list of image ids in UTF-8") from error


def labels_of_array(array: np.ndarray, where: str) -> Labels:
    """Return the labels in an array: ``n`` whole numbers or names, or ``n x 2`` whole numbers, subject and id."""
    if array.dtype.kind in "iu" and array.ndim == 2 and array.shape[1] == 2 and len(array):
        if array.min() < 0:
            raise UserError(f"{where}: holds a negative number; expected subjects and ids from 0")
        labels: list[Label] = [(int(s), int(i)) for s, i in array]
        return joined(labels, lambda k: f"row {k}", where)
    if array.ndim != 1 or array.dtype.kind not in "iuUS":
        raise UserError(f"{where}: ids are {array.dtype} {array.shape}; expected one row of whole numbers or names")
    return labels_of(array.tolist(), where)


def companion(path: Path, inside: Labels | None, expected: int) -> Labels | None:
    """Return the ids that belong to an array: ``ids`` beside it in its file, or a file ``NAME.ids.txt`` and the like.

    Args:
        path: the array's file.
        inside: what its own file tells.
        expected: number of images.

    Raises:
        UserError: there are not as many ids as images, or two sources disagree.
    """
    known: list[tuple[str, Labels]] = [(f"ids in {place(path)}", inside)] if inside is not None else []
    for suffix in COMPANIONS:
        file = path.with_name(path.stem + suffix)
        if file.exists():
            known.append((place(file), read_labels(file)))
    for where, labels in known:
        check_number(labels, expected, where, place(path))
        if labels != known[0][1]:
            raise UserError(f"{known[0][0]} and {where} disagree; expected the same ids in both; remove one")
    return known[0][1] if known else None


def check_number(labels: Labels, expected: int, where: str, path: str) -> None:
    """Raise UserError unless there are as many ids as images."""
    if len(labels) != expected:
        raise UserError(
            f"{where}: {counted(len(labels), 'id')} for the {counted(expected, 'image')} in {path}; "
            "expected one for each, in the order of the rows"
        )


def read_subset(path: str | Path) -> tuple[str, tuple[int | str, ...]]:
    """Read the ids of a subset of the test images, and what to call it.

    A list of ids (:func:`read_ids`) is called by its file's name. From NSD's ``nsd_expdesign.mat`` come the shared
    images that were shown within the first 37 sessions (27,750 trials of ``masterordering``), ascending: the 982 images
    that papers before the last release scored (Brain-IT, App. D.5). They are called "shared-982" after their number.

    Raises:
        UserError: the file is missing or malformed.
    """
    file = Path(path)
    if file.suffix.lower() != ".mat":
        ids = read_ids(file)
        return file.stem.removesuffix(".ids") or file.stem, ids

    from benchmark.data.formats import Wrong, read_design

    if not file.is_file():
        raise UserError(f"{place(path)}: no such file; expected NSD's nsd_expdesign.mat, or a list of image ids")
    try:
        design = read_design(file, NSD_IMAGES)
        if len(design.order) < FIRST_TRIALS:
            raise Wrong(f"{len(design.order)} trials", f"at least the {FIRST_TRIALS} of 37 sessions")
        columns = np.unique(design.order[:FIRST_TRIALS])
        ids_of = np.sort(design.seen[:, columns[columns < design.shared.size]], axis=1)  # subjects x shared images
        if not (ids_of == ids_of[0]).all():
            raise Wrong(
                "subjects differ in the shared images of 37 sessions", "the same images in all rows of subjectim"
            )
    except Wrong as error:
        raise UserError(
            f"{place(path)}: {one_line(error.found)}; expected {error.expected}, as in NSD's nsd_expdesign.mat"
        ) from error
    return f"shared-{ids_of.shape[1]}", tuple(int(i) for i in ids_of[0])
