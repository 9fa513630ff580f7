"""Sets of images in a folder of PNG, JPEG or WebP files, paired by their names, decoded when they are asked for."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmark.errors import UserError
from benchmark.imagesets.arrays import check_size
from benchmark.imagesets.imageset import MAX_IMAGES, Pixels
from benchmark.imagesets.labels import IMAGE_SUFFIXES, Label, Labels, joined, parse_label, parse_subject
from benchmark.imagesets.wording import damaged, listed, one_line, place, unreadable

_FORMATS = ("PNG", "JPEG", "WEBP")
_IGNORED = {"thumbs.db", "desktop.ini"}
_ORIENTATION = 0x0112
_THREADS = 4
_QUIET = threading.Lock()
_TO_RGB = "Image.open(f).convert('RGB').save(g)"
_MODES = {
    "L": f"grey; expected RGB; repeat the channel: {_TO_RGB}",
    "1": f"black and white; expected RGB; convert it: {_TO_RGB}",
    "P": f"a palette; expected RGB; convert it: {_TO_RGB}",
    "LA": "grey with transparency; expected RGB; put it on the background that is meant, then convert it",
    "RGBA": f"an alpha channel; expected RGB; if all of it is opaque, drop it: {_TO_RGB}",
    "CMYK": f"CMYK; expected RGB; convert it: {_TO_RGB}",
}


@dataclass(frozen=True)
class FolderSource:
    """Files of one size."""

    files: tuple[Path, ...]
    side: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """N, H, W, 3."""
        return len(self.files), self.side, self.side, 3

    @property
    def dtype(self) -> np.dtype[Any]:
        """Bytes."""
        return np.dtype(np.uint8)

    def name(self, row: int) -> str:
        """The file."""
        return place(self.files[row])

    def stem(self, row: int) -> str:
        """The stem of the file's name."""
        return self.files[row].stem

    def read(self, rows: NDArray[np.int64]) -> Pixels:
        """Decode the files asked for, several at once."""
        out = np.empty((len(rows), *self.shape[1:]), np.uint8)
        if len(rows) == 1:
            self._decode_into(out[0], int(rows[0]))
            return out
        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
            list(pool.map(self._decode_into, out, [int(row) for row in rows]))
        return out

    def _decode_into(self, target: Pixels, row: int) -> None:
        path = self.files[row]
        with _readable(path) as stream:
            try:
                with _quiet():
                    image = Image.open(stream, formats=_FORMATS)
                with image:
                    side, known = _check(path, stream, image), image.info.get("exif")
                    image.load()
                    if image.info.get("exif") != known:  # in a PNG it may stand after the pixels
                        with _quiet():
                            _check_orientation(path, image)
                    pixels = np.asarray(image)
            except (UserError, MemoryError):
                raise
            except Exception as error:  # Pillow raises many kinds for a damaged file
                raise damaged(path, error, "a whole PNG, JPEG or WebP image") from error
        if side != self.side or pixels.shape != target.shape:
            raise UserError(f"{place(path)}: changed while it was read; start again")
        target[:] = pixels


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Pillow from warning of large images and damaged EXIF, both of which are looked at here.

    One thread at a time: filters of warnings belong to the process. So images are opened in here and decoded outside.
    """
    with _QUIET, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def open_folder(path: Path) -> tuple[FolderSource, Labels, tuple[str, ...]]:
    """Open a folder of images, or of folders ``subj01``, ``subj02``, ... of images.

    The header of every file is read. Files of other kinds and other folders are left out, and a note names them.

    Returns:
        The images, ordered by subject and id, their labels, and notes.
    """
    files, others, folders = _listing(path)
    subjects = {folder: subject for folder in folders if (subject := parse_subject(folder.name)) is not None}
    others += [folder for folder in folders if folder not in subjects]
    inside: list[tuple[Path, int | None]] = [(file, None) for file in files]
    for folder, subject in subjects.items():
        own, rest, deeper = _listing(folder)
        inside += [(file, subject) for file in own]
        others += rest + deeper
    if files and len(inside) > len(files):
        raise UserError(
            f"{place(path)}: images both in the folder itself ({one_line(files[0].name)}) and in those of subjects "
            f"({one_line(inside[-1][0].parent.name)}); expected one or the other; hand in one"
        )
    if not inside:
        held = f"; it holds {listed([other.name for other in others])}" if others else ""
        raise UserError(f"{place(path)}: no PNG, JPEG or WebP image{held}; expected one file an image")
    if len(inside) > MAX_IMAGES:
        raise UserError(f"{place(path)}: {len(inside)} images; expected at most {MAX_IMAGES}")
    labels = [_label(file, subject) for file, subject in inside]
    joined(labels, lambda k: place(inside[k][0].relative_to(path)), place(path))
    order = sorted(range(len(inside)), key=lambda k: _order(labels[k]))
    ordered = tuple(inside[k][0] for k in order)
    side = _check_headers(ordered)
    notes: tuple[str, ...] = ()
    if others:
        names = listed([other.relative_to(path) for other in sorted(others)])
        notes = (f"{place(path)}: left out, for they are no images: {names}",)
    own_labels = joined([labels[k] for k in order], lambda k: place(ordered[k]), place(path))
    return FolderSource(ordered, side), own_labels, notes


def _order(label: Label) -> tuple[int, bool, int, str]:
    subject, own = label
    return subject or 0, isinstance(own, str), own if isinstance(own, int) else 0, str(own)


def _listing(folder: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """Return the images, the other files, and the folders in a folder; hidden ones are ignored."""
    files: list[Path] = []
    others: list[Path] = []
    folders: list[Path] = []
    try:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda e: e.name):
                if entry.name.startswith(".") or entry.name.lower() in _IGNORED:
                    continue
                own = folder / entry.name
                if entry.name.lower().endswith(IMAGE_SUFFIXES):
                    if not own.is_file():  # a folder, a pipe, a link to nowhere: opening one could wait for ever
                        raise UserError(f"{place(own)}: no regular file; expected an image; remove it")
                    files.append(own)
                else:
                    (folders if own.is_dir() else others).append(own)
    except OSError as error:
        raise unreadable(folder, error) from error
    return files, others, folders


def _label(file: Path, folder_subject: int | None) -> Label:
    stem = file.stem
    try:
        stem.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place(file)}: its name is no UTF-8; rename it") from error
    if not stem.isprintable():
        raise UserError(f"{place(file)}: a line break or the like in its name; rename it")
    subject, own = parse_label(stem)
    if folder_subject is not None and subject is not None and subject != folder_subject:
        raise UserError(f"{place(file)}: subject {subject} in the folder of subject {folder_subject}; move it")
    return subject if folder_subject is None else folder_subject, own


def _check_headers(files: tuple[Path, ...]) -> int:
    """Return the side of all images after looking at the header of each."""
    side, first = 0, files[0]
    with _quiet():
        for path in files:
            with _readable(path) as stream:
                try:
                    with Image.open(stream, formats=_FORMATS) as image:
                        own = _check(path, stream, image)
                        _check_orientation(path, image)
                except Image.DecompressionBombError as error:
                    raise UserError(f"{place(path)}: {one_line(error, 80)}; resize it") from error
                except (UserError, MemoryError):
                    raise
                except Exception as error:
                    raise damaged(path, error, "a PNG, JPEG or WebP image") from error
            if own != (side or own):
                raise UserError(
                    f"{place(first)} has {side} pixels a side, {one_line(path.name)} has {own}; expected one size; "
                    "resize them alike"
                )
            side = own
    return side


def _readable(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise unreadable(path, error) from error


def _check(path: Path, stream: IO[bytes], image: Image.Image) -> int:
    """Return the side of an image after looking at size, colours, depth and number of frames."""
    check_size(place(path), image.height, image.width)
    if image.mode != "RGB":
        found = _MODES.get(image.mode, f"mode {image.mode}; expected RGB with 8 bits a colour; convert it")
        raise UserError(f"{place(path)}: {found}")
    if getattr(image, "n_frames", 1) != 1:
        raise UserError(f"{place(path)}: several frames; expected one; save the frame that is meant")
    if image.format == "PNG":  # Pillow drops the lower half of 16 bits without a word
        position = stream.tell()
        stream.seek(24)
        depth = stream.read(1)
        stream.seek(position)
        if depth != b"\x08":
            raise UserError(f"{place(path)}: 16 bits a colour; expected 8; convert it: {_TO_RGB}")
    if "transparency" in image.info:
        raise UserError(f"{place(path)}: a transparent colour; expected RGB; put it on the background that is meant")
    return image.height


def _check_orientation(path: Path, image: Image.Image) -> None:
    exif = image.info.get("exif")
    if not isinstance(exif, bytes):
        return
    tags = Image.Exif()
    tags.load(exif)
    if tags.get(_ORIENTATION, 1) != 1:
        raise UserError(
            f"{place(path)}: turned by its EXIF orientation; expected upright pixels; turn it: "
            "ImageOps.exif_transpose(Image.open(f)).save(g)"
        )
