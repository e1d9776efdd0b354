// y = x W^T + bias for at most 8 rows x and a weight of INT4 codes in groups of 64 inputs: AdaLN modulation.
//
//   x      (rows, DIM) bf16 or fp16; y (rows, n) and bias (n,) or null in the same type
//   codes  (n, ceil(DIM / 2)) bytes, low nibble first; a code stands for code - 8
//   scales (n, ceil(DIM / 64)) bf16; x, codes and scales begin at multiples of 16 bytes
//
// Reading the weight is all the cost there is, so a block asks for as much of its share at once as its shared memory
// takes, and asks on as soon as a part is used up. Shared memory holds STAGES stages, each with the TILES tiles of 16
// rows of the weight that the block has in hand at a time. With BULK the hardware copies whole rows and counts their
// bytes; without it (compute capability 8, short or odd rows) threads copy 16 bytes at a time.
//
// SPLIT warps share a tile, each with its own inputs, in chunks of 4 groups; their sums are added in a fixed order. A
// warp needs the same part of x for all its tiles, and holds it in registers. The weight is the A operand of the tensor
// cores, the rows of x are the 8 columns of B. A sum has no order, so the inputs of a group are dealt out such that a
// lane multiplies the 8 bytes that it has read: lane (g, q) reads bytes 8q .. 8q+7 of a group from rows g and g+8, and
// orders its part of x as the codes come out of these bytes. Codes become 16-bit numbers exactly, each group's sum is
// multiplied with its scale in fp32. What lies past the last input counts as zeros; rows past the last one give sums
// that nobody stores.
//
// Compile-time: DIM; HALF (1: fp16, 0: bf16); WARPS of a block; SPLIT, which divides WARPS; STAGES, at least 2; BULK,
// which needs n % 16 == 0, DIM % 32 == 0 and compute capability 9.0. int4_linear.py counts the shared memory.
// Launch: WARPS * 32 threads, any number of blocks (more than tiles * SPLIT / WARPS are idle).

namespace {

constexpr int GROUP = 64, CHUNK = 4, CHUNK_BYTES = CHUNK * GROUP / 2;
constexpr int GROUPS = (DIM + GROUP - 1) / GROUP, CHUNKS = (GROUPS + CHUNK - 1) / CHUNK;
constexpr int ROUNDS = (CHUNKS + SPLIT - 1) / SPLIT;  // chunks of a tile that one warp takes
constexpr int TILES = WARPS / SPLIT, ROWS = TILES * 16, THREADS = WARPS * 32;
constexpr bool WHOLE = DIM == ROUNDS * SPLIT * CHUNK * GROUP;
constexpr int PITCH = (DIM + 1) / 2;  // bytes of a row of codes
// Rows in shared memory are 32 bytes more than a multiple of 128 apart, so that four neighbours use different banks.
constexpr int SHARED_PITCH = ROUNDS * SPLIT * CHUNK_BYTES + 32;
constexpr int STAGE = ROWS * (SHARED_PITCH + GROUPS * 2);
// Sums of a tile, as floats: 16 for each row of x, 20 apart, so that neither writing nor reading meets in a bank.
constexpr int SUM_PITCH = 20, SUMS = 8 * SUM_PITCH;
static_assert(STAGES >= 2, "one stage is in use while the others fill");
static_assert(!BULK || DIM % 32 == 0, "bulk copies take multiples of 16 bytes");

struct Weight {
  const u8* codes;
  const u16* scales;
  int n;
};

// A warp's share of a stage, in 16-byte pieces; nothing for rows past the last one.
__device__ __forceinline__ void copy_codes(u8* stage, const Weight& weight, int first) {
  if constexpr (PITCH % 16 == 0) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = warp / SPLIT * 16 + lane / 8;
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
      const int offset = (warp % SPLIT + round * SPLIT) * CHUNK_BYTES + lane % 8 * 16;
      const u8* from = weight.codes + (static_cast<i64>(first + row) * PITCH + offset);
      u8* to = stage + row * SHARED_PITCH + offset;
#pragma unroll
      for (int i = 0; i < 16; i += 4)
        if (first + row + i < weight.n && (WHOLE || offset < PITCH))
          copy_async(to + i * SHARED_PITCH, from + i * PITCH);
    }
  } else {
    const int count = min(ROWS, weight.n - first) * PITCH;
    const u8* from = weight.codes + static_cast<i64>(first) * PITCH;
    for (int i = threadIdx.x; i < count; i += THREADS) stage[i / PITCH * SHARED_PITCH + i % PITCH] = from[i];
  }
}

// Scales of neighbouring rows lie one after the other.
__device__ __forceinline__ void copy_scales(u8* stage, const Weight& weight, int first) {
  const int count = min(ROWS, weight.n - first) * GROUPS;
  const u16* from = weight.scales + static_cast<i64>(first) * GROUPS;
  u16* to = reinterpret_cast<u16*>(stage + ROWS * SHARED_PITCH);
#pragma unroll 1
  for (int i = threadIdx.x * 8; i < count; i += THREADS * 8) {
    if (i + 8 <= count) {
      copy_async(to + i, from + i);
    } else {
#pragma unroll 1
      for (int j = i; j < count; j++) to[j] = from[j];
    }
  }
}

// Each warp copies some of the rows: a copy costs its thread more time than the hardware.
__device__ __forceinline__ void copy_in_bulk(u8* stage, u8* barrier, const Weight& weight, int first) {
  const int warp = threadIdx.x / 32, count = min(ROWS, weight.n - first);
  if (threadIdx.x % 32 || count <= 0) return;
  if (warp == WARPS - 1) {
    const u16* scales = weight.scales + static_cast<i64>(first) * GROUPS;
    expect_bytes(barrier, count * (PITCH + GROUPS * 2));
    copy_bulk(stage + ROWS * SHARED_PITCH, scales, count * GROUPS * 2, barrier);
  }
#pragma unroll 1
  for (int row = warp; row < count; row += WARPS)
    copy_bulk(stage + row * SHARED_PITCH, weight.codes + static_cast<i64>(first + row) * PITCH, PITCH, barrier);
}

// Starts to copy the rows from `first` on into stage `slot`.
__device__ __forceinline__ void fill(u8* stages, u8* barriers, int slot, const Weight& weight, int first) {
  if constexpr (BULK) {
    copy_in_bulk(stages + slot * STAGE, barriers + slot * 8, weight, first);
  } else {
    copy_codes(stages + slot * STAGE, weight, first);
    copy_scales(stages + slot * STAGE, weight, first);
    close_group();
  }
}

// Codes i and i + 4 of the eight in `word`, minus 8, as two 16-bit numbers.
template <int I>
__device__ __forceinline__ u32 decode(u32 word) {
#if HALF
  // Under the exponent of 1024, bits 0-3 count ones and bits 4-7 count sixteens.
  const u32 shifted = I < 2 ? word : word >> 8;
  if (I % 2 == 0) return fma_f16x2(and_or(shifted, 0x000f000f, 0x64006400), 0x3c003c00, 0xe408e408);  // * 1 - 1032
  return fma_f16x2(and_or(shifted, 0x00f000f0, 0x64006400), 0x2c002c00, 0xd480d480);                  // / 16 - 72
#else
  // Under the exponent of 128, bits 0-3 count ones.
  return fma_bf16x2(and_or(word >> 4 * I, 0x000f000f, 0x43004300), 0x3f803f80, 0xc308c308);  // * 1 - 136
#endif
}

template <int FIRST>
__device__ __forceinline__ void multiply_words(float (&sum)[4], u32 upper, u32 lower, u32 x0, u32 x1) {
  const u32 a[4] = {decode<FIRST>(upper), decode<FIRST>(lower), decode<FIRST + 1>(upper), decode<FIRST + 1>(lower)};
  const u32 b[2] = {x0, x1};
#if HALF
  mma_f16(sum, a, b);
#else
  mma_bf16(sum, a, b);
#endif
}

// The warp's part of x: for each group of its chunks the lane's 16 inputs of row g (or of any row, if there are less:
// columns of B do not mix), of each eight in the order 0 4 1 5 2 6 3 7, as `decode` does it.
struct Inputs {
  uint4 eight[ROUNDS][CHUNK][2];
};

__device__ __forceinline__ uint4 load_eight(const u16* row, int at) {
  uint4 v = make_uint4(0, 0, 0, 0);
  if constexpr (DIM % 8 == 0) {
    if (WHOLE || at < DIM) v = __ldg(reinterpret_cast<const uint4*>(row + at));
  } else {
    u32 w[8];
#pragma unroll
    for (int j = 0; j < 8; j++) w[j] = at + j < DIM ? row[at + j] : 0;
    v = make_uint4(w[0] | w[1] << 16, w[2] | w[3] << 16, w[4] | w[5] << 16, w[6] | w[7] << 16);
  }
  return v;
}

__device__ __forceinline__ void load_inputs(Inputs& inputs, const u16* x, int rows) {
  const int lane = threadIdx.x % 32, part = threadIdx.x / 32 % SPLIT;
  const u16* row = x + min(lane / 4, rows - 1) * DIM;
#pragma unroll
  for (int round = 0; round < ROUNDS; round++)
#pragma unroll
    for (int i = 0; i < CHUNK * 2; i++) {
      const int group = (part + round * SPLIT) * CHUNK + i / 2;
      inputs.eight[round][i / 2][i % 2] = load_eight(row, group * GROUP + lane % 4 * 16 + i % 2 * 8);
    }
}

__device__ __forceinline__ void order_inputs(Inputs& inputs) {
#pragma unroll
  for (int i = 0; i < ROUNDS * CHUNK * 2; i++) {
    uint4& v = inputs.eight[i / (CHUNK * 2)][i / 2 % CHUNK][i % 2];
    v = make_uint4(__byte_perm(v.x, v.z, 0x5410), __byte_perm(v.x, v.z, 0x7632), __byte_perm(v.y, v.w, 0x5410),
                   __byte_perm(v.y, v.w, 0x7632));
  }
}

// The scales of a chunk of a row, zeros past the last group.
__device__ __forceinline__ uint2 load_scales(const u16* row, int chunk) {
  const u16* p = row + chunk * CHUNK;
  if constexpr (GROUPS % CHUNK == 0) {
    return WHOLE || chunk < CHUNKS ? *reinterpret_cast<const uint2*>(p) : make_uint2(0, 0);
  } else {
    u32 scale[CHUNK];
#pragma unroll
    for (int i = 0; i < CHUNK; i++) scale[i] = chunk * CHUNK + i < GROUPS ? p[i] : 0;
    return make_uint2(scale[0] | scale[1] << 16, scale[2] | scale[3] << 16);
  }
}

// Adds the warp's part of its tile, from round `round`, to `total`. Two groups at a time, so that a product need not
// wait for the one before.
__device__ __forceinline__ void multiply(float (&total)[4], const u8* stage, const uint4 (&x)[CHUNK][2], int round) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, chunk = warp % SPLIT + round * SPLIT;
  const int row = warp / SPLIT * 16 + lane / 4;
  const u8* codes = stage + row * SHARED_PITCH + chunk * CHUNK_BYTES + lane % 4 * 8;
  const u16* scales = reinterpret_cast<const u16*>(stage + ROWS * SHARED_PITCH) + row * GROUPS;
  const uint2 scale[2] = {load_scales(scales, chunk), load_scales(scales + 8 * GROUPS, chunk)};
#pragma unroll
  for (int i = 0; i < CHUNK; i += 2) {
    float sum[2][4] = {};
    uint2 code[2][2];
#pragma unroll
    for (int j = 0; j < 4; j++)
      code[j / 2][j % 2] =
          *reinterpret_cast<const uint2*>(codes + (i + j / 2) * (GROUP / 2) + j % 2 * 8 * SHARED_PITCH);
#pragma unroll
    for (int word = 0; word < 2; word++) {
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const uint4 v = x[i + j][word];
        const u32 upper = word ? code[j][0].y : code[j][0].x, lower = word ? code[j][1].y : code[j][1].x;
        multiply_words<0>(sum[j], upper, lower, v.x, v.y);
        multiply_words<2>(sum[j], upper, lower, v.z, v.w);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const u32 pair = i ? scale[half].y : scale[half].x;
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const float factor = __uint_as_float(j ? pair & 0xffff0000 : pair << 16);
        total[2 * half] = __fmaf_rn(factor, sum[j][2 * half], total[2 * half]);
        total[2 * half + 1] = __fmaf_rn(factor, sum[j][2 * half + 1], total[2 * half + 1]);
      }
    }
  }
}

// The outputs of the block's tiles: each the sum of its warps' parts, in their order.
__device__ __forceinline__ void finish(const float* sums, u16* y, const u16* bias, int first, int rows, int n) {
#pragma unroll 1
  for (int i = threadIdx.x; i < ROWS * 8; i += THREADS) {
    const int r = i % 16, row = i / 16 % 8, tile = i / 128, output = first + tile * 16 + r;
    if (row >= rows || output >= n) continue;
    const float* part = sums + tile * SPLIT * SUMS + row * SUM_PITCH + r;
    float sum = 0;
#pragma unroll
    for (int j = 0; j < SPLIT; j++) sum += part[j * SUMS];
#if HALF
    if (bias) sum += f16_to_float(bias[output]);
    y[static_cast<i64>(row) * n + output] = static_cast<u16>(pack_f16(sum, 0));
#else
    if (bias) sum += bf16_to_float(bias[output]);
    y[static_cast<i64>(row) * n + output] = static_cast<u16>(pack_bf16(sum, 0));
#endif
  }
}

}  // namespace

KERNEL void __launch_bounds__(THREADS) int4_linear(
    const u16* __restrict__ x, const u8* __restrict__ codes, const u16* __restrict__ scales,
    const u16* __restrict__ bias, u16* __restrict__ y, int rows, int n) {
  u8* barriers = dynamic_shared();
  float* parts = reinterpret_cast<float*>(barriers + (STAGES + 1) / 2 * 16);
  u8* stages = reinterpret_cast<u8*>(parts + 2 * WARPS * SUMS);
  const Weight weight = {codes, scales, n};
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, step = gridDim.x * ROWS;
  int first = blockIdx.x * ROWS;
  if (rows < 1 || first >= n) return;

  if constexpr (BULK) {
    if (threadIdx.x == 0) make_barriers(barriers, STAGES);
    __syncthreads();
  }
#pragma unroll 1
  for (int slot = 0; slot < EARLY; slot++) fill(stages, barriers, slot, weight, first + slot * step);
  Inputs inputs;
  load_inputs(inputs, x, rows);
#pragma unroll 1
  for (int slot = EARLY; slot < STAGES - 1; slot++) fill(stages, barriers, slot, weight, first + slot * step);
  order_inputs(inputs);

  int slot = 0, parity = 0;
  const float* before = nullptr;  // the sums of the tiles before
  for (; first < n; first += step) {
    if constexpr (BULK) {
      wait_for(barriers + slot * 8, parity);
    } else {
      wait_for_all_but<STAGES - 2>();
    }
    // Now everybody's copies have arrived and everybody is through with the tiles before, whose stage is free.
    __syncthreads();
    fill(stages, barriers, slot ? slot - 1 : STAGES - 1, weight, first + (STAGES - 1) * step);
    if (before) finish(before, y, bias, first - step, rows, n);

    float total[4] = {0, 0, 0, 0};
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) multiply(total, stages + slot * STAGE, inputs.eight[round], round);
    float* sums = before == parts ? parts + WARPS * SUMS : parts;
    float* to = sums + warp * SUMS + lane % 4 * 2 * SUM_PITCH + lane / 4;
    for (int i = 0; i < 4; i++) to[i % 2 * SUM_PITCH + i / 2 * 8] = total[i];
    before = sums;
    if (++slot == STAGES) slot = 0, parity ^= 1;
  }
  __syncthreads();
  finish(before, y, bias, first - step, rows, n);
}
