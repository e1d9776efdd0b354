// y = x W^T + bias for at most 8 rows x and a weight of INT4 codes in groups of 64 inputs: AdaLN modulation.
//
//   x      (rows, DIM) bf16 or fp16, 16-byte aligned; y (rows, n) and bias (n,) or null in the same type
//   codes  (n, ceil(DIM / 2)) bytes, 8-byte aligned, low nibble first; a code stands for code - 8
//   scales (n, ceil(DIM / 64)) bf16, 8-byte aligned
//
// Reading the codes is all the cost there is, so everything serves to keep reads in flight. The weight is the A
// operand of the tensor cores: a tile of 16 of its rows at a time, with the rows of x as the 8 columns of B. A sum
// has no order, so the inputs of a group are dealt out such that a lane multiplies the 8 bytes that it has read: lane
// (g, q) reads bytes 8q .. 8q+7 of a group from rows g and g+8, and x lies in shared memory in the order in which the
// codes come out of these bytes. Codes become 16-bit numbers exactly, each group's sum is multiplied with its scale in
// fp32.
//
// SPLIT warps share a tile, each with its own chunks of 4 groups; their sums are added in a fixed order. A warp holds
// one chunk in registers, and as soon as it has multiplied two groups it reads the same two of its next chunk (of this
// tile or its next one) in their place, so that nearly all of a chunk is always on its way. There are no branches: what
// lies past the end counts as zeros, and rows past the last one as the last one, whose sums nobody stores.
//
// Compile-time: DIM; HALF (1: fp16, 0: bf16); WARPS of a block; SPLIT, which divides WARPS.
// Launch: WARPS * 32 threads, any number of blocks (more than tiles * SPLIT / WARPS are idle), and
// WARPS * 1024 + rows * (512 * SPLIT * ceil(DIM / (256 * SPLIT)) + 16) bytes of shared memory.

namespace {

constexpr int GROUP = 64, CHUNK = 4;
constexpr int GROUPS = (DIM + GROUP - 1) / GROUP, CHUNKS = (GROUPS + CHUNK - 1) / CHUNK;
constexpr int ROUNDS = (CHUNKS + SPLIT - 1) / SPLIT;  // chunks of a tile that one warp takes
constexpr int TILES = WARPS / SPLIT;                  // tiles that a block has in hand
constexpr int INPUTS = ROUNDS * SPLIT * CHUNK * GROUP;
constexpr bool WHOLE = DIM == INPUTS;
constexpr i64 PITCH = (DIM + 1) / 2;  // bytes of a row of codes
// A row of x in shared memory has 16 bytes more, so that neighbouring rows use different banks.
constexpr int X_PITCH = INPUTS * 2 + 16;
constexpr int PARTIAL = 128;  // floats of a tile: 16 rows of the weight by 8 of x

// What a lane holds of one chunk: 16 codes of each group and four scales, of rows g and g+8.
struct Chunk {
  uint2 codes[CHUNK][2];
  uint2 scales[2];
};

// Where a warp reads a chunk: its lane's codes and scales of rows g and g+8, and how many bytes of codes and how many
// groups are left in the row.
struct Place {
  const u8* codes[2];
  const u16* scales[2];
  int bytes_left, groups_left;
};

__device__ __forceinline__ Place locate(const u8* codes, const u16* scales, int tile, int chunk, int n) {
  const int g = threadIdx.x % 32 / 4, offset = chunk * (CHUNK * GROUP / 2) + threadIdx.x % 4 * 8;
  Place place;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const i64 row = min(tile * 16 + 8 * half + g, n - 1);
    place.codes[half] = codes + (row * PITCH + offset);
    place.scales[half] = scales + (row * GROUPS + chunk * CHUNK);
  }
  place.bytes_left = static_cast<int>(PITCH) - offset;
  place.groups_left = GROUPS - chunk * CHUNK;
  return place;
}

// 8 bytes of a row of codes, `left` bytes before the row's end.
__device__ __forceinline__ uint2 load_codes(const u8* p, int left) {
  if constexpr (DIM % GROUP == 0) {
    return WHOLE || left > 0 ? load_streaming8(p) : make_uint2(0, 0);
  } else {
    u32 word[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (i < left) word[i / 4] |= static_cast<u32>(p[i]) << 8 * (i % 4);
    return make_uint2(word[0], word[1]);
  }
}

__device__ __forceinline__ uint2 load_scales(const u16* p, int left) {
  if constexpr (GROUPS % CHUNK == 0) {
    return WHOLE || left > 0 ? __ldg(reinterpret_cast<const uint2*>(p)) : make_uint2(0, 0);
  } else {
    u32 scale[CHUNK];
#pragma unroll
    for (int i = 0; i < CHUNK; i++) scale[i] = i < left ? p[i] : 0;
    return make_uint2(scale[0] | scale[1] << 16, scale[2] | scale[3] << 16);
  }
}

// Groups i and i + 1 of the chunk at `from`.
__device__ __forceinline__ void load_two(Chunk& to, const Place& from, int i) {
#pragma unroll
  for (int j = i; j < i + 2; j++)
#pragma unroll
    for (int half = 0; half < 2; half++)
      to.codes[j][half] = load_codes(from.codes[half] + j * (GROUP / 2), from.bytes_left - j * (GROUP / 2));
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

// Adds the chunk's part of the tile to `total`, and puts the chunk at `next` in its place; `x` is the lane's row of x,
// at this chunk and the lane's q. Two groups at a time, so that a product need not wait for the one before.
__device__ __forceinline__ void multiply(float (&total)[4], Chunk& chunk, const u8* x, const Place& next) {
#pragma unroll
  for (int i = 0; i < CHUNK; i += 2) {
    float sum[2][4] = {};
#pragma unroll
    for (int word = 0; word < 2; word++) {
      uint4 v[2];
      u32 upper[2], lower[2];
#pragma unroll
      for (int j = 0; j < 2; j++) {
        v[j] = *reinterpret_cast<const uint4*>(x + (i + j) * GROUP * 2 + word * 16);
        upper[j] = word ? chunk.codes[i + j][0].y : chunk.codes[i + j][0].x;
        lower[j] = word ? chunk.codes[i + j][1].y : chunk.codes[i + j][1].x;
      }
#pragma unroll
      for (int j = 0; j < 2; j++) multiply_words<0>(sum[j], upper[j], lower[j], v[j].x, v[j].y);
#pragma unroll
      for (int j = 0; j < 2; j++) multiply_words<2>(sum[j], upper[j], lower[j], v[j].z, v[j].w);
    }
    load_two(chunk, next, i);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const u32 pair = i ? chunk.scales[half].y : chunk.scales[half].x;
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const float scale = __uint_as_float(j ? pair & 0xffff0000 : pair << 16);
        total[2 * half] = __fmaf_rn(scale, sum[j][2 * half], total[2 * half]);
        total[2 * half + 1] = __fmaf_rn(scale, sum[j][2 * half + 1], total[2 * half + 1]);
      }
    }
  }
  for (int half = 0; half < 2; half++) chunk.scales[half] = load_scales(next.scales[half], next.groups_left);
}

// x into shared memory: of each eight inputs the order 0 4 1 5 2 6 3 7, as `decode` does it; zeros after the last one.
__device__ __forceinline__ void stage(u8* to, const u16* x, int rows) {
  constexpr int EIGHTS = INPUTS / 8;
  for (int i = threadIdx.x; i < rows * EIGHTS; i += WARPS * 32) {
    const int row = i / EIGHTS, eight = i % EIGHTS;
    const u16* from = x + row * DIM + eight * 8;
    uint4 v = make_uint4(0, 0, 0, 0);
    if constexpr (DIM % 8 == 0) {
      if (eight * 8 < DIM) v = __ldg(reinterpret_cast<const uint4*>(from));
    } else {
      u32 w[8];
#pragma unroll
      for (int j = 0; j < 8; j++) w[j] = eight * 8 + j < DIM ? from[j] : 0;
      v = make_uint4(w[0] | w[1] << 16, w[2] | w[3] << 16, w[4] | w[5] << 16, w[6] | w[7] << 16);
    }
    *reinterpret_cast<uint4*>(to + row * X_PITCH + eight * 16) =
        make_uint4(__byte_perm(v.x, v.z, 0x5410), __byte_perm(v.x, v.z, 0x7632), __byte_perm(v.y, v.w, 0x5410),
                   __byte_perm(v.y, v.w, 0x7632));
  }
}

// The outputs of the block's tiles: each the sum of its warps' parts, in their order.
__device__ __forceinline__ void finish(const float* partial, u16* y, const u16* bias, int first_tile, int rows, int n) {
  for (int i = threadIdx.x; i < TILES * 16 * rows; i += WARPS * 32) {
    const int r = i % 16, row = i / 16 % rows, slot = i / 16 / rows;
    const int output = (first_tile + slot) * 16 + r;
    if (output >= n) continue;
    const float* part = partial + slot * SPLIT * PARTIAL + (r % 8 * 4 + row / 2) * 4 + r / 8 * 2 + row % 2;
    float sum = 0;
#pragma unroll
    for (int j = 0; j < SPLIT; j++) sum += part[j * PARTIAL];
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

KERNEL void __launch_bounds__(WARPS * 32) int4_linear(
    const u16* __restrict__ x, const u8* __restrict__ codes, const u16* __restrict__ scales,
    const u16* __restrict__ bias, u16* __restrict__ y, int rows, int n) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = warp % SPLIT;
  float* partial = reinterpret_cast<float*>(dynamic_shared());
  u8* staged = dynamic_shared() + 2 * WARPS * PARTIAL * sizeof(float);
  const int step = gridDim.x * TILES;
  if (rows < 1) return;

  int tile = blockIdx.x * TILES + warp / SPLIT;
  Chunk chunk;
  const Place start = locate(codes, scales, tile, part, n);
  load_two(chunk, start, 0);
  load_two(chunk, start, 2);
  for (int half = 0; half < 2; half++) chunk.scales[half] = load_scales(start.scales[half], start.groups_left);
  stage(staged, x, rows);
  __syncthreads();

  // Columns of B do not mix, so lanes without a row of x may hold any other.
  const u8* mine = staged + min(lane / 4, rows - 1) * X_PITCH + part * (CHUNK * GROUP * 2) + lane % 4 * 32;
  for (int first = blockIdx.x * TILES; first * 16 < n; first += step) {
    float total[4] = {0, 0, 0, 0};
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
      const bool last = round == ROUNDS - 1;
      if (last) tile += step;
      const Place next = locate(codes, scales, tile, last ? part : part + (round + 1) * SPLIT, n);
      multiply(total, chunk, mine + round * (SPLIT * CHUNK * GROUP * 2), next);
    }
    *reinterpret_cast<float4*>(partial + warp * PARTIAL + lane * 4) =
        make_float4(total[0], total[1], total[2], total[3]);
    __syncthreads();
    finish(partial, y, bias, first, rows, n);
    // The other half of the partial sums is free: whoever read it came through the barrier since.
    const int other = WARPS * PARTIAL;
    partial = partial == reinterpret_cast<float*>(dynamic_shared()) ? partial + other : partial - other;
  }
}
