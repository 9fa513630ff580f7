"""Where things lie in a data tree: the folders of NSD's public bucket, under one root.

Two folders come from elsewhere and stand beside NSD's own: ``algonauts_2023`` (vertex masks and, as a fallback,
averaged betas, from the Algonauts 2023 release) and ``coco`` (COCO's unlabeled2017 photographs, for the images without
fMRI). The Schaefer atlases lie among fsaverage's labels. ``simulation`` exists in a miniature tree only.
"""

from __future__ import annotations

HEMISPHERES = ("lh", "rh")

STIMULI = "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5"
DESIGN = "nsddata/experiments/nsd/nsd_expdesign.mat"
STIM_INFO = "nsddata/experiments/nsd/nsd_stim_info_merged.csv"
SURFACES = "nsddata/freesurfer/fsaverage/surf"
LABELS = "nsddata/freesurfer/fsaverage/label"
EXTERNAL = "coco/unlabeled2017"
ALGONAUTS = "algonauts_2023"
SYNTHETIC_DESIGN = "nsddata/experiments/nsdsynthetic/nsdsynthetic_expdesign.mat"
SYNTHETIC_STIMULI = "nsddata_stimuli/stimuli/nsdsynthetic/nsdsynthetic_stimuli.hdf5"
SETTINGS = "simulation/settings.json"

ATLASES = {
    "schaefer-400": "Schaefer2018_400Parcels_7Networks_order",
    "schaefer-1000": "Schaefer2018_1000Parcels_7Networks_order",
}

SURFACE_NAMES = ("pial", "white", "inflated", "sphere")
"""fsaverage's surfaces that can place the vertices; the first is the one used unless another is asked for."""


def betas_folder(subject: int) -> str:
    """Return the folder of a subject's betas; ``subject`` counts from 1, as everywhere in NSD's file names."""
    return f"nsddata_betas/ppdata/subj{subject:02d}/fsaverage/betas_fithrf_GLMdenoise_RR"


def betas(subject: int, hemisphere: str, session: int) -> str:
    """Return the file of one session (from 1) of one hemisphere (``lh`` or ``rh``)."""
    return f"{betas_folder(subject)}/{hemisphere}.betas_session{session:02d}.mgh"


def ncsnr(subject: int, hemisphere: str) -> str:
    """Return the file of the noise-ceiling signal-to-noise ratio."""
    return f"{betas_folder(subject)}/{hemisphere}.ncsnr.mgh"


def synthetic_betas(subject: int, hemisphere: str) -> str:
    """Return the file of NSD-Synthetic's one session."""
    folder = f"nsddata_betas/ppdata/subj{subject:02d}/fsaverage/nsdsyntheticbetas_fithrf_GLMdenoise_RR"
    return f"{folder}/{hemisphere}.betas_nsdsynthetic.mgh"


def synthetic_colour_stimuli(subject: int) -> str:
    """Return NSD-Synthetic's coloured images, which differ between subjects."""
    return f"nsddata_stimuli/stimuli/nsdsynthetic/nsdsynthetic_colorstimuli_subj{subject:02d}.hdf5"


def mask(subject: int, hemisphere: str) -> str:
    """Return the file that marks the vertices used: 0 or 1 for each fsaverage vertex."""
    return f"{ALGONAUTS}/subj{subject:02d}/roi_masks/{hemisphere}.all-vertices_fsaverage_space.npy"


def general_labels(hemisphere: str) -> tuple[str, str]:
    """Return the labels whose union the mask is: NSD's ``nsdgeneral``, and RSC from the repository algonauts_2023."""
    return f"{LABELS}/{hemisphere}.nsdgeneral.mgz", f"{LABELS}/{hemisphere}.nsdgeneralRSC.mgz"


def algonauts_betas(subject: int, hemisphere: str) -> str:
    """Return the averaged betas of the Algonauts 2023 release: images x vertices in use."""
    return f"{ALGONAUTS}/subj{subject:02d}/training_split/training_fmri/{hemisphere}_training_fmri.npy"


def algonauts_images(subject: int, split: str) -> str:
    """Return the folder of the Algonauts images, ``split`` being ``training`` or ``test``."""
    return f"{ALGONAUTS}/subj{subject:02d}/{split}_split/{split}_images"


def surface(hemisphere: str, name: str = "pial") -> str:
    """Return the FreeSurfer geometry whose coordinates (mm) place the vertices; ``name`` as in ``SURFACE_NAMES``."""
    return f"{SURFACES}/{hemisphere}.{name}"


def annotation(hemisphere: str, atlas: str) -> str:
    """Return the FreeSurfer annotation of an atlas (the file's own name, see ``ATLASES``)."""
    return f"{LABELS}/{hemisphere}.{atlas}.annot"
