// Trellis codes of rows of numbers: the Viterbi algorithm, forward through a row and back.
//
// A state is the last STATES bits of the row's stream, its oldest bit lowest; a weight appends BITS bits on top. States
// that differ in those alone form a group (all other bits are its number), for they have the same predecessors: the
// 2^BITS states whose upper bits are the group's number. So M[g], the least cost of coming to group g, is all that the
// next weight needs. A thread holds 16 states, the predecessors of HELD groups; these are LANES apart, so that all 16
// lie in the same 2^BITS groups, whose M it reads. Table values stay in registers, M goes through shared memory, and
// the decisions (which predecessor; a byte a weight and thread) go to global memory. They come back in chunks for one
// thread a row, which follows the path from its end.
//
// Every operation is rounded on its own and ties go to the lowest state, so all devices find the same codes.
//
// Compile-time: BITS (2, 3, 4), STATES (8 to 12), THREADS (a multiple of LANES), MIN_BLOCKS (a processor, for the
// compiler's choice of registers).

#define CHOICES (1 << BITS)
#define GROUPS (1 << (STATES - BITS))
#define HELD (16 >> BITS)
#define LANES (GROUPS / HELD)  // threads a row
#define ROWS (THREADS / LANES)
#define CHUNK 32  // weights whose inputs or decisions lie in shared memory

// Where M[g] lies. A thread reads the entries of CHOICES groups in a row, four from each plane; planes and rows are
// shifted against each other so that 32 threads find 32 banks, reading and writing.
#define PLANES (CHOICES / 4)
#define IN_PLANE (GROUPS / PLANES)
#define PLANE (IN_PLANE + (PLANES > 1 && IN_PLANE > 32 / PLANES ? 32 / PLANES : 0))
#define COSTS (PLANES * PLANE | 16)
__device__ inline int place(int group) {
  return (group >> 2) % PLANES * PLANE + (group >> BITS) * 4 + (group & 3);
}

// z (rows, dim), table (2^STATES,), codes (rows, dim); workspace: for every block (dim / 4 rounded up, THREADS) words
KERNEL void __launch_bounds__(THREADS, MIN_BLOCKS)
    viterbi(const float* __restrict__ z, const float* __restrict__ table, u32* __restrict__ workspace,
            u8* __restrict__ codes, int rows, int dim) {
  __shared__ float4 costs[2][ROWS][COSTS / 4];
  __shared__ float4 inputs[ROWS][CHUNK / 4];
  __shared__ u32 decisions[CHUNK / 4][THREADS];
  __shared__ u8 found[ROWS][CHUNK];
  const int lane = threadIdx.x % LANES, row = threadIdx.x / LANES;
  const int quads = (dim + 3) / 4;
  u32* const own = workspace + static_cast<i64>(blockIdx.x) * quads * THREADS + threadIdx.x;

  float values[HELD][CHOICES];
#pragma unroll
  for (int k = 0; k < HELD; ++k)
#pragma unroll
    for (int j = 0; j < CHOICES; ++j) values[k][j] = table[(lane + k * LANES) * CHOICES + j];

  // From the costs M of this weight to those of the next; `number` counts within four.
  auto step = [&](int number, float input, u32& word) {
    const float4* const from = costs[number & 1][row] + lane % (GROUPS / CHOICES);
    float* const to = reinterpret_cast<float*>(costs[~number & 1][row]);
    float before[CHOICES];
#pragma unroll
    for (int p = 0; p < PLANES; ++p) {
      const float4 four = from[p * (PLANE / 4)];
      before[4 * p] = four.x, before[4 * p + 1] = four.y, before[4 * p + 2] = four.z, before[4 * p + 3] = four.w;
    }
#pragma unroll
    for (int k = 0; k < HELD; ++k) {
      float cost[CHOICES];
      u32 choice[CHOICES];
#pragma unroll
      for (int j = 0; j < CHOICES; ++j) {
        const float off = __fsub_rn(input, values[k][j]);
        cost[j] = __fadd_rn(before[j], __fmul_rn(off, off));
        choice[j] = j << (8 * number + BITS * k);
      }
#pragma unroll
      for (int apart = 1; apart < CHOICES; apart *= 2)
#pragma unroll
        for (int j = 0; j < CHOICES; j += 2 * apart) {
          const bool keep = cost[j] <= cost[j + apart];
          cost[j] = fminf(cost[j], cost[j + apart]);
          choice[j] = keep ? choice[j] : choice[j + apart];
        }
      to[place(lane + k * LANES)] = cost[0];
      word |= choice[0];
    }
    __syncthreads();
  };

  for (int first = blockIdx.x * ROWS; first < rows; first += gridDim.x * ROWS) {
#pragma unroll
    for (int k = 0; k < HELD; ++k) {
      const int group = lane + k * LANES;  // the row starts in state 0
      reinterpret_cast<float*>(costs[0][row])[place(group)] = group ? __uint_as_float(0x7f800000u) : 0.f;
    }
    for (int start = 0; start < dim; start += CHUNK) {
      for (int i = threadIdx.x; i < ROWS * CHUNK; i += THREADS) {
        const int at = min(start + i % CHUNK, dim - 1);
        reinterpret_cast<float*>(inputs)[i] = z[static_cast<i64>(min(first + i / CHUNK, rows - 1)) * dim + at];
      }
      __syncthreads();
#pragma unroll 1
      for (int i = 0; i < min(CHUNK, dim - start); i += 4) {
        const float4 four = inputs[row][i / 4];
        const float input[4] = {four.x, four.y, four.z, four.w};
        const int left = dim - start - i;
        u32 word = 0;
        if (left >= 4) {
#pragma unroll
          for (int n = 0; n < 4; ++n) step(n, input[n], word);
        } else {
#pragma unroll
          for (int n = 0; n < 3; ++n)
            if (n < left) step(n, input[n], word);
        }
        own[static_cast<i64>((start + i) / 4) * THREADS] = word;
      }
    }

    int group = 0;
    if (lane == 0) {
      const float* const ends = reinterpret_cast<const float*>(costs[dim & 1][row]);
      float least = ends[0];
      for (int g = 1; g < GROUPS; ++g) {
        const float cost = ends[place(g)];
        if (cost < least) least = cost, group = g;
      }
    }
    for (int start = (dim - 1) / CHUNK * CHUNK; start >= 0; start -= CHUNK) {
      const int count = min(CHUNK, dim - start);
#pragma unroll
      for (int q = 0; q < CHUNK / 4; ++q)
        if (4 * q < count) decisions[q][threadIdx.x] = own[static_cast<i64>(start / 4 + q) * THREADS];
      __syncthreads();
      if (lane == 0)
        for (int i = count - 1; i >= 0; --i) {
          const u32 word = decisions[i / 4][threadIdx.x + group % LANES];
          const u32 choice = word >> (i % 4 * 8 + group / LANES * BITS) & (CHOICES - 1);
          const int state = group * CHOICES + choice;
          found[row][i] = state / GROUPS;
          group = state % GROUPS;
        }
      __syncthreads();
      for (int i = threadIdx.x; i < ROWS * CHUNK; i += THREADS) {
        const int of = first + i / CHUNK, at = i % CHUNK;
        if (of < rows && at < count) codes[static_cast<i64>(of) * dim + start + at] = found[i / CHUNK][at];
      }
    }
  }
}
