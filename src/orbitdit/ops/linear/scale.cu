// The epilogue of a product that has none: out = sums * token_scale * row_scale + bias, four columns a thread.
//
// Compile-time: SUMS (0: int32, 1: fp32), OUTPUT (0: bf16, 1: fp16), BIAS (0: none, 1: bf16, 2: fp16), THREADS.

#if SUMS
#define sum_to_float __int_as_float
#else
#define sum_to_float static_cast<float>
#endif

#if OUTPUT
#define pack pack_f16
#else
#define pack pack_bf16
#endif
#if BIAS == 2
#define bias_to_float f16_to_float
#else
#define bias_to_float bf16_to_float
#endif

// sums (tokens, columns) of 32 bits, out (tokens, columns); columns is a multiple of 4
KERNEL void __launch_bounds__(THREADS) scale(const int4* __restrict__ sums, const float* __restrict__ token_scales,
                                             const float* __restrict__ row_scales, const u16* __restrict__ bias,
                                             uint2* __restrict__ out, int tokens, int columns) {
  const int quads = columns / 4;
  for (int token = blockIdx.x; token < tokens; token += gridDim.x) {
    const float t = token_scales[token];
    for (int quad = threadIdx.x; quad < quads; quad += THREADS) {
      const i64 at = static_cast<i64>(token) * quads + quad;
      const int4 sum = sums[at];
      const float4 r = reinterpret_cast<const float4*>(row_scales)[quad];
      float y[4] = {sum_to_float(sum.x) * t * r.x, sum_to_float(sum.y) * t * r.y, sum_to_float(sum.z) * t * r.z,
                    sum_to_float(sum.w) * t * r.w};
#if BIAS
      for (int i = 0; i < 4; ++i) y[i] += bias_to_float(bias[4 * quad + i]);
#endif
      out[at] = make_uint2(pack(y[0], y[1]), pack(y[2], y[3]));
    }
  }
}
