#pragma once

#include <cstdint>

#include "cpu/floats.h"

namespace optmem {

// Everything linear_rows reads and writes.  Sizes are in elements.
template <typename T, typename Out, typename W = T>
struct LinearRows {
  const T* x;           // [tokens, in]
  const W* weight;      // [rows, in]
  const float* scales;  // [rows]  of the weight's rows; may be null
  Out* out;             // [tokens, rows]  written whole
  int64_t tokens, rows, in;
};

// out = x weight^T, summed in fp32, times the scales.  A token's result does not depend on the other tokens, bit for bit.
// Explicitly instantiated for bf16 -> bf16, bf16 -> fp32 and fp32 -> fp32, each with weights of T and of int8_t.
template <typename T, typename Out, typename W>
void linear_rows(const LinearRows<T, Out, W>& job, int num_threads);

}  // namespace optmem
