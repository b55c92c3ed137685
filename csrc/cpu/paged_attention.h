#pragma once

#include <cstdint>

#include "cpu/floats.h"

namespace optmem {

constexpr int64_t kPageUnit = 16;  // a page holds a multiple of this many tokens

// Everything paged_attention reads and writes.  Sizes are in elements.
template <typename T>
struct PagedAttention {
  const T* queries;        // [tokens, heads, dim]
  const T* keys;           // [pages, page_size, heads, dim]
  const T* values;         // [pages, page_size, heads, dim]
  const int32_t* table;    // [sequences, table_width]  page of every page_size tokens; what is not attended to may be anything
  const int64_t* starts;   // [sequences + 1]  sequence b asks with queries starts[b] .. starts[b + 1], its last tokens
  const int64_t* lengths;  // [sequences]  tokens in the cache, those asking counted
  const int64_t* prompts;  // [sequences]  tokens that no window hides
  T* out;                  // [tokens, heads, dim]  written whole
  int64_t tokens, heads, dim, pages, page_size, sequences, table_width;
  int64_t window;  // 0 is none
  float scale;
};

// Softmax attention of every query over its sequence's keys j <= i, and with a window j < prompt or j > i - window.
// A query's result does not depend on what else is asked, bit for bit.  Throws std::invalid_argument if the table points outside.
// Explicitly instantiated for bf16 and fp32.
template <typename T>
void paged_attention(const PagedAttention<T>& job, int num_threads);

}  // namespace optmem
