// Dot products of a few weight rows with a few tokens: the one inner loop of linear_rows, route, expert_mlp and paged_attention.
//
// Every product of one row and one token is summed in the same order whatever the tile around it, so a token's result does not
// depend on how many other tokens were computed with it, bit for bit.  A row of int8 is widened to the tokens' type, which is
// exact, and then summed in the order of that type; bf16 tokens meet it as integers where that is faster (fixed.h).
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>

#include "cpu/fixed.h"
#include "cpu/floats.h"

namespace optmem {

constexpr int kDotRows = 4;    // rows of a tile
constexpr int kDotTokens = 8;  // most tokens of a tile; what suits an instruction set is DotKernel::tokens

// sums[kDotRows * m + r] = weight row r . token m; rows are `stride` elements apart.  W is T or int8_t; T is Fixed for int8_t alone.
// Rows from `ahead` on are fetched meanwhile; nothing is read there, so it may lie behind the end of the weights.
template <typename T, typename W = T>
using Dots = void (*)(const W* weight, int64_t stride, int64_t in, const T* const* tokens, const W* ahead, float* sums);

template <typename T, typename W = T>
struct DotKernel {
  Dots<T, W> four[kDotTokens];  // [number of tokens - 1]  four rows, while four are fetched
  Dots<T, W> slow[kDotTokens];  // four rows, while one is fetched
  Dots<T, W> one[kDotTokens];   // a single row; only sums[kDotRows * m] is written
  int tokens;                   // the best tile for this instruction set
  int ahead;                    // rows from those that `four` reads to those that it should fetch
  int many;                     // tiles of tokens from which on `slow` is the faster
};

// The kernel for the instruction set in force.
template <typename T, typename W = T>
DotKernel<T, W> dot_kernel();

constexpr int64_t kChunk = 32;  // rows of a chunk: with 1,280 columns 80 KB of bf16, which stay in the L2 cache

// Shares a row of tasks among threads.  A thread takes neighbours, as it reads on where it has fetched ahead: first many, then ever
// fewer, so that none is left alone with a long rest.
class Shares {
 public:
  Shares(int64_t count, int threads) : count_(count), threads_(threads) {}

  struct Range {
    int64_t first, end;
  };

  // What the calling thread does next; nothing where all is taken.
  Range take() {
    int64_t first = next_.load(std::memory_order_relaxed);
    while (true) {
      const int64_t end = std::min(count_, first + std::max<int64_t>((count_ - first) / (2 * threads_), 1));
      if (first >= count_ || next_.compare_exchange_weak(first, end, std::memory_order_relaxed)) return {first, std::max(first, end)};
    }
  }

 private:
  std::atomic<int64_t> next_{0};
  int64_t count_;
  int threads_;
};

// Up to kChunk neighbouring rows of a matrix.
template <typename W>
struct ChunkRows {
  const W* weight;      // [rows, in]
  const float* scales;  // [rows]  of int8; may be null
  int64_t rows, in;
  const W* next;        // [rows, in]  what will be read after it
};

// Rows first .. of a matrix [.., in] with scales for each, or null.
template <typename W>
ChunkRows<W> rows_from(const W* weight, const float* scales, int64_t first, int64_t rows, int64_t in) {
  const W* begin = weight + first * in;
  return {begin, scales == nullptr ? nullptr : scales + first, rows, in, begin + rows * in};
}

// A tile of tokens, and which of all the tiles that meet the same chunk it is.  The first has the chunk to fetch and would stand
// still, so where there are many they fetch the next chunk together.
template <typename T>
struct TokenTile {
  const T* const* tokens;
  int count;
  int64_t at, of;
};

constexpr int kNever = 1 << 30;  // tiles of tokens

// What is fetched while four rows from row r on meet a tile: a row of the next chunk, as long as there are such.
template <typename T, typename W>
inline const W* fetched(const ChunkRows<W>& chunk, const TokenTile<T>& tile, int64_t r) {
  const int64_t row = tile.at * (kChunk / kDotRows) + r / kDotRows;
  return row < chunk.rows ? chunk.next + row * chunk.in : chunk.weight + r * chunk.in;
}

// out[kChunk * m + r] for the tile's tokens, times the scale of r.
template <typename T, typename W>
inline void dot_rows(const DotKernel<T, W>& kernel, const ChunkRows<W>& chunk, const TokenTile<T>& tile, float* out) {
  float sums[kDotRows * kDotTokens];
  const auto four = kernel.four[tile.count - 1], slow = kernel.slow[tile.count - 1], one = kernel.one[tile.count - 1];
  int64_t r = 0;
  // A single token is bound by memory: row after row is the stream that the machine reads fastest (30 GB/s a core, not 22), where
  // nothing is to be widened.
  const bool is_stream = tile.count == 1 && tile.of == 1 && std::is_same_v<T, W>;
  for (; !is_stream && r + kDotRows <= chunk.rows; r += kDotRows) {
    const W* rows = chunk.weight + r * chunk.in;
    if (tile.of < kernel.many) {
      four(rows, chunk.in, chunk.in, tile.tokens, rows + kernel.ahead * chunk.in, sums);
    } else {
      slow(rows, chunk.in, chunk.in, tile.tokens, fetched(chunk, tile, r), sums);
    }
    for (int m = 0; m < tile.count; ++m) std::memcpy(out + kChunk * m + r, sums + kDotRows * m, sizeof(float) * kDotRows);
  }
  for (; r < chunk.rows; ++r) {
    const W* row = chunk.weight + r * chunk.in;
    one(row, chunk.in, chunk.in, tile.tokens, row, sums);
    for (int m = 0; m < tile.count; ++m) out[kChunk * m + r] = sums[kDotRows * m];
  }
  if (chunk.scales == nullptr) return;
  for (int m = 0; m < tile.count; ++m) {
    for (int64_t i = 0; i < chunk.rows; ++i) out[kChunk * m + i] *= chunk.scales[i];
  }
}

// Calls act(first, tile) for all tiles of tokens from `begin` to `end`, in order.
template <typename T, typename W, typename Act>
inline void each_tile(const DotKernel<T, W>& kernel, const T* const* tokens, int64_t begin, int64_t end, const Act& act) {
  TokenTile<T> tile{nullptr, 0, 0, (end - begin + kernel.tokens - 1) / kernel.tokens};
  for (int64_t i = begin; i < end; i += kernel.tokens, ++tile.at) {
    tile.tokens = tokens + i;
    tile.count = static_cast<int>(std::min<int64_t>(kernel.tokens, end - i));
    act(i, tile);
  }
}

}  // namespace optmem
