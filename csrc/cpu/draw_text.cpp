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

using Bytes8 = uint8_t __attribute__((vector_size(8)));

// Glyphs narrower than a word: whole words are read and written, and the bytes beyond the glyph's width are left as they were.
// The caller sees to it that 8 bytes can be read behind the last row's first, in the ink and on the page.
OPTMEM_INLINE void stamp_narrow(const uint8_t* ink, int64_t height, int64_t width, uint8_t* page, int64_t stride) {
  Bytes8 mine;
  for (int i = 0; i < 8; ++i) mine[i] = i < width ? 255 : 0;
  for (int64_t y = 0; y < height; ++y) {
    Bytes8 in, out;
    std::memcpy(&in, ink + y * width, 8);
    std::memcpy(&out, page + y * stride, 8);
    const Bytes8 drawn = ~(in & mine);  // 255 - ink
    out = out < drawn ? out : drawn;
    std::memcpy(page + y * stride, &out, 8);
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
    const int64_t height = glyph[1], width = glyph[2];
    const bool has_slack = place[2] + 8 <= job.width && glyph[0] + (height - 1) * width + 8 <= job.ink_size;
    if (width == 8) {
      stamp<8>(ink, height, 8, corner, job.width);
    } else if (width == 16) {
      stamp<16>(ink, height, 16, corner, job.width);
    } else if (width < 8 && has_slack) {
      stamp_narrow(ink, height, width, corner, job.width);
    } else {
      stamp<0>(ink, height, width, corner, job.width);
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
