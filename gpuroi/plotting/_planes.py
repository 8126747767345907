"""Planes through volumes, at a place in mm.

A plane has rows upwards and columns to the right, both in ascending mm, and the mm of its edges.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Direction = Literal["x", "y", "z"]
DIRECTIONS: tuple[Direction, ...] = ("x", "y", "z")

Extent = tuple[float, float, float, float]


@dataclass(frozen=True)
class Plane:
    """A picture, and the mm of its left, right, lower and upper edge."""

    pixels: NDArray[Any]
    extent: Extent

    def cropped(self, rows: slice, columns: slice) -> "Plane":
        """Return a part of the picture."""
        left, right, bottom, top = self.extent
        n_rows, n_columns = self.pixels.shape
        wide, high = (right - left) / n_columns, (top - bottom) / n_rows
        return Plane(
            self.pixels[rows, columns],
            (
                left + columns.start * wide,
                left + columns.stop * wide,
                bottom + rows.start * high,
                bottom + rows.stop * high,
            ),
        )

    def centers(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the mm of the columns and of the rows."""
        left, right, bottom, top = self.extent
        n_rows, n_columns = self.pixels.shape
        return (
            left + (np.arange(n_columns) + 0.5) * (right - left) / n_columns,
            bottom + (np.arange(n_rows) + 0.5) * (top - bottom) / n_rows,
        )


@dataclass(frozen=True)
class Volume:
    """A volume ``(X, Y, Z)`` in space; `is_labels` where values have no in-between."""

    data: NDArray[Any]
    affine: NDArray[np.float64]
    is_labels: bool = False

    @cached_property
    def axes(self) -> tuple[int, int, int] | None:
        """The voxel axis along x, y and z, or None if one lies askew."""
        directions = self.affine[:3, :3]
        largest = np.abs(directions).argmax(axis=1)
        along = directions[np.arange(3), largest]
        askew = np.abs(directions).sum() - np.abs(along).sum()
        if len(set(largest.tolist())) < 3 or askew > 1e-4 * np.abs(along).min():
            return None
        x, y, z = largest.tolist()
        return x, y, z

    @cached_property
    def bounds_mm(self) -> NDArray[np.float64]:
        """The mm ``(3, 2)`` of the field of view, from edge to edge of its voxels."""
        corners = [(-0.5, n - 0.5) for n in self.data.shape]
        places = self._mm(np.array(list(product(*corners))))
        return np.stack([places.min(axis=0), places.max(axis=0)], axis=1)

    def bounds_of_content_mm(self) -> NDArray[np.float64]:
        """Return the mm ``(3, 2)`` of what is not zero; of the field of view if all is."""
        boxes = ndimage.find_objects((self.data != 0).astype(np.uint8))
        if not boxes:
            return self.bounds_mm
        corners = [(span.start - 0.5, span.stop - 0.5) for span in boxes[0]]
        places = self._mm(np.array(list(product(*corners))))
        return np.stack([places.min(axis=0), places.max(axis=0)], axis=1)

    def plane(self, direction: Direction, at_mm: float) -> Plane:
        """Return the plane across `direction`; zeros outside the field of view."""
        normal = DIRECTIONS.index(direction)
        columns, rows = (axis for axis in range(3) if axis != normal)
        if self.axes is None:
            return self._askew(normal, columns, rows, at_mm)
        volume = self.data.transpose(self.axes)  # a view
        step = np.array([self.affine[axis, self.axes[axis]] for axis in range(3)])
        (left, right), (bottom, top) = self.bounds_mm[columns], self.bounds_mm[rows]
        extent = (float(left), float(right), float(bottom), float(top))
        place = int(np.rint((at_mm - self.affine[normal, 3]) / step[normal]))
        if not 0 <= place < volume.shape[normal]:
            shape = (volume.shape[rows], volume.shape[columns])
            return Plane(np.zeros(shape, volume.dtype), extent)
        pixels = np.moveaxis(volume, normal, 0)[place].T  # a view
        flip = tuple(slice(None, None, -1 if step[axis] < 0 else 1) for axis in (rows, columns))
        return Plane(pixels[flip], extent)

    def _askew(self, normal: int, columns: int, rows: int, at_mm: float) -> Plane:
        """Return the plane interpolated, on a grid twice as fine as the smallest voxel side."""
        fine = np.sqrt((self.affine[:3, :3] ** 2).sum(axis=0)).min() / 2
        (left, right), (bottom, top) = self.bounds_mm[columns], self.bounds_mm[rows]
        n_columns, n_rows = (
            max(1, int(np.ceil((end - start) / fine - 1e-6)))
            for start, end in ((left, right), (bottom, top))
        )
        extent = (
            float(left),
            float(left + n_columns * fine),
            float(bottom),
            float(bottom + n_rows * fine),
        )
        places = np.empty((3, n_rows, n_columns))
        places[normal] = at_mm
        places[columns] = left + (np.arange(n_columns) + 0.5) * fine
        places[rows] = (bottom + (np.arange(n_rows) + 0.5) * fine)[:, np.newaxis]
        to_voxels = np.linalg.inv(self.affine)
        voxels = np.tensordot(to_voxels[:3, :3], places, axes=1)
        voxels += to_voxels[:3, 3].reshape(3, 1, 1)
        order = 0 if self.is_labels else 1
        data = self.data if self.is_labels else self.data.astype(np.float32, copy=False)
        return Plane(ndimage.map_coordinates(data, voxels, order=order, prefilter=False), extent)

    def _mm(self, voxels: NDArray[np.float64]) -> NDArray[np.float64]:
        places: NDArray[np.float64] = voxels @ self.affine[:3, :3].T + self.affine[:3, 3]
        return places


def hull_mm(bounds: Iterable[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Return the mm ``(3, 2)`` of a box around several."""
    several = np.array(list(bounds))
    return np.stack([several[:, :, 0].min(axis=0), several[:, :, 1].max(axis=0)], axis=1)
