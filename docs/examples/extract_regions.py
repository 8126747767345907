"""Regions of a t-map: threshold it, pull the regions apart, look at them.

The map is of mental subtraction after spoken instructions (NeuroVault image 32980; fetching it
takes the extra ``datasets``; without it, or offline, it is the sample that nilearn brings). It is
thresholded twice, by percentile and by value, and the regions of both are found by the random
walker. In a script written for nilearn the import lines are all that changes.

    python extract_regions.py [FOLDER FOR THE PICTURES]
"""

import sys
from pathlib import Path

from gpuroi import datasets, plotting
from gpuroi.errors import DownloadError, MissingExtraError
from gpuroi.image import threshold_img
from gpuroi.regions import connected_regions

folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
folder.mkdir(parents=True, exist_ok=True)

# The map; offline, one that nilearn brings.
try:
    tmap_filename = datasets.fetch_neurovault_auditory_computation_task().images[0]
except (DownloadError, MissingExtraError) as error:
    print(f"{error}\nGoing on with the sample that nilearn brings.", file=sys.stderr)
    tmap_filename = datasets.load_sample_motor_activation_image()

# The highest 3% of all magnitudes, zeros outside the brain included.
threshold_percentile_img = threshold_img(tmap_filename, threshold="97%", copy=False)
plotting.plot_stat_map(
    threshold_percentile_img,
    display_mode="z",
    cut_coords=5,
    title="Threshold image with string percentile",
    colorbar=False,
    output_file=folder / "threshold_percentile.png",
)

# Magnitudes from 3 on, in the units of the map.
threshold_value_img = threshold_img(tmap_filename, threshold=3.0, copy=False)
plotting.plot_stat_map(
    threshold_value_img,
    display_mode="z",
    cut_coords=5,
    title="Threshold image with intensity value",
    colorbar=False,
    output_file=folder / "threshold_value.png",
)

# Regions of more than 1500 mm^3, each a volume of a 4-D image.
regions_percentile_img, index = connected_regions(threshold_percentile_img, min_region_size=1500)
regions_value_img, index = connected_regions(threshold_value_img, min_region_size=1500)

for name, regions_img in (
    ("percentile", regions_percentile_img),
    ("value", regions_value_img),
):
    plotting.plot_prob_atlas(
        regions_img,
        bg_img=tmap_filename,
        display_mode="z",
        cut_coords=5,
        view_type="contours",
        title=f"{regions_img.shape[3]} regions, threshold by {name}",
        output_file=folder / f"regions_{name}.png",
    )

plotting.show()
