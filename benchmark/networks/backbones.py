"""The networks of a scoring protocol, loaded when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from benchmark.errors import UserError
from benchmark.networks.registry import feature_network
from benchmark.weights import DOWNLOADS, WEIGHTS, require_weights, weights_digest
from metrics.protocols import get_protocol

if TYPE_CHECKING:
    from benchmark.networks.features import FeatureNetwork

Kind = Literal["paper", "demo"]
"""``paper``: the networks of published protocols, from files; ``demo``: those that install with pip."""


class LazyBackbones(Mapping[str, "FeatureNetwork"]):
    """Network name -> frozen network on its device, read from its file when first asked for.

    Looking up whether a name is here, the names, their number and their digests load nothing. A network stays until
    :meth:`drop` lets it go; asked for again, it is loaded again.

    Args:
        names: the networks' names, in the order in which they are given out.
        load: name -> network, ready on its device.
        digest: name -> what identifies its weights.
    """

    def __init__(
        self, names: Sequence[str], load: Callable[[str], FeatureNetwork], digest: Callable[[str], str]
    ) -> None:
        self._names = tuple(dict.fromkeys(names))
        self._load, self._digest = load, digest
        self._loaded: dict[str, FeatureNetwork] = {}

    def __getitem__(self, name: str) -> FeatureNetwork:
        """Return the network ``name``, loading it where it is not.

        Raises:
            KeyError: there is no such network here.
            UserError: its file is missing or does not fit.
        """
        if name not in self._names:
            raise KeyError(name)
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def drop(self, name: str) -> None:
        """Let the network ``name`` go, so that its memory is free for the next; nothing where it is not loaded."""
        self._loaded.pop(name, None)

    @property
    def loaded(self) -> tuple[str, ...]:
        """The networks that are in memory now."""
        return tuple(self._loaded)

    def digest(self, name: str) -> str:
        """Return what identifies the weights of ``name``, as its ``digest`` attribute does, without loading them.

        Raises:
            KeyError: there is no such network here.
        """
        if name not in self._names:
            raise KeyError(name)
        return self._digest(name)


def scoring_backbones(
    protocol_name_or_networks: str | Sequence[str],
    *,
    kind: Kind = "paper",
    weights: Path | None = None,
    device: str = "cpu",
    random_seed: int | None = None,
) -> LazyBackbones:
    """Return the networks that judge reconstructions, by the names that protocols use.

    Args:
        protocol_name_or_networks: a protocol, which means all of its networks; or the names of networks.
        kind: where they come from.
        weights: folder of the files of ``kind="paper"``; ``benchmark.weights.weights_folder`` by default.
        device: where the networks compute, such as ``cuda:0``.
        random_seed: ``kind="paper"`` only: the true architectures with weights drawn from this seed; no file is read.
            Such scores mean nothing; they are for tests and dry runs, and their digests say so.

    Raises:
        UserError: a network is not of this kind, or its file is missing.
    """
    if isinstance(protocol_name_or_networks, str):
        asked = f"protocol '{protocol_name_or_networks}'"
        names = list(get_protocol(protocol_name_or_networks).networks)
    else:
        asked = "the networks asked for"
        names = list(protocol_name_or_networks)
    judges = [name for name, download in DOWNLOADS.items() if download.group == "scoring"]
    known, other = (judges, "demo") if kind == "paper" else (list(WEIGHTS), "paper")
    for name in names:
        if name not in known:
            raise UserError(
                f"{asked}: '{name}' is not a network of --backbones {kind}, which has {', '.join(known)};\n"
                f"stand-ins fill the demo protocol's slots only, and the papers' networks those of the papers' "
                f"protocols: try --backbones {other}, or another --protocol"
            )
    if kind == "demo" and random_seed is not None:
        raise UserError("random weights are for the papers' networks; those of --backbones demo are installed")
    if random_seed is None:
        require_weights(names, weights)

    def load(name: str) -> FeatureNetwork:
        network = feature_network(name, weights, random_seed)
        network.to(device)
        return network

    def digest(name: str) -> str:
        return weights_digest(name, weights) if random_seed is None else f"random-{random_seed}"

    return LazyBackbones(names, load, digest)
