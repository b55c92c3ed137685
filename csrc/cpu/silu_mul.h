#pragma once

#include <cstdint>

#include "cpu/floats.h"

namespace optmem {

// out[i] = silu(gate[i]) * up[i], rounded once.  Explicitly instantiated for bf16 and fp32.
template <typename T>
void silu_mul(const T* gate, const T* up, T* out, int64_t count, int num_threads);

}  // namespace optmem
