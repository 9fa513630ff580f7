"""Files that want to run something, or to exhaust the machine, or are broken: refused, and nothing is run."""

from __future__ import annotations

import copyreg
import io
import os
import pickle
import struct
import sys
import tarfile
import time
import tracemalloc
import warnings
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmark.cli import main_guard
from benchmark.convert import main
from benchmark.errors import UserError
from benchmark.official_weights import convert, listing
from benchmark.restricted_pickle import (
    Record,
    RefusedError,
    as_array,
    as_mapping,
    as_scalar,
    is_array,
    printable,
    read,
    refusing,
)
from benchmark.torch_file import TorchFile

sys.path.insert(0, str(Path(__file__).parent))
import released_architecture as released

MARKER = "was-run"


class Call:
    """Pickles as a call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.args


class Stateful:
    """Pickles as an object with a state, or as what `reduced` says."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def touch(marker: Path) -> str:
    return f"touch {marker}"


def by_hand(function: str, argument: str, protocol: int = 0) -> bytes:
    module, _, name = function.rpartition(".")
    if protocol == 0:
        return f"c{module}\n{name}\n(V{argument}\ntR.".encode()
    body = b"".join(b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name))
    return b"\x80\x04" + body + b"\x93" + b"\x8c" + bytes([len(argument)]) + argument.encode() + b"\x85R."


def torch_zip(pickled: bytes, path: Path, **entries: bytes) -> Path:
    """A file of torch.save with any pickle in it."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", b"3\n")
        for name, content in entries.items():
            archive.writestr(f"archive/data/{name}", content)
    return path


def torch_legacy(pickled: bytes, path: Path) -> Path:
    head = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    path.write_bytes(b"".join(head) + pickled + pickle.dumps([], 2))
    return path


@lru_cache(maxsize=1)
def decoder_state() -> OrderedDict[str, torch.Tensor]:
    param = released.dec_param(20, 3, 4, 8, 12, 1, 2)
    return released.seeded(released.Decoder(param), 1).state_dict()


def hidden_in_state(call: Any) -> bytes:
    return pickle.dumps({"state_dict": {"voxel_embed": Stateful(OrderedDict, (), {"deep": [{"er": (call,)}]})}})


HOSTILE: dict[str, Callable[[Path], bytes]] = {
    "os.system": lambda marker: pickle.dumps(Call(os.system, touch(marker)), 2),
    "os.system, protocol 4": lambda marker: pickle.dumps(Call(os.system, touch(marker)), 4),
    "nested": lambda marker: pickle.dumps({"a": [(1, {"b": Call(os.system, touch(marker))})]}, 2),
    "in state": lambda marker: hidden_in_state(Call(os.system, touch(marker))),
    "as a tensor's hooks": lambda marker: pickle.dumps(
        {"w": Stateful(torch._utils._rebuild_parameter, (Call(os.system, touch(marker)), True, OrderedDict()))}
    ),
    "eval": lambda marker: pickle.dumps(Call(eval, f"open({str(marker)!r}, 'w')"), 2),
    "exec": lambda marker: pickle.dumps(Call(exec, f"open({str(marker)!r}, 'w')"), 2),
    "eval, only named": lambda marker: b"c__builtin__\neval\n.",
    "getattr": lambda marker: b"cbuiltins\ngetattr\n(cposixpath\njoin\nV__globals__\ntR.",
    "import": lambda marker: by_hand("builtins.__import__", "antigravity"),
    "Python 2's commands": lambda marker: by_hand("commands.getoutput", touch(marker)),
    "subprocess": lambda marker: by_hand("subprocess.check_output", touch(marker), 4),
    "a method reached by dots": lambda marker: by_hand("collections.OrderedDict.fromkeys", "x", 4),
    "typing's own modules": lambda marker: by_hand("typing.sys.modules.get", "x", 4),
    "an instance, protocol 0": lambda marker: f"(V{touch(marker)}\nios\nsystem\n.".encode(),
    "an object, protocol 1": lambda marker: f"(cos\nsystem\nV{touch(marker)}\no.".encode(),
    "copyreg": lambda marker: pickle.dumps(Call(copyreg._reconstructor, dict, object, None), 2),
    "copyreg's function": lambda marker: by_hand("copyreg.__newobj__", "x"),
    "copyreg's codes": lambda marker: b"\x80\x02\x82\x01.",
    "torch.hub": lambda marker: by_hand("torch.hub.load", "x"),
    "torch.load": lambda marker: by_hand("torch.load", "x", 4),
    "numpy.load": lambda marker: by_hand("numpy.load", "x"),
    "a stranger's function": lambda marker: by_hand("models.decoder_models.main", "x"),
    "a call of a call": lambda marker: b"c_operator\ngetitem\n(tR(tR.",
    "state for a class": lambda marker: b"cmodels.decoder_models\nDecoder\n}Vforward\nK\x01sb.",
    "state for a number": lambda marker: b"K\x01}b.",
    "constructed from nothing": lambda marker: b"\x80\x02K\x01)\x81.",
    "buffers from outside": lambda marker: b"\x80\x05\x97.",
}
FORMS: dict[str, Callable[[bytes, Path], Path]] = {
    "zip": lambda pickled, path: torch_zip(pickled, path),
    "legacy": torch_legacy,
    "bare": lambda pickled, path: (path.write_bytes(pickled), path)[1],
}


def is_refused(path: Path, capsys: pytest.CaptureFixture[str], because: str = "", listed: bool = False) -> None:
    """The command refuses the file, to list it too: exit code 2, two lines at most, nothing written."""
    before = sorted(path.parent.iterdir())
    for wish in (["--out", str(path.parent / "out.safetensors")], ["--list"])[: 1 if listed else 2]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing is even looked at twice
            assert main_guard(lambda words=wish: main(["--official", str(path), *words])) == 2  # type: ignore[misc]
        said = capsys.readouterr()
        assert said.err.startswith(f"error: {path}") and because in said.err
        assert len(said.err.splitlines()) <= 2 and said.err.isprintable() is False  # but for its line ends
        assert all(line.isprintable() for line in said.err.splitlines())
    assert sorted(path.parent.iterdir()) == before


@pytest.fixture
def memory() -> Iterator[Callable[[], int]]:
    """The most bytes that Python's objects took since the test began."""
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_pickles_are_refused(
    hostile: str, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / MARKER
    pickled = HOSTILE[hostile](marker)
    path = FORMS[form](pickled, tmp_path / "decoder.pth")
    is_refused(path, capsys, "" if form == "bare" and pickled[:1] != b"\x80" else "refused, and nothing in it was run")
    assert not marker.exists()


@pytest.mark.parametrize("hostile", ["os.system", "eval", "a stranger's function"])
def test_hostile_tables_are_refused(hostile: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marker, path = tmp_path / MARKER, tmp_path / "v2c.npy"
    np.save(path, np.array({"mapping": 1}, dtype=object))
    head = path.read_bytes().split(b"\n")[0] + b"\n"
    path.write_bytes(head + HOSTILE[hostile](marker))
    is_refused(path, capsys, "refused, and nothing in it was run")
    assert not marker.exists()


def test_the_marker_would_have_been_made(tmp_path: Path) -> None:
    """The same pickles do run when read the usual way."""
    pickle.loads(HOSTILE["os.system"](tmp_path / MARKER))
    assert (tmp_path / MARKER).exists()


def test_the_culprit_is_named(tmp_path: Path) -> None:
    for hostile, name in {"os.system": "posix.system", "eval": "builtins.eval", "torch.hub": "torch.hub.load"}.items():
        with pytest.raises(UserError, match=f" {name}[,;]"):
            list(listing(torch_zip(HOSTILE[hostile](tmp_path / MARKER), tmp_path / "x.pth")))


def test_tar_and_torchscript_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tarfile.open(tmp_path / "old.pth", "w", format=tarfile.USTAR_FORMAT) as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = HOSTILE["os.system"](tmp_path / MARKER)
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    is_refused(tmp_path / "old.pth", capsys, "tar archives")
    with zipfile.ZipFile(tmp_path / "script.pth", "w") as archive:
        archive.writestr("script/data.pkl", pickle.dumps({}))
        archive.writestr("script/code/__torch__.py", b"boom")
    is_refused(tmp_path / "script.pth", capsys, "TorchScript")
    assert not (tmp_path / MARKER).exists()


def _storage(numbers: int, key: str = "0", cls: str = "FloatStorage") -> bytes:
    return f"(Vstorage\nctorch\n{cls}\nV{key}\nVcpu\nL{numbers}L\ntQ".encode()


def _tensor(storage: bytes, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    numbers = [f"({''.join(f'L{n}L{chr(10)}' for n in part)}t".encode() for part in (shape, strides)]
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + f"L{offset}L\n".encode() + b"".join(numbers)
    return rebuild + b"I00\nccollections\nOrderedDict\n(tRtR"


@pytest.mark.parametrize(
    "pickled",
    [
        _tensor(_storage(4), 0, (10**12,), (1,)),
        _tensor(_storage(4), 0, (10**12,), (0,)),
        _tensor(_storage(4), 0, (10**6, 10**6), (0, 0)),
        _tensor(_storage(4), 1, (4,), (1,)),
        _tensor(_storage(4), -1, (4,), (1,)),
        _tensor(_storage(4), 0, (4,), (-1,)),
        _tensor(_storage(4), 0, (2**200,), (2**200,)),
        _tensor(_storage(4), 0, (1,) * 70, (1,) * 70),
        _tensor(_storage(4), 0, (4,), (1, 1)),
        _tensor(_storage(10**12), 0, (4,), (1,)),
        _tensor(_storage(4, "../../etc/passwd"), 0, (4,), (1,)),
        _tensor(_storage(4, cls="EvilStorage"), 0, (4,), (1,)),
        _tensor(_storage(2, cls="ComplexFloatStorage"), 0, (2,), (1,)),
        _tensor(_storage(4) + b"0" + _storage(2, cls="DoubleStorage"), 0, (2,), (1,)),
        b"(Vstorage\ntQ",
        b"VstorageQ"[:-1] + b"\nQ",
    ],
)
def test_tensors_beyond_their_storage_are_refused(
    pickled: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str], memory: Callable[[], int]
) -> None:
    body = b"\x80\x02}Vw\n" + pickled + b"s."
    is_refused(torch_zip(body, tmp_path / "x.pth", **{"0": b"\0" * 16}), capsys, "damaged, or not a file of weights")
    assert memory() < 50e6


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.",  # BINBYTES8 of 4 EB
        b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.",  # FRAME
        b"\x80\x04\x8e" + struct.pack("<Q", 60_000_000_000) + b"x.",
        b"\x80\x02N" + b"r" + struct.pack("<I", 2**32 - 1) + b".",  # memo index of 4 billion
        b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"x.",  # LONG4
        b"L" + b"9" * 100_000 + b"L\n.",
        b"\x80\x02" + b"(" * 50_000 + b"t" * 50_000 + b".",
        b"\x80\x02}" + b"(" * 50_000 + b"t" * 50_000 + b"Ns.",  # a deep tuple as a key
        b"\x80\x02]q\x00" + b"".join(b"(h%ch%ctq%c" % (k, k, k + 1) for k in range(100)) + b".",
        b"\x80\x02}q\x00" + b"Vx\nh\x00sVy\nh\x00s.",  # a dictionary within itself
        b"\x80\x02}q\x00" + b"".join(b"}q%cVx\nh%csVy\nh%cs" % (k + 1, k, k) for k in range(60)) + b".",
        pickle.dumps(np.zeros(3), 2).replace(b"K\x03\x85", b"J\xff\xff\xff\x7f\x85"),
    ],
)
def test_pickles_that_would_exhaust_the_machine(
    pickled: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str], memory: Callable[[], int]
) -> None:
    started = time.process_time()
    for form in ("zip", "legacy"):
        is_refused(FORMS[form](pickled, tmp_path / f"{form}.pth"), capsys, listed=True)
    assert memory() < 100e6 and time.process_time() - started < 20


def test_compressed_and_damaged_archives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bomb = tmp_path / "bomb.pth"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"N" * 50_000_000 + b".")
    is_refused(bomb, capsys, "compressed or encrypted")
    whole = torch_zip(pickle.dumps(dict(decoder_state())), tmp_path / "x.pth")
    content = whole.read_bytes()
    for cut in (4, 30, len(content) // 2, len(content) - 5):
        whole.write_bytes(content[:cut])
        is_refused(whole, capsys)
    with zipfile.ZipFile(tmp_path / "other.pth", "w") as archive:
        archive.writestr("readme.txt", b"hello")
    is_refused(tmp_path / "other.pth", capsys, "not one of torch.save")
    big = torch_zip(pickle.dumps({}), tmp_path / "big.pth")
    with zipfile.ZipFile(big, "a") as archive:
        archive.writestr("archive/byteorder", b"big")
    is_refused(big, capsys, "big-endian")


@pytest.mark.parametrize(
    "content", [b"hello", b"\x80", b"\x80\x02.", b"\x80\x02N.", b"\x93NUMPY", b"\x93NUMPY\x01\x00"]
)
def test_other_files(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    is_refused(tmp_path / "x.pth", capsys)


@pytest.mark.parametrize(
    "header", ["{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000,), }", "{", "1 +"]
)
def test_npy_headers_that_lie(header: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = header.encode() + b"\n"
    (tmp_path / "v2c.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(line)) + line + b"\0" * 80)
    is_refused(tmp_path / "v2c.npy", capsys)


# --- Mutations --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def seeds() -> dict[str, bytes]:
    """Small honest files of every form."""
    found = {}
    for name, options in {"zip.pth": {}, "legacy.pth": {"_use_new_zipfile_serialization": False}}.items():
        buffer = io.BytesIO()
        param = released.dec_param(5, 2, 2, 3, 4, 1, 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no source code of the classes
            released.save(released.Decoder(param), buffer, **options)
        found[name] = buffer.getvalue()
    rows = np.empty(2, dtype=object)
    rows[:] = [np.array([0, 2]), np.array([1])]
    for name, table in {"table.npy": np.array([[0, 2], [1, -1]]), "rows.npy": rows}.items():
        buffer = io.BytesIO()
        np.save(buffer, table)
        found[name] = buffer.getvalue()
    return found


PICKLES = [b"cos\nsystem\n", b"\x93", b"R", b"\x81", b"b", b"Q", b"(", b"t", b"0", b"u", b"e", b"\x88", b"h\x00", b"}"]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["zip.pth", "legacy.pth", "table.npy", "rows.npy"]),
    changes=st.lists(
        st.tuples(
            st.floats(0, 1, exclude_max=True),
            st.one_of(st.binary(max_size=6), st.sampled_from(PICKLES)),
            st.integers(0, 6),
        ),
        min_size=1,
        max_size=6,
    ),
    front=st.booleans(),
)
def test_mutated_files_convert_or_are_refused(
    name: str, changes: list[tuple[float, bytes, int]], front: bool, tmp_path: Path
) -> None:
    content = bytearray(seeds()[name])
    reach = len(content) if not front else min(len(content), 6000)  # where the pickle is
    for place, new, removed in changes:
        start = int(place * reach)
        content[start : start + removed] = new
    path, out = tmp_path / name, tmp_path / "out.safetensors"
    path.write_bytes(content)
    out.unlink(missing_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # odd escapes in texts
        try:
            convert([path], out)
        except UserError as error:
            assert str(error).startswith(str(path)) and not out.exists()
            assert all(line.isprintable() for line in str(error).splitlines())
        else:
            assert out.exists()
    assert not list(tmp_path.glob(".*"))  # no half-written file


@settings(max_examples=400, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(PICKLES), st.binary(min_size=1, max_size=3)), max_size=30).map(b"".join))
def test_any_bytes_read_as_a_pickle(pickled: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            with refusing("here"):
                read(pickled + b".")
        except UserError as error:
            assert str(error).startswith("here: ")


# --- The reader itself ------------------------------------------------------------------------------------------------

_numbers = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.binary())
_keys = st.one_of(st.integers(), st.text(), st.tuples(st.integers(), st.text()))
_values = st.recursive(
    _numbers,
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(_keys, inner), st.tuples(inner, inner), st.sets(_keys)),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(_values, st.integers(3, 5))
def test_plain_containers_read_as_pickle_reads_them(value: Any, protocol: int) -> None:
    if protocol == 3 and _has_set(value):
        protocol = 4  # protocol 3 builds sets by a call, which stays a record
    assert read(pickle.dumps(value, protocol)) == value


def _has_set(value: Any) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return isinstance(value, set) or any(map(_has_set, parts))


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("dtype", ["f4", ">f8", "i2", "u1", "?", "f2"])
def test_arrays_read_as_numpy_reads_them(protocol: int, dtype: str) -> None:
    array = (np.arange(24).reshape(2, 3, 4) % 5).astype(dtype)
    for form in (array, np.asfortranarray(array), array[:, ::2], array[:0], np.array(array[0, 0, 0])):
        found = read(pickle.dumps(form, protocol))
        assert is_array(found)
        np.testing.assert_array_equal(as_array(found), form, strict=True)
    scalar = read(pickle.dumps(array[1, 2, 3], protocol))
    assert as_scalar(scalar) == array[1, 2, 3].item()


def test_objects_become_records() -> None:
    value = OrderedDict(a=defaultdict(list, b=[released.dec_param(1, 2, 3, 4, 5, 6, 7)]))
    with released.importable():
        found = as_mapping(read(pickle.dumps(value, 2)))
    assert found is not None
    inner = as_mapping(found["a"])
    assert inner is not None
    (param,) = inner["b"]
    assert isinstance(param, Record) and param.name == "models.decoder_models.dec_param" and not param.called
    assert param.attributes["num_centers"] == 2 and as_scalar(param.attributes["num_voxels"]) == 1
    assert repr(param) == "<record of models.decoder_models.dec_param>"


def test_arrays_that_are_none() -> None:
    for odd in (Record("numpy.ndarray"), 3, read(pickle.dumps(np.datetime64("2020-01-01"), 2))):
        with pytest.raises((ValueError, TypeError)):
            as_array(odd)
    for array in (np.array(["a"]), np.zeros(2, [("x", "i4")]), np.array(["2020"], "M8[Y]")):
        with pytest.raises(ValueError, match="expected numbers"):
            as_array(read(pickle.dumps(array, 2)))


def test_persistent_ids_need_a_reader() -> None:
    with pytest.raises(RefusedError, match="outside of the pickle"):
        read(b"\x80\x02K\x01Q.")


def test_printable() -> None:
    assert printable("a\x1b[1m\nb") == "a?[1m?b"
    assert printable("x" * 1000, 10) == "xxxxxxxxxx..."


def test_torch_reads_the_same(tmp_path: Path) -> None:
    """Every dtype, views, half-used storages, empty and scalar tensors: as torch's own reader."""
    base = torch.randn(4, 6)
    state = {
        "view": base[1:, ::2],
        "transposed": base.T,
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(2)),
        **{str(d): torch.arange(5).to(d) for d in (torch.float16, torch.bfloat16, torch.float64, torch.int64)},
        **{str(d): torch.arange(2).to(d) for d in (torch.int8, torch.uint8, torch.bool, torch.int32, torch.int16)},
    }
    marked = torch.nn.Parameter(torch.randn(3))
    marked.note = "kept by torch in another way"  # type: ignore[attr-defined]
    state["marked"] = marked
    for zip_format in (True, False):
        torch.save(state, tmp_path / "x.pt", _use_new_zipfile_serialization=zip_format)
        file = TorchFile(tmp_path / "x.pt")
        found = file.contents(file.content).tensors
        expected = torch.load(tmp_path / "x.pt", weights_only=True)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            got = found[name].load()
            assert got.dtype == tensor.dtype and torch.equal(got, tensor), name


def test_a_checkpoint_is_looked_through_without_reading_its_tensors(tmp_path: Path, memory: Callable[[], int]) -> None:
    torch.save({"state_dict": {"w": torch.zeros(10_000_000)}}, tmp_path / "x.ckpt")  # 40 MB
    assert list(listing(tmp_path / "x.ckpt"))[0].split() == ["w", "float32", "10000000"]
    assert memory() < 5e6
