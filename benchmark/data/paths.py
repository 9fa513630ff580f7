"""Where things lie in a data tree: the folders of NSD's public bucket, under one root.

Two folders come from elsewhere and stand beside NSD's own: ``algonauts_2023`` (vertex masks, from the Algonauts 2023
release) and ``coco`` (COCO's unlabeled2017 photographs, for the images without fMRI). ``simulation`` exists in a
miniature tree only.
"""

from __future__ import annotations

HEMISPHERES = ("lh", "rh")

STIMULI = "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5"
DESIGN = "nsddata/experiments/nsd/nsd_expdesign.mat"
STIM_INFO = "nsddata/experiments/nsd/nsd_stim_info_merged.csv"
SURFACES = "nsddata/freesurfer/fsaverage/surf"
LABELS = "nsddata/freesurfer/fsaverage/label"
EXTERNAL = "coco/unlabeled2017"
SETTINGS = "simulation/settings.json"

ATLASES = {
    "schaefer-400": "Schaefer2018_400Parcels_7Networks_order",
    "schaefer-1000": "Schaefer2018_1000Parcels_7Networks_order",
}


def betas_folder(subject: int) -> str:
    """Return the folder of a subject's betas; ``subject`` counts from 1, as everywhere in NSD's file names."""
    return f"nsddata_betas/ppdata/subj{subject:02d}/fsaverage/betas_fithrf_GLMdenoise_RR"


def betas(subject: int, hemisphere: str, session: int) -> str:
    """Return the file of one session (from 1) of one hemisphere (``lh`` or ``rh``)."""
    return f"{betas_folder(subject)}/{hemisphere}.betas_session{session:02d}.mgh"


def ncsnr(subject: int, hemisphere: str) -> str:
    """Return the file of the noise-ceiling signal-to-noise ratio."""
    return f"{betas_folder(subject)}/{hemisphere}.ncsnr.mgh"


def mask(subject: int, hemisphere: str) -> str:
    """Return the file that marks the vertices used: 0 or 1 for each fsaverage vertex."""
    return f"algonauts_2023/subj{subject:02d}/roi_masks/{hemisphere}.all-vertices_fsaverage_space.npy"


def surface(hemisphere: str) -> str:
    """Return the FreeSurfer geometry whose coordinates (mm) place the vertices."""
    return f"{SURFACES}/{hemisphere}.pial"


def annotation(hemisphere: str, atlas: str) -> str:
    """Return the FreeSurfer annotation of an atlas (the file's own name, see ``ATLASES``)."""
    return f"{LABELS}/{hemisphere}.{atlas}.annot"
