"""Everything orbitdit raises on bad input.

    OrbitDiTError
    ├── ConfigError      unknown bits, keys or rules; a format newer than this version
    ├── TensorError      a tensor with the wrong dtype, shape or values
    ├── ModelError       nothing to quantize, or quantized already
    ├── CheckpointError  a missing, truncated, foreign or unsafe file; an output folder in use
    ├── PromptError      a prompt that the embedded model cannot take
    └── DependencyError  an optional package that is not installed

Messages are one line: what is wrong, with its name, and what to do.
"""


class OrbitDiTError(Exception):
    """Base of all errors raised by orbitdit."""


class ConfigError(OrbitDiTError, ValueError):
    """The configuration asks for something that does not exist."""


class TensorError(OrbitDiTError, ValueError):
    """A tensor has the wrong dtype, shape or values."""


class ModelError(OrbitDiTError, ValueError):
    """The model cannot be processed in its present state."""


class CheckpointError(OrbitDiTError, OSError):
    """A file or folder cannot be read or written as asked."""


class PromptError(OrbitDiTError, ValueError):
    """A prompt has words that the embedded model was not taught, or too many."""


class DependencyError(OrbitDiTError, ImportError):
    """An optional package is needed and not installed."""
