#include "cpu/linear_rows.h"

#include <algorithm>
#include <vector>

#include "cpu/dots.h"

namespace optmem {
namespace {

template <typename Out>
OPTMEM_INLINE void store_body(const float* sums, int64_t count, Out* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = narrow<Out>(sums[i]);
}

template <typename Out>
struct Store {
  OPTMEM_VARIANTS(store, store_body<Out>, (const float* sums, int64_t count, Out* out), (sums, count, out))
};

// Tokens of the kind that the kernel takes.
template <typename Token, typename T, typename Out, typename W>
void multiply(const LinearRows<T, Out, W>& job, int num_threads) {
  const DotKernel<Token, W> kernel = dot_kernel<Token, W>();
  const auto store = OPTMEM_DISPATCH(Store<Out>::store);
  Rows<Token, T> x(job.x, job.tokens, job.in);
  std::vector<const Token*> tokens(job.tokens);
  for (int64_t t = 0; t < job.tokens; ++t) {
    x.turn(t);
    tokens[t] = x[t];
  }
  Shares shares((job.rows + kChunk - 1) / kChunk, num_threads);
#pragma omp parallel num_threads(num_threads)
  {
    float sums[kChunk * kDotTokens];
    for (Shares::Range range = shares.take(); range.first < range.end; range = shares.take()) {
      for (int64_t first = range.first * kChunk; first < std::min(range.end * kChunk, job.rows); first += kChunk) {
        const int64_t rows = std::min(kChunk, job.rows - first);
        const ChunkRows<W> chunk = rows_from(job.weight, job.scales, first, rows, job.in);
        each_tile(kernel, tokens.data(), 0, job.tokens, [&](int64_t t, const TokenTile<Token>& tile) {
          dot_rows(kernel, chunk, tile, sums);
          for (int m = 0; m < tile.count; ++m) store(sums + kChunk * m, rows, job.out + (t + m) * job.rows + first);
        });
      }
    }
  }
}

}  // namespace

template <typename T, typename Out, typename W>
void linear_rows(const LinearRows<T, Out, W>& job, int num_threads) {
  if constexpr (takes_fixed<T, W>) {
    if (has_fixed()) return multiply<Fixed>(job, num_threads);
  }
  multiply<T>(job, num_threads);
}

template void linear_rows(const LinearRows<Bf16, Bf16>&, int);
template void linear_rows(const LinearRows<Bf16, float>&, int);
template void linear_rows(const LinearRows<float, float>&, int);
template void linear_rows(const LinearRows<Bf16, Bf16, int8_t>&, int);
template void linear_rows(const LinearRows<Bf16, float, int8_t>&, int);
template void linear_rows(const LinearRows<float, float, int8_t>&, int);

}  // namespace optmem
