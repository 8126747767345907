"""One HTML page about an extraction, in one file that asks nothing of any network.

It holds, for each map, a picture, slices to click through and a table of regions to sort; for
several maps how many regions they have, of which volumes, and where these overlap; what failed; and
how it was made. The command line writes it.
"""

from gpuroi.report._report import MOST_EMBEDDED, Report

__all__ = ["MOST_EMBEDDED", "Report"]
