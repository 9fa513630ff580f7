"""Pickles of strangers, read as data: nothing in them is imported, called or constructed.

A pickle is a program, and reading one the usual way runs it. Here its instructions only build plain containers and
:class:`Record` objects, which note what would have been called or constructed, with which arguments and which state.
What a record means is decided later, by whoever reads it: :func:`as_array`, :func:`as_mapping`,
``benchmark.torch_file``.

Two rules say what cannot be an honest file of weights; it is refused, naming the culprit:

* names of the standard library, except those that honest modules refer to (:data:`STANDARD`);
* calls (as opposed to objects), except those that rebuild tensors, arrays and containers (:data:`CALLS`).

The instructions are decoded by the standard library's ``pickletools``, which reads pickles without running them.
"""

from __future__ import annotations

import math
import pickletools
import re
import struct
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING  # names of Python 2's modules, which old protocols use
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

from benchmark.errors import UserError

if TYPE_CHECKING:
    import mmap

    import numpy as np

_TYPES = "bool bytearray bytes complex dict float frozenset int list long object set slice str tuple type"
STANDARD = frozenset(
    [
        *(f"builtins.{name}" for name in _TYPES.split()),
        *(f"collections.{name}" for name in ("Counter", "OrderedDict", "defaultdict", "deque")),
        *(f"inspect.{name}" for name in ("Parameter", "Signature", "_ParameterKind", "_empty")),
        *(f"pathlib.{name}" for name in ("Path", "PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath")),
        *(f"types.{name}" for name in ("GenericAlias", "NoneType", "UnionType")),
        "_codecs.encode",
        "_operator.getitem",
        "argparse.Namespace",
        "functools.partial",
        "operator.getitem",
    ]
)
"""Names of the standard library that may occur; besides, everything in ``typing``."""

CALLS = STANDARD | {
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.core.numeric._frombuffer",
    "numpy._core.numeric._frombuffer",
    "numpy.dtype",
    "torch.Size",
    "torch._tensor._rebuild_from_type_v2",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch.device",
    *(f"torch.jit._pickle.{name}" for name in ("build_boollist", "build_doublelist", "build_intlist")),
    *(f"torch.jit._pickle.{name}" for name in ("build_tensorlist", "restore_type_tag")),
    "torch.serialization._get_layout",
}
"""Calls that become records; every other call is refused."""

_PLAIN_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")
_LIMIT = 60  # characters of a stranger's text in a message


class RefusedError(Exception):
    """The pickle asks for something that no file of weights needs."""


@dataclass(frozen=True)
class Name:
    """A class or function that the pickle names; it is not looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Record:
    """What the pickle would have called or constructed.

    Attributes:
        name: full name of the class or function.
        args: what it would have been given.
        called: a call, whose result this stands for; otherwise an object of the class ``name``.
        state: what would have been the object's state (``None``: none given).
        entries: what would have been appended to it.
        mapping: what would have been set in it by key.
    """

    name: str
    args: tuple[Any, ...] = ()
    called: bool = False
    state: Any = None
    entries: list[Any] = field(default_factory=list)
    mapping: dict[Any, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<record of {printable(self.name)}>"

    @property
    def attributes(self) -> Mapping[str, Any]:
        """The object's attributes by name; empty where its state is something else."""
        parts = (
            self.state if isinstance(self.state, tuple) else (self.state,)
        )  # (attributes, slots), either may be None
        return ChainMap(*(part for part in parts if isinstance(part, dict)))


def printable(text: object, limit: int = _LIMIT) -> str:
    """Return a stranger's text fit for a terminal: no control characters, not endless."""
    clean = "".join(c if c.isprintable() else "?" for c in str(text)[: limit + 1])
    return clean if len(clean) <= limit else clean[:limit] + "..."


@contextmanager
def refusing(where: object) -> Iterator[None]:
    """Turn whatever reading a stranger's file raises into a ``UserError`` that begins with ``where``."""
    try:
        yield
    except RefusedError as error:
        raise UserError(f"{where}: refused, and nothing in it was run: {error}") from None
    except zipfile.BadZipFile as error:
        raise UserError(f"{where}: a damaged zip archive ({printable(error)}); download it again") from None
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        EOFError,
        LookupError,
        MemoryError,
        NotImplementedError,
        RecursionError,
        TypeError,
        ValueError,
        struct.error,
    ) as error:
        reason = printable(error, 100) if type(error) is ValueError else f"{type(error).__name__} {printable(error)}"
        raise UserError(f"{where}: damaged, or not a file of weights ({reason}); download it again") from None


def read(stream: IO[bytes] | mmap.mmap | bytes, persistent: Callable[[Any], Any] | None = None) -> Any:
    """Read one pickle from ``stream`` into plain containers and records. Use within :func:`refusing`.

    Args:
        stream: stands at the pickle's start, and afterwards behind its end. Reading it must not hand out more than the
            file holds (an ``mmap`` or ``bytes`` do not, whatever lengths the pickle claims).
        persistent: what stands for a persistent id (torch's storages); refused where None.

    Raises:
        RefusedError: the pickle asks for more than data.
        ValueError: or another error that :func:`refusing` knows: not a pickle.
    """
    return _Machine(persistent).run(stream)


def as_mapping(value: object) -> Mapping[Any, Any] | None:
    """Return what a dict, or a record of a dict's subclass (``OrderedDict`` ...), maps; None for anything else."""
    if isinstance(value, dict):
        return value
    if isinstance(value, Record) and (value.mapping or value.name == "collections.OrderedDict"):
        return value.mapping
    return None


def as_scalar(value: object) -> object:
    """Return a number, string, bool or None as it is, numpy's scalars as Python's; anything else raises ValueError."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Record) and value.called and value.name.endswith("core.multiarray.scalar"):
        dtype, raw = value.args
        import numpy as np

        scalar: object = np.frombuffer(_bytes(raw), _dtype(dtype), count=1)[0].item()
        return scalar
    raise ValueError(f"{type(value).__name__} where a number or a word was expected")


def is_array(value: object) -> bool:
    """Whether ``value`` is a record of a numpy array."""
    names = ("core.multiarray._reconstruct", "core.numeric._frombuffer")
    return isinstance(value, Record) and value.called and value.name.endswith(names)


def as_array(value: object) -> np.ndarray:
    """Return the numpy array that a record describes: numbers, or objects that are plain containers and records.

    The numbers are a read-only view of the pickle's bytes.

    Raises:
        ValueError: not an array, an array of structures or dates, or fewer bytes than its shape needs.
    """
    import numpy as np

    if not isinstance(value, Record) or not is_array(value):
        raise ValueError(f"{type(value).__name__} where an array was expected")
    if value.name.endswith("_frombuffer"):
        raw, dtype_record, shape, order = value.args
    else:
        _, shape, dtype_record, fortran, raw = value.state
        order = "F" if fortran else "C"
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape) or len(shape) > 16:
        raise ValueError("an array of impossible shape")
    if order not in ("C", "F"):
        raise ValueError("an array of impossible order")
    if isinstance(raw, list):
        if len(raw) != math.prod(shape):
            raise ValueError(f"an array of shape {shape} with {len(raw)} objects")
        objects = np.empty(len(raw), dtype=object)
        objects[:] = raw
        return objects.reshape(shape, order=order)
    dtype, data = _dtype(dtype_record), _bytes(raw)
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"an array of shape {shape} and {dtype} with {len(data)} bytes")
    return np.frombuffer(data, dtype).reshape(shape, order=order)


def _dtype(value: object) -> np.dtype[Any]:
    """Return the dtype of a record, if it is one of plain numbers."""
    import numpy as np

    if not isinstance(value, Record) or value.name != "numpy.dtype":
        raise ValueError("an array without a dtype")
    code = value.args[0]
    if not isinstance(code, str) or not _PLAIN_DTYPE.fullmatch(code):
        raise ValueError(f"an array of dtype {printable(code)}; expected numbers")
    order = value.state[1] if value.state is not None else "="
    if order not in ("<", ">", "|", "="):
        raise ValueError("a dtype of impossible byte order")
    return np.dtype(code.lstrip("<>|=")).newbyteorder(order)  # type: ignore[arg-type]  # one of the four


def _bytes(value: object) -> bytes | bytearray:
    """Return a pickle's bytes, which old protocols spell as text."""
    if isinstance(value, bytes | bytearray):
        return value
    if isinstance(value, Record) and value.name == "_codecs.encode" and value.args[1:] == ("latin1",):
        value = value.args[0]
    if isinstance(value, Record) and value.name == "builtins.bytes" and not value.args:
        return b""
    if not isinstance(value, str):
        raise ValueError(f"{type(value).__name__} where bytes were expected")
    return value.encode("latin1")


class _Machine:
    """The pickle machine: a stack, a memo, and instructions that only ever build containers and records."""

    def __init__(self, persistent: Callable[[Any], Any] | None) -> None:
        self.persistent = persistent
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self, stream: IO[bytes] | mmap.mmap | bytes) -> Any:
        for instruction, argument, _ in pickletools.genops(stream):  # type: ignore[arg-type]
            name = instruction.name
            if name == "STOP":
                return self.stack.pop()
            if name in _IGNORED:
                continue
            if name in _LITERALS:
                self.stack.append(argument)
            elif name in _EMPTY:
                self.stack.append(_EMPTY[name]())
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name in _STEPS:
                _STEPS[name](self, argument)
            else:
                raise RefusedError(f"the pickle instruction {name}, which needs things outside the file")
        raise ValueError("a pickle without an end")  # pragma: no cover (pickletools raises first)

    def since_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.marks.pop()
        return items

    # Stack and memo.

    def mark(self, _: Any) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def pop(self, _: Any) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.since_mark()

    def pop_mark(self, _: Any) -> None:
        self.since_mark()

    def duplicate(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    def put(self, index: int | None) -> None:
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    # Containers.

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise ValueError("a tuple longer than the stack")
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.stack.append(items)

    def marked(self, container: Callable[[list[Any]], Any]) -> None:
        items = self.since_mark()
        self.stack.append(container(items))

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Record):
            target.entries.extend(items)
        elif isinstance(target, list):
            target.extend(items)
        else:
            raise ValueError("something appended to what is no list")

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        mapping = target.mapping if isinstance(target, Record) else target
        if not isinstance(mapping, dict):
            raise ValueError("a key set in what is no dictionary")
        mapping.update(_pairs(items))

    def add(self, _: Any) -> None:
        items = self.since_mark()
        if not isinstance(self.stack[-1], set):
            raise ValueError("something added to what is no set")
        self.stack[-1].update(map(_key, items))

    # Names, calls, objects.

    def name(self, module: Any, name: Any) -> Name:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a name that is no text")
        found = Name(IMPORT_MAPPING.get(module, module), name)
        top = found.module.split(".")[0]
        if top in sys.stdlib_module_names and str(found) not in STANDARD and not _is_type_hint(found):
            raise RefusedError(f"it names {printable(found)}, which no weights need")
        return found

    def global_(self, argument: str) -> None:
        module, _, name = argument.partition(" ")  # pickletools joins the two lines by a space
        self.stack.append(self.name(module, name))

    def stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(self.name(module, name))

    def call(self, function: Any, args: Any) -> Record:
        if not isinstance(function, Name):
            raise RefusedError("it calls something that is no name")
        if str(function) not in CALLS and not _is_type_hint(function):
            raise RefusedError(f"it calls {printable(function)}; only tensors, arrays and containers are rebuilt")
        if not isinstance(args, tuple):
            raise ValueError("a call without arguments")
        return Record(str(function), args, called=True)

    def reduce(self, _: Any) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self.stack.append(self.call(function, args))

    def instance(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        args = tuple(self.since_mark())
        self.stack.append(self.call(self.name(module, name), args))

    def object_(self, _: Any) -> None:
        function, *args = self.since_mark()
        self.stack.append(self.call(function, tuple(args)))

    def construct(self, arguments: int) -> None:
        *_, args = [self.stack.pop() for _ in range(arguments)]  # keyword arguments, if any, tell nothing
        cls = self.stack.pop()
        if not isinstance(cls, Name):
            raise RefusedError("it constructs something that is no class")
        self.stack.append(Record(str(cls), args if isinstance(args, tuple) else ()))

    def build(self, _: Any) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Record):
            target.state = state
        elif not isinstance(target, dict | list | set):  # a container's attributes mean nothing here
            what = printable(target) if isinstance(target, Name) else type(target).__name__
            raise RefusedError(f"it changes {what}, which is not its own object")

    def persistent_id(self, _: Any) -> None:
        if self.persistent is None:
            raise RefusedError("it refers to data outside of the pickle")
        self.stack.append(self.persistent(self.stack.pop()))


def _is_type_hint(name: Name) -> bool:
    return name.module == "typing" and name.name.isidentifier()


def _key(value: Any) -> Any:
    """Let through what may be a dictionary's key; hashing deep nests of tuples could exhaust the stack."""
    flat = value if type(value) is tuple else (value,)
    if all(part is None or isinstance(part, bool | int | float | str | bytes | Name) for part in flat):
        return value
    if isinstance(value, Record):
        return value  # by identity
    raise ValueError("a dictionary's key that is no number or word")


def _pairs(items: list[Any]) -> dict[Any, Any]:
    return {_key(key): value for key, value in zip(items[::2], items[1::2], strict=True)}


_IGNORED = {"PROTO", "FRAME"}
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
}
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": _Machine.pop_mark,
    "DUP": _Machine.duplicate,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    "TUPLE": lambda machine, _: machine.marked(tuple),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "LIST": lambda machine, _: machine.marked(list),
    "DICT": lambda machine, _: machine.marked(_pairs),
    "FROZENSET": lambda machine, _: machine.marked(lambda items: frozenset(map(_key, items))),
    "APPEND": lambda machine, _: machine.append([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.set_items([machine.stack.pop(), machine.stack.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
    "ADDITEMS": _Machine.add,
    "GLOBAL": _Machine.global_,
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.reduce,
    "INST": _Machine.instance,
    "OBJ": _Machine.object_,
    "NEWOBJ": lambda machine, _: machine.construct(1),
    "NEWOBJ_EX": lambda machine, _: machine.construct(2),
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent_id,
}
