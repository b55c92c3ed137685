#pragma once

#include <cstdint>

#include "resample_pixel.h"

namespace optmem {

// Everything resample reads and writes.  Sizes are in pixels, all positive but num_images.
struct Resample {
  const uint8_t* images;  // [num_images, height_in, width_in, channels]
  uint8_t* out;           // [num_images, height, width, channels]  written whole
  int64_t num_images;
  int64_t height_in, width_in;
  int64_t height, width;
  int64_t channels;
};

// Pillow's 8-bit antialiased bicubic: columns first, then rows, 8 bits between the two.
// Throws std::bad_alloc before a pixel is written where its scratch memory does not fit.
void resample(const Resample& job, int num_threads);

// The same, one value at a time, through the function of the CUDA kernel: how that arithmetic is tested without a GPU.
void resample_scalar(const Resample& job);

}  // namespace optmem
