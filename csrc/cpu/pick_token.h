#pragma once

#include <cstdint>

namespace optmem {

// Everything pick_token reads and writes.  Sizes are in elements.
struct PickToken {
  const float* logits;          // [rows, vocab]
  const int64_t* history;       // [rows, length]  tokens said before, negative on the left where there are fewer
  const int64_t* guard_size;    // [rows]
  const int64_t* guard_window;  // [rows]
  const int64_t* allowed;       // [rows, listed]  negative where there are fewer
  const float* temperature;     // [rows]
  int64_t* ids;                 // [rows]  written but where a row draws: there the token drawn comes in, and -1 goes out if it fails
  float* logprobs;              // [rows]  written whole
  float* confidence;            // [rows]  written whole
  int64_t rows, vocab, length, listed, most_guard;
  bool is_sampled;
  float confidence_temperature;
};

// The likeliest token behind the guard where a row does not draw, and of every row's token its log-probability and its probability
// at the temperature of confidence, both of the raw logits.  As in optmem/ops/picking.py; no result depends on other rows or on the
// number of threads, bit for bit.
void pick_token(const PickToken& job, int num_threads);

}  // namespace optmem
