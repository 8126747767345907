"""Maps to try gpuroi on: nilearn's, under nilearn's names, and synthetic ones with known regions.

What is downloaded is kept: in the folder ``data_dir``, else in the one that the environment
variable ``GPUROI_DATA`` names, else in the user's cache.
"""

from pathlib import Path

from gpuroi.datasets._neurovault import (
    NeuroVaultDataset,
    fetch_neurovault_auditory_computation_task,
)
from gpuroi.datasets._synthetic import StatMap, make_stat_map
from gpuroi.errors import MissingExtraError

__all__ = [
    "NeuroVaultDataset",
    "StatMap",
    "fetch_neurovault_auditory_computation_task",
    "load_sample_motor_activation_image",
    "make_stat_map",
]


def load_sample_motor_activation_image() -> str:
    """Return the path of a real statistical map: motor task, one subject, 53 x 63 x 46, 3 mm.

    The file ships inside nilearn (NeuroVault image 10426); nothing is downloaded.

    Returns
    -------
    str
        The path of a ``.nii.gz`` file.

    Raises
    ------
    MissingExtraError
        If nilearn is not installed.

    Examples
    --------
    >>> from gpuroi import datasets, extract_regions
    >>> len(extract_regions(datasets.load_sample_motor_activation_image(), min_region_size=1500))
    6
    """
    try:
        from nilearn import datasets
    except ImportError as error:
        raise MissingExtraError(
            "the sample map is part of nilearn, which is not installed; "
            "pip install 'gpuroi[sample]'."
        ) from error
    return str(Path(datasets.load_sample_motor_activation_image()))
