// Means of consecutive tokens of a picture, eight channels a thread. What is not finite counts as zero.
//
// Compile-time: HALF (fp16, else bf16), THREADS.

#if HALF
#define to_float f16_to_float
#define pack pack_f16
#define LARGEST 65504.f
#else
#define to_float bf16_to_float
#define pack pack_bf16
#define LARGEST 3.3895314e38f
#endif

// x (pictures * picture_tokens, vectors * 8), out (pictures * groups, vectors * 8); `each` tokens have a mean, the last
// ones of a picture perhaps fewer
KERNEL void __launch_bounds__(THREADS) token_means(const uint4* __restrict__ x, uint4* __restrict__ out, int means,
                                                   int vectors, int picture_tokens, int groups, int each) {
  const int at = blockIdx.x * THREADS + threadIdx.x, mean = at / vectors, v = at - mean * vectors;
  if (mean >= means) return;
  const int picture = mean / groups, first = (mean - picture * groups) * each;
  const int count = min(each, picture_tokens - first);
  const uint4* const from = x + (static_cast<i64>(picture) * picture_tokens + first) * vectors + v;
  float sum[8] = {};
#pragma unroll 8
  for (int i = 0; i < count; ++i) {
    const uint4 r = __ldg(from + static_cast<i64>(i) * vectors);
    const u32 words[4] = {r.x, r.y, r.z, r.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      sum[2 * j] += to_float(static_cast<u16>(words[j]));
      sum[2 * j + 1] += to_float(static_cast<u16>(words[j] >> 16));
    }
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    sum[j] /= static_cast<float>(count);
    if (!(fabsf(sum[j]) <= LARGEST)) sum[j] = 0.f;
  }
  out[at] = make_uint4(pack(sum[0], sum[1]), pack(sum[2], sum[3]), pack(sum[4], sum[5]), pack(sum[6], sum[7]));
}
