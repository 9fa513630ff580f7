"""``python -m metrics list`` prints the metrics' cards, ``python -m metrics protocols`` the protocols side by side."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from metrics.cards import CARDS
from metrics.protocols import PROTOCOLS, Protocol


def cards_table() -> Table:
    """Return the metrics' cards, one row a metric."""
    table = Table(title="Metrics as published", title_justify="left")
    for heading in ("key", "", "what it is", "range", "size", "network, layer", "version", "reference"):
        table.add_column(heading)
    for card in CARDS.values():
        high = "" if card.high is None else f"{card.high:g}"
        network = f"{card.network}, {card.layer}" if card.network else "-"
        table.add_row(
            card.key,
            card.arrow,
            card.name,
            f"{card.low:g} .. {high}",
            card.input_size,
            network,
            card.version,
            card.reference,
        )
    return table


def protocols_table() -> Table:
    """Return the protocols side by side, one column a protocol."""
    table = Table(title="Protocols", title_justify="left", show_lines=True)
    table.add_column("")
    columns = [_column(protocol) for protocol in PROTOCOLS.values()]
    for name in PROTOCOLS:
        table.add_column(name)
    for row in columns[0]:
        table.add_row(row, *(column[row] for column in columns))
    return table


def _column(protocol: Protocol) -> dict[str, str]:
    def size(resize: object) -> str:
        return str(resize) if resize is not None else "as they are"

    ssim = protocol.ssim
    count = f"{protocol.n_images}: " if protocol.n_images else ""
    column = {
        "what it is": protocol.title,
        "source": protocol.source,
        "test images": f"{count}{protocol.images}",
        "truth": size(protocol.truth),
        "reconstruction": size(protocol.recon),
        "then both": size(protocol.common),
        "blend": "none" if protocol.blend is None else f"{protocol.blend:g} of the reconstruction",
        "PixCorr": f"RGB jointly, {size(protocol.pixcorr)}",
        "SSIM, SSIM-color": f"{ssim.flavour}, Gaussian {ssim.sigma:g}, {size(ssim.resize)}",
        "identification": f"{protocol.identification.similarity}, {protocol.identification.direction}, "
        f"ties {'lose' if protocol.identification.ties == 'strict' else 'count half'}",
        "retrieval": protocol.retrieval.sentence,
        "constant image": f"correlation counts as {protocol.constant}",
    }
    for key in CARDS:
        if key in protocol.slots:
            slot = protocol.slots[key]
            column[key] = f"{slot.sentence}\n{slot.network} {' '.join(slot.layers)}; {size(slot.resize)}"
    column["weights"] = "\n".join(f"{name}: {network.weights}" for name, network in protocol.networks.items())
    return column


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table that was asked for; return the exit status."""
    tables = {"list": cards_table, "protocols": protocols_table}
    parser = argparse.ArgumentParser(prog="python -m metrics", description="What is measured, and how.")
    parser.add_argument("what", metavar="{list,protocols}", help="the metrics' cards, or the protocols side by side")
    what = parser.parse_args(argv).what
    if what not in tables:
        near = difflib.get_close_matches(what, list(tables), n=1, cutoff=0.4)
        hint = f" (did you mean '{near[0]}'?)" if near else "; there are 'list' and 'protocols'"
        print(f"python -m metrics: nothing called '{what}'{hint}", file=sys.stderr)
        return 2
    Console().print(tables[what]())
    return 0


if __name__ == "__main__":
    sys.exit(main())
