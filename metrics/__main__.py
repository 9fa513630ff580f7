"""``python -m metrics list`` prints the metrics' cards, ``python -m metrics protocols`` the protocols side by side."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Mapping, Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from metrics.cards import CARDS
from metrics.protocols import PROTOCOLS, Protocol, Resize, Slot, get_protocol

_LABEL, _COLUMN = 16, 16  # least widths of a table's first and other columns
_SAME = "="
_LEGEND = (
    "Sizes in pixels, of tensors without antialiasing; AA: with it; PIL: of 8-bit images by PIL, which always"
    " antialiases. A metric's own size comes last. Size in print: of the reconstructions that were scored there."
)


def cards_table() -> Table:
    """Return the metrics' cards, one row a metric."""
    table = Table(title="Metrics as published", title_justify="left", show_lines=True)
    for heading in ("key", "what it is", "range", "network, layer", "reference"):
        table.add_column(heading)
    for card in CARDS.values():
        high = "" if card.high is None else f"{card.high:g}"
        network = f"{card.network}, {card.layer}, at {card.input_size} px" if card.network else f"{card.input_size} px"
        table.add_row(
            f"{card.key} {card.arrow}",
            f"{card.name} (version {card.version})",
            f"{card.low:g} .. {high}",
            network,
            card.reference,
        )
    return table


def protocols_report(protocols: Sequence[Protocol], width: int, sources: bool = True) -> Group:
    """Return the protocols side by side, one column a protocol, in as many tables as ``width`` characters ask for.

    Every table begins with the first protocol; of the others it shows what differs from that one. What is the same in
    all is told once, below. A single protocol is shown whole.
    """
    if len(protocols) == 1:
        return Group(_whole(protocols[0]))
    facts = {protocol.name: _facts(protocol) for protocol in protocols}
    labels = list(dict.fromkeys(label for column in facts.values() for label in column))
    rows = {label: tuple(column.get(label, "-") for column in facts.values()) for label in labels}
    differing = _merged({label: row for label, row in rows.items() if len(set(row)) > 1})
    same = {label: row[0] for label, row in rows.items() if len(set(row)) == 1}

    names = list(facts)
    parts: list[RenderableType] = [_grid({protocol.name: protocol.title for protocol in protocols}), ""]
    per_table = max(1, (width - _LABEL - 4) // (_COLUMN + 3) - 1)  # 3: a column's border and padding
    tables = -(-(len(names) - 1) // per_table)
    for k in range(tables):
        shown = range(1 + k * (len(names) - 1) // tables, 1 + (k + 1) * (len(names) - 1) // tables)
        table = Table()
        table.add_column("", min_width=_LABEL)
        for column in (0, *shown):
            table.add_column(_folded(names[column]), min_width=_COLUMN)
        for label, row in differing.items():
            table.add_row(label, row[0], *(_SAME if row[c] == row[0] else Text(row[c], style="bold") for c in shown))
        parts.append(table)
    parts.append(f"{_SAME}  as {names[0]}. {_LEGEND}")
    if same:
        parts += ["", "The same in all of these:", _grid(same)]
    if sources:
        parts += ["", "Sources:", _grid({protocol.name: protocol.source for protocol in protocols})]
    return Group(*parts)


def _merged(rows: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Put labels whose rows are equal on one line, in the place of the first."""
    labels: dict[tuple[str, ...], list[str]] = {}
    for label, row in rows.items():
        labels.setdefault(row, []).append(label)
    return {", ".join(own): row for row, own in labels.items()}


def _folded(name: str) -> str:
    start, hyphen, end = name.rpartition("-")
    return f"{start}{hyphen}\n{end}" if len(name) > _COLUMN else name


def _grid(entries: Mapping[str, str]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    for name, what in entries.items():
        table.add_row(name, what)
    return table


def _whole(protocol: Protocol) -> Table:
    table = Table(title=f"{protocol.name}: {protocol.title}", title_justify="left", show_header=False)
    facts = {
        "test images": protocol.images,
        **_facts(protocol),
        "retrieval": protocol.retrieval.sentence,
        "weights": "\n".join(f"{network.title}: {network.weights}" for network in protocol.networks.values()),
        "sizes": _LEGEND,
        "source": protocol.source,
    }
    for label, fact in facts.items():
        table.add_row(label, fact)
    return table


def _facts(protocol: Protocol) -> dict[str, str]:
    """Everything that decides a score under ``protocol``, in as few words as will do."""
    ssim, rule, pool = protocol.ssim, protocol.identification, protocol.retrieval
    slots = {key: protocol.slots[key] for key in CARDS if key in protocol.slots}
    window = 2 * int(ssim.truncate * ssim.sigma + 0.5) + 1
    return {
        "images": str(protocol.n_images or "any"),
        "size in print": f"{protocol.recon_size} px" if protocol.recon_size else "any",
        "truths": _size(protocol.truth),
        "reconstructions": _size(protocol.recon),
        "then both": _size(protocol.common),
        "blend": f"{protocol.blend:g} : {1 - protocol.blend:g} low-level" if protocol.blend else "-",
        "PixCorr": _size(protocol.pixcorr),
        "SSIM": _size(ssim.resize),
        "SSIM-color": _size(ssim.resize),
        **{slot.key: _size(slot.resize) for slot in protocol.pixels},
        **{key: _size(slot.resize) for key, slot in slots.items()},
        "SSIM of grey": {"2d": "in 2-D", "columns": "column by column"}[ssim.flavour],
        "SSIM window": f"Gaussian, sigma {ssim.sigma:g}, {window} px",
        **{f"{key} by": _judge(protocol, slot) for key, slot in slots.items()},
        "identification": f"by {rule.similarity.capitalize()} correlation, {rule.direction}",
        "ties": {"strict": "lose", "half": "count half"}[rule.ties],
        "retrieval among": "test images" if pool.pool == "test-set" else f"{pool.n} with distractors",
        "constant images": {"nan": "no value (NaN)", "zero": "correlate by 0"}[protocol.constant],
        "not in print": ", ".join(protocol.extra) or "-",
    }


def _judge(protocol: Protocol, slot: Slot) -> str:
    layers = slot.layers[0] if len(slot.layers) == 1 else f"{len(slot.layers)} layers"
    heads = f", weighed as {slot.heads.name}" if slot.heads else ""
    averaged = ", averaged over places" if slot.reduce == "mean" else ""
    return f"{protocol.networks[slot.network].title}, {layers}{averaged}{heads}"


def _size(resize: Resize | None) -> str:
    if resize is None:
        return "as they are"
    how = " PIL" if resize.engine == "pil" else " AA" if resize.antialias else ""
    return f"{resize.size} {resize.filter}{how}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table that was asked for; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m metrics", description="What is measured, and how.")
    parser.add_argument("what", metavar="{list,protocols}", help="the metrics' cards, or the protocols side by side")
    parser.add_argument(
        "names",
        metavar="PROTOCOL",
        nargs="*",
        help=f"of {', '.join(PROTOCOLS)}; all published ones by default; NAME+KEY adds a metric of metrics/added",
    )
    given = parser.parse_args(argv)
    console = Console()
    if given.what not in ("list", "protocols"):
        near = difflib.get_close_matches(given.what, ["list", "protocols"], n=1, cutoff=0.4)
        hint = f" (did you mean '{near[0]}'?)" if near else "; there are 'list' and 'protocols'"
        return _refused(f"python -m metrics knows nothing called '{given.what}'{hint}")
    if given.what == "list":
        if given.names:
            return _refused(f"'list' takes no names; did you mean: python -m metrics protocols {given.names[0]}")
        try:
            console.print(cards_table())
        except ValueError as error:
            return _refused(str(error))
        return 0
    published = [name for name, protocol in PROTOCOLS.items() if protocol.track == "paper"]
    try:
        chosen = [get_protocol(name) for name in dict.fromkeys(given.names or published)]
    except ValueError as error:
        return _refused(str(error))
    console.print(protocols_report(chosen, console.width, sources=bool(given.names)))
    if not given.names:
        console.print(
            "\nSources, and what is inferred: python -m metrics protocols NAME. The miniature NSD has its own: demo."
        )
    return 0


def _refused(why: str) -> int:
    print(f"error: {why}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
