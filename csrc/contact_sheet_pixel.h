// The arithmetic of contact_sheet for one value of one page, the same function on the host and in the CUDA kernel.
#pragma once

#include <cstdint>

#include "resample_pixel.h"

namespace optmem {

// Where a page's pixels and weights begin, how large it is, and where it goes.  A row of a table of int64: nothing but numbers.
struct SheetPage {
  int64_t pixels;  // place of its first byte among those of all pages: [height_in, width_in, channels]
  int64_t height_in, width_in, channels;
  int64_t top, left, height, width;  // on the sheet
  int64_t height_first;              // whether the pass along the height comes first
  int64_t down, down_taps;           // place of its bounds [height, 2] among the coefficients, its weights [height, taps] behind
  int64_t across, across_taps;       // the same along the width
};
constexpr int kSheetColumns = 13;
static_assert(sizeof(SheetPage) == kSheetColumns * sizeof(int64_t), "a row of a table of int64");

// Several pages, each resampled into its box of one sheet.  Boxes do not overlap.
struct ContactSheet {
  const uint8_t* pixels;        // of all pages, one behind the other
  const int32_t* coefficients;  // of all axes, one behind the other
  const SheetPage* pages;       // [num_pages]
  uint8_t* sheet;               // [size, size, channels]  written in the boxes
  int64_t num_pages, size, channels;
};

// What one position of an axis is made of.
struct SheetTaps {
  int32_t first, count;
  const int32_t* weights;  // [count]
};

OPTMEM_BOTH inline SheetTaps sheet_taps(const int32_t* axis, int64_t size, int64_t taps, int64_t position) {
  return {axis[2 * position], axis[2 * position + 1], axis + 2 * size + position * taps};
}

// The values that a page has on the sheet; a grey page among pages in colour writes each of them three times.
OPTMEM_BOTH inline int64_t sheet_values(const SheetPage& page) { return page.height * page.width * page.channels; }

// Writes value `index` of a page, which counts over [height, width, channels].  Both passes at once: the bytes that the first pass
// would have left are made where the second one wants them, four times each for a page that shrinks, and stand in no memory.
OPTMEM_BOTH inline void sheet_value(const ContactSheet& job, const SheetPage& page, uint32_t index) {
  const uint32_t channels = static_cast<uint32_t>(page.channels), width = static_cast<uint32_t>(page.width);
  const uint32_t channel = index % channels, x = index / channels % width, y = index / channels / width;
  const SheetTaps down = sheet_taps(job.coefficients + page.down, page.height, page.down_taps, y);
  const SheetTaps across = sheet_taps(job.coefficients + page.across, page.width, page.across_taps, x);
  const int64_t row = page.width_in * page.channels;
  const uint8_t* in = job.pixels + page.pixels + down.first * row + across.first * page.channels + channel;
  const bool height_first = page.height_first != 0;
  const SheetTaps& inner = height_first ? down : across;
  const SheetTaps& outer = height_first ? across : down;
  const int64_t inner_step = height_first ? row : page.channels, outer_step = height_first ? page.channels : row;
  int32_t sum = kResampleHalf;
  for (int32_t o = 0; o < outer.count; ++o, in += outer_step) {
    int32_t part = kResampleHalf;
    for (int32_t i = 0; i < inner.count; ++i) part += inner.weights[i] * in[i * inner_step];
    sum += outer.weights[o] * resample_clip(part);
  }
  uint8_t* out = job.sheet + ((page.top + y) * job.size + page.left + x) * job.channels + channel;
  const int64_t copies = page.channels == job.channels ? 1 : job.channels;
  for (int64_t c = 0; c < copies; ++c) out[c] = resample_clip(sum);
}

}  // namespace optmem
