#pragma once

#include <cstdint>

namespace optmem {

// Everything draw_text reads and writes.  Sizes are in elements.
struct DrawText {
  const uint8_t* ink;         // [ink_size]  coverage of all glyphs, row by row, 255 is black
  int64_t ink_size;
  const int32_t* glyphs;      // [num_glyphs, 3]  offset into ink, height, width
  int64_t num_glyphs;
  const int32_t* placements;  // [num_placements, 3]  glyph, top, left
  int64_t num_placements;
  const int64_t* starts;      // [num_pages + 1]  page p owns placements starts[p] .. starts[p + 1]
  int64_t num_pages;
  uint8_t* pages;             // [num_pages, height, width]  written whole
  int64_t height, width;
};

// Draws every placement of every page, black on white; where glyphs overlap the darker pixel wins.
// Throws std::invalid_argument, before a pixel is written, if a glyph lies outside the ink or a placement outside its page.
void draw_text(const DrawText& job, int num_threads);

}  // namespace optmem
