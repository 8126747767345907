"""The mistakes that gpuroi tells apart, one class each.

Every class also derives from the built-in exception that fits it, so that code written for
nilearn (``except ValueError``) keeps working.
"""


class GpuroiError(Exception):
    """Base of every error that gpuroi raises on purpose."""


class InvalidMapError(GpuroiError, ValueError):
    """A map, mask or file that cannot be read as a 3-D volume (or a series of them)."""


class DimensionError(InvalidMapError, TypeError):
    """An image with too few or too many axes; nilearn's error of that name is a TypeError."""


class UnknownBackendError(GpuroiError, ValueError):
    """A backend name that gpuroi has never heard of."""


class BackendUnavailableError(GpuroiError, RuntimeError):
    """A known backend that cannot run here; the message says why and what to install."""


class DeviceMemoryError(GpuroiError, MemoryError):
    """One single volume does not fit into the memory of the device."""


class MissingExtraError(GpuroiError, ImportError):
    """A feature whose optional packages are not installed."""
