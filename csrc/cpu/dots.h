// Dot products of a few weight rows with a few tokens: the one inner loop of linear_rows, route, expert_mlp and paged_attention.
//
// Every product of one row and one token is summed in the same order whatever the tile around it, so a token's result does not
// depend on how many other tokens were computed with it, bit for bit.
#pragma once

#include <cstdint>

#include "cpu/floats.h"

namespace optmem {

constexpr int kDotRows = 4;    // rows of a tile
constexpr int kDotTokens = 6;  // most tokens of a tile: 24 sums stay in registers

// sums[kDotRows * m + r] = weight row r . token m; rows are `stride` elements apart.
template <typename T>
using Dots = void (*)(const T* weight, int64_t stride, int64_t in, const T* const* tokens, float* sums);

template <typename T>
struct DotKernel {
  Dots<T> four[kDotTokens];  // [number of tokens - 1]  four rows
  Dots<T> one[kDotTokens];   // a single row; only sums[kDotRows * m] is written
  int tokens;                // the best tile for this instruction set
};

// The kernel for the instruction set in force.
template <typename T>
DotKernel<T> dot_kernel();

constexpr int64_t kChunk = 32;  // rows of a chunk: with 1,280 columns 80 KB of bf16, which stay in the L2 cache

// out[kChunk * m + r] for up to kChunk rows and up to kernel.tokens tokens.
template <typename T>
inline void dot_chunk(const DotKernel<T>& kernel, const T* weight, int64_t rows, int64_t stride, int64_t in, const T* const* tokens,
                      int num_tokens, float* out) {
  float sums[kDotRows * kDotTokens];
  int64_t r = 0;
  for (; r + kDotRows <= rows; r += kDotRows) {
    kernel.four[num_tokens - 1](weight + r * stride, stride, in, tokens, sums);
    for (int m = 0; m < num_tokens; ++m) std::memcpy(out + kChunk * m + r, sums + kDotRows * m, sizeof(float) * kDotRows);
  }
  for (; r < rows; ++r) {
    kernel.one[num_tokens - 1](weight + r * stride, stride, in, tokens, sums);
    for (int m = 0; m < num_tokens; ++m) out[kChunk * m + r] = sums[kDotRows * m];
  }
}

}  // namespace optmem
