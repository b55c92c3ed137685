#include "cpu/resample.h"

#include <omp.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/isa.h"
#include "cpu/resample_weigh.h"

namespace optmem {
namespace {

constexpr int64_t kRows = 64;      // rows taken through the pass along the width together: they are its lanes
constexpr int64_t kTile = 16;      // a transposition is made of squares of this many bytes
constexpr int64_t kAhead = 256;    // bytes fetched ahead in a row: the hardware does not follow sixteen (6.9 -> 6.1 ms a scan)
constexpr int64_t kColumns = 256;  // input columns in scratch at a time, so that they stay in the second-level cache
constexpr int64_t kShared = 16;    // a strip or band is this many times as large as what it shares with the next one

using Bytes = uint8_t __attribute__((vector_size(kTile)));

// The perfect shuffle of two registers: their bytes in turn, the first halves and the last halves.
OPTMEM_INLINE void interleave(const Bytes& a, const Bytes& b, Bytes& low, Bytes& high) {
  low = __builtin_shuffle(a, b, Bytes{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
  high = __builtin_shuffle(a, b, Bytes{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
}

// out[x][y] = in[y][x] for 16x16 bytes: four perfect shuffles, each of which moves one bit of y to x.
void transpose_tile(const uint8_t* in, int64_t in_stride, uint8_t* out, int64_t out_stride) {
  Bytes a[kTile], b[kTile];
  for (int64_t y = 0; y < kTile; ++y) {
    std::memcpy(&a[y], in + y * in_stride, kTile);
    __builtin_prefetch(in + y * in_stride + kAhead);
  }
  for (int round = 0; round < 2; ++round) {
    for (int y = 0; y < 8; ++y) interleave(a[y], a[y + 8], b[2 * y], b[2 * y + 1]);
    for (int y = 0; y < 8; ++y) interleave(b[y], b[y + 8], a[2 * y], a[2 * y + 1]);
  }
  for (int64_t y = 0; y < kTile; ++y) std::memcpy(out + y * out_stride, &a[y], kTile);
}

// in [height, width] -> out [width, height], bytes.  The last tile of a side overlaps the one before it.
void transpose(const uint8_t* in, int64_t in_stride, uint8_t* out, int64_t out_stride, int64_t height, int64_t width) {
  if (width < kTile || height < kTile) {
    for (int64_t y = 0; y < height; ++y) {
      for (int64_t x = 0; x < width; ++x) out[x * out_stride + y] = in[y * in_stride + x];
    }
    return;
  }
  for (int64_t y = 0; y < height; y += kTile) {
    const int64_t top = std::min(y, height - kTile);
    for (int64_t x = 0; x < width; x += kTile) {
      const int64_t left = std::min(x, width - kTile);
      transpose_tile(in + top * in_stride + left, in_stride, out + left * out_stride + top, out_stride);
    }
  }
}

// How many equal parts to cut `out` positions into, so that the inputs of a part are near `wanted` and mostly its own.
int64_t positions_per_part(int64_t size_in, int64_t size_out, int64_t wanted, const WeighTable& table) {
  const int64_t inputs = std::max(wanted, table.taps * kShared);
  const int64_t parts = std::clamp<int64_t>((size_in + inputs - 1) / inputs, 1, size_out);
  return (size_out + parts - 1) / parts;
}

// The most inputs that any part of so many outputs reads.
int64_t inputs_per_part(const WeighTable& table, int64_t size_out, int64_t positions) {
  int64_t most = 0;
  for (int64_t i = 0; i < size_out; i += positions) {
    most = std::max(most, table.end(std::min(i + positions, size_out) - 1) - table.first(i));
  }
  return most;
}

// What every thread reads.
struct Plan {
  const Resample& job;
  WeighKernel kernel;
  WeighTable across, down;  // the pass along the width and the pass along the height
  int64_t strip_width;      // output columns taken through scratch together
  int64_t band_height;      // output rows of a task
  int64_t num_bands;        // tasks of an image
  bool height_first;        // which pass goes first where both are needed
};

// What one thread writes.
struct Scratch {
  uint8_t* wide;    // [columns of a strip, channels, kRows]  input, columns as rows
  uint8_t* narrow;  // [strip_width, channels, kRows]         the same after the pass along the width
  uint8_t* rows;    // what the first pass leaves for the second, of one band
};

// The pass along the width: in [height, width_in, channels] -> out [height, width, channels].
void resample_width(const Plan& plan, const Scratch& scratch, const uint8_t* in, int64_t height, uint8_t* out) {
  const Resample& job = plan.job;
  const int64_t channels = job.channels, pixel = channels * kRows;
  const int64_t in_stride = job.width_in * channels, out_stride = job.width * channels;
  for (int64_t y = 0; y < height; y += kRows) {
    const int64_t rows = std::min(kRows, height - y);
    for (int64_t left = 0; left < job.width; left += plan.strip_width) {
      const int64_t right = std::min(left + plan.strip_width, job.width), first = plan.across.first(left);
      transpose(in + y * in_stride + first * channels, in_stride, scratch.wide, kRows, rows,
                (plan.across.end(right - 1) - first) * channels);
      for (int64_t x = left; x < right; ++x) {
        const uint8_t* from = scratch.wide + (plan.across.first(x) - first) * pixel;
        plan.kernel.run(from, pixel, plan.across.words_of(x), plan.across.count(x), pixel, scratch.narrow + (x - left) * pixel);
      }
      transpose(scratch.narrow, kRows, out + y * out_stride + left * channels, out_stride, (right - left) * channels, rows);
    }
  }
}

// The pass along the height for output rows top .. bottom, each of `stride` bytes; `rows` begins at the first row that they need.
void resample_height(const Plan& plan, const uint8_t* rows, int64_t stride, int64_t top, int64_t bottom, uint8_t* out) {
  for (int64_t y = top; y < bottom; ++y) {
    const uint8_t* from = rows + (plan.down.first(y) - plan.down.first(top)) * stride;
    plan.kernel.run(from, stride, plan.down.words_of(y), plan.down.count(y), stride, out + (y - top) * stride);
  }
}

void resample_band(const Plan& plan, const Scratch& scratch, int64_t task) {
  const Resample& job = plan.job;
  const int64_t image = task / plan.num_bands, top = task % plan.num_bands * plan.band_height;
  const int64_t bottom = std::min(top + plan.band_height, job.height);
  const int64_t in_stride = job.width_in * job.channels, stride = job.width * job.channels;
  const uint8_t* in = job.images + image * job.height_in * in_stride;
  uint8_t* out = job.out + (image * job.height + top) * stride;
  const int64_t first = plan.down.first(top), end = plan.down.end(bottom - 1);
  // A pass that keeps the size is left out: its weights are exactly one and zero.
  if (job.height == job.height_in && job.width == job.width_in) {
    std::memcpy(out, in + top * stride, (bottom - top) * stride);
  } else if (job.height == job.height_in) {
    resample_width(plan, scratch, in + top * in_stride, bottom - top, out);
  } else if (job.width == job.width_in) {
    resample_height(plan, in + first * stride, stride, top, bottom, out);
  } else if (plan.height_first) {
    resample_height(plan, in + first * in_stride, in_stride, top, bottom, scratch.rows);
    resample_width(plan, scratch, scratch.rows, bottom - top, out);
  } else {
    resample_width(plan, scratch, in + first * in_stride, end - first, scratch.rows);
    resample_height(plan, scratch.rows, stride, top, bottom, out);
  }
}

// Bands large enough to share little with their neighbours, but at least one a thread over all images.
Plan make_plan(const Resample& job, int64_t num_threads) {
  const WeighKernel kernel = weigh_kernel();
  Plan plan{job, kernel, weigh_table(job.width_in, job.width, kernel), weigh_table(job.height_in, job.height, kernel), 0, 0, 0,
            resamples_height_first(job.height_in, job.width_in, job.height, job.width)};
  plan.strip_width = positions_per_part(job.width_in, job.width, kColumns, plan.across);
  plan.band_height = positions_per_part(job.height_in, job.height, kRows, plan.down);
  const int64_t bands = job.num_images < num_threads ? (num_threads + job.num_images - 1) / job.num_images : 1;
  plan.band_height = std::min(plan.band_height, (job.height + bands - 1) / bands);
  plan.num_bands = (job.height + plan.band_height - 1) / plan.band_height;
  return plan;
}

void resample_values(const ResamplePass& pass) {
  const int64_t values = static_cast<int64_t>(pass.size_out) * pass.inner;
  for (int64_t slice = 0; slice < pass.outer; ++slice) {
    for (int64_t index = 0; index < values; ++index) resample_value(pass, slice, static_cast<uint32_t>(index));
  }
}

}  // namespace

void resample(const Resample& job, int num_threads) {
  if (job.num_images == 0) return;
  const Plan plan = make_plan(job, num_threads);
  const int64_t tasks = job.num_images * plan.num_bands;
  const int threads = static_cast<int>(std::clamp<int64_t>(tasks, 1, num_threads));
  const int64_t wide = inputs_per_part(plan.across, job.width, plan.strip_width) * job.channels * kRows;
  const int64_t narrow = plan.strip_width * job.channels * kRows;
  const int64_t rows = plan.height_first ? plan.band_height * job.width_in * job.channels
                                         : inputs_per_part(plan.down, job.height, plan.band_height) * job.width * job.channels;
  const int64_t each = wide + narrow + rows;
  // All threads' scratch is allocated here, because an exception may not leave a parallel region.
  const std::unique_ptr<uint8_t[]> scratch(new uint8_t[each * threads]);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t task = 0; task < tasks; ++task) {
    uint8_t* mine = scratch.get() + each * omp_get_thread_num();
    resample_band(plan, Scratch{mine, mine + wide, mine + wide + narrow}, task);
  }
}

void resample_scalar(const Resample& job) {
  const ResampleCoefficients across = resample_coefficients(job.width_in, job.width);
  const ResampleCoefficients down = resample_coefficients(job.height_in, job.height);
  const bool height_first = resamples_height_first(job.height_in, job.width_in, job.height, job.width);
  const int64_t pixels = height_first ? job.height * job.width_in : job.height_in * job.width;
  std::vector<uint8_t> middle(job.num_images * pixels * job.channels);
  const auto along_width = [&](const uint8_t* in, int64_t height, uint8_t* out) {
    resample_values({in, across.bounds.data(), across.weights.data(), out, job.num_images * height,
                     static_cast<int32_t>(job.width_in), static_cast<int32_t>(job.width), static_cast<int32_t>(job.channels),
                     across.taps});
  };
  const auto along_height = [&](const uint8_t* in, int64_t width, uint8_t* out) {
    resample_values({in, down.bounds.data(), down.weights.data(), out, job.num_images, static_cast<int32_t>(job.height_in),
                     static_cast<int32_t>(job.height), static_cast<int32_t>(width * job.channels), down.taps});
  };
  if (height_first) {
    along_height(job.images, job.width_in, middle.data());
    along_width(middle.data(), job.height, job.out);
  } else {
    along_width(job.images, job.height_in, middle.data());
    along_height(middle.data(), job.width, job.out);
  }
}

}  // namespace optmem
