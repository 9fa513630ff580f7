"""Contact sheets of the first test images, and what all of the pictures are worth to the late judge.

*True tokens* is the generator fed the semantic tokens of the seen image itself: the most that a perfect prediction
could bring. Two-way identification is counted twice: among all test images, and among those that show the same place,
which tells a picture of the right object from one of the right backdrop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from benchmark import networks
from benchmark.config import demo
from benchmark.data.scenes import render_scenes
from benchmark.demo_generator.train import RESERVED_SEED
from benchmark.errors import UserError
from benchmark.progress import Progress
from benchmark.report.grids import TITLES, contact_sheet
from benchmark.results import Result
from benchmark.stages import KINDS, METHOD, image_name, seen_name
from benchmark.stages.features import as_bytes, as_pixels
from benchmark.stages.prepare import TREE
from benchmark.stages.reconstruct import image_seed, read_images
from benchmark.stages.targets import BATCH
from benchmark.store import read_json, write_json
from leaderboard import Interval, compare, read_leaderboard, summarise
from leaderboard.statistics import bootstrap_interval
from methods.brain_it.generate import GenerationSettings, Generator, semantic_images
from methods.brain_it.unclip import decode, encode
from metrics.evaluate import TruthCache, evaluate
from metrics.identification import Floats, two_way
from metrics.protocols import Protocol, Ties, get_protocol

LATE = "CLIP"  # the slot of the late judge
TRUE_TOKENS = "true tokens"
COMPARISONS = (  # combined image against what, on which metrics
    (("reference", "mean image"), ("PixCorr",)),
    (("reference", "shuffled"), ("PixCorr",)),
    ((METHOD, "lowlevel"), ("Incep", LATE, "Eff")),
    ((METHOD, "semantic"), ("PixCorr", "SSIM")),
)
SHOWN = 12
_VERDICTS = {"a": "better", "b": "worse", "": "equal"}


# --- pictures from true tokens ----------------------------------------------------------------------------------------


@torch.inference_mode()
def true_tokens(images: np.ndarray, semantic: str) -> Tensor:
    """Return the semantic tokens of n x S x S x 3 uint8 images, as the generator takes them: n x tokens x dim."""
    network = networks.semantic_network(semantic)
    return torch.cat([network(as_pixels(images[k : k + BATCH])) for k in range(0, len(images), BATCH)])


def draw_from_tokens(
    generator: Generator, tokens: Tensor, settings: GenerationSettings, seeds: Sequence[int], progress: Progress
) -> np.ndarray:
    """Return what the generator makes of tokens (n x tokens x dim): n x S x S x 3 uint8."""
    with progress.bar("images from true tokens", total=len(seeds)) as bar:
        return as_bytes(semantic_images(generator, tokens, settings, seeds, batch=BATCH, progress=bar.advance))


def _settings(generation: Mapping[str, Any]) -> GenerationSettings:
    names = ("steps", "start_step", "guidance", "offset_noise", "contrast")
    return GenerationSettings(**{name: generation[name] for name in names})


# --- numbers ----------------------------------------------------------------------------------------------------------


def same_place_two_way(r: Floats, places: Sequence[str], ties: Ties) -> Floats:
    """Return each image's two-way identification score among the images of the same place: (n,), in [0, 1].

    Args:
        r: (n, n) correlations r[truth, reconstruction].
        places: what each of the n images shows.
        ties: "strict" or "half".

    Returns:
        NaN for an image that is the only one of its place.
    """
    scores = np.full(len(r), np.nan)
    shown = np.array(places)
    for place in sorted(set(places)):
        own = np.flatnonzero(shown == place)
        if len(own) > 1:
            scores[own] = two_way(r[np.ix_(own, own)], ties)
    return scores


@dataclass(frozen=True)
class Judge:
    """The late judge of a protocol, and the pixels."""

    protocol: Protocol
    backbones: Mapping[str, networks.FeatureNetwork]
    cache: TruthCache

    @classmethod
    def of(cls, protocol: Protocol) -> Judge:
        """Load the network that fills the late slot."""
        name = protocol.slots[LATE].network
        return cls(protocol, {name: networks.feature_network(name)}, TruthCache())

    def score(
        self, images: np.ndarray, truths: np.ndarray, ids: Sequence[int], places: Sequence[str] | None
    ) -> tuple[dict[str, Floats], Floats]:
        """Return PixCorr and the late slot's score of each image, and the latter within its place (NaN: no places)."""
        found = evaluate(images, truths, self.protocol, self.backbones, ids, keys=["PixCorr", LATE], cache=self.cache)
        ties = self.protocol.identification.ties
        within = np.full(len(ids), np.nan)
        if places is not None:
            within = same_place_two_way(found.matrices[LATE], places, ties)
        return found.per_image, within


def _interval(values: Floats) -> Interval | None:
    """Return mean and 95 % interval of subjects x images, NaN left out; None where there is no number."""
    if not np.isfinite(values).any():
        return None
    low, high = bootstrap_interval(values)
    return Interval(mean=float(np.nanmean(values)), ci_low=float(low), ci_high=float(high))


Row = dict[str, Interval | None]
"""``PixCorr``, ``two-way`` (late) and ``same place``."""


def _plain(rows: Mapping[str, Row]) -> dict[str, Any]:
    return {
        name: {key: None if value is None else value.model_dump() for key, value in row.items()}
        for name, row in rows.items()
    }


def _print_rows(title: str, rows: Mapping[str, Row]) -> None:
    print(f"{title}\n{'':<12} {'PixCorr':>16} {'two-way':>16} {'same place':>16}")
    for name, row in rows.items():
        cells = []
        for key, value in row.items():
            scale, digits, unit = (1, 3, "") if key == "PixCorr" else (100, 1, " %")
            if value is None or value.ci_low is None or value.ci_high is None:
                cells.append("-")
                continue
            half = (value.ci_high - value.ci_low) / 2
            cells.append(f"{scale * value.mean:.{digits}f}{unit} ±{scale * half:.{digits}f}")
        print(f"{name:<12} " + " ".join(f"{cell:>16}" for cell in cells))


# --- a finished sweep -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FinishedVariant:
    """One variant of a finished sweep: the results that its row of the leaderboard names, and the references."""

    name: str
    score: Result
    references: Result
    reconstruct: Result
    targets: Result
    places: Mapping[int, str] | None  # of each NSD id; None where the images were not drawn by the simulation

    @classmethod
    def find(cls, runs: Path, clusters: int) -> FinishedVariant:
        """Look the variant up in the leaderboard of ``runs``.

        Raises:
            UserError: no finished sweep there, or none with this variant.
        """
        page = runs / "leaderboard" / "leaderboard.json"
        if not page.is_file():
            out = "" if runs == Path("runs") else f' ARGS="--out {runs}"'
            raise UserError(f"{runs}: holds no finished sweep (no leaderboard/leaderboard.json)\ntype: make demo{out}")
        try:
            rows = {row.variant: row for row in read_leaderboard(page)}
        except ValueError as error:
            raise UserError(str(error)) from error
        name = f"clusters={clusters}"
        if name not in rows:
            have = ", ".join(row.variant for row in rows.values() if row.kind == "method")
            raise UserError(f"{runs}: has no variant {name}; it has {have}")
        score, references = (Result.read(runs / rows[row].source) for row in (name, "mean image"))
        reconstruct = score.upstream("reconstruct")
        assert reconstruct is not None
        targets, data = reconstruct.upstream("targets"), reconstruct.upstream("data")
        assert targets is not None and data is not None
        tree = data.upstream(TREE)
        return cls(name, score, references, reconstruct, targets, None if tree is None else _places(tree.folder))


def _places(folder: Path) -> dict[int, str]:
    table = pq.read_table(folder / TREE / "simulation" / "scenes.parquet", filters=[("set", "=", "nsd")])
    return dict(zip(table["index"].to_pylist(), table["place"].to_pylist(), strict=True))


# --- the commands -----------------------------------------------------------------------------------------------------


def pictures(runs: Path, out: Path, *, clusters: int = 128, subject: int = 1, count: int = SHOWN) -> dict[str, Any]:
    """Write ``contact.png``, ``true-tokens.png`` and ``pictures.json`` of a finished sweep, and print the numbers.

    Args:
        runs: the sweep's folder.
        out: folder for the files.
        clusters: which variant.
        subject: whose pictures the sheets show.
        count: the sheets show the first so many test images, in the order of the test set.

    Returns:
        What ``pictures.json`` holds: means with 95 % intervals (bootstrap over subjects and images), and the combined
        image's paired comparisons, over all test images and subjects.

    Raises:
        UserError: there is no such run, variant or subject.
    """
    run = FinishedVariant.find(runs, clusters)
    folder, config = run.reconstruct.folder, run.reconstruct.config
    index = np.load(folder / "index.npy")
    subjects = sorted(set(index[:, 0].tolist()))
    if subject not in subjects:
        raise UserError(f"{runs}: subject {subject} was not reconstructed; choose from {', '.join(map(str, subjects))}")
    ids, inverse = np.unique(index[:, 1], return_inverse=True)
    seen = read_images(folder / "seen", [seen_name(image) for image in ids])
    names = [image_name(*key) for key in index.tolist()]
    images = {kind: read_images(folder / kind, names) for kind in KINDS}
    images[TRUE_TOKENS] = draw_from_tokens(
        networks.generator(config["generator"]),
        true_tokens(seen, run.targets.config["semantic"])[torch.from_numpy(inverse)],
        _settings(config["generation"]),
        [image_seed(config["seed"], *key) for key in index.tolist()],
        Progress(),
    )

    shown = np.flatnonzero(index[:, 0] == subject)[:count]
    rows = {"seen": seen[inverse], TRUE_TOKENS: images[TRUE_TOKENS]} | {TITLES[kind]: images[kind] for kind in KINDS}
    rows = {title: pixels[shown] for title, pixels in rows.items()}
    contact_sheet(rows).save(out / "contact.png")
    contact_sheet({title: rows[title] for title in ("seen", TRUE_TOKENS)}, 132, 6).save(out / "true-tokens.png")

    about = read_json(run.score.folder / "protocol.json")
    judge = Judge.of(get_protocol(about["protocol"]))
    within: dict[str, list[Floats]] = {kind: [] for kind in images}
    tables = [pq.read_table(result.folder / "scores.parquet") for result in (run.score, run.references)]
    for person in subjects:
        own = np.flatnonzero(index[:, 0] == person)
        places = None if run.places is None else [run.places[image] for image in index[own, 1].tolist()]
        for kind, pixels in images.items():
            scores, same = judge.score(pixels[own], seen[inverse[own]], index[own, 1].tolist(), places)
            within[kind].append(same)
            if kind == TRUE_TOKENS:  # the others' scores are those of the score stage
                tables += [_table(tables[0], kind, person, index[own, 1], key, scores[key]) for key in scores]
    per_image = pa.concat_tables([table.replace_schema_metadata() for table in tables])

    means = summarise(per_image)
    keys = {TITLES[kind]: (METHOD, kind) for kind in KINDS}
    keys |= {TRUE_TOKENS: (METHOD, TRUE_TOKENS)}
    keys |= {name: ("reference", name) for name in ("mean image", "shuffled")}
    numbers: dict[str, Row] = {
        title: {
            "PixCorr": means[key]["PixCorr"],
            "two-way": means[key][LATE],
            "same place": _interval(np.stack(within[key[1]])) if key[1] in within else None,
        }
        for title, key in keys.items()
    }
    combined = (METHOD, "combined")
    compared = [
        {"against": TITLES.get(other[1], other[1]), **asdict(comparison)}
        for other, metrics in COMPARISONS
        for comparison in compare(per_image, combined, other, metrics=metrics).values()
    ]
    record = {
        "variant": run.name,
        **about,
        "late judge": judge.protocol.describe(LATE),
        "images of a place that others show": int(np.isfinite(within["combined"][0]).sum()),
        "rows": _plain(numbers),
        "combined image": compared,
        "source": str(run.score.folder.relative_to(runs)),
    }
    write_json(out / "pictures.json", record)
    title = f"{run.name}, {len(ids)} test images, subjects {', '.join(map(str, subjects))}"
    _print_rows(f"{title}; two-way: {record['late judge']}", numbers)
    for entry in compared:
        print(
            f"combined against {entry['against']}: {entry['metric']} {entry['difference']:+.3f} "
            f"({entry['ci_low']:+.3f} to {entry['ci_high']:+.3f}), {_VERDICTS[entry['better']]}, p = {entry['p']:.2g}"
        )
    print(f"written: {out / 'contact.png'}, {out / 'true-tokens.png'}, {out / 'pictures.json'}")
    return record


def _table(like: pa.Table, variant: str, subject: int, ids: np.ndarray, metric: str, values: Floats) -> pa.Table:
    """Return per-image scores in the form of the score stage's."""
    frame = pd.DataFrame(
        {
            "track": like["track"][0].as_py(),
            "method": METHOD,
            "variant": variant,
            "subject": subject,
            "seed": like["seed"][0].as_py(),
            "image_id": ids,
            "metric": metric,
            "value": values,
        }
    )
    return pa.Table.from_pandas(frame, schema=like.schema, preserve_index=False)


def generator(out: Path, *, n_images: int = 144, seed: int = 12345) -> dict[str, Any]:
    """Feed the shipped generator the true tokens of fresh scenes; write ``generator.png`` and ``generator.json``.

    The row *autoencoder* shows the scenes encoded and decoded: what is lost without any diffusion.

    Args:
        out: folder for the files.
        n_images: scenes drawn.
        seed: of the scenes, and of the sampler's noise.

    Returns:
        What ``generator.json`` holds: means with 95 % intervals (bootstrap over images).

    Raises:
        UserError: fewer than two scenes, or the seed whose scenes the generator was trained on.
    """
    if n_images < 2:
        raise UserError(f"--images {n_images}: expected 2 or more, for identification compares images")
    if seed < 0 or seed == RESERVED_SEED:
        why = "the generator was trained on its scenes" if seed == RESERVED_SEED else "expected 0 or more"
        raise UserError(f"--seed {seed}: {why}; choose another one")
    variant = demo()
    model = networks.generator(variant.networks.generator)
    scenes, described = render_scenes(n_images, seed, model.image_size)
    images = {
        TRUE_TOKENS: draw_from_tokens(
            model,
            true_tokens(scenes, variant.networks.semantic),
            _settings(variant.generation.model_dump()),
            [image_seed(seed, 0, k) for k in range(n_images)],
            Progress(),
        ),
        "autoencoder": _through_autoencoder(model, scenes),
    }
    rows = {"seen": scenes} | images
    contact_sheet({title: pixels[:SHOWN] for title, pixels in rows.items()}, 132, 6).save(out / "generator.png")

    judge = Judge.of(get_protocol(variant.score.protocol))
    places = [scene.place for scene in described]
    numbers: dict[str, Row] = {}
    for title, pixels in images.items():
        scores, same = judge.score(pixels, scenes, range(n_images), places)
        numbers[title] = {
            "PixCorr": _interval(scores["PixCorr"][None]),
            "two-way": _interval(scores[LATE][None]),
            "same place": _interval(same[None]),
        }
    late = judge.protocol.describe(LATE)
    record = {"n_images": n_images, "seed": seed, "late judge": late, "rows": _plain(numbers)}
    write_json(out / "generator.json", record)
    _print_rows(f"{n_images} fresh scenes, seed {seed}; two-way: {late}", numbers)
    print(f"written: {out / 'generator.png'}, {out / 'generator.json'}")
    return record


@torch.inference_mode()
def _through_autoencoder(model: Generator, images: np.ndarray) -> np.ndarray:
    parts = [
        decode(model.vae, encode(model.vae, as_pixels(images[k : k + BATCH]))) for k in range(0, len(images), BATCH)
    ]
    return as_bytes(torch.cat(parts))
