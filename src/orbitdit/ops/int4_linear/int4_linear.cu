// y = x W^T + bias for at most 8 rows x and a weight of INT4 codes in groups of 64 inputs: AdaLN modulation.
//
//   x      (rows, DIM) bf16 or fp16; y (rows, n) and bias (n,) or null in the same type
//   codes  (n, ceil(DIM / 2)) bytes, low nibble first; a code stands for code - 8
//   scales (n, ceil(DIM / 64)) bf16; x, codes and scales begin at multiples of 16 bytes
//
// Reading the weight is all the cost there is. A block's share of it passes through a ring of STAGES stages of shared
// memory, each with one piece: the part of a tile of 16 rows that WARPS warps take in a round, 256 inputs each. One
// more warp does nothing but move: it asks for the next piece as soon as a stage is free, and writes finished outputs.
// The others multiply and wait for nothing but their pieces. With BULK the hardware copies whole rows and counts their
// bytes; without it (compute capability 8, short or odd rows) the lanes of that warp copy 16 bytes at a time.
//
// The warps' sums of a tile are added in a fixed order. A warp needs the same part of x for all tiles, and holds it in
// registers. The weight is the A operand of the tensor cores, the rows of x are the 8 columns of B. A sum has no order,
// so the inputs of a group are dealt out such that a lane multiplies the 8 bytes that it has read: lane (g, q) reads
// bytes 8q .. 8q+7 of a group from rows g and g+8, and orders its part of x as the codes come out of these bytes. Codes
// become 16-bit numbers exactly, in fp16 the codes - 8. bf16 codes carry an offset of 136 (128 + 8). Each
// group's sum starts at minus 136 times the sum of x over the group, which is the same for all rows: fp32 then
// rounds larger sums, which costs about 2^-22 * 136, or 3e-5 steps of a code, for each input. Each group's sum is
// multiplied with its scale in fp32. What lies past the last input counts as zeros; rows past the last one give sums
// that are not stored.
//
// Compile-time: DIM; HALF (1: fp16, 0: bf16); WARPS that multiply; STAGES, at least 2; BULK, which needs
// n % 16 == 0, DIM % 32 == 0 and compute capability 9.0. int4_linear.py counts the shared memory.
// Launch: (WARPS + 1) * 32 threads, any number of blocks (more than there are tiles are idle).

namespace {

constexpr int GROUP = 64, CHUNK = 4, CHUNK_BYTES = CHUNK * GROUP / 2, ROWS = 16;
constexpr int GROUPS = (DIM + GROUP - 1) / GROUP, CHUNKS = (GROUPS + CHUNK - 1) / CHUNK;
constexpr int ROUNDS = (CHUNKS + WARPS - 1) / WARPS;  // pieces of a tile
constexpr int THREADS = (WARPS + 1) * 32;
constexpr bool WHOLE = DIM == ROUNDS * WARPS * CHUNK * GROUP;
constexpr int PITCH = (DIM + 1) / 2;  // bytes of a row of codes
constexpr int PIECE = WARPS * CHUNK_BYTES;
// Rows in shared memory are 32 bytes more than a multiple of 128 apart, so that four neighbours use different banks.
constexpr int SHARED_PITCH = PIECE + 32;
constexpr int STAGE = ROWS * (SHARED_PITCH + GROUPS * 2);  // with all scales of the tile, in every round
// Sums of a warp, as floats: 16 for each row of x, 20 apart, so that writing does not meet in a bank.
constexpr int SUM_PITCH = 20, SUMS = 8 * SUM_PITCH;
// A piece is asked for when the one STAGES before has been used and the tiles before that one are finished: whoever has
// a piece may write over the sums of the tile this many before.
constexpr int BUFFERS = (STAGES + ROUNDS) / ROUNDS;
constexpr int STARTS = ROUNDS * CHUNK * 16;  // floats of a warp
static_assert(STAGES >= 2, "one stage is in use while the others fill");
static_assert(!BULK || DIM % 32 == 0, "bulk copies take multiples of 16 bytes");

struct Weight {
  const u8* codes;
  const u16* scales;
  int n;
};

// Shared memory, in this order: a barrier for each stage that is full, one for each that is used; the starts of sums;
// sums; stages.
struct Shared {
  u8 *full, *used;
  float *starts, *sums;
  u8* stages;
};

__device__ __forceinline__ Shared shared_parts() {
  u8* full = dynamic_shared();
  float* starts = reinterpret_cast<float*>(full + STAGES * 16);
  float* sums = starts + WARPS * STARTS;
  return {full, full + STAGES * 8, starts, sums, reinterpret_cast<u8*>(sums + BUFFERS * WARPS * SUMS)};
}

// The lanes of a warp copy piece `round` of the tile at row `first`, 16 bytes at a time.
__device__ __forceinline__ void copy_piece(u8* stage, u8* barrier, const Weight& weight, int first, int round) {
  const int lane = threadIdx.x % 32, rows = min(ROWS, weight.n - first);
  const u8* codes = weight.codes + (static_cast<i64>(first) * PITCH + round * PIECE);
  const u16* scales = weight.scales + static_cast<i64>(first) * GROUPS;
  u16* to = reinterpret_cast<u16*>(stage + ROWS * SHARED_PITCH);
#pragma unroll 1
  for (int i = lane * 8; i < rows * GROUPS; i += 32 * 8) {
    if (i + 8 <= rows * GROUPS) {
      copy_async(to + i, scales + i);
    } else {
#pragma unroll 1
      for (int j = i; j < rows * GROUPS; j++) to[j] = scales[j];
    }
  }
  if constexpr (PITCH % 16 == 0) {  // four rows at a time, eight lanes to each
    const int row = lane / 8, left = PITCH - round * PIECE - lane % 8 * 16;
    const u8* from = codes + row * PITCH + lane % 8 * 16;
    u8* shared = stage + row * SHARED_PITCH + lane % 8 * 16;
#pragma unroll
    for (int i = 0; i < ROWS; i += 4)
#pragma unroll
      for (int offset = 0; offset < PIECE; offset += CHUNK_BYTES)
        if (row + i < rows && (WHOLE || offset < left))
          copy_async(shared + i * SHARED_PITCH + offset, from + i * PITCH + offset);
  } else {
    const int bytes = min(PIECE, PITCH - round * PIECE);
#pragma unroll 1
    for (int i = lane; i < rows * bytes; i += 32)
      stage[i / bytes * SHARED_PITCH + i % bytes] = codes[i / bytes * PITCH + i % bytes];
  }
  // Stores are seen by whoever sees the thread arrive; copies arrive on their own.
  if (PITCH % 16 == 0 && rows == ROWS) {
    arrive_after_copies(barrier);
  } else {
    wait_for_copies();
    arrive(barrier);
  }
}

__device__ __forceinline__ void copy_piece_in_bulk(u8* stage, u8* barrier, const Weight& weight, int first, int round) {
  const int lane = threadIdx.x % 32, bytes = WHOLE ? PIECE : min(PIECE, PITCH - round * PIECE);
  if (lane == ROWS) {
    expect_bytes(barrier, ROWS * (bytes + GROUPS * 2));
    const u16* scales = weight.scales + static_cast<i64>(first) * GROUPS;
    copy_bulk(stage + ROWS * SHARED_PITCH, scales, ROWS * GROUPS * 2, barrier);
  } else if (lane < ROWS) {
    const u8* codes = weight.codes + (static_cast<i64>(first + lane) * PITCH + round * PIECE);
    copy_bulk(stage + lane * SHARED_PITCH, codes, bytes, barrier);
  }
}

// Asks for the block's piece number `piece`, if there is one.
__device__ __forceinline__ void fill(const Shared& shared, const Weight& weight, int piece) {
  const int slot = piece % STAGES, first = (blockIdx.x + piece / ROUNDS * gridDim.x) * ROWS;
  if (first >= weight.n) return;
  u8 *stage = shared.stages + slot * STAGE, *barrier = shared.full + slot * 8;
  if constexpr (BULK) {
    copy_piece_in_bulk(stage, barrier, weight, first, piece % ROUNDS);
  } else {
    copy_piece(stage, barrier, weight, first, piece % ROUNDS);
  }
}

// Codes i and i + 4 of the eight in `word` as two 16-bit numbers: minus 8 in fp16, plus 128 in bf16.
template <int I>
__device__ __forceinline__ u32 decode(u32 word) {
  const u32 shifted = I < 2 ? word : word >> 8;
#if HALF
  // Under the exponent of 1024, bits 0-3 count ones and bits 4-7 count sixteens.
  if (I % 2 == 0) return fma_f16x2(and_or(shifted, 0x000f000f, 0x64006400), 0x3c003c00, 0xe408e408);  // * 1 - 1032
  return fma_f16x2(and_or(shifted, 0x00f000f0, 0x64006400), 0x2c002c00, 0xd480d480);                  // / 16 - 72
#else
  // Under bf16's exponent of 128, bits 0-3 count ones. These bits are also the fp16 number 3.5 + code / 512, so fp16
  // arithmetic brings bits 4-7 there (1024 + 16 code, / 8192 + 3.375), on a unit that has more time than the shifter.
  if (I % 2 == 0) return and_or(shifted, 0x000f000f, 0x43004300);
  return fma_f16x2(and_or(shifted, 0x00f000f0, 0x64006400), 0x08000800, 0x42c042c0);
#endif
}

__device__ __forceinline__ void product(float (&sum)[4], const u32 (&a)[4], u32 x0, u32 x1) {
  const u32 b[2] = {x0, x1};
#if HALF
  mma_f16(sum, a, b);
#else
  mma_bf16(sum, a, b);
#endif
}

template <int FIRST>
__device__ __forceinline__ void multiply_words(float (&sum)[4], u32 upper, u32 lower, u32 x0, u32 x1) {
  const u32 a[4] = {decode<FIRST>(upper), decode<FIRST>(lower), decode<FIRST + 1>(upper), decode<FIRST + 1>(lower)};
  product(sum, a, x0, x1);
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
  const int lane = threadIdx.x % 32, part = threadIdx.x / 32;
  const u16* row = x + min(lane / 4, rows - 1) * DIM;
#pragma unroll
  for (int round = 0; round < ROUNDS; round++)
#pragma unroll
    for (int i = 0; i < CHUNK * 2; i++) {
      const int group = (part + round * WARPS) * CHUNK + i / 2;
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

// Where the sums of the warp's groups start: the lane's columns, as the product leaves them.
__device__ __forceinline__ void make_starts(float* starts, const Inputs& inputs) {
#if !HALF
  const int lane = threadIdx.x % 32;
  const u32 a[4] = {0xc308c308, 0xc308c308, 0xc308c308, 0xc308c308};  // -136
#pragma unroll
  for (int i = 0; i < ROUNDS * CHUNK; i++) {
    const auto& x = inputs.eight[i / CHUNK][i % CHUNK];
    float sum[4] = {};
#pragma unroll
    for (int word = 0; word < 2; word++) {
      product(sum, a, x[word].x, x[word].y);
      product(sum, a, x[word].z, x[word].w);
    }
    if (lane < 4) reinterpret_cast<float4*>(starts)[i * 4 + lane] = make_float4(sum[0], sum[1], sum[2], sum[3]);
  }
  __syncwarp();
#endif
}

// Adds the warp's part of a piece to `total`. Two groups at a time, so that a product need not wait for the one before.
__device__ __forceinline__ void multiply(float (&total)[4], const u8* stage, const float* starts,
                                         const uint4 (&x)[CHUNK][2], int round) {
  const int lane = threadIdx.x % 32, part = threadIdx.x / 32, row = lane / 4;
  const u8* codes = stage + row * SHARED_PITCH + part * CHUNK_BYTES + lane % 4 * 8;
  const u16* scales = reinterpret_cast<const u16*>(stage + ROWS * SHARED_PITCH) + row * GROUPS;
  const int chunk = part + round * WARPS;
  const uint2 scale[2] = {load_scales(scales, chunk), load_scales(scales + 8 * GROUPS, chunk)};
#pragma unroll
  for (int i = 0; i < CHUNK; i += 2) {
    float sum[2][4] = {};
    uint2 code[2][2];
#pragma unroll
    for (int j = 0; j < 4; j++)
      code[j / 2][j % 2] =
          *reinterpret_cast<const uint2*>(codes + (i + j / 2) * (GROUP / 2) + j % 2 * 8 * SHARED_PITCH);
#if !HALF
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const float4 start = reinterpret_cast<const float4*>(starts)[(i + j) * 4 + lane % 4];
      sum[j][0] = start.x, sum[j][1] = start.y, sum[j][2] = start.z, sum[j][3] = start.w;
    }
#endif
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

// One of the warps that multiply.
__device__ __forceinline__ void multiply_tiles(const Shared& shared, const u16* x, int rows, int n) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float* starts = shared.starts + warp * STARTS;
  Inputs inputs;
  load_inputs(inputs, x, rows);
  order_inputs(inputs);
  make_starts(starts, inputs);
  __syncthreads();  // now there are barriers
#pragma unroll 1
  for (int tile = 0; (blockIdx.x + tile * gridDim.x) * ROWS < n; tile++) {
    float total[4] = {0, 0, 0, 0};
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
      const int piece = tile * ROUNDS + round, slot = piece % STAGES;
      wait_for(shared.full + slot * 8, piece / STAGES % 2);
      multiply(total, shared.stages + slot * STAGE, starts + round * CHUNK * 16, inputs.eight[round], round);
      if (round == ROUNDS - 1) {
        float* to = shared.sums + (tile % BUFFERS * WARPS + warp) * SUMS + lane % 4 * 2 * SUM_PITCH + lane / 4;
#pragma unroll
        for (int i = 0; i < 4; i++) to[i % 2 * SUM_PITCH + i / 2 * 8] = total[i];
      }
      __syncwarp();
      if (lane == 0) arrive(shared.used + slot * 8);
    }
  }
}

__device__ __forceinline__ float to_float(u16 v) {
#if HALF
  return f16_to_float(v);
#else
  return bf16_to_float(v);
#endif
}

// The lane's outputs of a tile: 4 neighbours of one row of x, each the sum of its warps' parts, in their order.
__device__ __forceinline__ void finish(const float* sums, u16* y, const float (&bias)[4], int first, int rows, int n) {
  const int row = threadIdx.x % 32 / 4, output = first + threadIdx.x % 4 * 4;
  const float* part = sums + row * SUM_PITCH + threadIdx.x % 4 * 4;
  if (row >= rows) return;
  float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
  for (int j = 0; j < WARPS; j++) {
    const float4 v = *reinterpret_cast<const float4*>(part + j * SUMS);
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
  }
#if HALF
  const u32 low = pack_f16(sum.x + bias[0], sum.y + bias[1]), high = pack_f16(sum.z + bias[2], sum.w + bias[3]);
#else
  const u32 low = pack_bf16(sum.x + bias[0], sum.y + bias[1]), high = pack_bf16(sum.z + bias[2], sum.w + bias[3]);
#endif
  u16* to = y + (static_cast<i64>(row) * n + output);
  if (n % 4 == 0) {
    if (output < n) *reinterpret_cast<uint2*>(to) = make_uint2(low, high);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (output + i < n) to[i] = static_cast<u16>((i < 2 ? low : high) >> i % 2 * 16);
}

// The warp that moves: pieces into stages as these are used up, and sums to the outputs.
__device__ __forceinline__ void move_tiles(const Shared& shared, const Weight& weight, const u16* bias, u16* y,
                                           int rows) {
  const int step = gridDim.x * ROWS;
  if (threadIdx.x % 32 == 0) {
    make_barriers(shared.full, STAGES, BULK ? 1 : 32);
    make_barriers(shared.used, STAGES, WARPS);
  }
  __syncwarp();
#pragma unroll 1
  for (int piece = 0; piece < STAGES; piece++) fill(shared, weight, piece);
  __syncthreads();
  int piece = 0, tile = 0;
#pragma unroll 1
  for (int first = blockIdx.x * ROWS; first < weight.n; first += step, tile++) {
    float offset[4] = {0, 0, 0, 0};  // asked for before there is anything to add it to
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int output = first + threadIdx.x % 4 * 4 + i;
      if (bias && output < weight.n) offset[i] = to_float(__ldg(bias + output));
    }
#pragma unroll 1
    for (int end = piece + ROUNDS; piece < end; piece++) {
      wait_for(shared.used + piece % STAGES * 8, piece / STAGES % 2);
      fill(shared, weight, piece + STAGES);
    }
    finish(shared.sums + tile % BUFFERS * WARPS * SUMS, y, offset, first, rows, weight.n);
    __syncwarp();  // these sums have been read when any lane asks for more
  }
}

}  // namespace

KERNEL void __launch_bounds__(THREADS, ROUNDS == 1 ? 2 : 1) int4_linear(
    const u16* __restrict__ x, const u8* __restrict__ codes, const u16* __restrict__ scales,
    const u16* __restrict__ bias, u16* __restrict__ y, int rows, int n) {
  const Shared shared = shared_parts();
  if (rows < 1 || static_cast<int>(blockIdx.x) * ROWS >= n) return;
  if (threadIdx.x < WARPS * 32) {
    multiply_tiles(shared, x, rows, n);
  } else {
    move_tiles(shared, {codes, scales, n}, bias, y, rows);
  }
}
