"""The rotation: its random stream to the bit, its matrix entry by entry, and what fp32 and bf16 make of it."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from orbitdit import ConfigError, Rotation, TensorError
from orbitdit.rotation import rotation as shared_rotation

PI = (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89)
BLOCKS = {1: 1, 2: 2, 3: 1, 63: 1, 137: 1, 199: 1, 256: 256, 960: 64, 1536: 512, 1920: 128, 3072: 1024, 3840: 256}
TABLES = [
    (1, 0, [0], [-1]),
    (3, 0, [0, 1, 2], [-1, 1, 1]),
    (6, 7, [2, 3, 1, 0, 5, 4], [1, -1, 1, 1, -1, 1]),
    (12, 2**64 - 1, [8, 5, 6, 0, 4, 7, 3, 2, 11, 10, 1, 9], [-1, -1, 1, -1, 1, -1, 1, 1, -1, -1, 1, 1]),
    (
        16,
        123,
        [2, 15, 8, 12, 3, 4, 7, 11, 9, 10, 6, 5, 0, 13, 1, 14],
        [1, -1, 1, 1, 1, 1, 1, 1, 1, -1, -1, 1, 1, 1, 1, -1],
    ),
]
HASHES = [
    (256, 0, "cfedf04fa0dd8902015a9c4c0ec30acc788d1274aad6b225e1929f6119941052"),
    (1536, 1, "565b3a467d65685c3d98157addb66d62a27d83167f66fa6e303123ed2b0d47eb"),
    (1920, 0, "47f532137755fca7765b70ef62b42d4be214f3dbc1840c138ad8f23feae1291f"),
    (3072, 0, "7a206e4f609763049fc8eefcc1b0f105ee3268b0665df93bc7ae4ed165ac6917"),
    (3840, 2**63 + 5, "139a03902a680148c5175971a1c0980a7c89f90c3e9aed1de1ab7817faf5ec17"),
]


def rows(count, dim, dtype=torch.float64):
    generator = torch.Generator().manual_seed(dim)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64).to(dtype)


def relative(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0,) * 2, "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"),
        ((oracle.MASK,) * 4, (oracle.MASK,) * 2, "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0"),
        (
            PI,
            (0x452821E638D01377, 0xBE5466CF34E90C6C),
            "a528f45403e61d95 38c72dbd566e9788 a5a1610e72fd18b5 57bd43b5e52b7fe6",
        ),
    ],
)
def test_philox_gives_the_published_answers_of_random123(counter, key, words):
    assert " ".join(f"{word:016x}" for word in oracle.philox_block(counter, key)) == words


@pytest.mark.parametrize("key", [(0, 1), (7, 6), (2**64 - 1, 3072)])
def test_numpys_stream_is_philox_from_block_one(key):
    words = np.random.Philox(key=np.array(key, dtype=np.uint64), counter=0).random_raw(10)
    assert words.tolist() == oracle.philox_words(key, 10)


@pytest.mark.parametrize(("dim", "seed", "permutation", "signs"), TABLES)
def test_golden_tables(dim, seed, permutation, signs):
    rotation = Rotation(dim, seed)
    assert rotation.permutation.dtype == torch.int64
    assert rotation.permutation.tolist() == permutation
    assert rotation.signs.dtype == torch.float32
    assert rotation.signs.tolist() == signs


@pytest.mark.parametrize(("dim", "seed", "digest"), HASHES)
def test_golden_hashes(dim, seed, digest):
    rotation = Rotation(dim, seed)
    tables = rotation.permutation.numpy().astype("<i8").tobytes() + rotation.signs.numpy().astype("i1").tobytes()
    assert hashlib.sha256(tables).hexdigest() == digest
    permutation, signs = oracle.permutation_and_signs(dim, seed)
    assert rotation.permutation.tolist() == permutation.tolist()
    assert rotation.signs.tolist() == signs.tolist()


def test_matrix_by_hand():
    """dim 6, seed 7: pairs (2, 3), (1, 0), (5, 4) with signs (+, -), (+, +), (-, +)."""
    expected = np.zeros((6, 6))
    expected[[0, 1], [2, 2]] = 1
    expected[[0, 1], [3, 3]] = -1, 1
    expected[[2, 3], [1, 1]] = 1
    expected[[2, 3], [0, 0]] = 1, -1
    expected[[4, 5], [5, 5]] = -1
    expected[[4, 5], [4, 4]] = 1, -1
    assert np.abs(Rotation(6, 7).matrix().numpy() * np.sqrt(2) - expected).max() < 1e-15


@pytest.mark.parametrize(("dim", "block"), BLOCKS.items())
def test_matrix_is_the_definition_and_orthogonal(dim, block):
    rotation = Rotation(dim, 5)
    matrix = rotation.matrix()
    assert rotation.block_size == block
    assert matrix.dtype == torch.float64
    np.testing.assert_allclose(matrix.numpy(), oracle.rotation_matrix(dim, 5), rtol=0, atol=1e-15)
    picked = torch.linspace(0, dim - 1, min(dim, 64)).long()
    identity = torch.eye(dim, dtype=torch.float64)[picked]
    torch.testing.assert_close(matrix[picked] @ matrix.T, identity, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", BLOCKS)
def test_apply_and_inverse_lose_no_more_than_torch_does(dim, dtype):
    """A dense matmul in the same dtype sets the scale; in fp64 it is the truth itself, up to 2e-15."""
    rotation, matrix = Rotation(dim, 5), torch.from_numpy(oracle.rotation_matrix(dim, 5))
    x = rows(4, dim, dtype)
    for apply, dense in ((rotation.apply, matrix.T), (rotation.inverse, matrix)):
        expected = x.double() @ dense
        got = apply(x)
        assert got.dtype == dtype
        assert relative(got, expected) <= 2 * relative(x @ dense.to(dtype), expected) + 2e-15


@pytest.mark.parametrize("dim", BLOCKS)
def test_inverse_undoes_apply(dim):
    rotation, x = Rotation(dim, 2**64 - 1), rows(3, dim)
    assert relative(rotation.inverse(rotation.apply(x)), x) < 2e-15
    assert relative(rotation.apply(rotation.inverse(x)), x) < 2e-15
    single = x.float()
    assert relative(rotation.inverse(rotation.apply(single)), single.double()) < 1e-6


def test_leading_dims_strides_and_empty_batches():
    rotation, matrix = Rotation(48, 3), torch.from_numpy(oracle.rotation_matrix(48, 3))
    x = rows(30, 48)
    expected = x @ matrix.T
    variants = {
        "one row": (x[7], expected[7]),
        "leading dims": (x.view(5, 3, 2, 48), expected.view(5, 3, 2, 48)),
        "transposed storage": (x.T.contiguous().T, expected),
        "every other row": (x[::2], expected[::2]),
        "columns of a wider tensor": (torch.cat([x, x], dim=1)[:, 48:], expected),
        "swapped leading dims": (x.view(5, 6, 48).transpose(0, 1), expected.view(5, 6, 48).transpose(0, 1)),
        "expanded": (x[:1].expand(4, 48), expected[:1].expand(4, 48)),
    }
    for name, (given_x, wanted) in variants.items():
        before = given_x.clone()
        torch.testing.assert_close(rotation.apply(given_x), wanted, rtol=1e-13, atol=1e-13, msg=name)
        torch.testing.assert_close(rotation.inverse(wanted), before, rtol=1e-13, atol=1e-13, msg=name)
        assert torch.equal(given_x, before), name
    for shape in ((0, 48), (3, 0, 48)):
        assert rotation.apply(torch.zeros(shape)).shape == shape
        assert rotation.inverse(torch.zeros(shape)).shape == shape


@settings(max_examples=60, deadline=None, derandomize=True)
@given(dim=st.integers(1, 300), seed=st.integers(0, 2**64 - 1), spread=st.integers(-6, 6))
def test_norms_and_inner_products_survive(dim, seed, spread):
    x, w = rows(2, dim) * 10.0**spread
    rotation = Rotation(dim, seed)
    rx, rw = rotation.apply(x), rotation.apply(w)
    scale = (x.norm() * w.norm()).item()
    assert rx.norm().item() == pytest.approx(x.norm().item(), rel=1e-13)
    assert torch.dot(rx, rw).item() == pytest.approx(torch.dot(x, w).item(), abs=1e-13 * scale)
    assert sorted(rotation.permutation.tolist()) == list(range(dim))
    assert set(rotation.signs.tolist()) <= {-1.0, 1.0}


def test_seed_and_dim_both_matter():
    assert Rotation(64, 0).permutation.tolist() != Rotation(64, 1).permutation.tolist()
    assert Rotation(64, 0).permutation.tolist() != [i for i in Rotation(65, 0).permutation.tolist() if i < 64]
    assert Rotation(64).signs.tolist() == Rotation(64, 0).signs.tolist() == shared_rotation(64).signs.tolist()


@pytest.mark.parametrize(("dim", "seed"), [(0, 0), (-8, 0), (8, -1), (8, 2**64)])
def test_arguments_out_of_range_are_refused(dim, seed):
    with pytest.raises(ConfigError, match=str(dim if dim < 1 else seed)):
        Rotation(dim, seed)


def test_a_seed_that_is_no_integer_is_refused():
    """Seed 1.5 must not quietly mean seed 1."""
    with pytest.raises((ConfigError, TypeError)):
        Rotation(8, 1.5)


@pytest.mark.parametrize("x", [torch.zeros(3, 7), torch.zeros(8, 9), torch.tensor(1.0), torch.zeros(2, 8).long()])
def test_tensors_of_other_widths_or_types_are_refused(x):
    rotation = Rotation(8)
    with pytest.raises(TensorError, match="width 8"):
        rotation.apply(x)
    with pytest.raises(TensorError, match="width 8"):
        rotation.inverse(x)
