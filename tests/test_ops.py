"""The custom ops: what torch is told of them, layers under `torch.compile`, and devices without kernels."""

import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from encoding_checks import same
from orbitdit import Int4Linear, OrbitLinear, kernels, trellis
from orbitdit.kernels import E4M3, EXACT, INT8, cpu, ops, reference
from orbitdit.kernels.layer import project_e4m3
from orbitdit.packing import pack
from parameters import BACKENDS

BF16 = torch.bfloat16


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plain_linear(dim=64, rows=48, bias=True, dtype=BF16):
    torch.manual_seed(0)
    return torch.nn.Linear(dim, rows, bias=bias).to(dtype)


def orbit(grid, bits=(4, 4), **sizes):
    layer = OrbitLinear.from_linear(plain_linear(**sizes), *bits, seed=2**63 + 5)
    layer.set_grid(grid, False)
    return layer.eval()


def packed(rows, dim, bits):
    codes = torch.randint(1 << bits, (rows, dim), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    return pack(codes, bits), random(rows).exp().bfloat16()


def buffers(tokens, means, dim, rows):
    """What `encode_decode` fills."""
    counts = (tokens, means, rows) if means else (tokens, rows)
    filled = [t for n in counts for t in (torch.zeros(n, dim, dtype=torch.int8), torch.zeros(n))]
    return filled if means else [*filled[:2], None, None, *filled[2:]]


def cases():
    x = random(5, 64, dtype=BF16)
    (codes, scales), (decoded, row_scales) = packed(32, 64, 3), reference.decode(*packed(48, 64, 4), 4, 64, "int8")
    bias = random(48, seed=1).bfloat16()
    return {
        "rotate_encode": (x, 4, -1, INT8),
        "decode": (*packed(48, 64, 3), 3, 64, INT8),
        "decode of a trellis": (*packed(48, 64, 3), 3, 64, INT8, 12),
        "project": (
            x.view(1, 5, 64),
            [codes, decoded],
            [scales, row_scales],
            [None, bias],
            [3, 4],
            [8, 0],
            4,
            -1,
            INT8,
            "",
            [],
        ),
        "encode_decode": (
            x[:, 16:],
            [codes, codes],
            [scales, scales],
            [None, None],
            3,
            0,
            4,
            -1,
            INT8,
            "gelu",
            [x[:, :16]],
            0,
            1.0,
            *buffers(5, 0, 64, 64),
            None,
        ),
        "encode_decode of centred tokens": (
            x.view(1, 5, 64),
            [codes],
            [scales],
            [None],
            3,
            0,
            4,
            -1,
            INT8,
            "",
            [],
            2,
            0.9,
            *buffers(5, 3, 64, 32),
            None,
        ),
        "project of centred tokens": (
            x.view(1, 5, 64),
            [codes],
            [scales],
            [None],
            [3],
            [0],
            4,
            -1,
            INT8,
            "",
            [],
            2,
            0.9,
        ),
        "exact_linear": (x, *packed(48, 64, 6), bias, 6, 4, -3),
        "exact_linear of a trellis": (x, *packed(48, 64, 2), bias, 2, 4, -3, 10),
        "viterbi": (random(3, 20), trellis.table(2, 8).float(), 2),
        "int4_linear": (x, packed(48, 64, 4)[0], random(48, 1).bfloat16(), bias),
    }


def op_named(name):
    return getattr(ops, name.partition(" ")[0])


@pytest.mark.parametrize("name", cases())
def test_the_registration_of_each_op(name):
    assert set(torch.library.opcheck(op_named(name).default, cases()[name]).values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", sorted(name for name in cases() if "encode_decode" not in name))  # it returns nothing
def test_shapes_and_dtypes_are_known_without_values(name):
    arguments = cases()[name]
    results = op_named(name)(*arguments)
    on_meta = op_named(name)(*torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), arguments))
    for expected, found in zip(*map(torch.utils._pytree.tree_leaves, (results, on_meta)), strict=True):
        assert (found.shape, found.dtype, found.stride()) == (expected.shape, expected.dtype, expected.stride())


@pytest.mark.parametrize("grid", ["e4m3", "int8"])
def test_ops_are_the_definition(grid):
    x, (codes, scales), bias = random(9, 64, dtype=BF16), packed(48, 64, 3), random(48, seed=1).bfloat16()
    number = kernels.GRIDS[grid]
    values, token_scales = ops.rotate_encode(x, 4, kernels.signed(2**64 - 1), number)
    expected = reference.rotate_encode(x, 4, 2**64 - 1, grid)
    if grid == "e4m3":
        assert same(values, expected[0])
    torch.testing.assert_close(token_scales, expected[1], rtol=1e-6, atol=0)
    weight = ops.decode(codes, scales, 3, 64, number)
    assert all(map(same, weight, reference.decode(codes, scales, 3, 64, grid)))
    product = reference.matmul(values, token_scales, *weight, bias, torch.float32)
    packed_and_decoded = ops.project(
        x.view(3, 3, 64), [codes, weight[0]], [scales, weight[1]], [bias, bias], [3, 3], [0, 0], 4, -1, number, "", []
    )
    assert packed_and_decoded.shape == (3, 3, 96)
    for y in packed_and_decoded.view(9, 96).split(48, dim=1):
        torch.testing.assert_close(y.float(), product, rtol=2**-8, atol=1e-5)


LAYERS = {
    "int8": lambda: orbit(INT8),
    "e4m3": lambda: orbit(E4M3, (2, 3)),
    "exact": lambda: orbit(EXACT, (3, 6)),
    "A16": lambda: orbit(None, (2, 16)),
    "INT4": lambda: Int4Linear.from_linear(plain_linear()).eval(),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own use of torch.jit
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_compiled_layers_give_the_same_for_any_number_of_tokens(name, backend):
    layer = LAYERS[name]()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for shape in ((5,), (7,), (63,), (137,), (2,), (199,)):
        x = random(*shape, 64, dtype=BF16)
        assert torch.equal(compiled(x), layer(x))
    assert counter.frame_count <= 2
    x = random(2, 11, 64, dtype=BF16)
    assert torch.equal(compiled(x), layer(x))
    assert counter.frame_count <= 3


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_no_tokens(name):
    layer = LAYERS[name]()
    torch._dynamo.reset()
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        for shape in ((0, 64), (2, 0, 64)):
            y = function(torch.empty(shape, dtype=BF16))
            assert (y.shape, y.dtype) == ((*shape[:-1], 48), BF16)


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_exported_layers_give_the_same(name):
    layer, x = LAYERS[name](), random(6, 64, dtype=BF16)
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: tokens},)).module()
    for given in (x, random(33, 64, dtype=BF16)):
        assert torch.equal(exported(given), layer(given))


@pytest.mark.parametrize("grid", [INT8, E4M3, EXACT])
def test_a_gradient_flows_whatever_the_grid(grid):
    layer, x = orbit(grid, (4, 16)), random(3, 64, dtype=BF16).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    assert x.grad.norm() > 0


@pytest.fixture
def fresh_grids():
    kernels._device_grids.cache_clear()
    yield
    kernels._device_grids.cache_clear()


@pytest.mark.usefixtures("fresh_grids")
@pytest.mark.parametrize(
    ("capability", "grids"),
    [
        *((newer, ("e4m3", "int8", "exact")) for newer in ((8, 9), (9, 0), (10, 0), (12, 0))),
        *((older, ("int8", "exact")) for older in ((8, 0), (8, 6))),
    ],
)
def test_grids_by_compute_capability(capability, grids, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert kernels.device_grids(torch.device("cuda", 0)) == grids


@pytest.mark.usefixtures("fresh_grids")
@pytest.mark.parametrize(("device", "cuda"), [("cuda:0", "13.0"), ("cuda:0", None), ("xpu:0", None), ("mps:0", None)])
def test_devices_without_kernels_run_exactly_and_say_so_once(device, cuda, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.warns(UserWarning, match=device) as caught:
        assert kernels.device_grids(torch.device(device)) == ("exact",)
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels.choose(None, torch.device(device), BF16) == EXACT


@pytest.mark.parametrize("op", ["exact_linear", "int4_linear", "viterbi"])
@pytest.mark.parametrize("key", ["CPU", "CUDA", "MPS", "XPU"])
def test_the_ops_that_other_devices_need_are_there(op, key):
    name = f"orbitdit::{op}"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key) or torch._C._dispatch_has_kernel_for_dispatch_key(
        name, "CompositeExplicitAutograd"
    )


@pytest.mark.usefixtures("fresh_grids")
def test_a_meta_device_is_no_reason_to_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels.device_grids(torch.device("meta")) == ("exact",)


@pytest.mark.usefixtures("fresh_grids")
@pytest.mark.parametrize("exact_products", [True, False])
def test_the_grid_of_a_cpu_is_int8_where_it_multiplies_that(exact_products, monkeypatch):
    monkeypatch.setattr(cpu, "multiplies_int8", lambda: exact_products)
    chosen = kernels.choose(None, torch.device("cpu"), BF16)
    assert chosen == (INT8 if exact_products else EXACT)
    assert set(kernels.device_grids(torch.device("cpu"))) == set(kernels.GRIDS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("forced", [None, INT8, E4M3])
def test_wide_inputs_run_exactly(forced, dtype):
    assert kernels.choose(forced, torch.device("cpu"), dtype) == EXACT


@pytest.mark.parametrize(
    ("shape", "bits"),
    [((63, 64), (4, 4)), ((8192, 64), (4, 4)), ((64, 60), (4, 4)), ((64, 64), (8, 4)), ((64, 64), (4, 8))],
)
def test_what_no_kernel_takes(shape, bits):
    assert not kernels.fits(shape, bits)
    assert kernels.fits((64, 64), (4, 4))
    assert not OrbitLinear(*shape, weight_bits=bits[0], activation_bits=bits[1]).fits


@pytest.mark.parametrize("forced", [INT8, E4M3, EXACT])
def test_a_forced_grid_is_taken(forced):
    for dtype in (BF16, torch.float16):
        assert kernels.choose(forced, torch.device("cpu"), dtype) == forced


@pytest.mark.parametrize("each", [0, 2, 5])
@pytest.mark.parametrize(("count", "bias", "states"), [(1, True, 0), (3, True, 12), (2, False, 8)])
def test_what_a_compiler_sees_of_a_product_on_e4m3(count, bias, states, each, monkeypatch):
    """Buffers, one op that fills them, and the library's product: the shapes and dtypes that the op itself promises."""
    x = random(3, 5, 64, dtype=torch.float16)
    weights, scales = zip(*(packed(48, 64, 3) for _ in range(count)), strict=True)
    biases = [random(48, dtype=torch.float16) if bias else None] * count
    filled = {}

    def product(values, weight, token_scales, row_scales, bias=None, out_dtype=None, use_fast_accum=False):
        assert weight.stride() == (1, 64)
        names = ("values", "token_scales", "weight", "row_scales", "bias")
        tensors = (values, token_scales, weight.t(), row_scales, bias)
        filled[len(values)] = dict(zip(names, tensors, strict=True))
        y = (values.float() @ weight.float()) * token_scales * row_scales
        return (y if bias is None else y + bias.float()).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", product)
    arguments = x, weights, scales, biases, [3] * count, [states] * count, 4, -1, E4M3
    y = project_e4m3(ops.encode_decode, *arguments, "", (), each, 0.9)
    expected = ops.project(x, list(weights), list(scales), *arguments[3:], "", [], each, 0.9)
    assert (y.shape, y.dtype) == (expected.shape, expected.dtype) == ((3, 5, 48 * count), torch.float16)
    torch.testing.assert_close(y, expected, rtol=2**-7, atol=6e-2 if each else 2e-2)  # of two bf16 outputs
    rows = {15: bias and not each} | ({3 * -(-5 // each): bias} if each else {})
    assert filled.keys() == rows.keys()
    for number, has_bias in rows.items():
        assert {name: None if t is None else (t.shape, t.dtype) for name, t in filled[number].items()} == {
            "values": ((number, 64), torch.float8_e4m3fn),
            "token_scales": ((number, 1), torch.float32),
            "weight": ((48 * count, 64), torch.float8_e4m3fn),
            "row_scales": ((1, 48 * count), torch.float32),
            "bias": ((48 * count,), BF16) if has_bias else None,
        }
