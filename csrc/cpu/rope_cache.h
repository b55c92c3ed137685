#pragma once

#include <cstdint>

#include "cpu/floats.h"

namespace optmem {

// Everything rope_cache reads and writes.  Sizes are in elements.
template <typename T>
struct RopeCache {
  T* queries;            // [tokens, heads, dim]  rotated in place
  const T* keys;         // [tokens, heads, dim]
  const T* values;       // [tokens, heads, dim]
  const T* cos;          // [tokens, dim / 2]
  const T* sin;          // [tokens, dim / 2]
  const int64_t* slots;  // [tokens]  cell of the cache; negative writes nothing
  T* key_cache;          // [cells, heads, dim]
  T* value_cache;        // [cells, heads, dim]
  int64_t tokens, heads, dim, cells;
};

// Rotates channel i with channel i + dim / 2.  Throws std::invalid_argument, before anything is written, if a slot lies outside.
// Explicitly instantiated for bf16 and fp32.
template <typename T>
void rope_cache(const RopeCache<T>& job, int num_threads);

}  // namespace optmem
