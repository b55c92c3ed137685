#pragma once

#include <cstdint>

#include "cpu/floats.h"

namespace optmem {

// Everything route reads and writes.  Sizes are in elements.
struct Route {
  float* scores;     // [tokens, experts]  router logits; overwritten with their softmax
  int32_t* ids;      // [tokens, top_k]  the likeliest experts, likeliest first, of equals the lower id
  float* weights;    // [tokens, top_k]  their probabilities
  int32_t* order;    // [tokens * top_k]  pairs token * top_k + slot, by expert, then by token
  int32_t* starts;   // [experts + 1]  expert e owns order[starts[e]] .. order[starts[e + 1]]
  int64_t tokens, experts, top_k;
};

void route(const Route& job, int num_threads);

}  // namespace optmem
