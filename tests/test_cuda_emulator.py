"""The emulator that the kernel tests stand on, against torch: products, shuffles, barriers, conversions, failures."""

import ctypes

import pytest
import torch

from cuda_emulator import EmulationError, Launch, launch


@pytest.fixture
def run(tmp_path):
    """Runs the kernel `k` whose parameters and body are given."""

    def run(parameters, body, args, defines=None, **how):
        file = tmp_path / "kernel.cu"
        file.write_text(f"KERNEL void k({parameters}) {{\n{body}\n}}\n")
        launch(file, "k", Launch(**how), args, defines)

    return run


def random_integers(low, high, shape, dtype):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(0)).to(dtype)


MMA = """
  int g = threadIdx.x / 4, q = threadIdx.x % 4;
  auto word = [](const u8* matrix, int row, int k) {
    return *reinterpret_cast<const u32*>(matrix + row * 32 + k * 4);
  };
  u32 a_[4] = {word(a, g, q), word(a, g + 8, q), word(a, g, q + 4), word(a, g + 8, q + 4)};
  u32 b_[2] = {word(b, g, q), word(b, g, q + 4)};
  float c_[4] = {c[g * 8 + 2 * q], c[g * 8 + 2 * q + 1], c[(g + 8) * 8 + 2 * q], c[(g + 8) * 8 + 2 * q + 1]};
  NAME(c_, a_, b_);
  c[g * 8 + 2 * q] = c_[0], c[g * 8 + 2 * q + 1] = c_[1];
  c[(g + 8) * 8 + 2 * q] = c_[2], c[(g + 8) * 8 + 2 * q + 1] = c_[3];
"""


@pytest.mark.parametrize(("name", "dtype"), [("mma_bf16", torch.bfloat16), ("mma_f16", torch.float16)])
@pytest.mark.parametrize("reverse", [False, True])
def test_tensor_core_product(run, name, dtype, reverse):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 16, generator=generator).to(dtype) for n in (16, 8))
    c = torch.randn(16, 8, generator=generator)
    expected = (c.double() + a.double() @ b.double().T).float()
    run("const u8* a, const u8* b, float* c", MMA, [a, b, c], defines={"NAME": name}, reverse=reverse)
    torch.testing.assert_close(c, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_to_16_bits_round_as_torch_does(run, dtype):
    name = "bf16" if dtype == torch.bfloat16 else "f16"
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (8192,), generator=generator, dtype=torch.int32)
    exact = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    between = (exact[:-1].double() + exact[1:].double()).float() / 2
    edges = torch.tensor([65519.99, 65520.0, -65520.0, 65536.0, 2.0**-24, 2.0**-25, 2.0**-26, -0.0, float("nan")])
    x = torch.cat([bits.view(torch.float32), exact, between, edges])
    out = torch.empty(len(x), 2, dtype=dtype)
    body = f"int i = blockIdx.x * 32 + threadIdx.x; if (i < n) y[i] = pack_{name}(x[i], -x[i]);"
    run("const float* x, u32* y, int n", body, [x, out, len(x)], grid=(-(-len(x) // 32), 1, 1))
    expected = torch.stack([x, -x], 1).to(dtype)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(out.signbit() | out.isnan(), expected.signbit() | expected.isnan())


@pytest.mark.parametrize(
    ("expression", "dtype"), [("bf16_to_float(x[i])", torch.bfloat16), ("f16_to_float(x[i])", torch.float16)]
)
def test_conversions_from_16_bits_are_exact(run, expression, dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    out = torch.empty(2**16)
    body = f"int i = blockIdx.x * 32 + threadIdx.x; y[i] = {expression};"
    run("const u16* x, float* y", body, [x, out], grid=(2048, 1, 1))
    torch.testing.assert_close(out, x.view(dtype).float(), rtol=0, atol=0, equal_nan=True)


def test_fma_of_pairs(run):
    a, b, c = (random_integers(-16, 17, (32, 2), torch.float16) for _ in range(3))
    out = torch.empty(32, 2, dtype=torch.float16)
    body = "int i = threadIdx.x; y[i] = fma_f16x2(a[i], b[i], c[i]);"
    run("const u32* a, const u32* b, const u32* c, u32* y", body, [a, b, c, out])
    assert torch.equal(out, (a.float() * b.float() + c.float()).half())


@pytest.mark.parametrize(
    ("expression", "source"),
    [
        ("__shfl_sync(0xffffffffu, v, 5)", lambda i: 5),
        ("__shfl_sync(0xffffffffu, v, 3, 8)", lambda i: i // 8 * 8 + 3),
        ("__shfl_xor_sync(0xffffffffu, v, 9)", lambda i: i ^ 9),
        ("__shfl_down_sync(0xffffffffu, v, 4)", lambda i: i + 4 if i + 4 < 32 else i),
        ("__shfl_up_sync(0xffffffffu, v, 3, 16)", lambda i: i - 3 if i % 16 >= 3 else i),
    ],
)
@pytest.mark.parametrize("kind", ["int", "float", "u32"])
def test_shuffles(run, expression, source, kind):
    out = torch.empty(64, dtype=torch.float32 if kind == "float" else torch.int32)
    body = f"{kind} v = 100 + threadIdx.x; y[threadIdx.x] = {expression};"
    run(f"{kind}* y", body, [out], block=64)
    assert out.tolist() == [100 + 32 * (i // 32) + source(i % 32) for i in range(64)]


def test_votes(run):
    out = torch.empty(32, 3, dtype=torch.int32)
    body = """
  int i = threadIdx.x;
  y[3 * i] = __ballot_sync(0xffffffffu, i % 3 == 0);
  y[3 * i + 1] = __any_sync(0xffffffffu, i == 7);
  y[3 * i + 2] = __all_sync(0xffffffffu, i < 31);
"""
    run("int* y", body, [out])
    ballot = sum(1 << i for i in range(0, 32, 3))
    assert out.tolist() == [[ballot, 1, 0]] * 32


@pytest.mark.parametrize("reverse", [False, True])
def test_shared_memory_and_barriers_of_a_block(run, reverse):
    x, out = torch.arange(3 * 100.0), torch.empty(3 * 100)
    body = """
  float* s = reinterpret_cast<float*>(dynamic_shared());
  __shared__ float total;
  int i = blockIdx.y * blockDim.x + threadIdx.x;
  s[threadIdx.x] = x[i];
  __syncthreads();
  if (threadIdx.x == 99) {
    total = 0;
    for (int j = 0; j < 100; j++) total += s[j];
  }
  __syncthreads();
  y[i] = total - s[99 - threadIdx.x];
"""
    run("const float* x, float* y", body, [x, out], grid=(1, 3, 1), block=100, shared_bytes=400, reverse=reverse)
    rows = x.view(3, 100)
    assert torch.equal(out.view(3, 100), rows.sum(1, keepdim=True) - rows.flip(1))


def test_shared_memory_starts_poisoned_in_each_block(run):
    out = torch.zeros(2, 32, dtype=torch.int32)
    body = """
  u32* s = reinterpret_cast<u32*>(dynamic_shared());
  y[blockIdx.x * 32 + threadIdx.x] = s[threadIdx.x];
  s[threadIdx.x] = 0;
"""
    run("u32* y", body, [out], grid=(2, 1, 1), shared_bytes=128)
    assert (out.view(torch.uint8) == 0xCD).all()


def test_a_thread_that_returns_leaves_the_barriers(run):
    out = torch.zeros(64)
    body = "if (threadIdx.x % 3) return; __syncwarp(); __syncthreads(); y[threadIdx.x] = 1; __syncthreads();"
    run("float* y", body, [out], block=64)
    assert out.tolist() == [float(i % 3 == 0) for i in range(64)]


def test_byte_permutations(run):
    selectors = random_integers(0, 2**16, (1000,), torch.int32)
    out = torch.empty(1000, dtype=torch.int32)
    body = "int i = blockIdx.x; y[i] = __byte_perm(0x04838281u, 0x7786f506u, s[i]);"
    run("const u32* s, u32* y", body, [selectors, out], grid=(1000, 1, 1), block=1)
    source = bytes.fromhex("81828304 06f58677")
    for selector, word in zip(selectors.tolist(), out.tolist(), strict=True):
        expected = bytes(source[selector >> 4 * i & 7] for i in range(4))
        assert word & 0xFFFFFFFF == int.from_bytes(expected, "little")


def test_integer_and_float_functions(run):
    integers, floats = torch.empty(12, dtype=torch.int32), torch.empty(9)
    body = """
  i[0] = __popc(0xf0f0u), i[1] = __clz(1), i[2] = __clz(0), i[3] = __ffs(8), i[4] = __ffs(0);
  i[5] = min(-1, 2), i[6] = max(-1, 2), i[7] = min(3u, 0xffffffffu), i[8] = max(1u, 2u);
  i[9] = __float_as_int(1.f), i[10] = __float2int_rn(2.5f), i[11] = __funnelshift_r(0x12345678u, 0x9abcdef0u, 8);
  float nan = __uint_as_float(0x7fc00000u);
  f[0] = __saturatef(nan), f[1] = __saturatef(-1.f), f[2] = fma_sat(2.f, 3.f, 4.f), f[3] = fminf(nan, 2.f);
  f[4] = __fsqrt_rn(2.f), f[5] = rsqrtf(4.f), f[6] = __fmaf_rn(0x1.000002p0f, 0x1.000002p0f, -0x1.000004p0f);
  f[7] = fma_sat(0.5f, 0.5f, 0.25f), f[8] = max(1.f, 2.f);
"""
    run("int* i, float* f", body, [integers, floats], block=1)
    assert integers.tolist() == [8, 31, 32, 4, 0, -1, 2, 3, 2, 0x3F800000, 2, 0xF0123456 - 2**32]
    root = torch.tensor(2.0).sqrt().item()
    assert floats.tolist() == [0, 0, 1, 2, root, 0.5, 2.0**-46, 0.5, 2]


def test_arguments_of_other_sizes(run):
    out = torch.zeros(1, dtype=torch.int64)
    run(
        "i64* y, i64 a, float b, const u8* p",
        "y[0] = a + (i64)b + (p ? 1 : 0);",
        [out, ctypes.c_longlong(1 << 40), 2.5, None],
        block=1,
    )
    assert out.item() == (1 << 40) + 2


@pytest.mark.parametrize(
    ("parameters", "body", "args", "message"),
    [
        (
            "int n",
            "if (threadIdx.x < 5) __syncthreads(); else __syncwarp();",
            [0],
            "deadlock: it waits at __syncthreads",
        ),
        ("int n", "if (threadIdx.x) __ballot_sync(0xffffffffu, 1);", [0], "deadlock: it waits at a vote; 31 of 32"),
        ("int n", "__syncwarp(0xffff);", [0], "only the mask of all lanes"),
        ("float* y", "y[32] = 1;", [torch.zeros(32)], "out of bounds"),
        ("float* y", "y[0] = y[31]; y[0] = y[32 * 1];", [torch.zeros(32)], "out of bounds"),
        ("u8* y", "y[63] = 1;", [torch.zeros(63, dtype=torch.uint8)], "0: a write outside of its 63 bytes, at byte 63"),
        ("float* y", "y[-1] = 1;", [torch.zeros(32)], "at byte -4"),
        ("float* y", "y[0] = 1;", [None], r"block \(0, 0, 0\), thread 0: out of bounds"),
        ("int n", "dynamic_shared()[64] = 1;", [0], "wrote past its 64 bytes of shared memory, at byte 64"),
        ("int* y", "y[0] = dynamic_shared()[128];", [torch.zeros(1, dtype=torch.int32)], "out of bounds"),
        ("const u8* p", "volatile u32 x = load_streaming(p + 4).x;", [torch.zeros(64)], "a load of 16 bytes from"),
        ("int* y", "y[0] = 7 / y[1];", [torch.zeros(2, dtype=torch.int32)], "division by zero"),
        ("float x", "", [torch.zeros(1)], "argument 0 takes 4 bytes; 8 were given"),
        ("float x", "", [], "takes 1 arguments; 0 were given"),
        ("float x", "nonsense;", [1.0], "does not compile"),
    ],
)
def test_failures_are_named(run, parameters, body, args, message):
    with pytest.raises(EmulationError, match=message):
        run(parameters, body, args, shared_bytes=64)


def test_the_next_launch_after_a_failure_is_sound(run):
    with pytest.raises(EmulationError):
        run("float* y", "y[0] = 1;", [None])
    out = torch.zeros(32)
    run("float* y", "y[threadIdx.x] = threadIdx.x;", [out])
    assert torch.equal(out, torch.arange(32.0))


BULK = """
  u8* shared = dynamic_shared();
  if (threadIdx.x == 0) make_barriers(shared, 2, 1);
  __syncthreads();
  for (int turn = 0; turn < 4; turn++) {
    u8* barrier = shared + turn % 2 * 8;
    if (threadIdx.x == 63) {
      copy_bulk(shared + 16, from + turn * 48, 32, barrier);
      expect_bytes(barrier, EXPECTED);
      copy_bulk(shared + 48, from + turn * 48 + 32, 16, barrier);
    }
    wait_for(barrier, turn / 2);
    if (threadIdx.x < 48) to[turn * 48 + threadIdx.x] = shared[16 + threadIdx.x];
    __syncthreads();
  }
"""


@pytest.mark.parametrize("reverse", [False, True])
def test_bulk_copies_and_their_barriers(run, reverse):
    data = random_integers(0, 200, (192,), torch.uint8)
    to = torch.zeros_like(data)
    arguments = "const u8* from, u8* to", BULK, [data, to]
    run(*arguments, block=64, shared_bytes=64, defines={"EXPECTED": 48}, reverse=reverse)
    assert torch.equal(to, data)
    with pytest.raises(EmulationError, match="a barrier in shared memory"):
        run(*arguments, block=64, shared_bytes=64, defines={"EXPECTED": 64}, reverse=reverse)
    with pytest.raises(EmulationError, match="48 bytes at a barrier that expects 32"):
        run(*arguments, block=64, shared_bytes=64, defines={"EXPECTED": 32}, reverse=reverse)


@pytest.mark.parametrize(
    ("to", "bytes_", "what"), [(0, 16, "under way"), (8, 16, "a copy of 16"), (0, 8, "a copy of 8")]
)
def test_bulk_copies_that_the_hardware_would_not_take(run, to, bytes_, what):
    body = f"u8* s = dynamic_shared(); make_barriers(s, 1, 1); copy_bulk(s + 16 + {to}, from, {bytes_}, s);"
    with pytest.raises(EmulationError, match=what):
        run("const u8* from", body, [torch.zeros(32, dtype=torch.uint8)], block=1, shared_bytes=64)


COUNTED = """
  u8* shared = dynamic_shared();
  if (threadIdx.x == 0) make_barriers(shared, 2, 32);
  __syncthreads();
  if (threadIdx.x < 32) {
    for (int turn = 0; turn < 3; turn++) {
      if (turn) wait_for(shared + 8, (turn - 1) % 2);
      copy_async(shared + 16 + threadIdx.x * 16, from + (turn * 32 + threadIdx.x) * 16);
      if (turn == 1) wait_for_copies();
      for (int i = 0; i < ARRIVALS; i++) turn == 1 ? arrive(shared) : arrive_after_copies(shared);
    }
  } else {
    for (int turn = 0; turn < 3; turn++) {
      wait_for(shared, turn % 2);
      for (int i = threadIdx.x - 32; i < 512; i += 32) to[turn * 512 + i] = shared[16 + i];
      arrive(shared + 8);
    }
  }
"""


@pytest.mark.parametrize("reverse", [False, True])
def test_barriers_that_count_arrivals(run, reverse):
    data = random_integers(0, 200, (3 * 512,), torch.uint8)
    to = torch.zeros_like(data)
    arguments = "const u8* from, u8* to", COUNTED, [data, to]
    run(*arguments, block=64, shared_bytes=528, defines={"ARRIVALS": 1}, reverse=reverse)
    assert torch.equal(to, data)
    with pytest.raises(EmulationError, match="a barrier in shared memory"):
        run(*arguments, block=64, shared_bytes=528, defines={"ARRIVALS": 0}, reverse=reverse)
    with pytest.raises(EmulationError, match="arrivals at a barrier"):
        run(*arguments, block=64, shared_bytes=528, defines={"ARRIVALS": 2}, reverse=reverse)


def test_copies_arrive_when_they_are_waited_for(run):
    """Whoever reads before the barrier's turn is over does not see what comes with it."""
    body = """
  u8* shared = dynamic_shared();
  make_barriers(shared, 1, 1);
  copy_async(shared + 16, from);
  arrive_after_copies(shared);
  to[0] = shared[16];
  wait_for(shared, 0);
  to[1] = shared[16];
"""
    to = torch.zeros(2, dtype=torch.uint8)
    run("const u8* from, u8* to", body, [torch.full((16,), 7, dtype=torch.uint8), to], block=1, shared_bytes=32)
    assert to.tolist() == [0xCD, 7]
