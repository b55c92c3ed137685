// Pillow's antialiased bicubic in numbers: which input pixels make an output pixel, and with what weights.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "resample_pixel.h"

namespace optmem {

// Compiled for the baseline instruction set: a fused multiply-add here would round a weight differently from Pillow.
struct ResampleCoefficients {
  int32_t taps = 0;              // the most any output pixel needs
  std::vector<int32_t> bounds;   // [out, 2]  first input pixel, number of taps
  std::vector<int32_t> weights;  // [out, taps]  22 fraction bits, they sum to about 1; zero past the number of taps
};

// Pillow 13 resamples the height first where it shrinks by more than twice as many pixels as the width; before 13 it never did.
inline bool resamples_height_first(int64_t height_in, int64_t width_in, int64_t height, int64_t width) {
  return height_in > height && height_in - height > 2 * (width_in - width);
}

// The cubic of Keys with a = -1/2, zero from 2 on.
inline double bicubic(double x) {
  constexpr double a = -0.5;
  x = std::fabs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
  if (x < 2.0) return (((x - 5.0) * x + 8.0) * x - 4.0) * a;
  return 0.0;
}

// Half away from zero.
inline int32_t resample_fixed(double weight) {
  const double scaled = weight * (1 << kResampleBits);
  return static_cast<int32_t>(scaled < 0.0 ? scaled - 0.5 : scaled + 0.5);
}

// Both sizes must be positive.  May throw std::bad_alloc.
inline ResampleCoefficients resample_coefficients(int64_t size_in, int64_t size_out) {
  const double scale = static_cast<double>(size_in) / static_cast<double>(size_out);
  const double stretch = std::max(scale, 1.0), support = 2.0 * stretch, squeeze = 1.0 / stretch;
  ResampleCoefficients table;
  table.taps = static_cast<int32_t>(std::ceil(support)) * 2 + 1;
  table.bounds.resize(2 * size_out);
  table.weights.resize(size_out * table.taps);
  std::vector<double> exact(table.taps);
  for (int64_t i = 0; i < size_out; ++i) {
    const double center = (static_cast<double>(i) + 0.5) * scale;
    // The cast drops the fraction towards zero, so what is below zero becomes zero or is clipped there: the same.
    const int64_t first = std::max<int64_t>(static_cast<int64_t>(center - support + 0.5), 0);
    const int64_t count = std::min(static_cast<int64_t>(center + support + 0.5), size_in) - first;
    double sum = 0.0;
    for (int64_t t = 0; t < count; ++t) {
      exact[t] = bicubic((static_cast<double>(t + first) - center + 0.5) * squeeze);
      sum += exact[t];
    }
    table.bounds[2 * i] = static_cast<int32_t>(first);
    table.bounds[2 * i + 1] = static_cast<int32_t>(count);
    for (int64_t t = 0; t < count; ++t) {
      table.weights[i * table.taps + t] = resample_fixed(sum != 0.0 ? exact[t] / sum : exact[t]);
    }
  }
  return table;
}

}  // namespace optmem
