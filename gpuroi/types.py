"""The words that signatures share."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

#: Which voxels may become foreground. Opposite signs never join one region.
Tail: TypeAlias = Literal["both", "positive", "negative"]
TAILS: tuple[Tail, ...] = ("both", "positive", "negative")

#: Neighbours of a voxel: faces (6), faces and edges (18), faces, edges and corners (26).
Connectivity: TypeAlias = Literal[6, 18, 26]
CONNECTIVITIES: tuple[Connectivity, ...] = (6, 18, 26)

#: An array of the backend's own namespace: NumPy on the CPU, CuPy on CUDA.
Array: TypeAlias = Any

#: The two dtypes that backends compute in; the doors convert everything else.
FloatArray: TypeAlias = NDArray[np.float32] | NDArray[np.float64]

#: What can be read as a map: a path or a nibabel image.
if TYPE_CHECKING:
    from nibabel.filebasedimages import FileBasedImage

    ImageLike: TypeAlias = str | os.PathLike[str] | FileBasedImage  # the type of `nibabel.load`
else:  # arrays do without nibabel
    ImageLike = str | os.PathLike | Any

#: How a result was made: JSON-serialisable values only.
Provenance: TypeAlias = Mapping[str, Any]
