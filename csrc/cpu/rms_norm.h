#pragma once

#include <cstdint>

#include "cpu/floats.h"

namespace optmem {

// Everything rms_norm reads and writes.  Sizes are in elements.
template <typename T>
struct RmsNorm {
  const T* x;         // [tokens, width]
  const T* residual;  // [tokens, width], may be null: added to x and rounded before anything else
  const T* weight;    // [width]
  T* sum;             // [tokens, width], null where residual is: x + residual
  T* out;             // [tokens, width]  written whole
  int64_t tokens, width;
  float eps;
};

// out = weight * round(sum / sqrt(mean(sum^2) + eps)), in fp32 but for the two roundings that the checkpoints were trained with.
// Explicitly instantiated for bf16 and fp32.
template <typename T>
void rms_norm(const RmsNorm<T>& job, int num_threads);

}  // namespace optmem
