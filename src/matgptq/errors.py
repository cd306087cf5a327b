"""Errors a user can act on. Each message names the thing at fault and what to do about it."""


class MatGPTQError(Exception):
    """Base of all errors that matgptq raises on purpose; the command line prints them without a traceback."""


class ConfigurationError(MatGPTQError, ValueError):
    """An option is out of range, or two options contradict each other."""


class UnsupportedModelError(MatGPTQError, ValueError):
    """The model cannot be quantized: unknown architecture, odd shape, or already quantized."""


class SourceError(MatGPTQError, ValueError):
    """The model's files are missing, truncated or hold unusable values."""


class CalibrationError(MatGPTQError, ValueError):
    """The calibration or evaluation text cannot be read, or is too short."""


class CheckpointError(MatGPTQError, ValueError):
    """A matgptq checkpoint is damaged, of another format version, or cannot be written."""


class ExportError(MatGPTQError, ValueError):
    """A slice that a format, or the engines that read it, cannot hold."""


class AllocationError(MatGPTQError, ValueError):
    """A width, or an allocation of widths to layers, that the checkpoint cannot serve."""


class UploadError(MatGPTQError, OSError):
    """The Hugging Face Hub refuses an upload, or cannot be reached."""
