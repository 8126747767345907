"""Maps to try gpuroi on, under nilearn's names."""

from pathlib import Path

from gpuroi.errors import MissingExtraError

__all__ = ["load_sample_motor_activation_image"]


def load_sample_motor_activation_image() -> str:
    """Return the path of a real statistical map: motor task, one subject, 53 x 63 x 46, 3 mm.

    The file ships inside nilearn (NeuroVault image 10426); nothing is downloaded.

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
