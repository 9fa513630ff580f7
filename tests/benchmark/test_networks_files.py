"""Weights files of strangers: read whatever form they have, refused by name where they do not fit, never run."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmark.errors import UserError
from benchmark.networks.files import load_weights, read_tensors

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")


class Net(nn.Module):
    """A convolution, a batch norm and a bare parameter, with a classifier that nobody needs."""

    def __init__(self, head: bool = True) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.scale = nn.Parameter(torch.ones(2, 5))
        if head:
            self.head = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.stem(x).mean((2, 3)) * self.scale.sum()


@pytest.fixture
def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    net = Net()
    for tensor in net.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape) + 0.5)
    return net.state_dict()


def load(path: Path, unused: tuple[str, ...] = ("head.",), **options: Any) -> nn.Module:
    with torch.device("meta"):
        net = Net(head=False)
    load_weights(net, path, "a small network", unused, **options)
    return net


def holds(net: nn.Module, state: dict[str, Tensor]) -> None:
    for name, tensor in net.state_dict().items():
        assert tensor.device.type == "cpu" and torch.equal(tensor, state[name].to(tensor.dtype)), name


def script(state: dict[str, Tensor], path: Path, trace: bool = False) -> None:
    net = Net()
    net.load_state_dict(state)
    net.eval()
    made = torch.jit.trace(net, torch.rand(1, 3, 5, 5)) if trace else torch.jit.script(net)
    made.save(str(path))


SAVERS: dict[str, Callable[[dict[str, Tensor], Path], None]] = {
    "zip": lambda state, path: torch.save(state, path),
    "legacy": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "safetensors": lambda state, path: save_file(dict(state), path),
    "scripted": script,
    "traced": lambda state, path: script(state, path, trace=True),
    "checkpoint": lambda state, path: torch.save({"epoch": 3, "state_dict": state, "optimizer": {"lr": [0.1]}}, path),
    "parallel": lambda state, path: torch.save({f"module.{name}": value for name, value in state.items()}, path),
    "without counters": lambda state, path: torch.save({k: v for k, v in state.items() if "num_b" not in k}, path),
    "parameters": lambda state, path: torch.save({k: nn.Parameter(v, False) for k, v in state.items()}, path),
}


@pytest.mark.parametrize("kind", SAVERS)
def test_every_form_of_the_same_weights_gives_the_same_network(
    kind: str, state: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "net.pt"  # what a file is shows from its content, not from its name
    SAVERS[kind](state, path)
    net = load(path)
    holds(net, state if kind != "without counters" else {**state, "stem.1.num_batches_tracked": torch.tensor(0)})
    before = path.read_bytes()
    with torch.no_grad():
        net.scale.mul_(2)  # type: ignore[operator, union-attr]
    assert path.read_bytes() == before, "the network has its own memory"


@pytest.mark.parametrize("kind", ["zip", "safetensors", "scripted"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(
    kind: str, dtype: torch.dtype, state: dict[str, Tensor], tmp_path: Path
) -> None:
    lower = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    if kind == "scripted":
        net = Net().to(dtype)
        net.load_state_dict(lower)
        torch.jit.script(net.eval()).save(str(tmp_path / "net.pt"))
    else:
        SAVERS[kind](lower, tmp_path / "net.pt")
    found = load(tmp_path / "net.pt")
    assert {value.dtype for value in found.state_dict().values()} == {torch.float32, torch.int64}
    holds(found, {name: value.float() if value.is_floating_point() else value for name, value in lower.items()})
    half = load(tmp_path / "net.pt", dtype=torch.float16)
    assert {value.dtype for value in half.parameters()} == {torch.float16}


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "scripted"])
def test_only_wanted_tensors_are_read(kind: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    SAVERS[kind](state, tmp_path / "net.pt")
    assert set(read_tensors(tmp_path / "net.pt")) == set(state)
    assert set(read_tensors(tmp_path / "net.pt", lambda name: name.startswith("head."))) == {"head.weight", "head.bias"}


def test_names_may_be_chosen_and_changed(state: dict[str, Tensor], tmp_path: Path) -> None:
    other = {"text.scale": torch.zeros(1), **{f"visual.{name}": value for name, value in state.items()}}
    torch.save(other, tmp_path / "net.pt")
    net = load(
        tmp_path / "net.pt",
        ("visual.head.",),
        only=("visual.",),
        convert=lambda found: {name.removeprefix("visual."): value for name, value in found.items()},
    )
    holds(net, state)

    def fail(found: dict[str, Tensor]) -> dict[str, Tensor]:
        raise UserError("'visual.query' is missing")

    with pytest.raises(UserError, match=r"net\.pt: not the weights of a small network: 'visual.query' is missing$"):
        load(tmp_path / "net.pt", convert=fail)


# --- what does not fit ------------------------------------------------------------------------------------------------


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {key: value for key, value in state.items() if key != name}


def replaced(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {**state, name: value}


MISFITS: list[tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = [
    (without("scale"), "'scale' is missing (1 of its 7 tensors are)"),
    (without("stem.1.running_var"), "'stem.1.running_var' is missing (1 of its 7 tensors are)"),
    (lambda state: {"fc.weight": torch.ones(2)}, "'scale' is missing (7 of its 7 tensors are)"),
    (replaced("stem.2.weight", torch.ones(2)), "'stem.2.weight' is unexpected"),
    (replaced("stem.0.weight", torch.ones(4, 3, 5, 5)), "'stem.0.weight' is 4 x 3 x 5 x 5, expected 4 x 3 x 3 x 3"),
    (replaced("scale", torch.ones(())), "'scale' is a single number, expected 2 x 5"),
    (replaced("scale", torch.ones(2, 5, dtype=torch.int64)), "'scale' is torch.int64, expected floating point"),
    (replaced("scale", torch.full((2, 5), torch.nan)), "'scale' holds a NaN or an infinity"),
    (replaced("scale", torch.full((2, 5), torch.inf)), "'scale' holds a NaN or an infinity"),
]


@pytest.mark.parametrize(("change", "message"), MISFITS, ids=[message for _, message in MISFITS])
@pytest.mark.parametrize("kind", ["zip", "safetensors"])
def test_the_first_tensor_that_does_not_fit_is_named(
    kind: str,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    message: str,
    state: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    path = tmp_path / "net.pt"
    SAVERS[kind](change(state), path)
    with pytest.raises(UserError) as caught:
        load(path)
    assert str(caught.value) == f"{path}: not the weights of a small network: {message}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "it holds a list, not a state dict"),
        ({}, "it holds a dict, not a state dict"),
        ({"scale": torch.ones(2, 5), "epoch": 3}, "its 'epoch' is no tensor"),
        ({3: torch.ones(2)}, "its '3' is no tensor"),
    ],
)
def test_what_is_no_state_dict_is_refused(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "net.pt")
    with pytest.raises(UserError, match=rf"net\.pt: damaged, or not a network's weights \({message}"):
        read_tensors(tmp_path / "net.pt")


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"hello", b"\x80\x02.", b"\x00" * 100, b"\x10" + bytes(7) + b"{"]
)
def test_what_is_no_weights_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "net.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"net\.pt: ") as caught:
        read_tensors(tmp_path / "net.pt")
    assert len(str(caught.value).splitlines()) <= 2


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            read_tensors(path)


# --- files that want to do something ----------------------------------------------------------------------------------


class Evil:
    """Whoever unpickles it makes a file."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.made),)


def in_script(path: Path, pickled: bytes) -> None:
    """Put a pickle in place of the one that a TorchScript archive has."""
    source = io.BytesIO()
    buffer = torch.jit.script(Net()).save_to_buffer()
    source.write(buffer)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for member in old.infolist():
            new.writestr(member, pickled if member.filename.endswith("/data.pkl") else old.read(member))


EVIL: dict[str, Callable[[Any, Path], None]] = {
    "zip": lambda evil, path: torch.save(evil, path),
    "beside weights": lambda evil, path: torch.save({"scale": torch.ones(2, 5), "more": evil}, path),
    "in a checkpoint": lambda evil, path: torch.save({"state_dict": {"scale": evil}}, path),
    "legacy": lambda evil, path: torch.save(evil, path, _use_new_zipfile_serialization=False),
    "pickle": lambda evil, path: path.write_bytes(pickle.dumps(evil, 2)) and None,
    "newer pickle": lambda evil, path: path.write_bytes(pickle.dumps(evil, 4)) and None,
    "script": lambda evil, path: in_script(path, pickle.dumps(evil, 2)),
    "ckpt": lambda evil, path: torch.save({"state_dict": {"scale": evil}}, path),
}


@pytest.mark.parametrize("kind", EVIL)
def test_code_in_a_file_is_refused_and_not_run(kind: str, tmp_path: Path) -> None:
    made, path = tmp_path / "made", tmp_path / ("net.ckpt" if kind == "ckpt" else "net.pt")
    EVIL[kind](Evil(made), path)
    with pytest.raises(UserError) as caught:
        load(path)
    assert not made.exists()
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and len(message.splitlines()) <= 2
    assert "mkdir" in message or message.endswith("not a network's weights (Unsupported operand 149)")
    if "pickle" in kind:
        pickle.loads(path.read_bytes())
        assert made.exists(), "the same file does it to whoever unpickles it"


class Reaching(nn.Module):
    """A module whose TorchScript does something when torch loads it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2, 5))
        self.training = False

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, bool]:
        return self.scale, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, bool]) -> None:
        self.scale = state[0] * 0
        self.training = state[1]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.sum()


def test_a_program_in_torchscript_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    torch.jit.script(Reaching()).save(str(path))
    assert not torch.jit.load(str(path)).scale.any(), "torch runs it while loading"
    with pytest.raises(UserError, match="'scale' is missing"):
        load(path)


def test_a_small_archive_does_not_unfold_to_a_large_one(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path, packed = tmp_path / "net.pt", tmp_path / "packed.pt"
    script(state, path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    with pytest.raises(UserError, match=r"packed\.pt: refused.*compressed"):
        read_tensors(packed)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[bytes, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("originals")
    torch.manual_seed(0)
    found = {}
    for kind in ("zip", "legacy", "safetensors", "scripted"):
        SAVERS[kind](Net().state_dict(), folder / kind)
        found[kind] = ((folder / kind).read_bytes(), {k: v.clone() for k, v in read_tensors(folder / kind).items()})
    return found


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["zip", "legacy", "safetensors", "scripted"]),
    cut=st.none() | st.floats(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=4),
)
def test_a_damaged_file_is_an_error_in_two_lines_or_other_numbers(
    originals: dict[str, tuple[bytes, dict[str, Tensor]]],
    tmp_path: Path,
    kind: str,
    cut: float | None,
    flips: list[tuple[float, int]],
) -> None:
    content, state = bytearray(originals[kind][0]), originals[kind][1]
    for place, change in flips:
        content[int(place * len(content))] ^= change
    if cut is not None:
        del content[int(cut * len(content)) :]
    path = tmp_path / "net.pt"
    path.write_bytes(content)
    try:
        net = load(path)
    except UserError as error:
        assert str(error).startswith(f"{path}: ") and len(str(error).splitlines()) <= 2
    else:  # the damage is in numbers, or where nobody reads
        assert net.state_dict().keys() == {name for name in state if not name.startswith("head.")}
