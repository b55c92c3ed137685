#include "cpu/silu_mul.h"

#include <algorithm>

namespace optmem {
namespace {

constexpr int64_t kBlock = 16384;  // values: less is not worth another thread

template <typename T>
OPTMEM_INLINE void silu_mul_body(const T* gate, const T* up, T* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = narrow<T>(silu(widen(gate[i])) * widen(up[i]));
}

template <typename T>
struct Block {
  OPTMEM_VARIANTS(run, silu_mul_body<T>, (const T* gate, const T* up, T* out, int64_t count), (gate, up, out, count))
};

}  // namespace

template <typename T>
void silu_mul(const T* gate, const T* up, T* out, int64_t count, int num_threads) {
  const auto run = OPTMEM_DISPATCH(Block<T>::run);
#pragma omp parallel for num_threads(num_threads) if (count > kBlock)
  for (int64_t first = 0; first < count; first += kBlock) {
    run(gate + first, up + first, out + first, std::min(kBlock, count - first));
  }
}

template void silu_mul(const Bf16*, const Bf16*, Bf16*, int64_t, int);
template void silu_mul(const float*, const float*, float*, int64_t, int);

}  // namespace optmem
