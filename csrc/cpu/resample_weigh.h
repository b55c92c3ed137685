// Weighted sums of rows of bytes, the one inner loop of both passes of resample, for every instruction set.
//
// The weights have 22 fraction bits and the machines' dot products take 8 or 16, so a weight is cut into signed digits of
// 32 / taps bits, the lowest first: a sum over digits, each shifted to its place, is the exact 32-bit sum again.
#pragma once

#include <cstdint>
#include <vector>

#include "resample_coefficients.h"

namespace optmem {

// out[i] = clip(half + sum over t < count of weight t * rows[t * stride + i]) for i < lanes.
using Weigh = void (*)(const uint8_t* rows, int64_t stride, const int32_t* words, int64_t count, int64_t lanes, uint8_t* out);

struct WeighKernel {
  Weigh run;
  int taps;    // taps of a round: as many digits lie in a word of 32 bits
  int digits;  // words of a round
};

// The kernel for the instruction set in force.
WeighKernel weigh_kernel();

// The coefficients of one axis as a kernel reads them.
struct WeighTable {
  std::vector<int32_t> bounds;  // [out, 2]  first input position, number of taps
  std::vector<int32_t> words;   // [out, rounds, digits]
  int64_t words_each;           // rounds * digits
  int64_t taps;                 // the most any output position needs

  int64_t first(int64_t position) const { return bounds[2 * position]; }
  int64_t count(int64_t position) const { return bounds[2 * position + 1]; }
  // One past the last input position that outputs up to and including this one need.
  int64_t end(int64_t position) const { return first(position) + count(position); }
  const int32_t* words_of(int64_t position) const { return words.data() + position * words_each; }
};

WeighTable weigh_table(int64_t size_in, int64_t size_out, const WeighKernel& kernel);

}  // namespace optmem
