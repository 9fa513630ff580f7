"""``read_images``: one call for everything that ``--recons`` and ``--truth`` may name."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np

from benchmark.errors import UserError, did_you_mean
from benchmark.imagesets.containers import OPENERS
from benchmark.imagesets.imageset import ImageSet, Source
from benchmark.imagesets.labels import IMAGE_SUFFIXES, Labels, check_number, companion, read_labels
from benchmark.imagesets.wording import listed, one_line, place, unreadable

_NSD_STIMULI = "imgBrick"  # in NSD's nsd_stimuli.hdf5: the row of an image is its NSD id


def read_images(path: str | Path, *, ids: Path | None = None, what: str = "reconstructions") -> ImageSet:
    """Open a set of images.

    Args:
        path: a folder of PNG, JPEG or WebP files, ordered by subject and id, or folders ``subj01``, ... of them; or an
            array, ``N x H x W x 3`` uint8 or ``N x 3 x H x W`` (or ``N x H x W x 3``) float in [0, 1], in ``.npy``,
            ``.npz``, ``.safetensors``, ``.pt``, ``.h5`` or ``.hdf5``. A file of several arrays is followed by
            ``::name``.
        ids: a list of ids (see :func:`benchmark.imagesets.read_ids`). For an array, those of its rows; they else come
            from ``ids`` in the same file, or from ``NAME.ids.txt``, ``.json`` or ``.npy`` beside it. Where images have
            ids of their own (a folder, or ``imgBrick`` of NSD's nsd_stimuli.hdf5), the images to take, in this order.
        what: what messages call the images.

    Returns:
        The set. Headers have been checked and the first image has been read; the others are read when they are asked
        for (``ImageSet.check`` reads all).

    Raises:
        UserError: nothing is there, or not what was expected: the message names file or row, and the remedy.
    """
    location, key = _split(str(path))
    notes: tuple[str, ...] = ()
    own: Labels | None
    source: Source
    if _is_folder(location):
        if key is not None:
            raise UserError(f"{place(location)}: a folder; leave out '::{one_line(key, 60)}'")
        from benchmark.imagesets.folder import open_folder

        source, own, notes = open_folder(location)
        images = _labelled(str(path), what, source, own, notes)
        chosen = images if ids is None else _taken(images, ids)
    else:
        opener = OPENERS[_kind(location)]
        try:
            location.open("rb").close()
            opened, own = opener(location, key)
        except OSError as error:
            raise unreadable(location, error) from error
        source, n = opened, opened.shape[0]
        if opened.where.endswith(_NSD_STIMULI) and own is None:
            images = _labelled(str(path), what, source, Labels(tuple(range(n))))
            chosen = images if ids is None else _taken(images, ids)
        else:
            beside = companion(location, own, n)
            if ids is not None:
                given = read_labels(ids)
                check_number(given, n, place(ids), place(path))
                if beside is not None and beside != given:
                    raise UserError(
                        f"{place(ids)}: other ids than those that came with {place(path)}; expected the same; "
                        "leave one out"
                    )
                beside = given
            chosen = _labelled(str(path), what, source, beside)
    chosen[:1]  # finds what is wrong with all of them, such as a range of 0..255
    return chosen


def _labelled(path: str, what: str, source: Source, labels: Labels | None, notes: tuple[str, ...] = ()) -> ImageSet:
    n = source.shape[0]
    rows = np.arange(n)
    if labels is None:
        return ImageSet(path, what, source, rows, tuple(range(n)), has_ids=False, notes=notes)
    return ImageSet(path, what, source, rows, labels.ids, labels.subjects, notes=notes)


def _taken(images: ImageSet, ids: Path) -> ImageSet:
    """Return the images that a list names, in its order; of each subject, where it does not tell subjects."""
    wanted = read_labels(ids)
    subjects = images.subjects or (0,) * len(images)
    where = {key: k for k, key in enumerate(zip(subjects, images.ids, strict=True))}
    if wanted.subjects is not None and images.subjects is not None:
        keys = list(zip(wanted.subjects, wanted.ids, strict=True))
    else:
        keys = [(subject, i) for subject in sorted(set(subjects)) for i in wanted.ids]
    missing = [i for subject, i in keys if (subject, i) not in where]
    if missing:
        names = [str(i) for i in images.ids[:2000]]
        raise UserError(
            f"{place(ids)}: no image {listed(missing)} in {place(images.path)}{did_you_mean(str(missing[0]), names)}; "
            "expected ids of images that are there"
        )
    return images.select(np.array([where[key] for key in keys], np.int64))


def _split(text: str) -> tuple[Path, str | None]:
    """Return file and key of ``FILE::key``; a file whose name holds ``::`` is taken as it is."""
    if not text:
        raise UserError("an empty path; expected a folder of images or a file of an array")
    location, mark, key = text.rpartition("::")
    if not mark or not location or os.path.lexists(text):
        return Path(text), None
    if not key:
        raise UserError(f"{place(text)}: nothing after '::'; expected the name of an array")
    return Path(location), key


def _is_folder(path: Path) -> bool:
    """Return whether a path is a folder; raise UserError where it is neither that nor a regular file."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise UserError(
            f"{place(path)}: no such file or folder{_near(path)}; expected a folder of images, or one of "
            f"{', '.join(OPENERS)}"
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a null character
        raise unreadable(path, error if isinstance(error, OSError) else OSError(str(error))) from error
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        raise UserError(f"{place(path)}: neither a file nor a folder; expected images")
    return stat.S_ISDIR(mode)


def _near(path: Path) -> str:
    try:
        return did_you_mean(path.name, os.listdir(path.parent))
    except OSError:
        return ""


def _kind(path: Path) -> str:
    kind = path.suffix.lower()
    if kind in IMAGE_SUFFIXES:
        raise UserError(f"{place(path)}: one image; expected a folder of images; hand in {place(path.parent)}")
    if kind not in OPENERS:
        raise UserError(
            f"{place(path)}: unknown kind of file '{one_line(kind, 20)}'{did_you_mean(kind, OPENERS)}; expected "
            f"a folder of images, or one of {', '.join(OPENERS)}"
        )
    return kind
