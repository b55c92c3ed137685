#include "cpu/rope_cache.h"

#include "checks.h"

namespace optmem {
namespace {

// May work in place.
template <typename T>
OPTMEM_INLINE void rotate_body(const T* from, const T* cos, const T* sin, int64_t heads, int64_t half, T* to) {
  for (int64_t h = 0; h < heads; ++h, from += 2 * half, to += 2 * half) {
#pragma GCC ivdep
    for (int64_t i = 0; i < half; ++i) {
      const float left = widen(from[i]), right = widen(from[i + half]), c = widen(cos[i]), s = widen(sin[i]);
      to[i] = narrow<T>(left * c - right * s);
      to[i + half] = narrow<T>(right * c + left * s);
    }
  }
}

template <typename T>
struct Row {
  OPTMEM_VARIANTS(rotate, rotate_body<T>, (const T* from, const T* cos, const T* sin, int64_t heads, int64_t half, T* to),
                  (from, cos, sin, heads, half, to))
};

}  // namespace

template <typename T>
void rope_cache(const RopeCache<T>& job, int num_threads) {
  for (int64_t t = 0; t < job.tokens; ++t) {
    check(job.slots[t] < job.cells, "rope_cache: token ", t, " goes to cell ", job.slots[t], " of ", job.cells);
  }
  const auto rotate = OPTMEM_DISPATCH(Row<T>::rotate);
  const int64_t half = job.dim / 2, width = job.heads * job.dim;
#pragma omp parallel for num_threads(num_threads) if (job.tokens > 8)  // few rows are not worth another thread
  for (int64_t t = 0; t < job.tokens; ++t) {
    const T* cos = job.cos + t * half;
    const T* sin = job.sin + t * half;
    rotate(job.queries + t * width, cos, sin, job.heads, half, job.queries + t * width);
    if (job.slots[t] < 0) continue;
    rotate(job.keys + t * width, cos, sin, job.heads, half, job.key_cache + job.slots[t] * width);
    std::memcpy(job.value_cache + job.slots[t] * width, job.values + t * width, width * sizeof(T));
  }
}

template void rope_cache(const RopeCache<Bf16>&, int);
template void rope_cache(const RopeCache<float>&, int);

}  // namespace optmem
