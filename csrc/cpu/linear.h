// A linear layer over many rows at once, in bf16 with sums in fp32, and the function that follows it.
#pragma once

#include <cstdint>

#include "cpu/floats.h"

namespace optmem {

enum class Activation { none, gelu, quick_gelu };

struct Linear {
  const Bf16* x;       // [rows, in]
  const Bf16* weight;  // [columns, in]
  const Bf16* bias;    // [columns]; may be null
  Bf16* out;           // [rows, columns]
  int64_t rows, columns, in;
  Activation activation;
};

// Whether this machine and the instruction set in force can: bf16 products, and an even number of inputs.
bool has_linear(int64_t in);

// A row's result does not depend on the other rows, bit for bit.
void linear(const Linear& job, int num_threads);

}  // namespace optmem
