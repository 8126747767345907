"""Pure functions of arrays: no paths, no affines, no millimetres."""
