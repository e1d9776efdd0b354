"""The methods that the paper compares with, as fake quantization: what they lose, not what they take.

Each is written from its paper, with the settings that its authors found best, on any diffusers transformer. All of
them quantize the layers that `orbitdit.plan` names, and store modulation layers as orbitdit does, so that only the
method differs. None of this is part of the installed package.
"""

from baselines.apply import quantize_, stored_bits, stored_bytes
from baselines.calibration import Statistics, calibrate
from baselines.methods import METHODS

__all__ = ["METHODS", "Statistics", "calibrate", "quantize_", "stored_bits", "stored_bytes"]
