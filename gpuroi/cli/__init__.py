"""The command line: what is typed, and what is shown; the science is elsewhere.

Exit codes: 0 all maps done, 1 some failed or the run had to stop, 2 the command cannot be carried
out, 130 interrupted.
"""

from gpuroi.cli._commands import app, main

__all__ = ["app", "main"]
