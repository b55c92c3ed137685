#include "cpu/draw_text.h"

#include <algorithm>
#include <cstring>

#include "checks.h"
#include "cpu/isa.h"

namespace optmem {
namespace {

constexpr uint8_t kPaper = 255;

void check_job(const DrawText& job) {
  for (int64_t g = 0; g < job.num_glyphs; ++g) {
    const int32_t* glyph = job.glyphs + 3 * g;
    const int64_t end = glyph[0] + static_cast<int64_t>(glyph[1]) * glyph[2];
    check(glyph[0] >= 0 && glyph[1] >= 0 && glyph[2] >= 0 && end <= job.ink_size, "draw_text: glyph ", g, " (offset ", glyph[0],
          ", height ", glyph[1], ", width ", glyph[2], ") lies outside the ", job.ink_size, " bytes of ink");
  }
  check(job.starts[0] == 0 && job.starts[job.num_pages] == job.num_placements, "draw_text: starts must run from 0 to ",
        job.num_placements, ", got ", job.starts[0], " to ", job.starts[job.num_pages]);
  for (int64_t p = 0; p < job.num_pages; ++p) {
    check(job.starts[p] <= job.starts[p + 1], "draw_text: starts must not decrease, but page ", p, " starts at ", job.starts[p],
          " and ends at ", job.starts[p + 1]);
  }
  for (int64_t i = 0; i < job.num_placements; ++i) {
    const int32_t* place = job.placements + 3 * i;
    check(place[0] >= 0 && place[0] < job.num_glyphs, "draw_text: placement ", i, " names glyph ", place[0], " of ",
          job.num_glyphs);
    const int32_t* glyph = job.glyphs + 3 * static_cast<int64_t>(place[0]);
    const int64_t bottom = static_cast<int64_t>(place[1]) + glyph[1], right = static_cast<int64_t>(place[2]) + glyph[2];
    check(place[1] >= 0 && place[2] >= 0 && bottom <= job.height && right <= job.width, "draw_text: placement ", i, " at top ",
          place[1], ", left ", place[2], " does not fit in a page of ", job.height, "x", job.width);
  }
}

// A known width lets the compiler unroll a glyph row into one or two vector instructions.
template <int kWidth>
OPTMEM_INLINE void stamp(const uint8_t* ink, int64_t height, int64_t width, uint8_t* page, int64_t stride) {
  if (kWidth != 0) width = kWidth;
  for (int64_t y = 0; y < height; ++y) {
    uint8_t* out = page + y * stride;
    const uint8_t* in = ink + y * width;
    for (int64_t x = 0; x < width; ++x) out[x] = std::min<uint8_t>(out[x], kPaper - in[x]);
  }
}

OPTMEM_INLINE void draw_page_body(const DrawText& job, int64_t page) {
  uint8_t* pixels = job.pages + page * job.height * job.width;
  std::memset(pixels, kPaper, job.height * job.width);
  for (int64_t i = job.starts[page]; i < job.starts[page + 1]; ++i) {
    const int32_t* place = job.placements + 3 * i;
    const int32_t* glyph = job.glyphs + 3 * static_cast<int64_t>(place[0]);
    uint8_t* corner = pixels + place[1] * job.width + place[2];
    const uint8_t* ink = job.ink + glyph[0];
    switch (glyph[2]) {
      case 8: stamp<8>(ink, glyph[1], 8, corner, job.width); break;
      case 16: stamp<16>(ink, glyph[1], 16, corner, job.width); break;
      default: stamp<0>(ink, glyph[1], glyph[2], corner, job.width);
    }
  }
}

OPTMEM_VARIANTS(draw_page, draw_page_body, (const DrawText& job, int64_t page), (job, page))

}  // namespace

void draw_text(const DrawText& job, int num_threads) {
  check_job(job);
  const auto draw = OPTMEM_DISPATCH(draw_page);
#pragma omp parallel for schedule(dynamic) num_threads(num_threads)
  for (int64_t page = 0; page < job.num_pages; ++page) draw(job, page);
}

}  // namespace optmem
