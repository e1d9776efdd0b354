"""How far pictures are from a reference."""

import numpy as np
import torch
from torch.nn.functional import conv2d

IDENTICAL_DB = 100.0
WINDOW, SIGMA = 11, 1.5
"""Width in pixels and standard deviation of the Gaussian window of SSIM."""


def psnr(pictures: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of uint8 `pictures` (N, ...) to `reference`, the mean over the N pictures.

    Identical pictures count as IDENTICAL_DB. Raises ValueError for other shapes or dtypes.
    """
    _check(pictures, reference)
    error = np.square(pictures.astype(np.float64) - reference).reshape(len(pictures), -1).mean(1)
    with np.errstate(divide="ignore"):
        return float(np.minimum(10 * np.log10(255**2 / error), IDENTICAL_DB).mean())


def ssim(pictures: np.ndarray, reference: np.ndarray, device: str = "cpu") -> float:
    """Structural similarity of uint8 `pictures` (N, H, W, C) to `reference`: the mean over pictures, channels, places.

    Wang et al., "Image quality assessment" (2004), equation 13, with its Gaussian window of 11 x 11 pixels, only where
    it lies inside the picture; K1 = 0.01, K2 = 0.03. Raises ValueError for other shapes or dtypes, and for pictures
    smaller than the window.
    """
    _check(pictures, reference)
    if pictures.ndim != 4 or min(pictures.shape[1:3]) < WINDOW:
        raise ValueError(f"pictures of at least {WINDOW} x {WINDOW} pixels are needed; got {pictures.shape}")
    place = torch.arange(WINDOW, dtype=torch.float64, device=device) - WINDOW // 2
    weights = torch.exp(-(place**2) / (2 * SIGMA**2))
    weights = weights / weights.sum()

    def blur(x: torch.Tensor) -> torch.Tensor:
        return conv2d(conv2d(x, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))

    total = 0.0
    for start in range(0, len(pictures), 100):
        pair = (torch.from_numpy(p[start : start + 100]).to(device) for p in (pictures, reference))
        x, y = (p.double().permute(0, 3, 1, 2).flatten(0, 1)[:, None] for p in pair)
        mean_x, mean_y = blur(x), blur(y)
        variances = blur(x * x) - mean_x**2 + blur(y * y) - mean_y**2
        covariance = blur(x * y) - mean_x * mean_y
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        same = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
        total += float((same / ((mean_x**2 + mean_y**2 + c1) * (variances + c2))).mean((1, 2, 3)).sum())
    return float(total / (len(pictures) * pictures.shape[3]))


def _check(pictures: np.ndarray, reference: np.ndarray) -> None:
    if pictures.shape != reference.shape or pictures.dtype != np.uint8 or reference.dtype != np.uint8:
        raise ValueError(
            f"pictures must be two uint8 arrays of one shape; got {pictures.dtype} {pictures.shape} and "
            f"{reference.dtype} {reference.shape}"
        )
