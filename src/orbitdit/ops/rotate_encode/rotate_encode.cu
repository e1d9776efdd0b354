// Tokens to codes on the number grid: norm, permutation, signs, block-Hadamard and nearest centroid in one pass.
//
// A block of threads takes TOKENS tokens at a time. It reads each once, 16 bytes a thread, takes the norms on the way
// (the diagonal of X X^T, on the tensor cores), and lays the tokens into shared memory channel by channel, so that one
// read of the gather serves all of them. The rest stays in registers: a warp gathers 256 coordinates as a 16 x 16
// matrix in the layout of a B operand and multiplies it with H_16 from the left; the product has the layout of an A
// operand, is rounded to fp16 once, and is multiplied with H_16 from the right. That is H_256, since H_256 = H_16 (x)
// H_16 for any assignment of index bits to rows and columns. Larger Hadamard matrices combine the products of FACTOR1
// tiles on the left and FACTOR2 on the right with the signs of H_FACTOR1 and H_FACTOR2: in the product's own sum, or
// with BUTTERFLIES afterwards in fp32, which saves products and costs additions (with SPLIT, FACTOR2 warps share that
// work through shared memory); smaller ones are H on some bits of row and column (ROW_BITS, COLUMN_BITS) and the
// identity on the others.
//
// Bits of a coordinate's index in its tile, low to high: c0 c3 r3 c1 c2 r0 r1 r2 (r: row, c: column), which gives each
// lane 8 consecutive coordinates in the end, and `lane * 8` is where they start.
//
// The power of two in 1 / norm rides on the left H_16, which keeps the rounding to fp16 in range for nothing; the rest
// of 1 / norm, and what the Hadamard factors leave out, is in the slope of the bins.
//
// A code is looked up. Up to 4 bits, 32 equal bins hold at most one boundary each; lane k holds the entry of bin k (the
// boundary's place in the bin above 16 bits, then the grid byte above it, then the one below), and a shuffle is the
// table, without bank conflicts. For more bits, BINS bins in shared memory hold the grid byte of their middle; their
// width was chosen so that boundaries lie close to edges of bins.
//
// What a token is (BEFORE): 0, a row of x. 1, FIRST channels of `extra`, then gelu(x) (tanh approximation), as the MLP
// of a transformer block has it. 2, LayerNorm(x) * (1 + scale) + shift without other parameters, as AdaLN has it; each
// row of scale and shift is for `batch_tokens` tokens. 3, silu(x) * extra, as a gated MLP has it. 4, RMSNorm(x) times
// the weight and (1 + scale), or the weight alone where `scale` is null. All in fp32, rounded to 16 bits once.
//
// Tokens may be encoded as the sum of a mean that they share and of what is left without it (see means.py): `each`
// consecutive ones of the `sample_tokens` of a sample, which has `groups` of them, share one. That takes two launches.
// The first (AVERAGE) makes a token of each group: the mean of what the step before makes of its tokens, rounded to 16
// bits, 0 where it is not finite. It writes the rows of `means` and encodes them; their values come out in fp16. The
// second (CENTRED) encodes tokens less their mean, rounded to 16 bits too, and adds the mean's values in fp16: with a
// scale for the largest sum that the two codebooks have, it is rounded to the grid (e4m3 or int8, as CENTRED says).
// Both codebooks are on the grid int8, and their tables have 128 more, so that a byte comes to fp16 at full rate. A
// block takes consecutive tokens, so that the L1 cache holds their mean, and blocks begin with the last tokens, which
// the L2 cache still holds.
//
// A block that takes one short token at a time has two places for it: while one is worked on, the next is on its way to
// the other, without registers (ASYNC). Two tokens do not lie in shared memory as they arrive, so their way is through
// registers, and long ones would leave room for fewer blocks.
//
// Compile-time: DIM (a multiple of 16), TOKENS (1, 2, 4; 1 with AVERAGE), FACTOR1, FACTOR2, ROW_BITS, COLUMN_BITS,
// BINS, WARPS, SPLIT (0, or 1 where FACTOR2 divides FACTOR1 and WARPS), BUTTERFLIES, HALF (fp16, else bf16), MIN_BLOCKS
// (a processor, for the compiler's choice of registers), BEFORE, FIRST (a multiple of 8), AVERAGE, CENTRED (0; 1 on
// e4m3, 2 on int8).

#define TILES (FACTOR1 * FACTOR2)
#define THREADS (WARPS * 32)
#define VECTORS (DIM / 8)
#define UNITS ((DIM + 256 * TILES - 1) / (256 * TILES))
#define STEPS ((VECTORS + THREADS - 1) / THREADS)  // vectors of a token a thread
#define ASYNC (TOKENS == 1 && DIM <= 4096 && !AVERAGE)
#define STAGE_BYTES (TOKENS * (DIM + 8) * 2)
#define STAGES_BYTES ((ASYNC ? 2 : 1) * STAGE_BYTES)
#define GELU (BEFORE == 1)
#define LAYER_NORM (BEFORE == 2)
#define SILU (BEFORE == 3)
#define RMS_NORM (BEFORE == 4)
#define NORM (LAYER_NORM || RMS_NORM)
#define AT_A_TIME ((SILU ? 4 : 8) / TOKENS)
// what it asks for at a time: norms need all of a token, and means are of many
#define LOADS (AVERAGE ? 1 : NORM || STEPS < AT_A_TIME ? STEPS : AT_A_TIME)
#define SIDE_BY_SIDE (SPLIT ? WARPS / FACTOR2 : WARPS)  // units that a block has in hand
#define ROUNDS ((UNITS + SIDE_BY_SIDE - 1) / SIDE_BY_SIDE)

#if HALF
#define input_to_float f16_to_float
#define mma_input mma_f16
#define mma_input_first mma_f16_first
#define mma_input_k8 mma_f16_k8
#define pack_input pack_f16
#define fma_input_x2 fma_f16x2
#define ONE 0x3c00u
#define LARGEST 65504.f
#else
#define input_to_float bf16_to_float
#define mma_input mma_bf16
#define mma_input_first mma_bf16_first
#define mma_input_k8 mma_bf16_k8
#define pack_input pack_bf16
#define fma_input_x2 fma_bf16x2
#define ONE 0x3f80u
#define LARGEST 3.3895314e38f
#endif
#define GROUP 16  // tokens that share a mean, at most

// An entry of the Hadamard matrix over the bits in `mask` (identity over the others) as 16 bits, `one` being 1.0.
__device__ inline u32 entry(int row, int column, int mask, u32 one) {
  return (row ^ column) & ~mask ? 0u : one | (__popc(row & column & mask) & 1) << 15;
}

__device__ inline u32 entry_pair(int row, int column, int mask, u32 one) {
  return entry(row, column, mask, one) | entry(row, column + 1, mask, one) << 16;
}

// The Hadamard matrix of order N over N tiles' products, which lie alike in all lanes: butterflies.
template <int N>
__device__ inline void hadamard(float (&sum)[N][2][4]) {
#pragma unroll
  for (int step = 1; step < N; step *= 2)
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (!(i & step))
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          float &one = sum[i][j >> 2][j & 3], &two = sum[i | step][j >> 2][j & 3];
          const float difference = one - two;
          one += two;
          two = difference;
        }
}

__device__ inline float sum_of_warp(float v) {
#pragma unroll
  for (int step = 16; step; step >>= 1) v += __shfl_xor_sync(0xffffffffu, v, step);
  return v;
}

__device__ inline float max_of_warp(float v) {
#pragma unroll
  for (int step = 16; step; step >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, step));
  return v;
}

// The norm of a token whose squares leave fp32, by all threads of the block.
__device__ float careful_norm(const u16* token, float* partial) {
  const int warp = threadIdx.x >> 5;
  float largest = 0.f;
  for (int c = threadIdx.x; c < DIM; c += THREADS) largest = fmaxf(largest, fabsf(input_to_float(token[c * TOKENS])));
  largest = max_of_warp(largest);
  __syncthreads();
  if ((threadIdx.x & 31) == 0) partial[warp] = largest;
  __syncthreads();
  for (int w = 0; w < WARPS; ++w) largest = fmaxf(largest, partial[w]);
  float sum = 0.f;
  for (int c = threadIdx.x; c < DIM; c += THREADS) {
    const float v = input_to_float(token[c * TOKENS]) / (largest > 0.f ? largest : 1.f);
    sum += v * v;
  }
  sum = sum_of_warp(sum);
  __syncthreads();
  if ((threadIdx.x & 31) == 0) partial[warp] = sum;
  __syncthreads();
  sum = 0.f;
  for (int w = 0; w < WARPS; ++w) sum += partial[w];
  __syncthreads();
  return largest * sqrtf(sum);
}

// The two numbers in a register, and `change(number, channel of 8)` of all eight in four of them.
__device__ inline float low_of(u32 word) { return input_to_float(static_cast<u16>(word)); }
__device__ inline float high_of(u32 word) { return input_to_float(static_cast<u16>(word >> 16)); }

template <typename Change>
__device__ inline uint4 change_all(uint4 r, Change change) {
  return make_uint4(pack_input(change(low_of(r.x), 0), change(high_of(r.x), 1)),
                    pack_input(change(low_of(r.y), 2), change(high_of(r.y), 3)),
                    pack_input(change(low_of(r.z), 4), change(high_of(r.z), 5)),
                    pack_input(change(low_of(r.w), 6), change(high_of(r.w), 7)));
}

// Number `channel` of 8.
__device__ inline float channel_of(uint4 r, int channel) {
  const u32 words[4] = {r.x, r.y, r.z, r.w}, word = words[channel >> 1];
  return channel & 1 ? high_of(word) : low_of(word);
}

// gelu(v) = v / 2 * (1 + tanh(sqrt(2 / pi) * (v + 0.044715 v^3)))
__device__ inline float gelu(float v, int) {
  const float half = 0.5f * v;
  return __fmaf_rn(half, tanh_fast(v * __fmaf_rn(v * v, 0.0356774081f, 0.7978845608f)), half);
}

// silu(v) = v / (1 + exp(-v)) = v / 2 * (1 + tanh(v / 2))
__device__ inline float silu(float v) {
  const float half = 0.5f * v;
  return __fmaf_rn(half, tanh_fast(half), half);
}

// Of [x y] [x]^T and [x y] [y]^T the diagonals, in rows g and g + 8.
__device__ inline void add_squares(float (&squares)[2][4], uint4 r) {
  mma_input_k8(squares[0], r.x, r.y, r.x);
  mma_input_k8(squares[1], r.x, r.y, r.y);
  mma_input_k8(squares[0], r.z, r.w, r.z);
  mma_input_k8(squares[1], r.z, r.w, r.w);
}

// Adds the numbers of a vector to `total`, whose sum is that of the first column: c[0] and c[2] of lanes with q = 0.
__device__ inline void add_numbers(float (&total)[4], uint4 r) {
  mma_input_k8(total, r.x, r.y, ONE * 0x10001u);
  mma_input_k8(total, r.z, r.w, ONE * 0x10001u);
}

// a - b for all eight numbers, rounded once.
__device__ inline uint4 less(uint4 a, uint4 b) {
  const u32 minus_one = (ONE | 0x8000u) * 0x10001u;
  return make_uint4(fma_input_x2(b.x, minus_one, a.x), fma_input_x2(b.y, minus_one, a.y),
                    fma_input_x2(b.z, minus_one, a.z), fma_input_x2(b.w, minus_one, a.w));
}

// Two bytes, 128 more than an int8 number each, as fp16: 0x64.. is 1024 and more, where fp16 holds the integers.
__device__ inline u32 numbers_of(u32 low, u32 high) {
  return fma_f16x2(and_or(__byte_perm(low, high, 0x0400), 0x00ff00ffu, 0x64006400u), 0x3c003c00u, 0xe480e480u);
}

// Four numbers in fp16, two a register, as bytes of the grid.
__device__ inline u32 to_grid(u32 low, u32 high) {
#if CENTRED == 1
  return f16x2_to_e4m3(low) | f16x2_to_e4m3(high) << 16;
#else  // 1536 + k ends in the byte k
  const auto rounded = [](u32 pair) { return fma_f16x2(pair, 0x3c003c00u, 0x66006600u); };
  return __byte_perm(rounded(low), rounded(high), 0x6420);
#endif
}

// A lane's part of the sum of those diagonals.
__device__ inline float diagonal_of(const float (&squares)[2][4]) {
  const int g = threadIdx.x >> 2 & 7, q = threadIdx.x & 3;
  const float diagonal = g & 1 ? squares[0][1] + squares[1][3] : squares[0][0] + squares[1][2];
  return q == g >> 1 ? diagonal : 0.f;
}

// Lays vector v of all tokens out by channel: a word (or half a word, or two) holds one channel of each.
__device__ inline void lay_out(u8* staged, int v, const uint4 (&r)[TOKENS]) {
  uint4* const to = reinterpret_cast<uint4*>(staged) + v;
#if TOKENS == 1
  to[0] = r[0];
#elif TOKENS == 2
  to[0] = make_uint4(__byte_perm(r[0].x, r[1].x, 0x5410), __byte_perm(r[0].x, r[1].x, 0x7632),
                     __byte_perm(r[0].y, r[1].y, 0x5410), __byte_perm(r[0].y, r[1].y, 0x7632));
  to[VECTORS] = make_uint4(__byte_perm(r[0].z, r[1].z, 0x5410), __byte_perm(r[0].z, r[1].z, 0x7632),
                           __byte_perm(r[0].w, r[1].w, 0x5410), __byte_perm(r[0].w, r[1].w, 0x7632));
#else
  const u32 a[4] = {r[0].x, r[0].y, r[0].z, r[0].w}, b[4] = {r[1].x, r[1].y, r[1].z, r[1].w};
  const u32 c[4] = {r[2].x, r[2].y, r[2].z, r[2].w}, d[4] = {r[3].x, r[3].y, r[3].z, r[3].w};
#pragma unroll
  for (int j = 0; j < 4; ++j)
    to[j * VECTORS] = make_uint4(__byte_perm(a[j], b[j], 0x5410), __byte_perm(c[j], d[j], 0x5410),
                                 __byte_perm(a[j], b[j], 0x7632), __byte_perm(c[j], d[j], 0x7632));
#endif
}

#if GELU || SILU
#define SOURCE , const u16* __restrict__ extra, int extra_pitch, int pitch
#elif NORM  // `extra`: rows of shift like those of scale, or the weight
#define SOURCE \
  , const u16* __restrict__ scale, const u16* __restrict__ extra, int pitch, int batch_tokens, float epsilon
#else
#define SOURCE
#endif
#if AVERAGE
#define MEANS , u16* __restrict__ means, int sample_tokens, int groups, int each
#elif CENTRED  // reach: of the sum's scale, what a codebook's scale takes
#define MEANS                                                                                      \
  , const u16* __restrict__ means, const u16* __restrict__ mean_values, const float* __restrict__ mean_scales, \
      int sample_tokens, int groups, int each, float own_reach, float mean_reach
#else
#define MEANS
#endif

// x (tokens, DIM - FIRST), `pitch` numbers from row to row with GELU and SILU; gather (tiles, 32 lanes, 8) u16: place
// in shared memory, and in the highest bit the sign; table: 32 words or BINS bytes; out (tokens, DIM) grid bytes,
// scales (tokens,). With AVERAGE, `tokens` are groups; means (groups of all samples, DIM) in 16 bits, and their
// values in fp16, with AVERAGE in `out`. Dynamic shared memory: STAGES_BYTES and, with SPLIT, 512 for each token and
// tile that a block has in hand.
KERNEL void __launch_bounds__(THREADS, MIN_BLOCKS)
    rotate_encode(const u16* __restrict__ x, const uint4* __restrict__ gather, const uint4* __restrict__ table,
                  u8* __restrict__ out, float* __restrict__ scales, int tokens, float to_unit, float slope,
                  float grid_scale SOURCE MEANS) {
#if BINS > 32
  __shared__ uint4 bins[BINS / 16];
  const float base = index_base(bins);
  for (int i = threadIdx.x; i < BINS / 16; i += THREADS) copy_async(bins + i, table + i);
#else
  const u32 bin = reinterpret_cast<const u32*>(table)[threadIdx.x & 31];
#endif
  __shared__ float partial[TOKENS][WARPS];
#if NORM && AVERAGE
  __shared__ float norms[2][GROUP];  // mean, and 1 / the standard deviation, of each token
#elif NORM
  __shared__ float moments[2][TOKENS][WARPS];
#endif
  u8* staged = dynamic_shared();
  // the shuffle tells the compiler that all lanes agree on it
  const int lane = threadIdx.x & 31, warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0), g = lane >> 2, q = lane & 3;

  // what coordinates past the end read
  if (threadIdx.x < TOKENS * 8) {
    reinterpret_cast<u16*>(staged)[TOKENS * DIM + threadIdx.x] = 0;
    reinterpret_cast<u16*>(staged + STAGES_BYTES - TOKENS * 16)[threadIdx.x] = 0;
  }

  u32 left[4], right[2][2][2];  // right: [negated]
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    left[i] = entry_pair(g + 8 * (i & 1), 2 * q + 8 * (i >> 1), ROW_BITS, ONE);
    right[0][i >> 1][i & 1] = entry_pair(g + 8 * (i >> 1), 2 * q + 8 * (i & 1), COLUMN_BITS, 0x3c00u);
    right[1][i >> 1][i & 1] = right[0][i >> 1][i & 1] ^ 0x80008000u;
  }

  // Token t of those at hand, past the end the last one; and its vector v.
  auto token_of = [&](int first, int t) { return min(first + t, tokens - 1); };
  auto source = [&](i64 token, int v) {
#if GELU || SILU
    if (v * 8 < FIRST) return extra + token * extra_pitch + v * 8;
    return x + token * pitch + (v * 8 - FIRST);
#else
    return x + token * DIM + v * 8;
#endif
  };

#if CENTRED  // a block's tokens are consecutive, counted from the last
  const int turns = (tokens + TOKENS - 1) / TOKENS, of_block = (turns + gridDim.x - 1) / gridDim.x * TOKENS;
  const int begin = blockIdx.x * of_block, next = TOKENS, end = min(begin + of_block, turns * TOKENS);
  auto token_at = [&](int at) { return (turns - 1) * TOKENS - at; };
#else
  const int begin = blockIdx.x * TOKENS, next = gridDim.x * TOKENS, end = tokens;
  auto token_at = [](int at) { return at; };
#endif

#if ASYNC
  auto fetch = [&](int first, u8* to) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      const int v = step * THREADS + threadIdx.x;
      if ((step + 1) * THREADS <= VECTORS || v < VECTORS) copy_async(to + v * 16, source(first, v));
    }
  };
  if (begin < end) fetch(token_at(begin), staged);
  u8* other = staged + STAGE_BYTES;
#endif

  for (int at = begin; at < end; at += next) {
    const int first = token_at(at);
#if ASYNC
    wait_for_copies();  // of this thread: the others are waited for at the next barrier
    if (at + next < end) fetch(token_at(at + next), other);
#endif
#if CENTRED
    int group_of[TOKENS];
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
      const int token = token_of(first, t), sample = token / sample_tokens;
      group_of[t] = sample * groups + (token - sample * sample_tokens) / each;
    }
#elif AVERAGE
    const int sample = first / groups, in_sample = (first - sample * groups) * each;
    const i64 group_start = static_cast<i64>(sample) * sample_tokens + in_sample;
    const int count = min(each, sample_tokens - in_sample);
#if NORM
    for (int i = warp; i < count; i += WARPS) {  // a warp takes the moments of a token
      float total[4] = {}, raw[2][4] = {};
#pragma unroll 4
      for (int v = lane; v < (VECTORS + 31) / 32 * 32; v += 32) {
        uint4 r = make_uint4(0, 0, 0, 0);
        if (v < VECTORS) r = __ldg(reinterpret_cast<const uint4*>(source(group_start + i, v)));
        add_squares(raw, r);
        if (!RMS_NORM) add_numbers(total, r);
      }
      const float sum = sum_of_warp(q == 0 ? total[0] + total[2] : 0.f), all_squares = sum_of_warp(diagonal_of(raw));
      const float mean = RMS_NORM ? 0.f : sum * (1.f / DIM);
      const float variance = __fmaf_rn(-mean, mean, all_squares * (1.f / DIM));
      if (lane == 0) norms[0][i] = mean, norms[1][i] = rsqrtf((variance < 0.f ? 0.f : variance) + epsilon);
    }
    __syncthreads();
#endif
    // Vector v of the group's mean.
    auto mean_of_group = [&](int v) {
      float sum[8] = {};
#pragma unroll 8
      for (int i = 0; i < count; ++i) {
        const i64 token = group_start + i;
        const uint4 r = __ldg(reinterpret_cast<const uint4*>(source(token, v)));
#if SILU
        const uint4 gates = __ldg(reinterpret_cast<const uint4*>(extra + token * extra_pitch + v * 8));
#elif NORM
        const float mean = norms[0][i], deviation = norms[1][i];
#endif
#pragma unroll
        for (int channel = 0; channel < 8; ++channel) {
          const float number = channel_of(r, channel);
#if GELU
          sum[channel] += v * 8 < FIRST ? number : gelu(number, channel);
#elif SILU
          sum[channel] += silu(number) * channel_of(gates, channel);
#elif NORM
          sum[channel] += (number - mean) * deviation;
#else
          sum[channel] += number;
#endif
        }
      }
#if NORM
      const i64 at = group_start / batch_tokens * pitch + v * 8;
      const auto row = [](const u16* p) { return __ldg(reinterpret_cast<const uint4*>(p)); };
      const uint4 scales_of = RMS_NORM && !scale ? make_uint4(0, 0, 0, 0) : row(scale + at);
      const uint4 extras_of = row(extra + (RMS_NORM ? v * 8 : at));
#endif
      uint4 means_of = make_uint4(0, 0, 0, 0);
      means_of = change_all(means_of, [&](float, int channel) {
        float mean = sum[channel] / static_cast<float>(count);
#if NORM
        const float gain = 1.f + channel_of(scales_of, channel), other = channel_of(extras_of, channel);
        mean = RMS_NORM ? mean * (gain * other) : __fmaf_rn(mean, gain, other);
#endif
        return fabsf(mean) <= LARGEST ? mean : 0.f;
      });
      *reinterpret_cast<uint4*>(means + static_cast<i64>(first) * DIM + v * 8) = means_of;
      return means_of;
    };
#endif
    float squares[TOKENS][2][4] = {};
#pragma unroll
    for (int step = 0; step < STEPS; step += LOADS) {
      uint4 loaded[LOADS][TOKENS];
#if SILU && !AVERAGE
      uint4 gates[LOADS][TOKENS];
#endif
#pragma unroll
      for (int l = 0; l < LOADS; ++l)
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
          const int v = (step + l) * THREADS + threadIdx.x;
          if ((step + l + 1) * THREADS > VECTORS) loaded[l][t] = make_uint4(0, 0, 0, 0);
          if ((step + l + 1) * THREADS <= VECTORS || v < VECTORS) {
#if AVERAGE
            loaded[l][t] = mean_of_group(v);
#elif ASYNC
            loaded[l][t] = reinterpret_cast<const uint4*>(staged)[v];
#else
            loaded[l][t] = load_streaming(source(token_of(first, t), v));
#endif
#if SILU && !AVERAGE
            gates[l][t] = load_streaming(extra + static_cast<i64>(token_of(first, t)) * extra_pitch + v * 8);
#endif
          }
        }
#if NORM && !AVERAGE
      float mean[TOKENS], deviation[TOKENS];  // of 1 / the standard deviation; an RMSNorm takes the mean for zero
#pragma unroll
      for (int t = 0; t < TOKENS; ++t) {
        float total[4] = {}, raw[2][4] = {};
#pragma unroll
        for (int l = 0; l < LOADS; ++l) {
          add_squares(raw, loaded[l][t]);
          if (!RMS_NORM) add_numbers(total, loaded[l][t]);
        }
        const float sum = sum_of_warp(q == 0 ? total[0] + total[2] : 0.f);
        const float sum_of_squares = sum_of_warp(diagonal_of(raw));
        if (lane == 0) moments[0][t][warp] = sum, moments[1][t][warp] = sum_of_squares;
      }
      __syncthreads();
#pragma unroll
      for (int t = 0; t < TOKENS; ++t) {
        float sum = 0.f, sum_of_squares = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) sum += moments[0][t][w], sum_of_squares += moments[1][t][w];
        mean[t] = RMS_NORM ? 0.f : sum * (1.f / DIM);
        const float variance = __fmaf_rn(-mean[t], mean[t], sum_of_squares * (1.f / DIM));
        deviation[t] = rsqrtf((variance < 0.f ? 0.f : variance) + epsilon);  // a comparison keeps NaN
      }
#endif
#pragma unroll
      for (int l = 0; l < LOADS; ++l) {
        const int v = (step + l) * THREADS + threadIdx.x;
        if (step + l >= STEPS) break;
        const bool inside = (step + l + 1) * THREADS <= VECTORS || v < VECTORS;
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
          uint4& r = loaded[l][t];
#if AVERAGE  // all is done
#elif GELU
          if (v * 8 >= FIRST) r = change_all(r, gelu);
#elif SILU
          const auto gated = [&](float number, int i) { return silu(number) * channel_of(gates[l][t], i); };
          if (inside) r = change_all(r, gated);
#elif NORM
          if (inside) {
            const i64 at = static_cast<i64>(token_of(first, t) / batch_tokens) * pitch + v * 8;
            const auto row = [](const u16* p) { return __ldg(reinterpret_cast<const uint4*>(p)); };
            const uint4 scales_of = RMS_NORM && !scale ? make_uint4(0, 0, 0, 0) : row(scale + at);
            const uint4 extras_of = row(extra + (RMS_NORM ? v * 8 : at));
            r = change_all(r, [&](float number, int channel) {
              const float gain = __fmaf_rn(channel_of(scales_of, channel), deviation[t], deviation[t]);
              const float other = channel_of(extras_of, channel);
              return RMS_NORM ? number * (gain * other) : __fmaf_rn(number - mean[t], gain, other);
            });
          }
#endif
#if CENTRED
          if (inside)
            r = less(r, __ldg(reinterpret_cast<const uint4*>(means + static_cast<i64>(group_of[t]) * DIM) + v));
#endif
          add_squares(squares[t], r);
        }
#if !ASYNC || BEFORE || CENTRED
        if (inside) lay_out(staged, v, loaded[l]);
#endif
      }
    }
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
      const float sum = sum_of_warp(diagonal_of(squares[t]));
      if (lane == 0) partial[t][warp] = sum;
    }
#if BINS > 32 && !ASYNC
    wait_for_copies();  // of the bins
#endif
    __syncthreads();

    float norm[TOKENS];
    u32 unusual = 0;
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) sum += partial[t][w];
      unusual |= (sum > 1e-24f && sum < 1e36f ? 0u : 1u) << t;
      norm[t] = sqrtf(sum);
    }
    if (unusual)
#pragma unroll
      for (int t = 0; t < TOKENS; ++t)
        if (unusual >> t & 1) norm[t] = careful_norm(reinterpret_cast<const u16*>(staged) + t, partial[0]);

    float factor[TOKENS], rise[TOKENS];
    u32 scaled[TOKENS][4];
#if CENTRED
    u32 own_factor[TOKENS], mean_factor[TOKENS];  // in both halves
#endif
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
      float token_scale = norm[t] * grid_scale;
#if CENTRED
      const float own = token_scale, of_mean = __ldg(mean_scales + group_of[t]);
      token_scale = __fmaf_rn(own, own_reach, of_mean * mean_reach);
      const bool usual = token_scale > 0.f && token_scale < 3e38f;
      const float own_part = usual ? own / token_scale : 0.f, mean_part = usual ? of_mean / token_scale : 0.f;
      own_factor[t] = pack_f16(own_part, own_part);
      mean_factor[t] = pack_f16(mean_part, mean_part);
#endif
      if (threadIdx.x == t && first + t < tokens) scales[first + t] = token_scale;
      factor[t] = to_unit / (norm[t] + 1e-10f);
      const u32 bits = __float_as_uint(factor[t]);
      rise[t] = HALF ? slope : slope * __uint_as_float((bits & 0x7fffffu) | 0x3f800000u);
      const u32 exponents = (bits >> 23) * 0x00800080u;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const u32 filled = (left[i] >> 7 & 0x00010001u) * 0x7f80u;  // exponents of entries that are not zero
        scaled[t][i] = HALF ? left[i] : (left[i] & 0x80008000u) | (exponents & filled);
      }
    }

    // The left product of one row of tiles (f2) of a unit, as A operands of the right one.
    auto left_product = [&](int unit, int f2, u32 (&middle)[FACTOR1][TOKENS][4]) {
      u32 b[FACTOR1][TOKENS][2][2];
#pragma unroll
      for (int f1 = 0; f1 < FACTOR1; ++f1) {
        const uint4 places = __ldg(gather + (unit * TILES + f2 * FACTOR1 + f1) * 32 + lane);
        const u32 place[4] = {places.x, places.y, places.z, places.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const u32 low = place[i] & 0x7fffu, high = place[i] >> 16 & 0x7fffu;
#if TOKENS == 1
          const u16* const channel = reinterpret_cast<const u16*>(staged);
          b[f1][0][i >> 1][i & 1] = xor_and(__byte_perm(channel[low], channel[high], 0x5410), place[i], 0x80008000u);
#elif TOKENS == 2
          const u32 one = reinterpret_cast<const u32*>(staged)[low], two = reinterpret_cast<const u32*>(staged)[high];
          b[f1][0][i >> 1][i & 1] = xor_and(__byte_perm(one, two, 0x5410), place[i], 0x80008000u);
          b[f1][1][i >> 1][i & 1] = xor_and(__byte_perm(one, two, 0x7632), place[i], 0x80008000u);
#else
          const uint2 one = reinterpret_cast<const uint2*>(staged)[low];
          const uint2 two = reinterpret_cast<const uint2*>(staged)[high];
          b[f1][0][i >> 1][i & 1] = xor_and(__byte_perm(one.x, two.x, 0x5410), place[i], 0x80008000u);
          b[f1][1][i >> 1][i & 1] = xor_and(__byte_perm(one.x, two.x, 0x7632), place[i], 0x80008000u);
          b[f1][2][i >> 1][i & 1] = xor_and(__byte_perm(one.y, two.y, 0x5410), place[i], 0x80008000u);
          b[f1][3][i >> 1][i & 1] = xor_and(__byte_perm(one.y, two.y, 0x7632), place[i], 0x80008000u);
#endif
        }
      }
#pragma unroll
      for (int t = 0; t < TOKENS; ++t) {
        float sum[FACTOR1][2][4];
#pragma unroll
        for (int f1 = 0; f1 < FACTOR1; ++f1)
#pragma unroll
          for (int n = 0; n < 2; ++n) {
#if BUTTERFLIES
            mma_input_first(sum[f1][n], scaled[t], b[f1][t][n]);
#else
#pragma unroll
            for (int o1 = 0; o1 < FACTOR1; ++o1) {
              u32 a[4];
#pragma unroll
              for (int i = 0; i < 4; ++i) a[i] = scaled[t][i] ^ (__popc(o1 & f1) & 1 ? 0x80008000u : 0u);
              if (f1 == 0)
                mma_input_first(sum[o1][n], a, b[0][t][n]);
              else
                mma_input(sum[o1][n], a, b[f1][t][n]);
            }
#endif
          }
#if BUTTERFLIES
        hadamard(sum);
#endif
#pragma unroll
        for (int o1 = 0; o1 < FACTOR1; ++o1)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float* const c = &sum[o1][i >> 1][2 * (i & 1)];
            middle[o1][t][i] = HALF ? pack_f16(c[0] * factor[t], c[1] * factor[t]) : pack_f16(c[0], c[1]);
          }
      }
    };

    // The right products of the tiles (o1, any) of a unit from the left products of all f2, their codes, and their way
    // out.
    auto finish = [&](int unit, int o1, int t, const u32 (&middle)[FACTOR2][4]) {
#if BUTTERFLIES
      float sums[FACTOR2][2][4];
#pragma unroll
      for (int f2 = 0; f2 < FACTOR2; ++f2)
#pragma unroll
        for (int n = 0; n < 2; ++n) mma_f16_first(sums[f2][n], middle[f2], right[0][n]);
      hadamard(sums);
#endif
#pragma unroll
      for (int o2 = 0; o2 < FACTOR2; ++o2) {
#if BUTTERFLIES
        const float(&sum)[2][4] = sums[o2];
#else
        float sum[2][4];
#pragma unroll
        for (int f2 = 0; f2 < FACTOR2; ++f2)
#pragma unroll
          for (int n = 0; n < 2; ++n)
            if (f2 == 0)
              mma_f16_first(sum[n], middle[0], right[0][n]);
            else
              mma_f16(sum[n], middle[f2], right[__popc(o2 & f2) & 1][n]);
#endif
        const int index = (unit * TILES + o2 * FACTOR1 + o1) * 256 + lane * 8;
        const bool inside = DIM % 256 == 0 || index < DIM;
#if CENTRED
        uint4 of_mean = make_uint4(0, 0, 0, 0);
        if (inside)
          of_mean =
              __ldg(reinterpret_cast<const uint4*>(mean_values + static_cast<i64>(group_of[t]) * DIM + index));
#endif
        u32 byte[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {  // bits of i: c0, c3, r3
          const float z = fma_sat(sum[i >> 1 & 1][(i & 1) + 2 * (i >> 2)], rise[t], 0.49999994f);  // 0: the lower code
#if BINS > 32
          byte[i] = look_up(bins, __fmaf_rn(z, __uint_as_float(BINS - 1), base));
#else
          const u32 place = __float_as_uint(__fmaf_rn(z, 2097151.f, 8388608.f));  // 5 bits bin, 16 bits place in it
          byte[i] = shift_if_greater(__shfl_sync(0xffffffffu, bin, place >> 16), place << 16);
#endif
        }
        if (first + t >= tokens || !inside) continue;
        const i64 to = static_cast<i64>(first + t) * DIM + index;
#if AVERAGE || CENTRED
        uint4 numbers = make_uint4(numbers_of(byte[0], byte[1]), numbers_of(byte[2], byte[3]),
                                   numbers_of(byte[4], byte[5]), numbers_of(byte[6], byte[7]));
#endif
#if AVERAGE
        *reinterpret_cast<uint4*>(reinterpret_cast<u16*>(out) + to) = numbers;
#elif CENTRED
        const auto both = [&](u32 own, u32 mean) {
          return fma_f16x2(own, own_factor[t], mul_f16x2(mean, mean_factor[t]));
        };
        *reinterpret_cast<uint2*>(out + to) =
            make_uint2(to_grid(both(numbers.x, of_mean.x), both(numbers.y, of_mean.y)),
                       to_grid(both(numbers.z, of_mean.z), both(numbers.w, of_mean.w)));
#else
        *reinterpret_cast<uint2*>(out + to) =
            make_uint2(join(byte[0], byte[1], byte[2], byte[3]), join(byte[4], byte[5], byte[6], byte[7]));
#endif
      }
    };

#pragma unroll 1
    for (int round = 0; round < ROUNDS; ++round) {
#if SPLIT
      // FACTOR2 warps share a unit: each makes one row of left products and finishes FACTOR1 tiles.
      const int unit = round * (WARPS / FACTOR2) + warp / FACTOR2, part = warp % FACTOR2;
      const bool active = UNITS % (WARPS / FACTOR2) == 0 || unit < UNITS;
      uint4* const exchange =
          reinterpret_cast<uint4*>(dynamic_shared() + STAGES_BYTES) + warp / FACTOR2 * (TILES * TOKENS * 32) + lane;
      if (active) {
        u32 middle[FACTOR1][TOKENS][4];
        left_product(unit, part, middle);
#pragma unroll
        for (int o1 = 0; o1 < FACTOR1; ++o1)
#pragma unroll
          for (int t = 0; t < TOKENS; ++t) {
            const u32(&m)[4] = middle[o1][t];
            exchange[((part * FACTOR1 + o1) * TOKENS + t) * 32] = make_uint4(m[0], m[1], m[2], m[3]);
          }
      }
      __syncthreads();
      if (active) {
#pragma unroll
        for (int t = 0; t < TOKENS; ++t)
#pragma unroll
          for (int j = 0; j < FACTOR1 / FACTOR2; ++j) {
            const int o1 = part * (FACTOR1 / FACTOR2) + j;
            u32 middle[FACTOR2][4];
#pragma unroll
            for (int f2 = 0; f2 < FACTOR2; ++f2) {
              const uint4 m = exchange[((f2 * FACTOR1 + o1) * TOKENS + t) * 32];
              middle[f2][0] = m.x, middle[f2][1] = m.y, middle[f2][2] = m.z, middle[f2][3] = m.w;
            }
            finish(unit, o1, t, middle);
          }
      }
      if (ROUNDS > 1) __syncthreads();
#else
      const int unit = round * WARPS + warp;
      if (UNITS % WARPS && unit >= UNITS) break;
      u32 left_products[FACTOR2][FACTOR1][TOKENS][4];
#pragma unroll
      for (int f2 = 0; f2 < FACTOR2; ++f2) left_product(unit, f2, left_products[f2]);
#pragma unroll
      for (int o1 = 0; o1 < FACTOR1; ++o1)
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
          u32 middle[FACTOR2][4];
#pragma unroll
          for (int f2 = 0; f2 < FACTOR2; ++f2)
#pragma unroll
            for (int i = 0; i < 4; ++i) middle[f2][i] = left_products[f2][o1][t][i];
          finish(unit, o1, t, middle);
        }
#endif
    }
    __syncthreads();
#if ASYNC
    u8* const done = staged;
    staged = other, other = done;
#endif
  }
}
