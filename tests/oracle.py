"""The method computed a second way, in plain numpy and fp64: dense matrices, exhaustive search, quadrature.

Written from the definitions alone; shares no code with the package and must never import it.
"""

import functools

import numpy as np
from scipy import optimize

MASK = (1 << 64) - 1
NODES, WEIGHTS = np.polynomial.legendre.leggauss(64)


def philox_block(counter, key):
    """Philox4x64-10 of Salmon et al. (SC 2011): four 64-bit words from a counter (4 words) and a key (2 words)."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        left, right = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
        a, b, c, d = (right >> 64) ^ b ^ k, right & MASK, (left >> 64) ^ d ^ m, left & MASK
        k, m = (k + 0x9E3779B97F4A7C15) & MASK, (m + 0xBB67AE8584CAA73B) & MASK
    return a, b, c, d


def philox_words(key, count):
    """The first `count` words of NumPy's stream, which steps the counter before each block: blocks 1, 2, ..."""
    blocks = (philox_block((n, 0, 0, 0), key) for n in range(1, (count + 3) // 4 + 1))
    return [word for block in blocks for word in block][:count]


@functools.lru_cache(maxsize=32)
def permutation_and_signs(dim, seed):
    words = philox_words((seed, dim), 2 * dim)
    permutation = np.array(sorted(range(dim), key=words.__getitem__))
    signs = np.array([-1.0 if word >> 63 else 1.0 for word in words[dim:]])
    return permutation, signs


def block_size(dim):
    h = 1
    while dim % (2 * h) == 0:
        h *= 2
    return h


def hadamard(size):
    """Sylvester's matrix of +-1: entry (i, j) is -1 to the number of ones in i & j."""
    index = np.arange(size)
    common = index[:, None] & index[None, :]
    for shift in (16, 8, 4, 2, 1):
        common ^= common >> shift
    return 1.0 - 2.0 * (common & 1)


@functools.lru_cache(maxsize=6)
def rotation_matrix(dim, seed):
    """R: row k*h + i holds h^-1/2 H[i, j] s[k*h + j] in column p[k*h + j]."""
    h = block_size(dim)
    permutation, signs = permutation_and_signs(dim, seed)
    matrix = np.zeros((dim, dim))
    for start in range(0, dim, h):
        block = slice(start, start + h)
        matrix[block, permutation[block]] = hadamard(h) * signs[block] / np.sqrt(h)
    return matrix


def _end(dim):
    """The angle where the density is cut: the pole, or 14 standard deviations."""
    return min(np.pi / 2, 14 / np.sqrt(dim))


def cell_moments(dim, boundaries, powers):
    """Integrals of z^k over each cell, up to a common factor. `boundaries` excludes the two outer ends.

    With z = sin(angle) the density (1 - z^2)^((d-3)/2) dz turns into cos(angle)^(d-2), without poles at +-1;
    cos is taken as 1 - 2 sin^2(angle/2), whose logarithm keeps its digits where dim is large.
    """
    edges = np.concatenate([[-_end(dim)], np.arcsin(np.clip(boundaries, -1, 1)), [_end(dim)]])
    half = np.diff(edges)[:, None] / 2
    angle = (edges[:-1, None] + edges[1:, None]) / 2 + half * NODES
    mass = half * WEIGHTS * np.exp((dim - 2) * np.log1p(-2 * np.sin(angle / 2) ** 2))
    return [(mass * np.sin(angle) ** k).sum(-1) for k in powers]


def cell_means(dim, boundaries):
    mass, first = cell_moments(dim, boundaries, (0, 1))
    return first / mass


def midpoints(centroids):
    return (centroids[1:] + centroids[:-1]) / 2


def lloyd(dim, bits, steps):
    """Lloyd's plain iteration from equal steps over +-3 standard deviations."""
    centroids = np.linspace(-3, 3, 2**bits) / np.sqrt(dim + 9)
    for _ in range(steps):
        centroids = cell_means(dim, midpoints(centroids))
    return centroids


@functools.lru_cache(maxsize=128)
def codebook(dim, bits):
    """Lloyd-Max centroids for dim >= 2: Lloyd's iteration, then MINPACK on the same fixed point, no derivatives."""
    start = lloyd(dim, bits, 300)
    found = optimize.root(lambda c: c - cell_means(dim, midpoints(c)), start, method="hybr", options={"xtol": 1e-13})
    centroids = (found.x - found.x[::-1]) / 2
    if np.abs(centroids - cell_means(dim, midpoints(centroids))).max() > 1e-12 * centroids[-1]:
        raise RuntimeError(f"the oracle found no codebook for dim {dim}, bits {bits}")
    return centroids


def mean_squared_error(dim, centroids, boundaries):
    """E (z - c(z))^2 for the density, in units of its variance 1/dim."""
    mass, first, second = cell_moments(dim, boundaries, (0, 1, 2))
    return dim * (second - 2 * centroids * first + centroids**2 * mass).sum() / mass.sum()


def nearest(values, centroids):
    """Codes by trying every centroid; exact as long as values are not below the rounding of the centroids."""
    return np.abs(values[..., None] - centroids).argmin(-1).astype(np.uint8)


def to_bf16(values):
    """Round to 8 significant bits, ties to even (normal range only)."""
    mantissa, exponent = np.frexp(np.asarray(values, dtype=np.float64))
    return np.ldexp(np.rint(mantissa * 256), exponent - 8)


def unpack(packed, bits, dim):
    """Read each bit of each code by itself: bit k of a row is bit k % 8 of its byte k // 8, low bits first."""
    codes = np.zeros((len(packed), dim), dtype=np.uint8)
    for r, row in enumerate(packed):
        for j in range(dim):
            for bit in range(bits):
                k = j * bits + bit
                codes[r, j] |= ((int(row[k // 8]) >> (k % 8)) & 1) << bit
    return codes


def encode_weight(weight, bits, seed):
    """Codes and norms (not rounded) of the rotated rows; a row of zeros has norm zero."""
    rotated = weight @ rotation_matrix(weight.shape[1], seed).T
    norms = np.sqrt((rotated**2).sum(-1))
    unit = rotated / np.where(norms == 0, 1, norms)[:, None]
    return nearest(unit, codebook(weight.shape[1], bits)), norms


def normalized_tokens(x, seed):
    """R x / (t + 1e-10) and t = ||x||, of shape (..., 1)."""
    norms = np.sqrt((x**2).sum(-1, keepdims=True))
    return x / (norms + 1e-10) @ rotation_matrix(x.shape[-1], seed).T, norms


def rotated_weight(weight, bits, seed):
    """The rows n_i c_W(i), still rotated."""
    codes, norms = encode_weight(weight, bits, seed)
    return codebook(weight.shape[1], bits)[codes] * to_bf16(norms)[:, None]


def rotated_tokens(x, bits, seed, codes=None):
    """The tokens t c_A, still rotated; 16 bits mean R x itself. `codes` overrides the search."""
    if bits == 16:
        return x @ rotation_matrix(x.shape[-1], seed).T
    unit, norms = normalized_tokens(x, seed)
    centroids = codebook(x.shape[-1], bits)
    return centroids[nearest(unit, centroids) if codes is None else codes] * norms


def layer(weight, bias, x, weight_bits, activation_bits, seed, token_codes=None):
    """y_i = n_i t <c_W(i), c_A> + bias_i."""
    tokens = rotated_tokens(x, activation_bits, seed, token_codes)
    return tokens @ rotated_weight(weight, weight_bits, seed).T + bias


def int4(weight):
    """Codes -7..7 and bf16 scales, column group by column group, one value at a time."""
    rows, dim = weight.shape
    codes = np.zeros((rows, dim), dtype=np.int64)
    scales = np.zeros((rows, -(-dim // 64)))
    for r in range(rows):
        for g in range(scales.shape[1]):
            group = weight[r, 64 * g : 64 * g + 64]
            scales[r, g] = scale = to_bf16(max(abs(group)) / 7)
            for j, value in enumerate(group):
                codes[r, 64 * g + j] = min(7, max(-7, round(float(value / scale)))) if scale else 0
    return codes, scales


def int4_weight(codes, scales):
    return np.stack([codes[:, j] * scales[:, j // 64] for j in range(codes.shape[1])], axis=1)
