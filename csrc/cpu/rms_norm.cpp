#include "cpu/rms_norm.h"

#include <cmath>

namespace optmem {
namespace {

constexpr int64_t kLanes = 32;  // partial sums, so that adding is vectorised in a fixed order

template <typename T>
OPTMEM_INLINE void norm_body(const T* x, const T* weight, int64_t width, float eps, T* out) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    for (int64_t k = 0; k < kLanes; ++k) lanes[k] += widen(x[i + k]) * widen(x[i + k]);
  }
  for (; i < width; ++i) lanes[i % kLanes] += widen(x[i]) * widen(x[i]);
  float squares = 0.0f;
  for (float lane : lanes) squares += lane;
  const float scale = 1.0f / std::sqrt(squares / static_cast<float>(width) + eps);
  for (i = 0; i < width; ++i) out[i] = narrow<T>(widen(narrow<T>(widen(x[i]) * scale)) * widen(weight[i]));
}

template <typename T>
OPTMEM_INLINE void add_body(const T* x, const T* residual, int64_t width, T* sum) {
  for (int64_t i = 0; i < width; ++i) sum[i] = narrow<T>(widen(x[i]) + widen(residual[i]));
}

template <typename T>
struct Row {
  OPTMEM_VARIANTS(norm, norm_body<T>, (const T* x, const T* weight, int64_t width, float eps, T* out), (x, weight, width, eps, out))
  OPTMEM_VARIANTS(add, add_body<T>, (const T* x, const T* residual, int64_t width, T* sum), (x, residual, width, sum))
};

}  // namespace

template <typename T>
void rms_norm(const RmsNorm<T>& job, int num_threads) {
  const auto norm = OPTMEM_DISPATCH(Row<T>::norm);
  const auto add = OPTMEM_DISPATCH(Row<T>::add);
#pragma omp parallel for num_threads(num_threads) if (job.tokens > 8)  // few rows are not worth another thread
  for (int64_t t = 0; t < job.tokens; ++t) {
    const int64_t start = t * job.width;
    const T* row = job.x + start;
    if (job.residual != nullptr) {
      add(row, job.residual + start, job.width, job.sum + start);
      row = job.sum + start;
    }
    norm(row, job.weight, job.width, job.eps, job.out + start);
  }
}

template void rms_norm(const RmsNorm<Bf16>&, int);
template void rms_norm(const RmsNorm<float>&, int);

}  // namespace optmem
