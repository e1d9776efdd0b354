// Packed codes to grid bytes, for up to four weights of one width at a time, whose rows are written one after the
// other. The layout has no gaps where a row is a multiple of 16 codes, so a weight's codes are one stream: a thread
// turns 2 * BITS bytes into 16 and looks each up in a table in shared memory (64 entries and fewer never meet in a
// bank). UNROLL chunks a thread keep enough loads in flight. The kernel also scales the rows, and collects biases.
//
// A scalar code is its own index. In a trellis the index is the last STATES bits of the row's stream up to the code's
// end, zeros before the row: a thread also reads the 16 bits before its chunk. There, of 32 random entries 3.5 meet in
// one bank, so where the table stays small an entry holds the values of CODES consecutive codes, for an index that much
// longer; and blocks go on to further chunks, for such a table takes a while to load.
//
// Compile-time: BITS (2, 3, 4, 6, 8), STATES (0: scalar; else log2 of the trellis' states, up to 12, with 2 to 4 BITS),
// CODES (1, or 2 with STATES), MEMBERS (1 to 4), BIAS (0 or 1), THREADS, UNROLL.

#define REACH (STATES ? STATES : BITS)  // bits that a value depends on
#define WINDOW (REACH + (CODES - 1) * BITS)

#if CODES == 2
using Entry = u16;
#else
using Entry = u8;
#endif
#if STATES
using Piece = uint4;
#else
using Piece = u8;
#endif
#define PIECES (sizeof(Entry) * (1 << WINDOW) / sizeof(Piece))

// codes (chunks * 2 * BITS,), scales (rows,) bf16 and bias (rows,) of 16 bits for each weight; table (2^WINDOW, CODES);
// out (chunks * 16,), row_scales (rows,) and biases (rows,) for all. chunk0, row0: where the first weight ends, and so
// on; row_chunks: chunks of a row
KERNEL void __launch_bounds__(THREADS)
    decode(const u8* codes0, const u8* codes1, const u8* codes2, const u8* codes3, const u16* scales0,
           const u16* scales1, const u16* scales2, const u16* scales3, const u16* bias0, const u16* bias1,
           const u16* bias2, const u16* bias3, const Piece* __restrict__ table, u8* __restrict__ out,
           float* __restrict__ row_scales, u16* __restrict__ biases, int chunk0, int row0, int chunk1, int row1,
           int chunk2, int row2, int chunks, int rows, u32 row_chunks, float scale) {
  __shared__ Piece entries[PIECES];
  for (int i = threadIdx.x; i < PIECES; i += THREADS) entries[i] = table[i];
  for (int row = blockIdx.x * THREADS + threadIdx.x; row < rows; row += gridDim.x * THREADS) {
    const int member = MEMBERS == 1 ? 0 : (row >= row0) + (row >= row1) + (row >= row2);
    const int within = member == 0 ? row : row - (member == 1 ? row0 : member == 2 ? row1 : row2);
    const u16* const from = member == 0 ? scales0 : member == 1 ? scales1 : member == 2 ? scales2 : scales3;
    row_scales[row] = bf16_to_float(from[within]) * scale;
    if (BIAS) biases[row] = (member == 0 ? bias0 : member == 1 ? bias1 : member == 2 ? bias2 : bias3)[within];
  }
  u32 words[UNROLL][5];  // of the stream, from 32 bits before the chunk

  auto load = [&](int first) {
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const int chunk = first + u * THREADS;
      if (chunk >= chunks) continue;
      const int member = MEMBERS == 1 ? 0 : (chunk >= chunk0) + (chunk >= chunk1) + (chunk >= chunk2);
      const int within = member == 0 ? chunk : chunk - (member == 1 ? chunk0 : member == 2 ? chunk1 : chunk2);
      const u8* const from = (member == 0 ? codes0 : member == 1 ? codes1 : member == 2 ? codes2 : codes3) +
                             static_cast<i64>(within) * 2 * BITS;
#if STATES
      words[u][0] = 0;
      if (static_cast<u32>(chunk) % row_chunks) words[u][0] = reinterpret_cast<const u16*>(from)[-1];
#endif
#if BITS == 2
      words[u][1] = *reinterpret_cast<const u32*>(from);
#elif BITS == 3
      const u16* const part = reinterpret_cast<const u16*>(from);
      words[u][1] = part[0] | static_cast<u32>(part[1]) << 16;
      words[u][2] = part[2];
#elif BITS == 4
      const uint2 both = *reinterpret_cast<const uint2*>(from);
      words[u][1] = both.x;
      words[u][2] = both.y;
#elif BITS == 6
      const u32* const part = reinterpret_cast<const u32*>(from);
      words[u][1] = part[0];
      words[u][2] = part[1];
      words[u][3] = part[2];
#else
      const uint4 all = *reinterpret_cast<const uint4*>(from);
      words[u][1] = all.x;
      words[u][2] = all.y;
      words[u][3] = all.z;
      words[u][4] = all.w;
#endif
    }
  };

  auto turn = [&](int first) {
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const int chunk = first + u * THREADS;
      if (chunk >= chunks) continue;
      words[u][0] <<= 16;  // here, for it waits for the load
      u32 result[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        u32 value[4];
#pragma unroll
        for (int i = 0; i < 4; i += CODES) {
          const int bit = 32 + (4 * w + i + 1) * BITS - REACH, word = bit / 32, shift = bit % 32;
          u32 window = words[u][word] >> shift;
          if (shift + WINDOW > 32) window |= words[u][word + 1] << (32 - shift);
          value[i] = reinterpret_cast<const Entry*>(entries)[window & ((1 << WINDOW) - 1)];
        }
        result[w] = CODES == 2 ? value[0] | value[2] << 16 : join(value[0], value[1], value[2], value[3]);
      }
      *reinterpret_cast<uint4*>(out + static_cast<i64>(chunk) * 16) =
          make_uint4(result[0], result[1], result[2], result[3]);
    }
  };

  int first = blockIdx.x * THREADS * UNROLL + threadIdx.x;
  load(first);
  __syncthreads();
  for (;;) {
    turn(first);
    first += gridDim.x * THREADS * UNROLL;
    if (!STATES || first >= chunks) return;
    load(first);
  }
}
