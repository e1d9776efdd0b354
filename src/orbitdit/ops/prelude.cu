// Everything that kernels say in PTX or to the hardware, once. tests/cuda/emulator.h defines the same names in plain
// C++, so that every kernel also runs on a CPU, thread by thread, in the tests.
//
// Fragments of the 16x8 tensor-core product C += A B, for lane = 4 * g + q (g < 8, q < 4), two 16-bit values a
// register, the first one low:
//   A (16 x 16): a[0] = A[g][2q, 2q+1], a[1] = A[g+8][2q, ..], a[2] = A[g][2q+8, ..], a[3] = A[g+8][2q+8, ..]
//   B (16 x 8):  b[0] = B[2q, 2q+1][g], b[1] = B[2q+8, 2q+9][g]
//   C (16 x 8):  c[0], c[1] = C[g][2q, 2q+1], c[2], c[3] = C[g+8][2q, 2q+1]

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;

#define KERNEL extern "C" __global__

__device__ inline u8* dynamic_shared() {
  extern __shared__ uint4 dynamic_shared_words[];
  return reinterpret_cast<u8*>(dynamic_shared_words);
}

__device__ inline void mma_bf16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline void mma_f16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// C = A B: saves setting C to zero.
__device__ inline void mma_bf16_first(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
      : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(0.f));
}

__device__ inline void mma_f16_first(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
      : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(0.f));
}

// The shorter 16x8 product, 8 along the sum: a[0] = A[g][2q, ..], a[1] = A[g+8][2q, ..], b = B[2q, ..][g].
__device__ inline void mma_bf16_k8(float (&c)[4], u32 a0, u32 a1, u32 b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b));
}

__device__ inline void mma_f16_k8(float (&c)[4], u32 a0, u32 a1, u32 b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b));
}

// Two floats rounded to nearest, `low` in the lower half.
__device__ inline u32 pack_f16(float low, float high) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

__device__ inline u32 pack_bf16(float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

__device__ inline float f16_to_float(u16 h) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(h));
  return r;
}

__device__ inline float bf16_to_float(u16 h) { return __uint_as_float(static_cast<u32>(h) << 16); }

// a * b + c, then clamped to [0, 1]; NaN gives 0.
__device__ inline float fma_sat(float a, float b, float c) { return __saturatef(__fmaf_rn(a, b, c)); }

// Look-ups in shared memory whose index is computed in floating point: as a multiple of 2^-149 a small integer is its
// own bits. `index_base` is where a table begins, as such a float, and `look_up` reads the byte at base + n.
__device__ inline float index_base(const void* table) {
  return __uint_as_float(static_cast<u32>(__cvta_generic_to_shared(table)));
}

__device__ inline u32 look_up(const void* table, float index) {
  u32 r;
  asm("ld.shared.u8 %0, [%1];" : "=r"(r) : "r"(__float_as_uint(index)));
  return r;
}

// word >> 8 if key > word, else word: picks one of two bytes by a boundary that `word` holds in its upper half.
__device__ inline u32 shift_if_greater(u32 word, u32 key) {
  asm("{ .reg .pred p; setp.gt.u32 p, %1, %0; @p shr.u32 %0, %0, 8; }" : "+r"(word) : "r"(key));
  return word;
}

// The lowest bytes of four words as one word.
__device__ inline u32 join(u32 a, u32 b, u32 c, u32 d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

// a ^ (b & c) in one instruction.
__device__ inline u32 xor_and(u32 a, u32 b, u32 c) {
  u32 r;
  asm("lop3.b32 %0, %1, %2, %3, 0x78;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}

// tanh to 2^-11.
__device__ inline float tanh_fast(float v) {
  float r;
  asm("tanh.approx.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}

// 16 bytes that are not read or written again soon.
__device__ inline uint4 load_streaming(const void* p) {
  uint4 r;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
      : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
      : "l"(p));
  return r;
}

// Starts a copy of 16 bytes from global to shared memory, past the L1 cache; `wait_for_copies` waits for this thread's.
__device__ inline void copy_async(void* to, const void* from) {
  const u32 shared = static_cast<u32>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
}

__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Barriers of 8 bytes in shared memory that count: a turn ends when `arrivals` threads have arrived, with all that they
// wrote before. `wait_for` returns when the turn is over; the first turn has parity 0, the next one parity 1, and so
// on. One thread makes barriers; others may use them after __syncthreads or, in its warp, __syncwarp.
__device__ inline u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

__device__ inline void make_barriers(u8* barriers, int count, u32 arrivals) {
  const u32 first = shared_address(barriers);
  for (int i = 0; i < count; i++)
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(first + i * 8), "r"(arrivals) : "memory");
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

__device__ inline void arrive(u8* barrier) {
  asm volatile("{ .reg .b64 s; mbarrier.arrive.shared.b64 s, [%0]; }" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives when this thread's copies so far have; what it has stored otherwise does not count.
__device__ inline void arrive_after_copies(u8* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Bulk copies (compute capability 9.0 and later) of a multiple of 16 bytes from global to shared memory, counted by a
// barrier: one thread arrives and says how many bytes the turn's copies bring together, and the turn waits for them.
__device__ inline void expect_bytes(u8* barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

__device__ inline void copy_bulk(u8* to, const void* from, u32 bytes, u8* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

__device__ inline void wait_for(u8* barrier, u32 parity) {
  u32 done;
  do {
#if __CUDA_ARCH__ >= 900
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
#else
    asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
#endif
                 : "=r"(done)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
  } while (!done);
}

// a * b + c for both halves of a register, rounded once.
__device__ inline u32 fma_f16x2(u32 a, u32 b, u32 c) {
  u32 r;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}

__device__ inline u32 fma_bf16x2(u32 a, u32 b, u32 c) {
  u32 r;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}

__device__ inline u32 mul_f16x2(u32 a, u32 b) {
  u32 r;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

// Two numbers rounded to the nearest in e4m3, at most 448 (compute capability 8.9 and later).
__device__ inline u32 f16x2_to_e4m3(u32 pair) {
  u16 r;
  asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;" : "=h"(r) : "r"(pair));
  return r;
}

// (a & b) | c in one instruction, which the compiler makes two of when b and c are constants.
__device__ inline u32 and_or(u32 a, u32 b, u32 c) {
  u32 r;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}
