// Attention with decomposed relative positions or none, over a grid or inside its windows, in bf16 with sums in fp32.
#pragma once

#include <cstdint>

#include "cpu/floats.h"

namespace optmem {

struct GridAttention {
  const Bf16 *queries, *keys, *values;     // [grids, height, width, heads * dim]
  int64_t stride;                          // from one place's numbers to the next's
  const Bf16* bias;                        // [3 * heads * dim]  stands where a window goes beyond the grid; unused if none does
  const Bf16 *toward_row, *toward_column;  // [2 * rows - 1, dim], [2 * columns - 1, dim]  for key = query + (side - 1) - index; or null
  Bf16* out;                               // [grids, height, width, heads * dim]
  int64_t grids, height, width, heads, dim;
  int64_t rows, columns;                   // of a window; the grid's own where all see all
};

// Whether this machine and the instruction set in force can: bf16 products, and heads of 16, 32, 48 or 64.
bool has_grid_attention(int64_t dim);

void grid_attention(const GridAttention& job, int num_threads);

}  // namespace optmem
