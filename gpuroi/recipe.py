"""The parameters of an extraction, checked at the door and the same for every map."""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from inspect import signature
from pathlib import Path
from typing import Any, Literal

from nibabel.spatialimages import SpatialImage

from gpuroi import io
from gpuroi.algorithms.local_regions import SEED_DISTANCE_VOXELS
from gpuroi.algorithms.threshold import Threshold, parse_threshold
from gpuroi.checks import at_least_one, at_least_zero, check_choice, shown
from gpuroi.masks import check_mask, load_image
from gpuroi.types import CONNECTIVITIES, TAILS, Connectivity, ImageLike, Tail

Method = Literal["connected_components", "local_regions"]
METHODS: tuple[Method, ...] = ("connected_components", "local_regions")


@dataclass(frozen=True)
class Recipe:
    """The checked parameters of `extract_regions`; see there."""

    threshold: Threshold
    tail: Tail = "both"
    population: Literal["all", "nonzero"] | ImageLike = "all"
    mask_img: ImageLike | None = None
    method: Method = "connected_components"
    connectivity: Connectivity = 6
    min_region_size_mm3: float = 0.0
    smoothing_fwhm_mm: float = 6.0
    seed_distance_voxels: int = SEED_DISTANCE_VOXELS
    resample_mask: bool = False

    def mask_files(self) -> list[str]:
        """Return the whole paths of the masks that are files."""
        masks = [one for one in (self.mask_img, self.population) if isinstance(one, SpatialImage)]
        return [path for path in map(_where, masks) if Path(path).is_absolute()]

    def describe(self) -> dict[str, Any]:
        """Return the parameters by their names, JSON-serialisable: images by the paths they have.

        ``extract_regions(img, **described)`` asks for the same, if the masks were files.
        """
        is_percentile = self.threshold.is_percentile
        asked: dict[str, Any] = {
            "threshold": str(self.threshold) if is_percentile else self.threshold.value,
            "tail": self.tail,
            "population": self.population
            if isinstance(self.population, str)
            else _where(self.population),
            "mask_img": None if self.mask_img is None else _where(self.mask_img),
            "method": self.method,
            "connectivity": self.connectivity,
            "min_region_size": self.min_region_size_mm3,
        }
        if self.resample_mask:
            asked["resample_mask"] = True
        if self.method == "local_regions":
            asked |= {
                "smoothing_fwhm": self.smoothing_fwhm_mm,
                "seed_distance": self.seed_distance_voxels,
            }
        return asked


def _where(mask: ImageLike) -> str:
    """Return the whole path of a mask; what describes it, of one in memory."""
    name = io.describe(mask)
    return str(Path(name).expanduser().absolute()) if Path(name).expanduser().is_file() else name


def make_recipe(
    threshold: float | str = "97%",
    *,
    tail: str = "both",
    population: str | ImageLike = "all",
    mask_img: ImageLike | None = None,
    method: str = "connected_components",
    connectivity: int = 6,
    min_region_size: float = 0.0,
    smoothing_fwhm: float = 6.0,
    seed_distance: int = SEED_DISTANCE_VOXELS,
    resample_mask: bool = False,
) -> Recipe:
    """Return the parameters of `extract_regions`, checked; see there."""
    if method == "local_regions" and connectivity != 6:
        raise ValueError(
            f"connectivity={connectivity!r} has no meaning for method='local_regions': its random "
            "walker steps across faces; leave connectivity at 6."
        )
    return Recipe(
        threshold=_magnitude_threshold(threshold),
        tail=check_choice("tail", tail, TAILS),
        population=_population(population),
        mask_img=None if mask_img is None else _mask("mask_img", mask_img),
        method=check_choice("method", method, METHODS),
        connectivity=check_choice("connectivity", connectivity, CONNECTIVITIES),
        min_region_size_mm3=at_least_zero("min_region_size", min_region_size, "mm^3"),
        smoothing_fwhm_mm=at_least_zero("smoothing_fwhm", smoothing_fwhm, "mm"),
        seed_distance_voxels=at_least_one("seed_distance", seed_distance, "voxels"),
        resample_mask=check_choice("resample_mask", resample_mask, (True, False)),
    )


def recipe_of(parameters: Mapping[str, Any]) -> Recipe:
    """Return `make_recipe` of parameters by their names.

    Raises
    ------
    TypeError
        Also if there is no parameter of such a name.
    """
    if not isinstance(parameters, Mapping):
        raise TypeError(
            f"recipe={shown(parameters)} is a {type(parameters).__name__}; pass a mapping such as "
            "{'threshold': '97%'}."
        )
    known = list(signature(make_recipe).parameters)
    for name in parameters:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}."
            raise TypeError(f"there is no parameter {name!r}; {hint}")
    return make_recipe(**parameters)


def _magnitude_threshold(threshold: float | str) -> Threshold:
    parsed = parse_threshold(threshold)
    if parsed.value < 0:
        raise ValueError(
            f"threshold={threshold!r} is below zero; a threshold is a magnitude. For values below "
            f"zero pass threshold={-parsed.value:g} with tail='negative'."
        )
    return parsed


def _population(population: Any) -> Any:
    if isinstance(population, str) and population in ("all", "nonzero"):
        return population
    if isinstance(population, str) and not Path(population).expanduser().exists():
        raise ValueError(
            f"population={population!r} is neither 'all' nor 'nonzero', nor an existing file."
        )
    return _mask("population", population, "a path, an image, 'all' or 'nonzero'")


def _mask(parameter: str, mask: Any, accepted: str = "a path or an image") -> SpatialImage:
    """Return a mask as an image, so that a file is read and checked once for all maps."""
    image = load_image(mask, parameter, accepted)
    check_mask(image, parameter)
    return image
