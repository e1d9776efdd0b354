"""How far pictures are from a reference."""

import numpy as np

IDENTICAL_DB = 100.0


def psnr(pictures: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of uint8 `pictures` (N, ...) to `reference`, the mean over the N pictures.

    Identical pictures count as IDENTICAL_DB. Raises ValueError for other shapes or dtypes.
    """
    if pictures.shape != reference.shape or pictures.dtype != np.uint8 or reference.dtype != np.uint8:
        raise ValueError(
            f"pictures must be two uint8 arrays of one shape; got {pictures.dtype} {pictures.shape} and "
            f"{reference.dtype} {reference.shape}"
        )
    error = np.square(pictures.astype(np.float64) - reference).reshape(len(pictures), -1).mean(1)
    with np.errstate(divide="ignore"):
        return float(np.minimum(10 * np.log10(255**2 / error), IDENTICAL_DB).mean())
