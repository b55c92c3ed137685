// The arithmetic of resample for one output value, the same function on the CPU and in the CUDA kernel.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define OPTMEM_BOTH __host__ __device__
#else
#define OPTMEM_BOTH
#endif

namespace optmem {

constexpr int kResampleBits = 22;  // fraction bits of a weight: 32 less 8 of the pixel and 2 for overshoot
constexpr int32_t kResampleHalf = 1 << (kResampleBits - 1);
constexpr int64_t kResampleMaxSide = 65535;

// A weighted sum, half already added, back to a pixel.
OPTMEM_BOTH inline uint8_t resample_clip(int32_t sum) {
  const int32_t value = sum >> kResampleBits;
  return static_cast<uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value);
}

// One pass along one axis.  Rows and columns are the same thing here: only the stride between neighbours differs.
struct ResamplePass {
  const uint8_t* in;       // [outer, size_in, inner]
  const int32_t* bounds;   // [size_out, 2]  first input position, number of taps
  const int32_t* weights;  // [size_out, taps]
  uint8_t* out;            // [outer, size_out, inner]
  int64_t outer;
  int32_t size_in, size_out, inner, taps;
};

// Writes value `index` of slice `outer` of the output; index counts over [size_out, inner].
OPTMEM_BOTH inline void resample_value(const ResamplePass& pass, int64_t outer, uint32_t index) {
  const uint32_t position = index / static_cast<uint32_t>(pass.inner), lane = index % static_cast<uint32_t>(pass.inner);
  const int32_t first = pass.bounds[2 * position], count = pass.bounds[2 * position + 1];
  const int32_t* weights = pass.weights + static_cast<int64_t>(position) * pass.taps;
  const uint8_t* in = pass.in + (outer * pass.size_in + first) * pass.inner + lane;
  int32_t sum = kResampleHalf;
  for (int32_t t = 0; t < count; ++t) sum += weights[t] * in[static_cast<int64_t>(t) * pass.inner];
  pass.out[outer * pass.size_out * static_cast<int64_t>(pass.inner) + index] = resample_clip(sum);
}

}  // namespace optmem
