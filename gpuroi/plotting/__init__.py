"""Figures of maps and regions, in nilearn's names.

Slices through space in mm: left is left unless `radiological`, oblique images are interpolated, and
whatever has no template behind it gets the outline of its own head. Every function returns a
`Display`, or writes `output_file` and returns None.
"""

from gpuroi.plotting._display import Cut, Display
from gpuroi.plotting._figures import plot_prob_atlas, plot_regions, plot_stat_map, show

__all__ = ["Cut", "Display", "plot_prob_atlas", "plot_regions", "plot_stat_map", "show"]
