#include "cpu/paged_attention.h"

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "checks.h"
#include "cpu/dots.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions only

namespace optmem {
namespace {

using Floats = float __attribute__((vector_size(64)));

struct Range {
  int64_t first, end;  // multiples of kPageUnit
};

// Neighbouring queries of one sequence, for one head.
template <typename T>
struct Ask {
  const PagedAttention<T>& job;
  int64_t sequence, first_query, head;
  int64_t position;  // of the first query
  int count;

  int64_t prompt() const { return job.prompts[sequence]; }
  // The first key behind the prompt that query m sees.
  int64_t window_start(int64_t m) const { return job.window == 0 ? 0 : std::max<int64_t>(position + m - job.window + 1, 0); }
  const T* row(const T* cache, int64_t key) const {
    const int64_t page = job.table[sequence * job.table_width + key / job.page_size];
    return cache + ((page * job.page_size + key % job.page_size) * job.heads + head) * job.dim;
  }
  int64_t stride() const { return job.heads * job.dim; }
};

int64_t floor_unit(int64_t key) { return key / kPageUnit * kPageUnit; }
int64_t ceil_unit(int64_t key) { return floor_unit(key + kPageUnit - 1); }  // of a key that a table reaches: check_job

// The keys that any of the queries sees, in one or two ranges; the second may be empty.
template <typename T>
void ranges_of(const Ask<T>& ask, Range (&ranges)[2]) {
  const int64_t end = ask.position + ask.count;
  const Range prompt{0, ceil_unit(std::min(ask.prompt(), end))}, recent{floor_unit(ask.window_start(0)), ceil_unit(end)};
  const bool is_one = recent.first <= prompt.end;
  ranges[0] = {is_one ? 0 : prompt.first, is_one ? recent.end : prompt.end};
  ranges[1] = is_one ? Range{0, 0} : recent;
}

constexpr int64_t kMostPageSize = int64_t{1} << 31;  // so that the tokens of any table are counted in int64

// All pages that a sequence's queries look at.
template <typename T>
void check_pages(const Ask<T>& ask) {
  Range ranges[2];
  ranges_of(ask, ranges);
  for (const Range& range : ranges) {
    if (range.first == range.end) continue;
    for (int64_t entry = range.first / ask.job.page_size; entry <= (range.end - 1) / ask.job.page_size; ++entry) {
      const int32_t page = ask.job.table[ask.sequence * ask.job.table_width + entry];
      check(page >= 0 && page < ask.job.pages, "paged_attention: sequence ", ask.sequence, " names page ", page, " of ", ask.job.pages);
    }
  }
}

template <typename T>
void check_job(const PagedAttention<T>& job) {
  check(job.starts[0] == 0 && job.starts[job.sequences] == job.tokens, "paged_attention: starts must run from 0 to ", job.tokens,
        ", got ", job.starts[0], " to ", job.starts[job.sequences]);
  for (int64_t b = 0; b < job.sequences; ++b) {
    check(job.starts[b] <= job.starts[b + 1], "paged_attention: starts must not decrease, but do at sequence ", b);
  }
  check(job.page_size <= kMostPageSize, "paged_attention: a page must hold at most ", kMostPageSize, " tokens, got ", job.page_size);
  for (int64_t b = 0; b < job.sequences; ++b) {
    const int64_t count = job.starts[b + 1] - job.starts[b];
    check(count <= job.lengths[b], "paged_attention: sequence ", b, " asks with ", count, " tokens of ", job.lengths[b]);
    check(job.prompts[b] >= 0, "paged_attention: prompts must not be negative, got ", job.prompts[b]);
    if (count == 0) continue;
    // A query sees itself, so the table reaches the end whatever the window.  Nothing below overflows once this holds.
    const int64_t needed = (job.lengths[b] - 1) / job.page_size + 1;
    check(needed <= job.table_width, "paged_attention: sequence ", b, " needs ", needed, " pages, its table has ", job.table_width);
    check_pages(Ask<T>{job, b, job.starts[b], 0, job.lengths[b] - count, static_cast<int>(count)});
  }
}

constexpr int64_t kAhead = 16;  // keys: 4 KB of bf16 heads of 128, what is on its way while a core waits 200 ns for memory

// Fetches the rows of kDotRows keys to the second cache: a head's rows are `heads` rows apart, which no prefetcher of the machine
// guesses.  8 sequences of 300 tokens, 10 heads of 128: 0.72 ms without, 0.57 ms with it.
template <typename T>
OPTMEM_INLINE void fetch_ahead(const Ask<T>& ask, const T* cache, int64_t key, const Range& range) {
  if (key >= range.end) return;
  const char* row = reinterpret_cast<const char*>(ask.row(cache, key));
  for (int r = 0; r < kDotRows; ++r) {
    for (int64_t byte = 0; byte < ask.job.dim * static_cast<int64_t>(sizeof(T)); byte += 64) {
      __builtin_prefetch(row + r * ask.stride() * static_cast<int64_t>(sizeof(T)) + byte, 0, 2);
    }
  }
}

// scores[width * m + key] = query m . key, over the ranges.
template <typename T>
void score(const Ask<T>& ask, const DotKernel<T>& kernel, const Range (&ranges)[2], int64_t width, float* scores) {
  const T* queries[kDotTokens];
  float sums[kDotRows * kDotTokens];
  for (int m = 0; m < ask.count; ++m) queries[m] = ask.job.queries + ((ask.first_query + m) * ask.job.heads + ask.head) * ask.job.dim;
  for (const Range& range : ranges) {
    for (int64_t key = range.first; key < range.end; key += kDotRows) {
      fetch_ahead(ask, ask.job.keys, key + kAhead, range);
      // What lies behind the last key is memory of the same page: its score is replaced in soften.
      const T* keys = ask.row(ask.job.keys, key);
      kernel.four[ask.count - 1](keys, ask.stride(), ask.job.dim, queries, keys + kDotRows * ask.stride(), sums);
      for (int m = 0; m < ask.count; ++m) std::memcpy(scores + width * m + key, sums + kDotRows * m, sizeof(float) * kDotRows);
    }
  }
}

struct Seen {
  int64_t prompt, window_start, end;
};

OPTMEM_INLINE void hide(const Seen& seen, int64_t key, float scale, float* scores) {
  for (int64_t i = 0; i < kPageUnit; ++i) {
    const int64_t k = key + i;
    const bool is_seen = (k < seen.end) & ((k < seen.prompt) | (k >= seen.window_start));
    scores[k] = is_seen ? scores[k] * scale : -std::numeric_limits<float>::infinity();
  }
}

// Scores to exponentials, 0 for what is not seen; returns their sum.  Lanes go by the key's place, so ranges do not matter.
OPTMEM_INLINE void soften_body(const Range (&ranges)[2], const Seen& seen, float scale, float* scores, float* sum) {
  float most[kPageUnit], lanes[kPageUnit] = {};
  std::fill_n(most, kPageUnit, -std::numeric_limits<float>::infinity());
  for (const Range& range : ranges) {
    for (int64_t key = range.first; key < range.end; key += kPageUnit) {
      hide(seen, key, scale, scores);
      for (int64_t i = 0; i < kPageUnit; ++i) most[i] = scores[key + i] > most[i] ? scores[key + i] : most[i];
    }
  }
  const float top = *std::max_element(most, most + kPageUnit);
  for (const Range& range : ranges) {
    for (int64_t key = range.first; key < range.end; key += kPageUnit) {
      for (int64_t i = 0; i < kPageUnit; ++i) {
        scores[key + i] = exponential(scores[key + i] - top);
        lanes[i] += scores[key + i];
      }
    }
  }
  *sum = 0.0f;
  for (float lane : lanes) *sum += lane;
}

OPTMEM_VARIANTS(soften, soften_body, (const Range (&ranges)[2], const Seen& seen, float scale, float* scores, float* sum),
                (ranges, seen, scale, scores, sum))

constexpr int64_t kWide = 32;  // channels of a block: a cache line of bf16

OPTMEM_INLINE void load_wide(const float* from, int64_t count, Floats& low, Floats& high) {
  float wide[kWide] = {};
  std::memcpy(wide, from, std::min(count, kWide) * sizeof(float));
  std::memcpy(&low, wide, 64);
  std::memcpy(&high, wide + 16, 64);
}

// Even channels in low, odd ones in high.
OPTMEM_INLINE void load_wide(const Bf16* from, int64_t count, Floats& low, Floats& high) {
  using Words = uint32_t __attribute__((vector_size(64)));
  Words words = {};
  if (count >= kWide) {
    std::memcpy(&words, from, 64);
  } else {
    std::memcpy(&words, from, count * sizeof(Bf16));
  }
  low = reinterpret_cast<Floats>(words << 16);
  high = reinterpret_cast<Floats>(words & 0xffff0000u);
}

OPTMEM_INLINE float wide_channel(const float*, const Floats& low, const Floats& high, int64_t i) { return i < 16 ? low[i] : high[i - 16]; }
OPTMEM_INLINE float wide_channel(const Bf16*, const Floats& low, const Floats& high, int64_t i) { return i % 2 ? high[i / 2] : low[i / 2]; }

// Registers of sums: kCount queries by kBlocks blocks of channels, of two each.
constexpr int most_blocks(int count) { return count == 1 ? 4 : count <= 3 ? 2 : 1; }

// Channels d .. of out = sum over keys of weight * value / total, for kCount queries.
template <typename T, int kCount, int kBlocks>
OPTMEM_INLINE void blend_blocks(const Ask<T>& ask, const Range (&ranges)[2], int64_t width, const float* weights,
                                const float* totals, int64_t d) {
  const int64_t dim = ask.job.dim;
  Floats low[kCount][kBlocks] = {}, high[kCount][kBlocks] = {};
  for (const Range& range : ranges) {
    for (int64_t start = range.first; start < range.end; start += kPageUnit) {
      const T* values = ask.row(ask.job.values, start) + d;
      const int64_t count = std::min(kPageUnit, ask.position + ask.count - start);  // beyond it nothing was written
      for (int64_t i = 0; i < count; ++i) {
        if (i % kDotRows == 0) fetch_ahead(ask, ask.job.values, start + i + kAhead, range);
#pragma GCC unroll 4
        for (int b = 0; b < kBlocks; ++b) {
          Floats value_low, value_high;
          load_wide(values + i * ask.stride() + b * kWide, dim - d - b * kWide, value_low, value_high);
#pragma GCC unroll 6
          for (int m = 0; m < kCount; ++m) {
            const float weight = weights[width * m + start + i];
            low[m][b] += weight * value_low;
            high[m][b] += weight * value_high;
          }
        }
      }
    }
  }
  for (int m = 0; m < kCount; ++m) {
    for (int b = 0; b < kBlocks; ++b) {
      const int64_t first = d + b * kWide;
      T* out = ask.job.out + ((ask.first_query + m) * ask.job.heads + ask.head) * dim + first;
      for (int64_t i = 0; i < std::min(kWide, dim - first); ++i) {
        out[i] = narrow<T>(wide_channel(out, low[m][b], high[m][b], i) / totals[m]);
      }
    }
  }
}

// All channels: as many blocks at once as there are, for a row of values is best read in one go.
template <typename T, int kCount>
OPTMEM_INLINE void blend_body(const Ask<T>& ask, const Range (&ranges)[2], int64_t width, const float* weights, const float* totals) {
  constexpr int kMost = most_blocks(kCount);
  int64_t d = 0;
  for (; d + (kMost - 1) * kWide < ask.job.dim; d += kMost * kWide) blend_blocks<T, kCount, kMost>(ask, ranges, width, weights, totals, d);
  for (; d < ask.job.dim; d += kWide) blend_blocks<T, kCount, 1>(ask, ranges, width, weights, totals, d);
}

template <typename T, int kCount>
struct Blend {
  OPTMEM_VARIANTS(blend, (blend_body<T, kCount>),
                  (const Ask<T>& ask, const Range (&ranges)[2], int64_t width, const float* weights, const float* totals),
                  (ask, ranges, width, weights, totals))
};

template <typename Any>
auto blend_of() {
  return OPTMEM_DISPATCH(Any::blend);
}

template <typename T, int... kLess>
void blend(std::integer_sequence<int, kLess...>, const Ask<T>& ask, const Range (&ranges)[2], int64_t width, const float* weights,
           const float* totals) {
  const decltype(&Blend<T, 1>::blend_plain) of_count[] = {blend_of<Blend<T, kLess + 1>>()...};
  of_count[ask.count - 1](ask, ranges, width, weights, totals);
}

template <typename T>
void answer(const Ask<T>& ask, const DotKernel<T>& kernel, std::vector<float>& scores) {
  Range ranges[2];
  ranges_of(ask, ranges);
  const int64_t width = ceil_unit(ask.position + ask.count);
  if (static_cast<int64_t>(scores.size()) < width * ask.count) scores.resize(width * ask.count);
  score(ask, kernel, ranges, width, scores.data());
  float totals[kDotTokens];
  for (int m = 0; m < ask.count; ++m) {
    const Seen seen{ask.prompt(), ask.window_start(m), ask.position + m + 1};
    OPTMEM_DISPATCH(soften)(ranges, seen, ask.job.scale, scores.data() + width * m, &totals[m]);
  }
  blend(std::make_integer_sequence<int, kDotTokens>{}, ask, ranges, width, scores.data(), totals);
}

// Queries are taken kernel.tokens at a time; the last of a sequence first, for they see the most keys.
template <typename T>
std::vector<Ask<T>> asks_of(const PagedAttention<T>& job, int tokens) {
  std::vector<Ask<T>> asks;
  for (int64_t b = 0; b < job.sequences; ++b) {
    const int64_t before = job.lengths[b] - (job.starts[b + 1] - job.starts[b]);
    for (int64_t end = job.starts[b + 1]; end > job.starts[b]; end -= tokens) {
      const int64_t first = std::max(end - tokens, job.starts[b]);
      for (int64_t head = 0; head < job.heads; ++head) {
        asks.push_back({job, b, first, head, before + first - job.starts[b], static_cast<int>(end - first)});
      }
    }
  }
  return asks;
}

}  // namespace

template <typename T>
void paged_attention(const PagedAttention<T>& job, int num_threads) {
  check_job(job);
  const DotKernel<T> kernel = dot_kernel<T>();
  const std::vector<Ask<T>> asks = asks_of(job, kernel.tokens);
  const int64_t num_asks = static_cast<int64_t>(asks.size());
#pragma omp parallel num_threads(num_threads)
  {
    std::vector<float> scores;
#pragma omp for schedule(dynamic)
    for (int64_t a = 0; a < num_asks; ++a) answer(asks[a], kernel, scores);
  }
}

template void paged_attention(const PagedAttention<Bf16>&, int);
template void paged_attention(const PagedAttention<float>&, int);

}  // namespace optmem
