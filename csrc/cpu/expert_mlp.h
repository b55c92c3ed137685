#pragma once

#include <cstdint>

#include "cpu/floats.h"

namespace optmem {

// Everything expert_mlp reads and writes.  Sizes are in elements.  A pair is a token and one of its experts: token * top_k + slot.
template <typename T, typename W = T>
struct ExpertMlp {
  const T* x;                   // [tokens, hidden]
  const W* gate_up;             // [experts, 2 * width, hidden]  the gate's rows, then the up projection's
  const W* down;                // [experts, hidden, width]
  const float* gate_up_scales;  // [experts, 2 * width]  of the rows; may be null
  const float* down_scales;     // [experts, hidden]     the same
  const float* weights;         // [tokens * top_k]  of every pair
  const int32_t* order;         // [tokens * top_k]  the pairs, by expert
  const int32_t* starts;        // [experts + 1]  expert e owns order[starts[e]] .. order[starts[e + 1]]
  T* out;                       // [tokens, hidden]  written whole
  int64_t tokens, hidden, width, experts, top_k;

  int64_t pairs() const { return tokens * top_k; }
};

// out[t] = sum over t's experts of weight * down(silu(gate(x)) * up(x)): fp32 sums in the order of experts, rounded once.
// A token's result does not depend on the other tokens, bit for bit.  Throws std::invalid_argument if order or starts point
// outside.  Explicitly instantiated for bf16 and fp32, each with weights of T and of int8_t.
template <typename T, typename W>
void expert_mlp(const ExpertMlp<T, W>& job, int num_threads);

}  // namespace optmem
