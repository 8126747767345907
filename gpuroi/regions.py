"""The nilearn door to regions: ``nilearn.regions`` by another import line."""

import math
import warnings
from collections.abc import Iterable

import nibabel as nib
import numpy as np

from gpuroi.algorithms.measure import RegionVoxels, gather
from gpuroi.arrays import check_choice
from gpuroi.backends import Backend, get_backend
from gpuroi.errors import UnsupportedMethodError
from gpuroi.image import load_images, voxels
from gpuroi.masks import load_mask
from gpuroi.stack import stack_image
from gpuroi.types import ImageLike

__all__ = ["connected_regions"]
