"""orbitdit: diffusion transformers with 2- to 4-bit weights and activations, without calibration.

    import orbitdit
    plan = orbitdit.quantize_(pipe.transformer, orbitdit.OrbitQuantConfig("w4a4"))

The method is OrbitQuant (arXiv 2607.02461). A tensor's way through the package: checkpoint, plan, rotate,
encode, pack, save and load, linear, pipeline, report.
"""

from orbitdit.codebooks.lloyd_max import Codebook, lloyd_max
from orbitdit.config import OrbitQuantConfig
from orbitdit.errors import (
    CheckpointError,
    ConfigError,
    DependencyError,
    ModelError,
    OrbitDiTError,
    PromptError,
    TensorError,
)
from orbitdit.explain import explain
from orbitdit.files import load_file, save_file
from orbitdit.integrations import register_on_import
from orbitdit.linear import Int4Linear, OrbitLinear
from orbitdit.model import dequantize_, plan, quantize_, set_grid_
from orbitdit.policy import LayerPlan, Plan
from orbitdit.rotation import Rotation
from orbitdit.verify import unverified

__version__ = "0.2.0"

__all__ = [
    "CheckpointError",
    "Codebook",
    "ConfigError",
    "DependencyError",
    "Int4Linear",
    "LayerPlan",
    "ModelError",
    "OrbitDiTError",
    "OrbitLinear",
    "OrbitQuantConfig",
    "Plan",
    "PromptError",
    "Rotation",
    "TensorError",
    "__version__",
    "dequantize_",
    "explain",
    "lloyd_max",
    "load_file",
    "plan",
    "quantize_",
    "save_file",
    "set_grid_",
    "unverified",
]

register_on_import()
