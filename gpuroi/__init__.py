"""Statistical brain maps to regions, on a GPU or a CPU, with identical labels.

``extract_regions`` is the whole way from a map to labels and a table, ``extract_cohort`` that for
folders of maps, ``load_regions`` the way back from files, ``gpuroi.report`` a page to look through
them. ``gpuroi.image``, ``gpuroi.regions``, ``gpuroi.plotting`` and ``gpuroi.datasets`` have, under
their names, the functions of nilearn's modules that turn maps into regions; ``gpuroi.arrays`` works
on NumPy and CuPy arrays. Names load what they need when first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpuroi import (
        arrays,
        backends,
        cohort,
        datasets,
        errors,
        image,
        plotting,
        regions,
        report,
    )
    from gpuroi.backends import available_backends, get_backend
    from gpuroi.cohort import extract_cohort
    from gpuroi.extract import extract_regions
    from gpuroi.result import Regions
    from gpuroi.saved import load_regions

__version__ = "0.1.0"

_HOME = {
    "Regions": "gpuroi.result",
    "available_backends": "gpuroi.backends",
    "extract_cohort": "gpuroi.cohort",
    "extract_regions": "gpuroi.extract",
    "get_backend": "gpuroi.backends",
    "load_regions": "gpuroi.saved",
}
_SUBMODULES = (
    "arrays",
    "backends",
    "cohort",
    "datasets",
    "errors",
    "image",
    "plotting",
    "regions",
    "report",
)

__all__ = [
    "Regions",
    "__version__",
    "arrays",
    "available_backends",
    "backends",
    "cohort",
    "datasets",
    "errors",
    "extract_cohort",
    "extract_regions",
    "get_backend",
    "image",
    "load_regions",
    "plotting",
    "regions",
    "report",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"gpuroi.{name}")
    else:
        raise AttributeError(f"module 'gpuroi' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
