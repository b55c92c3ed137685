// One task is some queries of one window and head.  Its keys and values are laid out once as the dot product wants them, which
// does windowing and padding by addressing; then tiles of six queries go over chunks of keys with a running softmax.
//
// On a core with one bf16 product a cycle (Zen 4) sixteen keys and one query of 64 dimensions cost 64 cycles of products and
// about 20 of exponentials, biases and maxima: three quarters of the peak is the most that this form can reach.
#include "cpu/grid_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "checks.h"
#include "cpu/pairs.h"

#pragma GCC diagnostic ignored "-Wuninitialized"  // as in pairs.h: it comes from inlining
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace optmem {
namespace {

constexpr int kTile = 6;      // queries of a tile: with four blocks beside them, 24 sums stay in registers
constexpr int kGroup = 4;     // blocks of keys that are multiplied at once
constexpr int kChunk = 16;    // blocks of keys that are normalised at once; even
constexpr int kTiles = 4;     // tiles that use a chunk of keys while it is near
constexpr int kQueries = kTile * kTiles;
constexpr int64_t kFewest = 4 * kQueries;  // queries that are worth laying the keys out for
constexpr float kLog2E = 1.44269504088896341f;

// Lanes of a block of keys that lie in one row of the window.
struct Segment {
  __mmask16 lanes;
  int row;
};

// kLanes neighbouring keys: where the first stands, and its segments.
struct Block {
  int column, first, last;
};

// The window's keys, sixteen by sixteen: the same for every window, head and query.
struct Keys {
  std::vector<Block> blocks;
  std::vector<Segment> segments;
};

Keys keys_of(int64_t rows, int64_t columns) {
  Keys keys;
  const int64_t count = rows * columns;
  const int64_t blocks = (count + 2 * kLanes - 1) / (2 * kLanes) * 2;  // even: weights are narrowed by two blocks
  for (int64_t b = 0; b < blocks; ++b) {
    Block block{static_cast<int>(b * kLanes % columns), static_cast<int>(keys.segments.size()), 0};
    for (int64_t lane = 0; lane < kLanes && b * kLanes + lane < count; ++lane) {
      const int row = static_cast<int>((b * kLanes + lane) / columns);
      if (static_cast<int>(keys.segments.size()) == block.first || keys.segments.back().row != row) {
        keys.segments.push_back({0, row});
      }
      keys.segments.back().lanes |= static_cast<__mmask16>(1 << lane);
    }
    block.last = static_cast<int>(keys.segments.size());
    keys.blocks.push_back(block);
  }
  return keys;
}

// A table of relative positions, turned: [pairs of dimensions][places], the last place first, so that the biases of one query
// toward keys 0, 1, 2 .. lie side by side.
struct Table {
  std::vector<uint32_t> pairs;
  int64_t stride;
};

Table turned(const Bf16* table, int64_t side, int64_t dim) {
  if (table == nullptr) return {};
  const int64_t places = 2 * side - 1, stride = places + 2 * kLanes;  // whole registers are read at any place
  Table out{std::vector<uint32_t>(static_cast<size_t>(dim / 2 * stride)), stride};
  for (int64_t place = 0; place < places; ++place) {
    const Bf16* row = table + (places - 1 - place) * dim;
    for (int64_t p = 0; p < dim / 2; ++p) std::memcpy(&out.pairs[p * stride + place], row + 2 * p, sizeof(uint32_t));
  }
  return out;
}

int64_t padded(int64_t count) { return (count + 2 * kLanes - 1) / kLanes * kLanes; }

// A window of one grid, seen by one head.
struct Window {
  int64_t grid, top, left, head;
  int64_t height, width;  // what of it lies on the grid: these are its queries
};

// What is the same for every task.
struct Plan {
  const GridAttention& job;
  Keys keys;
  Table toward_row, toward_column;
  int64_t windows_down, windows_across, splits;

  int64_t tasks() const { return job.grids * windows_down * windows_across * job.heads * splits; }

  Window window(int64_t index) const {
    const int64_t head = index % job.heads, across = index / job.heads % windows_across;
    const int64_t down = index / job.heads / windows_across % windows_down;
    const int64_t top = down * job.rows, left = across * job.columns;
    return {index / job.heads / windows_across / windows_down, top, left, head,
            std::min(job.rows, job.height - top), std::min(job.columns, job.width - left)};
  }

  bool has_biases() const { return job.toward_row != nullptr; }

  // Query, key or value (part 0, 1, 2) of a place in a window: the bias's where that is beyond the grid.
  const Bf16* at(const Window& window, int64_t row, int64_t column, int part) const {
    const bool is_inside = row < window.height && column < window.width;
    const int64_t place = (window.grid * job.height + window.top + row) * job.width + window.left + column;
    const Bf16* parts[] = {job.queries, job.keys, job.values};
    return (is_inside ? parts[part] + place * job.stride : job.bias + part * job.heads * job.dim) + window.head * job.dim;
  }
};

// A thread's working memory.
struct Scratch {
  std::vector<Line> keys;    // [blocks][dim / 2]        of sixteen keys two dimensions
  std::vector<Line> values;  // [blocks * 8][dim / 16]   of sixteen dimensions two keys
  std::vector<float> toward_row, toward_column;  // [kQueries][padded]  biases times log2 e; columns go around
  alignas(64) uint32_t queries[kQueries][32];    // pairs of dimensions
  alignas(64) float mixed[kQueries][64];         // sums of weighted values so far
  float most[kQueries], total[kQueries];         // greatest logit and sum of weights so far
  alignas(64) float shrink[kLanes];              // what a tile's sums so far are worth beside the new greatest logit
  alignas(64) float logits[kTile][kChunk * kLanes];
  alignas(64) uint32_t weights[kTile][kChunk * kLanes / 2];  // bf16, two keys each

  explicit Scratch(const Plan& plan)
      : keys(plan.keys.blocks.size() * static_cast<size_t>(plan.job.dim / 2)),
        values(keys.size()),
        toward_row(static_cast<size_t>(kQueries * padded(plan.job.rows))),
        toward_column(static_cast<size_t>(kQueries * padded(plan.job.columns))) {}
};

void lay_out_keys(const Plan& plan, const Window& window, Scratch& scratch) {
  const int64_t columns = plan.job.columns, count = plan.job.rows * columns, pairs = plan.job.dim / 2;
  for (int64_t k = 0; k < count; ++k) {
    uint32_t key[32];
    std::memcpy(key, plan.at(window, k / columns, k % columns, 1), static_cast<size_t>(pairs) * sizeof(uint32_t));
    Line* lines = &scratch.keys[static_cast<size_t>(k / kLanes * pairs)];
    for (int64_t p = 0; p < pairs; ++p) lines[p].pairs[k % kLanes] = key[p];
  }
}

OPTMEM_AVX512 void lay_out_values(const Plan& plan, const Window& window, Scratch& scratch) {
  const int64_t columns = plan.job.columns, count = plan.job.rows * columns, dim = plan.job.dim;
  uint16_t even[64] = {}, odd[64] = {};
  for (int64_t k = 0; k < count; k += 2) {
    std::memcpy(even, plan.at(window, k / columns, k % columns, 2), static_cast<size_t>(dim) * sizeof(uint16_t));
    if (k + 1 < count) {
      std::memcpy(odd, plan.at(window, (k + 1) / columns, (k + 1) % columns, 2), static_cast<size_t>(dim) * sizeof(uint16_t));
    } else {
      std::fill(odd, odd + 64, uint16_t{0});
    }
    uint32_t* pairs = scratch.values[static_cast<size_t>(k / 2 * (dim / kLanes))].pairs;
    for (int64_t d = 0; d < dim; ++d) pairs[d] = even[d] | static_cast<uint32_t>(odd[d]) << 16;
  }
}

// A tile's biases toward `count` places of a table, times log2 e; query i begins at place from[i].
OPTMEM_AVX512_BF16 void relate(const Table& table, const uint32_t (*queries)[32], int pairs, const int64_t* from, int64_t count,
                               float* out, int64_t stride) {
  for (int64_t j = 0; j < count; j += kLanes) {
    __m512 sums[kTile];
#pragma GCC unroll 6
    for (int i = 0; i < kTile; ++i) sums[i] = _mm512_setzero_ps();
    for (int p = 0; p < pairs; ++p) {
#pragma GCC unroll 6
      for (int i = 0; i < kTile; ++i) {
        const __m512i places = _mm512_loadu_si512(&table.pairs[static_cast<size_t>(p * table.stride + from[i] + j)]);
        const __m512i pair = _mm512_set1_epi32(static_cast<int>(queries[i][p]));
        sums[i] = _mm512_dpbf16_ps(sums[i], (__m512bh)places, (__m512bh)pair);
      }
    }
#pragma GCC unroll 6
    for (int i = 0; i < kTile; ++i) _mm512_storeu_ps(out + i * stride + j, _mm512_mul_ps(sums[i], _mm512_set1_ps(kLog2E)));
  }
}

// Products of a tile with kBlocks blocks of keys, into columns `column` .. of the logits.
template <int kBlocks>
OPTMEM_AVX512_BF16 void dot_keys(const uint32_t (*queries)[32], const Line* keys, int pairs, int column, Scratch& scratch) {
  __m512 sums[kTile][kBlocks];
#pragma GCC unroll 6
  for (int i = 0; i < kTile; ++i) {
#pragma GCC unroll 4
    for (int b = 0; b < kBlocks; ++b) sums[i][b] = _mm512_setzero_ps();
  }
  for (int p = 0; p < pairs; ++p) {
#pragma GCC unroll 6
    for (int i = 0; i < kTile; ++i) {
#pragma GCC unroll 4
      for (int b = 0; b < kBlocks; ++b) sums[i][b] = multiply_add(sums[i][b], keys[b * pairs + p], queries[i][p]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kTile; ++i) {
#pragma GCC unroll 4
    for (int b = 0; b < kBlocks; ++b) _mm512_store_ps(&scratch.logits[i][column + b * kLanes], sums[i][b]);
  }
}

// Logits of one query: scaled, biased, in powers of two, and their maximum.  Lanes of no segment are no keys.
OPTMEM_AVX512_BF16 OPTMEM_INLINE __m512 add_biases(const Keys& keys, int first, int count, const float* toward_row,
                                                   const float* toward_column, __m512 scale, float* logits) {
  const __m512 nothing = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  __m512 most = nothing;
  for (int b = 0; b < count; ++b) {
    const Block& block = keys.blocks[static_cast<size_t>(first + b)];
    const __m512 columns = _mm512_loadu_ps(toward_column + block.column);
    __m512 bias = nothing;
    for (int s = block.first; s < block.last; ++s) {
      const Segment& segment = keys.segments[static_cast<size_t>(s)];
      bias = _mm512_mask_add_ps(bias, segment.lanes, columns, _mm512_set1_ps(toward_row[segment.row]));
    }
    const __m512 logit = _mm512_fmadd_ps(_mm512_load_ps(logits + b * kLanes), scale, bias);
    _mm512_store_ps(logits + b * kLanes, logit);
    most = _mm512_max_ps(most, logit);
  }
  return most;
}

// Logits to weights; gives their sum.
OPTMEM_AVX512_BF16 OPTMEM_INLINE float weigh(const float* logits, int count, float most, uint32_t* weights) {
  const __m512 greatest = _mm512_set1_ps(most);
  __m512 total = _mm512_setzero_ps();
  for (int b = 0; b < count; b += 2) {
    const __m512 low = power_of_two(_mm512_sub_ps(_mm512_load_ps(logits + b * kLanes), greatest));
    const __m512 high = power_of_two(_mm512_sub_ps(_mm512_load_ps(logits + (b + 1) * kLanes), greatest));
    total = _mm512_add_ps(total, _mm512_add_ps(low, high));
    _mm512_store_si512(weights + b * kLanes / 2, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
  return _mm512_reduce_add_ps(total);
}

// mixed[i] = mixed[i] * shrink[i] + weights[i] times the values of a chunk.
template <int kDims>
OPTMEM_AVX512_BF16 void mix(const uint32_t (*weights)[kChunk * kLanes / 2], const Line* values, int pairs, const float* shrink,
                            float (*mixed)[64]) {
  __m512 sums[kTile][kDims];
#pragma GCC unroll 6
  for (int i = 0; i < kTile; ++i) {
#pragma GCC unroll 4
    for (int d = 0; d < kDims; ++d) {
      sums[i][d] = _mm512_mul_ps(_mm512_load_ps(&mixed[i][d * kLanes]), _mm512_set1_ps(shrink[i]));
    }
  }
  for (int k = 0; k < pairs; ++k) {
#pragma GCC unroll 6
    for (int i = 0; i < kTile; ++i) {
#pragma GCC unroll 4
      for (int d = 0; d < kDims; ++d) sums[i][d] = multiply_add(sums[i][d], values[k * kDims + d], weights[i][k]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kTile; ++i) {
#pragma GCC unroll 4
    for (int d = 0; d < kDims; ++d) _mm512_store_ps(&mixed[i][d * kLanes], sums[i][d]);
  }
}

// A tile of queries meets a chunk of keys.
template <int kDims>
OPTMEM_AVX512_BF16 void meet(const Plan& plan, int tile, int first, int count, Scratch& scratch) {
  constexpr int kPairs = kDims * kLanes / 2;
  const int query = tile * kTile;
  const Line* keys = &scratch.keys[static_cast<size_t>(first) * kPairs];
  int b = 0;
  for (; b + kGroup <= count; b += kGroup) {
    dot_keys<kGroup>(scratch.queries + query, keys + b * kPairs, kPairs, b * kLanes, scratch);
  }
  for (; b < count; b += 2) dot_keys<2>(scratch.queries + query, keys + b * kPairs, kPairs, b * kLanes, scratch);
  const __m512 scale = _mm512_set1_ps(kLog2E / std::sqrt(static_cast<float>(plan.job.dim)));
  const size_t rows = padded(plan.job.rows), columns = padded(plan.job.columns);
  for (int i = 0; i < kTile; ++i) {
    const size_t at = static_cast<size_t>(query + i);
    const float before = scratch.most[at];
    const __m512 most = add_biases(plan.keys, first, count, &scratch.toward_row[at * rows],
                                   &scratch.toward_column[at * columns], scale, scratch.logits[i]);
    scratch.most[at] = std::max(before, _mm512_reduce_max_ps(most));
    scratch.shrink[i] = before - scratch.most[at];
  }
  _mm512_store_ps(scratch.shrink, power_of_two(_mm512_load_ps(scratch.shrink)));
  for (int i = 0; i < kTile; ++i) {
    const int at = query + i;
    scratch.total[at] = scratch.total[at] * scratch.shrink[i] + weigh(scratch.logits[i], count, scratch.most[at], scratch.weights[i]);
  }
  mix<kDims>(scratch.weights, &scratch.values[static_cast<size_t>(first * (kLanes / 2) * kDims)], count * kLanes / 2, scratch.shrink,
             scratch.mixed + query);
}

// Loads up to kQueries queries from `first` on and their biases; what is missing of the last tile is its last query again.
OPTMEM_AVX512_BF16 void begin(const Plan& plan, const Window& window, int64_t first, int count, Scratch& scratch) {
  const GridAttention& job = plan.job;
  const int64_t rows = padded(job.rows), columns = padded(job.columns);
  for (int tile = 0; tile * kTile < count; ++tile) {
    int64_t from_row[kTile], from_column[kTile];
    for (int i = 0; i < kTile; ++i) {
      const int at = tile * kTile + i;
      const int64_t query = first + std::min(at, count - 1), row = query / window.width, column = query % window.width;
      std::memcpy(scratch.queries[at], plan.at(window, row, column, 0), static_cast<size_t>(job.dim) * sizeof(Bf16));
      from_row[i] = job.rows - 1 - row;
      from_column[i] = job.columns - 1 - column;
      std::fill(scratch.mixed[at], scratch.mixed[at] + 64, 0.0f);
      scratch.most[at] = -std::numeric_limits<float>::infinity();
      scratch.total[at] = 0.0f;
    }
    if (!plan.has_biases()) continue;  // they stay zero
    const uint32_t(*queries)[32] = scratch.queries + tile * kTile;
    const int pairs = static_cast<int>(job.dim / 2);
    relate(plan.toward_row, queries, pairs, from_row, job.rows, &scratch.toward_row[static_cast<size_t>(tile * kTile * rows)], rows);
    float* around = &scratch.toward_column[static_cast<size_t>(tile * kTile * columns)];
    relate(plan.toward_column, queries, pairs, from_column, job.columns, around, columns);
    for (int i = 0; i < kTile; ++i) {
      for (int64_t c = job.columns; c < job.columns + kLanes; ++c) around[i * columns + c] = around[i * columns + c - job.columns];
    }
  }
}

OPTMEM_AVX512_BF16 void finish(const Plan& plan, const Window& window, int64_t first, int count, const Scratch& scratch) {
  const GridAttention& job = plan.job;
  for (int at = 0; at < count; ++at) {
    const int64_t row = (first + at) / window.width, column = (first + at) % window.width;
    const int64_t place = (window.grid * job.height + window.top + row) * job.width + window.left + column;
    Bf16* out = job.out + (place * job.heads + window.head) * job.dim;
    const __m512 share = _mm512_set1_ps(1.0f / scratch.total[at]);
    for (int64_t d = 0; d < job.dim; d += kLanes) {
      const __m256bh narrow = _mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_load_ps(&scratch.mixed[at][d]), share));
      std::memcpy(out + d, &narrow, sizeof(narrow));
    }
  }
}

template <int kDims>
void attend(const Plan& plan, int64_t task, Scratch& scratch) {
  const Window window = plan.window(task / plan.splits);
  const int64_t part = task % plan.splits, queries = window.height * window.width;
  const int64_t end = queries * (part + 1) / plan.splits;
  const int blocks = static_cast<int>(plan.keys.blocks.size());
  lay_out_keys(plan, window, scratch);
  lay_out_values(plan, window, scratch);
  for (int64_t first = queries * part / plan.splits; first < end; first += kQueries) {
    const int count = static_cast<int>(std::min<int64_t>(kQueries, end - first));
    begin(plan, window, first, count, scratch);
    for (int block = 0; block < blocks; block += kChunk) {
      for (int tile = 0; tile * kTile < count; ++tile) meet<kDims>(plan, tile, block, std::min(kChunk, blocks - block), scratch);
    }
    finish(plan, window, first, count, scratch);
  }
}

using Attend = void (*)(const Plan& plan, int64_t task, Scratch& scratch);
constexpr Attend kAttend[] = {attend<1>, attend<2>, attend<3>, attend<4>};

}  // namespace

bool has_grid_attention(int64_t dim) { return has_bf16() && dim > 0 && dim % kLanes == 0 && dim <= 64; }

void grid_attention(const GridAttention& job, int num_threads) {
  check(has_grid_attention(job.dim), "grid_attention: heads of ", job.dim, " are not for this machine");
  const int64_t down = (job.height + job.rows - 1) / job.rows, across = (job.width + job.columns - 1) / job.columns;
  const int64_t alone = job.grids * down * across * job.heads;
  if (alone == 0) return;
  const int64_t most = std::max<int64_t>(1, job.rows * job.columns / kFewest);
  const int64_t splits = std::min(most, (4 * num_threads + alone - 1) / alone);
  const Plan plan{job, keys_of(job.rows, job.columns), turned(job.toward_row, job.rows, job.dim),
                  turned(job.toward_column, job.columns, job.dim), down, across, splits};
  const Attend run = kAttend[job.dim / kLanes - 1];
#pragma omp parallel num_threads(num_threads)
  {
    Scratch scratch(plan);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < plan.tasks(); ++task) run(plan, task, scratch);
  }
}

}  // namespace optmem
