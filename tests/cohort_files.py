"""Maps on disk, and what a run has made of them."""

import hashlib
import json

import nibabel as nib

from tests.conftest import image

RECIPE = {"threshold": "90%", "min_region_size": 20}


def save_maps(folder, names, blobs, shape=(12, 13, 14)):
    paths = []
    for seed, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(image(blobs(shape, seed=seed)), path)
        paths.append(path)
    return paths


def contents(folder):
    """Return a digest of every file of the output, but for the ledger."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".gpuroi" not in path.parts
    }


def ledger_of(folder):
    lines = (folder / ".gpuroi" / "ledger.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
