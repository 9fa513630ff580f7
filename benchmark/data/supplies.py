"""Where each part of the data comes from, under which agreement, and what to type. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmark.data import paths

BUCKET = "s3://natural-scenes-dataset"
_CBIG = "stable_projects/brain_parcellation/Schaefer2018_LocalGlobal/Parcellations/FreeSurfer5.3/fsaverage/label"


@dataclass(frozen=True)
class Supply:
    """Who gives a part of the data, and on what terms."""

    name: str
    where: str
    agreement: str


SUPPLIES = {
    "nsd": Supply(
        "Natural Scenes Dataset",
        f"{BUCKET} (AWS, free of charge)",
        "NSD Data Access Agreement: fill in the form at https://naturalscenesdataset.org",
    ),
    "algonauts": Supply(
        "Algonauts Project 2023 challenge data",
        "the drive that http://algonauts.csail.mit.edu/challenge.html leads to",
        "the challenge's form there, which accepts NSD's terms",
    ),
    "coco": Supply(
        "COCO unlabeled2017",
        "http://images.cocodataset.org/zips/unlabeled2017.zip",
        "COCO's terms of use (https://cocodataset.org/#termsofuse); the photographs are under Flickr's",
    ),
    "schaefer": Supply(
        "Schaefer 2018 parcellation on fsaverage",
        f"https://github.com/ThomasYeoLab/CBIG, {_CBIG}",
        "CBIG's licence (MIT)",
    ),
    "fsaverage": Supply(
        "FreeSurfer's fsaverage",
        f"$SUBJECTS_DIR/fsaverage/surf of any FreeSurfer installation; also {BUCKET}/{paths.SURFACES}",
        "FreeSurfer's licence (https://surfer.nmr.mgh.harvard.edu/registration.html)",
    ),
    "simulation": Supply("miniature NSD", "this program", "none: nothing in it was measured"),
}


def bucket(folder: str, *patterns: str) -> str:
    """Return the command that fetches files of a folder of NSD's bucket; what is there already is not fetched again.

    Like all commands here it is typed in the root of the data tree.
    """
    included = " ".join(f"--include '{pattern}'" for pattern in patterns)
    return f"aws s3 sync --no-sign-request {BUCKET}/{folder} {folder} --exclude '*' {included}"


def photographs() -> str:
    """Return the command that fetches and unpacks COCO's photographs."""
    address = SUPPLIES["coco"].where
    return f"mkdir -p coco && (cd coco && curl -C - -O {address} && unzip -q unlabeled2017.zip)"


def atlas(name: str) -> str:
    """Return the command that fetches the annotations of both hemispheres."""
    address = f"https://raw.githubusercontent.com/ThomasYeoLab/CBIG/master/{_CBIG}"
    return f"curl -L --create-dirs --output-dir {paths.LABELS} -O '{address}/{{lh,rh}}.{name}.annot'"


def subjects_pattern(subjects: Sequence[int]) -> str:
    """Return the pattern of some subjects' folders: ``subj0[1257]``."""
    return f"subj0[{''.join(map(str, subjects))}]"
