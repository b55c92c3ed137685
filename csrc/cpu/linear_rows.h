#pragma once

#include <cstdint>

#include "cpu/floats.h"

namespace optmem {

// Everything linear_rows reads and writes.  Sizes are in elements.
template <typename T, typename Out>
struct LinearRows {
  const T* x;       // [tokens, in]
  const T* weight;  // [rows, in]
  Out* out;         // [tokens, rows]  written whole
  int64_t tokens, rows, in;
};

// out = x weight^T, summed in fp32.  A token's result does not depend on the other tokens, bit for bit.
// Explicitly instantiated for bf16 -> bf16, bf16 -> fp32 and fp32 -> fp32.
template <typename T, typename Out>
void linear_rows(const LinearRows<T, Out>& job, int num_threads);

}  // namespace optmem
