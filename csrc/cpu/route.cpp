#include "cpu/route.h"

#include <algorithm>
#include <vector>

namespace optmem {
namespace {

OPTMEM_INLINE void softmax_body(float* scores, int64_t count) {
  const float top = *std::max_element(scores, scores + count);
  for (int64_t i = 0; i < count; ++i) scores[i] = exponential(scores[i] - top);
  float sum = 0.0f;
  for (int64_t i = 0; i < count; ++i) sum += scores[i];
  for (int64_t i = 0; i < count; ++i) scores[i] /= sum;
}

OPTMEM_VARIANTS(softmax, softmax_body, (float* scores, int64_t count), (scores, count))

// Moves the likeliest to the front, one after the other.  Probabilities are never negative, so -1 is "taken".
void pick(float* scores, int64_t experts, int64_t top_k, int32_t* ids, float* weights) {
  for (int64_t k = 0; k < top_k; ++k) {
    const float* best = std::max_element(scores, scores + experts);  // the first of equals
    ids[k] = static_cast<int32_t>(best - scores);
    weights[k] = *best;
    scores[ids[k]] = -1.0f;
  }
}

// A counting sort.
void group(const Route& job) {
  const int64_t pairs = job.tokens * job.top_k;
  std::fill_n(job.starts, job.experts + 1, 0);
  for (int64_t p = 0; p < pairs; ++p) ++job.starts[job.ids[p] + 1];
  for (int64_t e = 0; e < job.experts; ++e) job.starts[e + 1] += job.starts[e];
  std::vector<int32_t> next(job.starts, job.starts + job.experts);
  for (int64_t p = 0; p < pairs; ++p) job.order[next[job.ids[p]]++] = static_cast<int32_t>(p);
}

}  // namespace

void route(const Route& job, int num_threads) {
  const auto soften = OPTMEM_DISPATCH(softmax);
#pragma omp parallel for num_threads(num_threads) if (job.tokens > 32)  // few rows are not worth another thread
  for (int64_t t = 0; t < job.tokens; ++t) {
    float* scores = job.scores + t * job.experts;
    soften(scores, job.experts);
    pick(scores, job.experts, job.top_k, job.ids + t * job.top_k, job.weights + t * job.top_k);
  }
  group(job);
}

}  // namespace optmem
