// Dot products of a few weight rows with a few tokens: the one inner loop of linear_rows, route, expert_mlp and paged_attention.
//
// Every product of one row and one token is summed in the same order whatever the tile around it, so a token's result does not
// depend on how many other tokens were computed with it, bit for bit.  A row of int8 is widened to the tokens' type, which is
// exact, and then summed in the order of that type; bf16 tokens meet it as integers where that is faster (fixed.h).
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/fixed.h"
#include "cpu/floats.h"

namespace optmem {

constexpr int kDotRows = 4;    // rows of a tile
constexpr int kDotTokens = 8;  // most tokens of a tile; what suits an instruction set is DotKernel::tokens

// sums[kDotRows * m + r] = weight row r . token m; rows are `stride` elements apart.  W is T or int8_t; T is Fixed for int8_t alone.
template <typename T, typename W = T>
using Dots = void (*)(const W* weight, int64_t stride, int64_t in, const T* const* tokens, float* sums);

template <typename T, typename W = T>
struct DotKernel {
  Dots<T, W> four[kDotTokens];  // [number of tokens - 1]  four rows
  Dots<T, W> one[kDotTokens];   // a single row; only sums[kDotRows * m] is written
  int tokens;                   // the best tile for this instruction set
};

// The kernel for the instruction set in force.
template <typename T, typename W = T>
DotKernel<T, W> dot_kernel();

constexpr int64_t kChunk = 32;  // rows of a chunk: with 1,280 columns 80 KB of bf16, which stay in the L2 cache

// Neighbouring chunks that a thread takes at once: it reads on where it has fetched ahead, and eight turns share the work evenly.
inline int run_of(int64_t chunks, int num_threads) { return static_cast<int>(chunks / (8 * num_threads)) + 1; }

// out[kChunk * m + r] for up to kChunk rows and up to kernel.tokens tokens.
template <typename T, typename W>
inline void dot_chunk(const DotKernel<T, W>& kernel, const W* weight, int64_t rows, int64_t stride, int64_t in,
                      const T* const* tokens, int num_tokens, float* out) {
  float sums[kDotRows * kDotTokens];
  int64_t r = 0;
  // A single token is bound by memory: row after row is the stream that the machine reads fastest (30 GB/s a core, not 22), where
  // nothing is to be widened.
  const bool is_stream = num_tokens == 1 && std::is_same_v<T, W>;
  for (; !is_stream && r + kDotRows <= rows; r += kDotRows) {
    kernel.four[num_tokens - 1](weight + r * stride, stride, in, tokens, sums);
    for (int m = 0; m < num_tokens; ++m) std::memcpy(out + kChunk * m + r, sums + kDotRows * m, sizeof(float) * kDotRows);
  }
  for (; r < rows; ++r) {
    kernel.one[num_tokens - 1](weight + r * stride, stride, in, tokens, sums);
    for (int m = 0; m < num_tokens; ++m) out[kChunk * m + r] = sums[kDotRows * m];
  }
}

// Up to kChunk neighbouring rows of a matrix.
template <typename W>
struct ChunkRows {
  const W* weight;      // [rows, in]
  const float* scales;  // [rows]  of int8; may be null
  int64_t rows, in;
};

// Rows first .. of a matrix [.., in] with scales for each, or null.
template <typename W>
ChunkRows<W> rows_from(const W* weight, const float* scales, int64_t first, int64_t rows, int64_t in) {
  return {weight + first * in, scales == nullptr ? nullptr : scales + first, rows, in};
}

// out[kChunk * m + r] for up to kernel.tokens tokens, times the scale of r.
template <typename T, typename W>
inline void dot_rows(const DotKernel<T, W>& kernel, const ChunkRows<W>& chunk, const T* const* tokens, int num_tokens, float* out) {
  dot_chunk(kernel, chunk.weight, chunk.rows, chunk.in, chunk.in, tokens, num_tokens, out);
  if (chunk.scales == nullptr) return;
  for (int m = 0; m < num_tokens; ++m) {
    for (int64_t r = 0; r < chunk.rows; ++r) out[kChunk * m + r] *= chunk.scales[r];
  }
}

}  // namespace optmem
