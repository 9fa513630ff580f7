"""Arrays and dependencies: what Slurm is told must be what the stages need, no more and no less."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmark.launch.arrays import Array, Item, Wait, make_arrays


def item(name: str, *needs: str, kind: str | None = None) -> Item:
    """A stage such as ``lowlevel-8``; its kind is the word before the dash."""
    return Item(name, kind or name.partition("-")[0], needs)


def sweep(variants: Sequence[str], done: Sequence[str] = ()) -> list[Item]:
    """The stages of a sweep, variant after variant; those in ``done`` have their results."""
    items: dict[str, Item] = {}

    def add(name: str, *needs: str) -> str:
        if name not in done:
            items.setdefault(name, item(name, *(need for need in needs if need not in done)))
        return name

    data = add("prepare")
    encoder = add("encoder", data)
    external = add("external", data, encoder)
    for variant in variants:
        clusters = add(f"clusters-{variant}", encoder)
        low = add(f"lowlevel-{variant}", data, encoder, external, clusters)
        semantic = add(f"semantic-{variant}", data, encoder, external, clusters)
        joint = add(f"joint-{variant}", data, encoder, clusters, external, semantic)
        reconstruct = add(f"reconstruct-{variant}", data, clusters, low, joint)
        add(f"score-{variant}", reconstruct)
    add("references", data, f"reconstruct-{variants[-1]}")
    return list(items.values())


def waits_for(arrays: Sequence[Array]) -> dict[str, set[str]]:
    """Read back which stages (or outside jobs) each stage waits for, as Slurm would."""
    found: dict[str, set[str]] = {}
    for number, array in enumerate(arrays):
        for index, member in enumerate(array.members):
            own: set[str] = set()
            for wait in array.waits:
                assert wait.array < number, "an array is submitted after those that it waits for"
                if wait.ended:
                    continue
                if wait.array < 0:
                    own.add(wait.outside)
                elif wait.each:
                    assert len(arrays[wait.array].members) == len(array.members)
                    own.add(arrays[wait.array].members[index])
                elif wait.element is not None:
                    own.add(arrays[wait.array].members[wait.element])
                else:
                    own.update(arrays[wait.array].members)
            found[member] = own
    return found


def closure(direct: dict[str, set[str]], order: Sequence[str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name in order:
        found[name] = set().union(*({need} | found.get(need, set()) for need in direct[name]))
    return found


def check(items: Sequence[Item], arrays: Sequence[Array]) -> None:
    """All stages once, of one kind in an array, and each waits for what it needs: directly or through another."""
    members = [member for array in arrays for member in array.members]
    order = [one.fingerprint for one in items]
    assert sorted(members) == sorted(order)
    kinds = {one.fingerprint: one.kind for one in items}
    assert all(len({kinds[member] for member in array.members}) == 1 for array in arrays)
    needed = closure({one.fingerprint: set(one.needs) for one in items}, order)
    assert closure(waits_for(arrays), order) == needed


def names(arrays: Sequence[Array]) -> list[str]:
    return [
        array.members[0].partition("-")[0] + (f" x {len(array.members)}" if len(array.members) > 1 else "")
        for array in arrays
    ]


def test_a_sweep_is_one_array_for_each_stage() -> None:
    items = sweep(["8", "64", "128"])
    arrays = make_arrays(items)
    check(items, arrays)
    assert sorted(names(arrays)) == sorted(
        ["prepare", "encoder", "external", "clusters x 3", "lowlevel x 3", "semantic x 3", "joint x 3"]
        + ["reconstruct x 3", "score x 3", "references"]
    )
    by_name = {array.members[0].partition("-")[0]: (number, array) for number, array in enumerate(arrays)}
    number = {name: found[0] for name, found in by_name.items()}
    assert set(by_name["lowlevel"][1].waits) == {Wait(number["external"]), Wait(number["clusters"], each=True)}
    assert by_name["joint"][1].waits == (Wait(number["semantic"], each=True),)
    both = {Wait(number["lowlevel"], each=True), Wait(number["joint"], each=True)}
    assert set(by_name["reconstruct"][1].waits) == both
    assert by_name["references"][1].waits == (Wait(number["reconstruct"], element=2),)


def test_what_is_done_for_some_variants_splits_no_more_than_it_must() -> None:
    items = sweep(["8", "16", "64", "128"], done=["prepare", "encoder", "external", "clusters-8", "lowlevel-8"])
    arrays = make_arrays(items)
    check(items, arrays)
    assert sorted(names(arrays)) == sorted(
        ["clusters x 3", "lowlevel x 3", "semantic", "semantic x 3", "joint", "joint x 3"]
        + ["reconstruct", "reconstruct x 3", "score x 4", "references"]
    ) or sorted(names(arrays)) == sorted(
        ["clusters x 3", "lowlevel x 3", "semantic", "semantic x 3", "joint", "joint x 3"]
        + ["reconstruct", "reconstruct x 3", "score", "score x 3", "references"]
    )


def test_each_seed_waits_for_its_own_encoder_only() -> None:
    items = [item(f"encoder-{seed}") for seed in (0, 1)]
    items += [item(f"clusters-{seed}.{k}", f"encoder-{seed}") for seed in (0, 1) for k in (8, 64, 512)]
    arrays = make_arrays(items)
    check(items, arrays)
    assert names(arrays) == ["encoder x 2", "clusters x 3", "clusters x 3"]
    assert [array.waits for array in arrays[1:]] == [(Wait(0, element=0),), (Wait(0, element=1),)]


def test_unlike_requests_of_one_stage_are_not_mixed() -> None:
    arrays = make_arrays([item("a-1", kind="gpu"), item("a-2", kind="cpu"), item("a-3", kind="gpu")])
    assert [array.members for array in arrays] == [("a-1", "a-3"), ("a-2",)]


def test_jobs_of_others_are_waited_for() -> None:
    items = [item("low-1", "elsewhere"), item("low-2", "elsewhere"), item("sem-1", "own-1"), item("sem-2", "own-2")]
    arrays = make_arrays(items)
    check(items, arrays)
    assert [array.members for array in arrays] == [("low-1", "low-2"), ("sem-1",), ("sem-2",)]
    assert arrays[0].waits == (Wait(-1, outside="elsewhere"),)


def test_needs_that_no_array_can_say_make_single_jobs() -> None:
    crossed = [item("a-1"), item("a-2"), item("b-1", "a-1"), item("b-2", "a-2"), item("c-1", "a-1"), item("c-2", "a-2")]
    items = [*crossed, item("d-1", "b-1", "c-2"), item("d-2", "b-2", "c-1")]
    arrays = make_arrays(items)
    check(items, arrays)
    assert names(arrays) == ["a x 2", "b x 2", "c x 2", "d", "d"]


@pytest.mark.parametrize(("size", "sizes"), [(4, [4, 4, 2]), (10, [10]), (9, [9, 1])])
def test_arrays_split_at_the_largest_size_and_stay_aligned(size: int, sizes: list[int]) -> None:
    items = sweep([str(k) for k in range(10)])
    arrays = make_arrays(items, max_size=size)
    check(items, arrays)
    for kind in ("clusters", "lowlevel", "joint", "score"):
        assert [len(array.members) for array in arrays if array.members[0].startswith(kind)] == sizes
    assert max(len(array.waits) for array in arrays) <= 2


@pytest.mark.parametrize(
    ("parallel", "throttles", "queues"),
    [(7, [3, 2, 2], []), (2, [1, 1, 1], [(2, 0)]), (1, [1, 1, 1], [(1, 0), (2, 1)]), (None, [None] * 3, [])],
)
def test_a_split_array_shares_its_throttle(
    parallel: int | None, throttles: list[int | None], queues: list[tuple[int, int]]
) -> None:
    items = [item(f"a-{index}") for index in range(10)]
    arrays = make_arrays(items, max_size=4, parallel=parallel)
    assert [array.throttle for array in arrays] == throttles
    assert [(n, wait.array) for n, array in enumerate(arrays) for wait in array.waits if wait.ended] == queues
    check(items, arrays)


@st.composite
def graphs(draw: st.DrawFn) -> list[Item]:
    count = draw(st.integers(1, 24))
    kinds = draw(st.integers(1, 5))
    items: list[Item] = []
    for index in range(count):
        before = [one.fingerprint for one in items] + ["outside-1", "outside-2"]
        needs = draw(st.lists(st.sampled_from(before), max_size=3))
        items.append(item(f"{draw(st.integers(0, kinds))}-{index}", *needs))
    return items


@settings(max_examples=300, deadline=None)
@given(graphs(), st.integers(1, 6), st.one_of(st.none(), st.integers(1, 5)))
def test_any_graph_is_said_exactly(items: list[Item], max_size: int, parallel: int | None) -> None:
    arrays = make_arrays(items, max_size, parallel)
    check(items, arrays)
    assert all(len(array.members) <= max_size for array in arrays)
    if parallel is not None:
        assert all(1 <= (array.throttle or 0) <= parallel for array in arrays)
