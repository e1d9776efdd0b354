// Stands in for ops/prelude.cu and for CUDA's own names, so that a kernel's source runs on a CPU, thread by thread.
//
// Every CUDA thread is a fiber with a stack of its own; one operating-system thread runs them all. A fiber runs until
// it meets others (a barrier, a shuffle, a tensor-core product) and hands on to the next one that can go on. Blocks
// run one after another. When nobody can go on, or a fiber reads or writes where it may not, the launch ends with a
// message. What this cannot show: races between warps (one interleaving runs, or its mirror image with `reverse`),
// the rounding inside a tensor core (sums are in fp64 here), and speed.

#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <math.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <utility>

#define EMULATED 1
#ifndef __CUDA_ARCH__
#define __CUDA_ARCH__ 900
#endif

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

#define KERNEL extern "C" __global__
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// Other fibers write between two reads of the same address, which the compiler must not rule out.
#undef __restrict__
#define __restrict__

#define EMULATED_VECTORS(type, name)                                                      \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                \
  struct name##3 { type x, y, z; };                                                       \
  struct alignas(4 * sizeof(type)) name##4 { type x, y, z, w; };                          \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                        \
  inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }             \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
EMULATED_VECTORS(int, int)
EMULATED_VECTORS(u32, uint)
EMULATED_VECTORS(float, float)
EMULATED_VECTORS(u8, uchar)
EMULATED_VECTORS(u16, ushort)
#undef EMULATED_VECTORS
using dim3 = uint3;

static uint3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

namespace emulator {

constexpr int MAX_THREADS = 1024;
constexpr size_t PAGE = 4096, STACK = 128 << 10;

// What the last fiber to arrive does for all of them, given what each one brought.
using Work = void (*)(void** brought);

struct Fiber {
  jmp_buf resume;
  bool started, done;
  const u32* generation;  // waits until *generation is no longer `seen`
  u32 seen;
  const char* place;
};

struct Meeting {
  u32 generation;
  int arrived, live;
  Work work;
  void* brought[32];
};

// A thread's copies under way, and how many groups of them it has closed.
struct Copies {
  static constexpr int LIMIT = 512;
  struct Copy {
    void* to;
    const void* from;
    u32 group;
  };
  Copy copy[LIMIT];
  int count;
  u32 closed;
};

// The 8 bytes of a barrier: how many arrivals end a turn, how many there have been, whether the number of turns is odd,
// and the bytes that bulk copies bring in this one.
struct Barrier {
  u8 arrivals, arrived, parity, unused;
  u32 expected;
};

// A thread arrives at a barrier when the copies that it had started have arrived: its groups before `end`.
struct LateArrival {
  u8* barrier;
  int thread;
  u32 end;
};

struct BulkCopy {
  u8* to;
  const void* from;
  u32 bytes;
  u8* barrier;
};

static Fiber fibers[MAX_THREADS];
static Copies copies[MAX_THREADS];
constexpr int BULK_LIMIT = 4096;
static BulkCopy bulk[BULK_LIMIT];
static int bulk_count;
static LateArrival late[BULK_LIMIT];
static int late_count;
static Meeting news;  // who waits for a barrier looks again when there is something new
static Meeting warps[MAX_THREADS / 32], block;
static int current, threads, unfinished;
static bool backwards;
static u8* stacks;
static u8* shared;
static size_t shared_bytes;
static ucontext_t entry;
static sigjmp_buf leave;
static char message[1024];
static void (*body)(void**);
static void** arguments;

void run_thread();

[[noreturn]] inline void fail(const char* format, ...) {
  int n = snprintf(message, sizeof message, "block (%u, %u, %u), thread %d: ", blockIdx.x, blockIdx.y, blockIdx.z,
                   current);
  va_list list;
  va_start(list, format);
  vsnprintf(message + n, sizeof message - n, format, list);
  va_end(list);
  siglongjmp(leave, 2);
}

inline void on_signal(int number) {
  fail(number == SIGFPE ? "integer division by zero"
                        : "out of bounds or misaligned access to memory (or more than 124 KiB of stack)");
}

inline void set_thread(int thread) {
  current = thread;
  threadIdx.x = thread % blockDim.x;
  threadIdx.y = thread / blockDim.x % blockDim.y;
  threadIdx.z = thread / (blockDim.x * blockDim.y);
}

inline void release(Meeting& m) {
  m.arrived = 0;
  m.generation++;
}

[[noreturn]] inline void run_next() {
  for (int i = 1; i <= threads; i++) {
    int next = (current + (backwards ? threads - i : i)) % threads;
    Fiber& f = fibers[next];
    if (f.done || (f.started && *f.generation == f.seen)) continue;
    set_thread(next);
    if (f.started) _longjmp(f.resume, 1);
    f.started = true;
    entry.uc_stack.ss_sp = stacks + next * STACK + PAGE;
    entry.uc_stack.ss_size = STACK - PAGE;
    makecontext(&entry, run_thread, 0);
    setcontext(&entry);
  }
  int waiting = 0;
  const Fiber* other = nullptr;
  for (int i = 0; i < threads; i++) {
    if (fibers[i].done) continue;
    if (!waiting++) set_thread(i);
    if (strcmp(fibers[i].place, fibers[current].place)) other = &fibers[i];
  }
  if (other) fail("deadlock: it waits at %s, thread %d at %s; %d of %d threads are left", fibers[current].place,
                  static_cast<int>(other - fibers), other->place, waiting, threads);
  fail("deadlock: it waits at %s; %d of %d threads are left", fibers[current].place, waiting, threads);
}

inline bool complete(const Meeting& m, bool all_lanes) { return m.arrived && m.arrived == (all_lanes ? 32 : m.live); }

void run_thread() {
  body(arguments);
  fibers[current].done = true;
  if (--unfinished == 0) siglongjmp(leave, 1);
  Meeting& warp = warps[current / 32];
  warp.live--;
  block.live--;
  if (complete(warp, warp.work)) release(warp);
  if (complete(block, false)) release(block);
  run_next();
}

// noipa: for the compiler, anything may have changed on return.
__attribute__((noipa)) void wait(Meeting& m, const char* place) {
  Fiber& f = fibers[current];
  f.generation = &m.generation;
  f.seen = m.generation;
  f.place = place;
  if (_setjmp(f.resume) == 0) run_next();
}

// All lanes of a warp bring something; `work` sees it all. Without work it is a barrier of the lanes still running.
__attribute__((noipa)) void meet(const char* place, Work work, void* brought) {
  Meeting& m = warps[current / 32];
  if (m.arrived && m.work != work) fail("it comes to %s while other lanes of its warp wait elsewhere", place);
  m.work = work;
  m.brought[current % 32] = brought;
  m.arrived++;
  if (!complete(m, work)) return wait(m, place);
  if (work) work(m.brought);
  release(m);
}

__attribute__((noipa)) void check_mask(u32 mask) {
  if (mask != 0xffffffffu) fail("only the mask of all lanes is emulated");
}

inline Barrier load_barrier(const u8* barrier) {
  if (reinterpret_cast<uintptr_t>(barrier) % 8) fail("a barrier at %p", barrier);
  Barrier b;
  memcpy(&b, barrier, sizeof b);
  return b;
}

inline void store_barrier(u8* barrier, Barrier b) {
  load_barrier(barrier);
  memcpy(barrier, &b, sizeof b);
}

// The thread's groups before `end` arrive.
inline void arrive(int thread, u32 end) {
  Copies& mine = copies[thread];
  int left = 0;
  for (int i = 0; i < mine.count; i++) {
    const Copies::Copy copy = mine.copy[i];
    if (copy.group < end) memcpy(copy.to, copy.from, 16);
    else mine.copy[left++] = copy;
  }
  mine.count = left;
}

// Ends the barrier's turn if nothing but copies under way is missing, which arrive.
inline bool end_turn(u8* barrier) {
  Barrier b = load_barrier(barrier);
  u32 sum = 0;
  int arrived = b.arrived;
  for (int i = 0; i < bulk_count; i++)
    if (bulk[i].barrier == barrier) sum += bulk[i].bytes;
  for (int i = 0; i < late_count; i++) arrived += late[i].barrier == barrier;
  if (arrived > b.arrivals) fail("%d arrivals at a barrier for %d", arrived, b.arrivals);
  if (arrived < b.arrivals) return false;
  if (sum > b.expected) fail("copies of %u bytes at a barrier that expects %u", sum, b.expected);
  if (sum < b.expected) return false;
  int left = 0;
  for (int i = 0; i < bulk_count; i++) {
    const BulkCopy copy = bulk[i];
    if (copy.barrier == barrier) memcpy(copy.to, copy.from, copy.bytes);
    else bulk[left++] = copy;
  }
  bulk_count = left;
  left = 0;
  for (int i = 0; i < late_count; i++) {
    const LateArrival one = late[i];
    if (one.barrier == barrier) arrive(one.thread, one.end);
    else late[left++] = one;
  }
  late_count = left;
  store_barrier(barrier, {b.arrivals, 0, static_cast<u8>(1 - b.parity), 0, 0});
  release(news);
  return true;
}

inline bool run_block() {
  const size_t whole = (shared_bytes + 127) / 128 * 128;
  memset(shared, 0xCD, whole);
  memset(fibers, 0, sizeof fibers);
  memset(warps, 0, sizeof warps);
  memset(&block, 0, sizeof block);
  for (int i = 0; i < threads; i++) copies[i].count = copies[i].closed = 0;
  bulk_count = late_count = 0;
  unfinished = block.live = threads;
  for (int i = 0; i < threads; i++) warps[i / 32].live++;
  int how = sigsetjmp(leave, 1);
  if (how == 0) {
    current = backwards ? 0 : threads - 1;
    run_next();
  }
  if (how == 1) {
    if (bulk_count) {
      snprintf(message, sizeof message, "block (%u, %u, %u) ended with %d bulk copies under way", blockIdx.x,
               blockIdx.y, blockIdx.z, bulk_count);
      return false;
    }
    for (size_t i = shared_bytes; i < whole; i++) {
      if (shared[i] == 0xCD) continue;
      snprintf(message, sizeof message, "block (%u, %u, %u) wrote past its %zu bytes of shared memory, at byte %zu",
               blockIdx.x, blockIdx.y, blockIdx.z, shared_bytes, i);
      return false;
    }
  }
  return how == 1;
}

template <class... Args>
constexpr auto indices(void (*)(Args...)) {
  return std::make_index_sequence<sizeof...(Args)>{};
}

template <class... Args, size_t... I>
void call(void (*kernel)(Args...), void** args, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_const_t<Args>*>(args[I])...);
}

template <class... Args>
const char* check_sizes(void (*)(Args...), const int* sizes, int count) {
  constexpr int wanted[] = {sizeof(Args)..., 0};
  constexpr int n = sizeof...(Args);
  if (count != n) {
    snprintf(message, sizeof message, "the kernel takes %d arguments; %d were given", n, count);
    return message;
  }
  for (int i = 0; i < n; i++) {
    if (sizes[i] == wanted[i]) continue;
    snprintf(message, sizeof message, "argument %d takes %d bytes; %d were given", i, wanted[i], sizes[i]);
    return message;
  }
  return nullptr;
}

// Runs all blocks of a launch; null, or what went wrong.
inline const char* launch(void (*function)(void**), void** args, const int* grid, int threads_, int bytes,
                          bool backwards_) {
  if (threads_ < 1 || threads_ > MAX_THREADS) return "a block has 1 to 1024 threads";
  if (bytes < 0 || bytes > 227 << 10) return "a block has at most 227 KiB of shared memory";
  void* mapped = mmap(nullptr, threads_ * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return "no memory for the threads' stacks";
  stacks = static_cast<u8*>(mapped);
  for (int i = 0; i < threads_; i++) mprotect(stacks + i * STACK, PAGE, PROT_NONE);
  getcontext(&entry);
  // Shared memory starts at a multiple of 128 bytes and ends, up to that, at a page that may not be touched.
  constexpr size_t LIMIT = 228 << 10;
  alignas(PAGE) static u8 memory[LIMIT + PAGE];
  shared = memory + LIMIT - (bytes + 127) / 128 * 128;
  body = function;
  arguments = args;
  threads = threads_;
  shared_bytes = bytes;
  backwards = backwards_;
  gridDim = {u32(grid[0]), u32(grid[1]), u32(grid[2])};
  blockDim = {u32(threads), 1, 1};

  static u8 signal_stack[64 << 10];
  stack_t mine = {}, previous;
  mine.ss_sp = signal_stack;
  mine.ss_size = sizeof signal_stack;
  sigaltstack(&mine, &previous);
  struct sigaction action = {}, before[3];
  action.sa_handler = on_signal;
  action.sa_flags = SA_ONSTACK;
  constexpr int signals[] = {SIGSEGV, SIGBUS, SIGFPE};
  for (int i = 0; i < 3; i++) sigaction(signals[i], &action, &before[i]);

  mprotect(memory + LIMIT, PAGE, PROT_NONE);
  bool good = true;
  for (u32 z = 0; good && z < gridDim.z; z++)
    for (u32 y = 0; good && y < gridDim.y; y++)
      for (u32 x = 0; good && x < gridDim.x; x++) {
        blockIdx = {x, y, z};
        good = run_block();
      }

  for (int i = 0; i < 3; i++) sigaction(signals[i], &before[i], nullptr);
  sigaltstack(&previous, nullptr);
  munmap(mapped, threads * STACK);
  return good ? nullptr : message;
}

template <class To, class From>
inline To bits(From value) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To r;
  memcpy(&r, &value, sizeof r);
  return r;
}

}  // namespace emulator

// The entry that tests/cuda_emulator.py calls, for the kernel `name`.
#define EMULATED_ENTRY(name)                                                                                      \
  extern "C" const char* emulated_launch(const int* grid, int threads, int shared_bytes, int backwards, void** args, \
                                         const int* sizes, int count) {                                           \
    const char* wrong = emulator::check_sizes(name, sizes, count);                                                \
    if (wrong) return wrong;                                                                                      \
    auto body = [](void** a) { emulator::call(name, a, emulator::indices(name)); };                               \
    return emulator::launch(body, args, grid, threads, shared_bytes, backwards);                                  \
  }

__attribute__((noipa)) inline u8* dynamic_shared() { return emulator::shared; }

inline void __syncthreads() {
  emulator::Meeting& m = emulator::block;
  if (++m.arrived == m.live) return emulator::release(m);
  emulator::wait(m, "__syncthreads");
}

inline void __syncwarp(u32 mask = 0xffffffffu) {
  emulator::check_mask(mask);
  emulator::meet("__syncwarp", nullptr, nullptr);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

inline u32 __float_as_uint(float f) { return emulator::bits<u32>(f); }
inline int __float_as_int(float f) { return emulator::bits<int>(f); }
inline float __uint_as_float(u32 u) { return emulator::bits<float>(u); }
inline float __int_as_float(int i) { return emulator::bits<float>(i); }

inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1 / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __frsqrt_rn(float a) { return static_cast<float>(1 / sqrt(static_cast<double>(a))); }
inline float rsqrtf(float a) { return __frsqrt_rn(a); }
inline float __saturatef(float a) { return a > 0 ? (a < 1 ? a : 1.f) : 0.f; }
inline int __float2int_rn(float a) { return static_cast<int>(nearbyintf(a)); }
inline int __float2int_rd(float a) { return static_cast<int>(floorf(a)); }
inline int __float2int_rz(float a) { return static_cast<int>(a); }

#define EMULATED_MIN_MAX(type, a_type, b_type)                                                                    \
  inline type min(a_type a, b_type b) { return static_cast<type>(a) < static_cast<type>(b) ? static_cast<type>(a) \
                                                                                           : static_cast<type>(b); } \
  inline type max(a_type a, b_type b) { return static_cast<type>(a) > static_cast<type>(b) ? static_cast<type>(a) \
                                                                                           : static_cast<type>(b); }
EMULATED_MIN_MAX(int, int, int)
EMULATED_MIN_MAX(u32, u32, u32)
EMULATED_MIN_MAX(u32, int, u32)
EMULATED_MIN_MAX(u32, u32, int)
EMULATED_MIN_MAX(i64, i64, i64)
EMULATED_MIN_MAX(u64, u64, u64)
#undef EMULATED_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

inline int __popc(u32 a) { return __builtin_popcount(a); }
inline int __popcll(u64 a) { return __builtin_popcountll(a); }
inline int __clz(int a) { return a ? __builtin_clz(a) : 32; }
inline int __clzll(i64 a) { return a ? __builtin_clzll(a) : 64; }
inline int __ffs(int a) { return __builtin_ffs(a); }
inline int __ffsll(i64 a) { return __builtin_ffsll(a); }
inline u32 __funnelshift_r(u32 low, u32 high, u32 by) {
  return static_cast<u32>((static_cast<u64>(high) << 32 | low) >> (by & 31));
}
inline u32 __funnelshift_l(u32 low, u32 high, u32 by) {
  return static_cast<u32>((static_cast<u64>(high) << 32 | low) << (by & 31) >> 32);
}

// nvcc clears the fourth bit of each selector, which would ask for a byte's sign.
inline u32 __byte_perm(u32 x, u32 y, u32 selector) {
  const u64 source = static_cast<u64>(y) << 32 | x;
  u32 r = 0;
  for (int i = 0; i < 4; i++) r |= static_cast<u32>(source >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return r;
}

template <class T>
inline T __ldg(const T* p) { return *p; }

inline u16 float_to_bf16(float f) {
  u32 b = __float_as_uint(f);
  if ((b & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return static_cast<u16>((b + 0x7fff + (b >> 16 & 1)) >> 16);
}

inline u16 float_to_f16(float f) {
  u32 b = __float_as_uint(f), sign = b >> 16 & 0x8000, size = b & 0x7fffffff;
  if (size > 0x7f800000) return 0x7fff;
  if (size >= 0x477ff000) return sign | 0x7c00;                                             // 65520 rounds to infinity
  if (size < 0x38800000) return sign | static_cast<u32>(nearbyintf(fabsf(f) * 0x1p24f));  // steps of 2^-24 below 2^-14
  return sign | ((size + 0xfff + (size >> 13 & 1) - (112u << 23)) >> 13);
}

inline float bf16_to_float(u16 h) { return __uint_as_float(static_cast<u32>(h) << 16); }

inline float f16_to_float(u16 h) {
  u32 sign = (h & 0x8000u) << 16, rest = (h & 0x7fffu) << 13;
  if (rest >= 0x0f800000) return __uint_as_float(sign | rest | 0x7f800000);
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(rest) * 0x1p112f));
}

inline u32 pack_f16(float low, float high) { return static_cast<u32>(float_to_f16(high)) << 16 | float_to_f16(low); }
inline u32 pack_bf16(float low, float high) { return static_cast<u32>(float_to_bf16(high)) << 16 | float_to_bf16(low); }

inline float tanh_fast(float v) { return tanhf(v); }
inline float fma_sat(float a, float b, float c) { return __saturatef(__fmaf_rn(a, b, c)); }

template <class T>
inline T load_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) emulator::fail("a load of %zu bytes from %p", sizeof(T), p);
  T r;
  memcpy(&r, p, sizeof r);
  return r;
}

inline float index_base(const void*) { return 0; }
inline u32 look_up(const void* table, float index) { return static_cast<const u8*>(table)[__float_as_uint(index)]; }
inline u32 shift_if_greater(u32 word, u32 key) { return key > word ? word >> 8 : word; }
inline u32 join(u32 a, u32 b, u32 c, u32 d) { return (a & 255) | (b & 255) << 8 | (c & 255) << 16 | d << 24; }
inline u32 xor_and(u32 a, u32 b, u32 c) { return a ^ (b & c); }
inline uint4 load_streaming(const void* p) { return load_aligned<uint4>(p); }

// Copies that are under way arrive when they are waited for, as late as they may.
inline void copy_async(void* to, const void* from) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16)
    emulator::fail("a copy of 16 bytes from %p to %p", from, to);
  emulator::Copies& mine = emulator::copies[emulator::current];
  if (mine.count == emulator::Copies::LIMIT) emulator::fail("too many copies at a time for the emulator");
  mine.copy[mine.count++] = {to, from, mine.closed};
}

inline void wait_for_copies() { emulator::arrive(emulator::current, emulator::copies[emulator::current].closed + 1); }

inline void make_barriers(u8* barriers, int count, u32 arrivals) {
  for (int i = 0; i < count; i++) emulator::store_barrier(barriers + i * 8, {static_cast<u8>(arrivals), 0, 0, 0, 0});
}

inline void arrive_bringing(u8* barrier, u32 bytes) {
  emulator::Barrier b = emulator::load_barrier(barrier);
  if (b.arrived == b.arrivals) emulator::fail("more arrivals at a barrier than the %d it is for", b.arrivals);
  b.arrived++;
  b.expected += bytes;
  emulator::store_barrier(barrier, b);
  emulator::release(emulator::news);
}

inline void arrive(u8* barrier) { arrive_bringing(barrier, 0); }
inline void expect_bytes(u8* barrier, u32 bytes) { arrive_bringing(barrier, bytes); }

inline void arrive_after_copies(u8* barrier) {
  if (emulator::late_count == emulator::BULK_LIMIT) emulator::fail("too many copies at a time for the emulator");
  const u32 end = ++emulator::copies[emulator::current].closed;
  emulator::late[emulator::late_count++] = {barrier, emulator::current, end};
  emulator::release(emulator::news);
}

inline void copy_bulk(u8* to, const void* from, u32 bytes, u8* barrier) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes) % 16)
    emulator::fail("a copy of %u bytes from %p to %p", bytes, from, to);
  if (emulator::bulk_count == emulator::BULK_LIMIT) emulator::fail("too many copies at a time for the emulator");
  emulator::bulk[emulator::bulk_count++] = {to, from, bytes, barrier};
  emulator::release(emulator::news);
}

// A turn ends, with its copies, when somebody waits for it: as late as may be. Nobody may arrive for the next before.
inline void wait_for(u8* barrier, u32 parity) {
  while (emulator::load_barrier(barrier).parity == parity && !emulator::end_turn(barrier))
    emulator::wait(emulator::news, "a barrier in shared memory");
}

inline u32 and_or(u32 a, u32 b, u32 c) { return (a & b) | c; }

// Rounded twice where the exact result does not fit a float; kernels use them where it does.
inline u32 fma_f16x2(u32 a, u32 b, u32 c) {
  auto half = [=](int s) { return fmaf(f16_to_float(a >> s), f16_to_float(b >> s), f16_to_float(c >> s)); };
  return pack_f16(half(0), half(16));
}

inline u32 fma_bf16x2(u32 a, u32 b, u32 c) {
  auto half = [=](int s) { return fmaf(bf16_to_float(a >> s), bf16_to_float(b >> s), bf16_to_float(c >> s)); };
  return pack_bf16(half(0), half(16));
}

inline u32 mul_f16x2(u32 a, u32 b) { return fma_f16x2(a, b, 0x80008000u); }

inline float e4m3_to_float(u32 e) {
  if ((e & 127) == 127) return __uint_as_float(0x7fc00000u);
  const float size = e & 0x78 ? ldexpf(8 + (e & 7), static_cast<int>(e >> 3 & 15) - 10) : ldexpf(e & 7, -9);
  return e & 128 ? -size : size;
}

inline u32 float_to_e4m3(float f) {
  const u32 sign = __float_as_uint(f) >> 24 & 128;
  const float size = fabsf(f);
  if (!(size == size)) return 127;
  if (size >= 448) return sign | 126;
  u32 nearest = 0;
  for (u32 e = 1; e < 127; e++) {  // ties to the even code
    const float old = fabsf(e4m3_to_float(nearest) - size), now = fabsf(e4m3_to_float(e) - size);
    if (now < old || (now == old && e % 2 == 0)) nearest = e;
  }
  return sign | nearest;
}

inline u32 f16x2_to_e4m3(u32 pair) {
  return float_to_e4m3(f16_to_float(pair)) | float_to_e4m3(f16_to_float(pair >> 16)) << 8;
}

namespace emulator {

struct Shuffle { u32 value; int source; };

inline void shuffle(void** brought) {
  u32 values[32];
  for (int i = 0; i < 32; i++) values[i] = static_cast<Shuffle*>(brought[i])->value;
  for (int i = 0; i < 32; i++) {
    Shuffle* s = static_cast<Shuffle*>(brought[i]);
    s->value = values[s->source];
  }
}

inline void vote(void** brought) {
  u32 all = 0;
  for (int i = 0; i < 32; i++) all |= (*static_cast<u32*>(brought[i]) != 0 ? 1u : 0u) << i;
  for (int i = 0; i < 32; i++) *static_cast<u32*>(brought[i]) = all;
}

template <class T>
inline T shuffled(u32 mask, T value, int source) {
  check_mask(mask);
  Shuffle s = {bits<u32>(value), source};
  meet("a shuffle", shuffle, &s);
  return bits<T>(s.value);
}

inline int lane() { return current % 32; }

struct Product { const u32* a; const u32* b; void* c; };

struct Bf16 {
  static constexpr int WIDTH = 16;
  using Sum = double;
  using C = float;
  static Sum value(u32 b) { return bf16_to_float(b); }
};

struct F16 {
  static constexpr int WIDTH = 16;
  using Sum = double;
  using C = float;
  static Sum value(u32 b) { return f16_to_float(b); }
};

template <class Kind>
__attribute__((optimize("O3"))) void multiply(void** brought) {
  using Sum = typename Kind::Sum;
  constexpr int PER = 32 / Kind::WIDTH, K = 8 * PER;
  Sum a[16][K], b[K][8], c[16][8];
  for (int lane = 0; lane < 32; lane++) {
    const Product& p = *static_cast<Product*>(brought[lane]);
    const int g = lane / 4, q = lane % 4;
    for (int e = 0; e < PER; e++) {
      auto value = [e](u32 word) { return Kind::value(word >> e * Kind::WIDTH & ((1u << Kind::WIDTH) - 1)); };
      for (int r = 0; r < 4; r++) a[g + 8 * (r & 1)][PER * q + e + K / 2 * (r >> 1)] = value(p.a[r]);
      for (int r = 0; r < 2; r++) b[PER * q + e + K / 2 * r][g] = value(p.b[r]);
    }
    for (int r = 0; r < 4; r++) c[g + 8 * (r >> 1)][2 * q + (r & 1)] = static_cast<typename Kind::C*>(p.c)[r];
  }
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < K; k++)
      for (int j = 0; j < 8; j++) c[i][j] += a[i][k] * b[k][j];
  for (int lane = 0; lane < 32; lane++) {
    const Product& p = *static_cast<Product*>(brought[lane]);
    for (int r = 0; r < 4; r++)
      static_cast<typename Kind::C*>(p.c)[r] = c[lane / 4 + 8 * (r >> 1)][2 * (lane % 4) + (r & 1)];
  }
}

}  // namespace emulator

template <class T>
inline T __shfl_sync(u32 mask, T value, int source, int width = 32) {
  return emulator::shuffled(mask, value, (emulator::lane() & -width) | (source & (width - 1)));
}
template <class T>
inline T __shfl_xor_sync(u32 mask, T value, int change, int width = 32) {
  int lane = emulator::lane(), source = lane ^ change;
  return emulator::shuffled(mask, value, source < (lane & -width) + width ? source : lane);
}
template <class T>
inline T __shfl_down_sync(u32 mask, T value, u32 by, int width = 32) {
  int lane = emulator::lane(), source = lane + static_cast<int>(by);
  return emulator::shuffled(mask, value, source < (lane & -width) + width ? source : lane);
}
template <class T>
inline T __shfl_up_sync(u32 mask, T value, u32 by, int width = 32) {
  int lane = emulator::lane(), source = lane - static_cast<int>(by);
  return emulator::shuffled(mask, value, source >= (lane & -width) ? source : lane);
}

inline u32 __ballot_sync(u32 mask, int predicate) {
  emulator::check_mask(mask);
  u32 bit = predicate != 0;
  emulator::meet("a vote", emulator::vote, &bit);
  return bit;
}
inline int __any_sync(u32 mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(u32 mask, int predicate) { return __ballot_sync(mask, predicate) == 0xffffffffu; }

#define EMULATED_MMA(name, kind, type)                                               \
  inline void name(type (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {             \
    emulator::Product p = {a, b, c};                                                 \
    emulator::meet(#name, emulator::multiply<emulator::kind>, &p);                   \
  }
EMULATED_MMA(mma_bf16, Bf16, float)
EMULATED_MMA(mma_f16, F16, float)

#define EMULATED_VARIANTS(kind)                                                             \
  inline void mma_##kind##_first(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {     \
    for (float& value : c) value = 0;                                                       \
    mma_##kind(c, a, b);                                                                    \
  }                                                                                         \
  inline void mma_##kind##_k8(float (&c)[4], u32 a0, u32 a1, u32 b) {                       \
    const u32 a[4] = {a0, a1, 0, 0}, wide[2] = {b, 0};                                      \
    mma_##kind(c, a, wide);                                                                 \
  }
EMULATED_VARIANTS(bf16)
EMULATED_VARIANTS(f16)
#undef EMULATED_VARIANTS
#undef EMULATED_MMA
