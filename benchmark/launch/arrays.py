"""How a plan becomes job arrays: which stages share an array, and what each array waits for.

Slurm knows two dependencies that fit. ``afterok:7`` or ``afterok:7_3``: the whole array starts once array 7, or its
element 3, is done. ``aftercorr:7``: element i starts once element i of array 7 is done. A stage that waited for more
than it reads would be held up, or go down, with variants that it has nothing to do with. So stages share an array only
where the two forms say exactly what each of them needs; the rest get arrays of their own.

Pure functions on fingerprints; nothing here knows Slurm's commands.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

_ROUNDS = 64  # of splitting; a plan settles in about as many as its longest chain has stages

_Needs = Mapping[str, Sequence[str]]
_Place = Mapping[str, tuple[int, int]]  # fingerprint -> array, element


@dataclass(frozen=True)
class Item:
    """One stage to submit.

    Attributes:
        fingerprint: the stage's.
        kind: what the stages of one array have in common: the stage's name and all that is asked of the cluster.
        needs: fingerprints of stages that have no result yet; those that are no items have live jobs elsewhere.
    """

    fingerprint: str
    kind: Hashable
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, order=True)
class Wait:
    """What an array waits for.

    Attributes:
        array: index of an array of the same list; -1 for the job outside of it that computes ``outside``.
        element: of that array; None for all of it.
        each: element i waits for element i.
        ended: a bad end will do, too.
        outside: fingerprint.
    """

    array: int
    element: int | None = None
    each: bool = False
    ended: bool = False
    outside: str = ""


@dataclass(frozen=True)
class Array:
    """Fingerprints of stages that are submitted together, at most ``throttle`` of them at a time (None: all)."""

    members: tuple[str, ...]
    waits: tuple[Wait, ...] = ()
    throttle: int | None = None


def make_arrays(items: Sequence[Item], max_size: int = 1001, parallel: int | None = None) -> list[Array]:
    """Return the arrays of ``items``.

    Args:
        items: stages to submit, in an order in which they can run.
        max_size: Slurm's MaxArraySize: larger arrays are split.
        parallel: how many stages that could share an array run at a time at most; None for no limit.

    Returns:
        Arrays, each after those that it waits for; every item is a member of one.
    """
    needs = _direct(items)
    arrays: list[Array] = []
    place: dict[str, tuple[int, int]] = {}
    for block in _blocks(items, needs):
        users = Counter(need for member in block for need in needs[member])
        # Where each member has an array element of its own to wait for, it takes that element's index.
        ordered = sorted(
            block, key=lambda one: sorted(place[need] for need in needs[one] if users[need] == 1 and need in place)
        )
        chunks = [tuple(ordered[start : start + max_size]) for start in range(0, len(ordered), max_size)]
        made = _expressed(chunks, needs, place, arrays)
        if made is None:
            made = _expressed([(member,) for member in block], needs, place, arrays)
            assert made is not None, "what a single stage needs can always be said"
        for array in _throttled(made, parallel, len(arrays)):
            place.update((member, (len(arrays), element)) for element, member in enumerate(array.members))
            arrays.append(array)
    return arrays


def _direct(items: Sequence[Item]) -> dict[str, tuple[str, ...]]:
    """The needs of each item without those that another need of it waits for anyway."""
    bits: dict[str, int] = {}
    below: dict[str, int] = {}  # all that an item waits for, directly or not, as bits of one number
    direct: dict[str, tuple[str, ...]] = {}
    for item in items:
        for name in (*item.needs, item.fingerprint):
            bits.setdefault(name, 1 << len(bits))
        own = tuple(dict.fromkeys(item.needs))
        covered = 0
        for need in own:
            covered |= below.get(need, 0)
        direct[item.fingerprint] = tuple(need for need in own if not covered & bits[need])
        for need in own:
            covered |= bits[need]
        below[item.fingerprint] = covered
    return direct


def _blocks(items: Sequence[Item], needs: _Needs) -> list[list[str]]:
    """Split the items until those of a block relate to every other block alike; blocks follow what they need."""
    level: dict[str, int] = {}
    for item in items:
        level[item.fingerprint] = 1 + max((level.get(need, 0) for need in needs[item.fingerprint]), default=0)
    names = [item.fingerprint for item in items]
    block = _numbered(names, {item.fingerprint: (item.kind, level[item.fingerprint]) for item in items})
    for _ in range(_ROUNDS):
        sizes = Counter(block.values())
        users: Counter[tuple[str, int]] = Counter((need, block[name]) for name in names for need in needs[name])
        down: dict[str, list[Hashable]] = {}
        up: dict[str, list[int]] = defaultdict(list)
        for name in names:
            own = block[name]
            sources = Counter(block.get(need, -1) for need in needs[name])
            down[name] = []
            for need in needs[name]:
                source = block.get(need, -1)
                alone = users[need, own] == 1 and sizes[own] > 1
                if alone and source >= 0 and sources[source] == 1:
                    down[name].append(source)
                    up[need].append(own)
                else:
                    down[name].append(need)
        marks = {name: (block[name], frozenset(down[name]), frozenset(up[name])) for name in names}
        split = _numbered(names, marks)
        settled = len(set(split.values())) == len(sizes)
        block = split
        if settled:
            break
    members: dict[int, list[str]] = defaultdict(list)
    for name in names:
        members[block[name]].append(name)
    return sorted(members.values(), key=lambda own: level[own[0]])


def _numbered(names: Sequence[str], marks: Mapping[str, Hashable]) -> dict[str, int]:
    numbers: dict[Hashable, int] = {}
    return {name: numbers.setdefault(marks[name], len(numbers)) for name in names}


def _expressed(
    chunks: Sequence[tuple[str, ...]], needs: _Needs, place: _Place, arrays: Sequence[Array]
) -> list[Array] | None:
    """The chunks as arrays, or None where Slurm cannot be told exactly what each member waits for."""
    made = []
    for chunk in chunks:
        common = set(needs[chunk[0]]).intersection(*(needs[member] for member in chunk))
        partners = {place.get(need, (-1, -1))[0] for need in needs[chunk[0]] if need not in common}
        for index, member in enumerate(chunk):
            own = {place.get(need, (-1, -1)) for need in needs[member] if need not in common}
            count = sum(need not in common for need in needs[member])
            if own != {(partner, index) for partner in partners} or count != len(partners) or -1 in partners:
                return None
        if any(len(arrays[partner].members) != len(chunk) for partner in partners):
            return None
        waits = [Wait(partner, each=True) for partner in partners]
        waits += [Wait(-1, outside=need) for need in common if need not in place]
        elements: dict[int, list[int]] = defaultdict(list)
        for array, element in (place[need] for need in common if need in place):
            elements[array].append(element)
        for array, some in elements.items():
            whole = len(some) == len(arrays[array].members)
            waits += [Wait(array)] if whole else [Wait(array, element) for element in some]
        made.append(Array(chunk, tuple(sorted(waits, key=lambda wait: (wait.array, wait.element or 0, wait.outside)))))
    return made


def _throttled(made: Sequence[Array], parallel: int | None, first: int) -> list[Array]:
    """Share ``parallel`` out among arrays that could have been one; the rest wait for one before them to end."""
    if parallel is None:
        return list(made)
    lanes = min(parallel, len(made))
    throttled = []
    for number, array in enumerate(made):
        share = parallel // lanes + (number % lanes < parallel % lanes)
        queue = (Wait(first + number - lanes, ended=True),) if number >= lanes else ()
        throttled.append(replace(array, waits=(*array.waits, *queue), throttle=share))
    return throttled
