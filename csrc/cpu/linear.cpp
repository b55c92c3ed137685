// A task is a panel of weight rows and a stretch of x.  The panel is turned once into lines of pairs, in this core's cache; then
// tiles of six rows of x meet 64 of its columns: 24 sums in registers, ten loads for 24 products.
//
// oneDNN turns all weights at every call, or wants them twice in memory.  Here a turned number is used by every row of x: with
// 101 of them, the fewest there are, turning is 5 % of a task.
#include "cpu/linear.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "checks.h"
#include "cpu/pairs.h"

#pragma GCC diagnostic ignored "-Wuninitialized"  // as in pairs.h: it comes from inlining
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace optmem {
namespace {

constexpr int kTile = 6;                       // rows of a tile
constexpr int kBlocks = 4;                     // registers of columns of a tile
constexpr int64_t kGroup = kBlocks * kLanes;   // columns of a tile
constexpr int64_t kPanelBytes = 512 << 10;     // of turned weights: half of a core's second cache
constexpr int64_t kLineBytes = 64;            // of the cache
constexpr int64_t kFewestRows = 96;            // that are worth turning weights for

// How a job is cut into tasks: groups of columns by parts, rows by stretches.
struct Cut {
  int64_t groups, parts, stretches;
};

Cut cut(const Linear& job, int64_t threads) {
  const int64_t groups = (job.columns + kGroup - 1) / kGroup;
  const int64_t most = std::max<int64_t>(1, kPanelBytes / (kGroup * job.in * static_cast<int64_t>(sizeof(Bf16))));
  const int64_t fewest = (groups + most - 1) / most;
  const int64_t parts = std::min(groups, (fewest + threads - 1) / threads * threads);  // equal work for every thread
  const int64_t missing = (threads + parts - 1) / parts;
  return {groups, parts, std::clamp<int64_t>(job.rows / kFewestRows, 1, missing)};
}

// Weights that will be turned next: so many lines of the cache from an address on.
struct Ahead {
  const char* from;
  int64_t lines;
};

// A thread's panel: [group][pair][kBlocks] lines, and its bias.
struct Panel {
  std::vector<Line> lines;
  std::vector<float> bias;
};

OPTMEM_AVX512_BF16 void turn_weights(const Linear& job, int64_t first_group, int64_t groups, Panel& panel) {
  const int64_t pairs = job.in / 2;
  for (int64_t block = 0; block < groups * kBlocks; ++block) {
    const int64_t column = first_group * kGroup + block * kLanes;
    Line* lines = &panel.lines[static_cast<size_t>(block / kBlocks * pairs * kBlocks + block % kBlocks)];
    for (int64_t p = 0; p < pairs; p += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, pairs - p);
      const __mmask16 there = static_cast<__mmask16>((1u << count) - 1);
      __m512i rows[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) {
        const bool is_row = column + r < job.columns;
        rows[r] = _mm512_maskz_loadu_epi32(is_row ? there : 0, job.weight + (is_row ? column + r : 0) * job.in + 2 * p);
      }
      turn(rows);
      for (int64_t r = 0; r < count; ++r) _mm512_store_si512(lines + (p + r) * kBlocks, rows[r]);
    }
  }
  for (int64_t c = 0; c < groups * kGroup; ++c) {
    const int64_t column = first_group * kGroup + c;
    panel.bias[static_cast<size_t>(c)] = job.bias != nullptr && column < job.columns ? widen(job.bias[column]) : 0.0f;
  }
}

// The chance that a normal number is beyond x, for 0 <= x < 6, as polynomials of what x is off the middle of one of sixteen cells.
// Fitted for the least greatest relative error: 2e-5 to 3.4, 7e-4 at 6; the absolute error is below 2e-7 everywhere.
constexpr int kCells = 16;
constexpr float kCellsEnd = 6.0f;
alignas(64) constexpr float kBeyond[5][kCells] = {
    {0.425634295f, 0.286887705f, 0.174250737f, 0.0946757719f, 0.0457536466f, 0.0195800867f, 0.00739460252f, 0.00245789182f,
     0.000717534567f, 0.000183665499f, 4.11654946e-05f, 8.07024571e-06f, 1.38261123e-06f, 2.06848441e-07f, 2.70069194e-08f,
     3.07568548e-09f},
    {-0.391987413f, -0.340566278f, -0.257075101f, -0.168595463f, -0.0960632786f, -0.0475545451f, -0.0204525255f,
     -0.00764220674f, -0.00248087035f, -0.0006996796f, -0.000171435444f, -3.64926163e-05f, -6.74853163e-06f,
     -1.08420409e-06f, -1.5132423e-07f, -1.83485156e-08f},
    {0.0367528014f, 0.0957839414f, 0.120498165f, 0.110632367f, 0.0810469687f, 0.0490386374f, 0.0249280743f, 0.0107496344f,
     0.00395617262f, 0.00124761905f, 0.000338096172f, 7.88942998e-05f, 1.587718e-05f, 2.75896696e-06f, 4.14361551e-07f,
     5.38279679e-08f},
    {0.0626367256f, 0.0386522301f, 0.00532693462f, -0.0200400818f, -0.0293742009f, -0.0257129762f, -0.0168627352f,
     -0.00885070302f, -0.00382754882f, -0.00138528203f, -0.000423578109f, -0.000110102294f, -2.44339735e-05f,
     -4.6438663e-06f, -7.57645239e-07f, -1.0629936e-07f},
    {-0.00913448725f, -0.0212966278f, -0.0210737847f, -0.0115722828f, -0.000927898509f, 0.00511959614f, 0.00604941742f,
     0.00433213264f, 0.00231421716f, 0.000983163947f, 0.000342016923f, 9.90073313e-05f, 2.40893351e-05f, 4.95942095e-06f,
     8.68051814e-07f, 1.29623373e-07f},
};

// x times the chance that a normal number is below x.
OPTMEM_AVX512_BF16 OPTMEM_INLINE __m512 gelu(__m512 x) {
  const __m512 size = _mm512_abs_ps(x);
  const __m512i cell = _mm512_cvttps_epi32(_mm512_mul_ps(size, _mm512_set1_ps(kCells / kCellsEnd)));
  const __m512 middle = _mm512_add_ps(_mm512_cvtepi32_ps(cell), _mm512_set1_ps(0.5f));
  const __m512 part = _mm512_fnmadd_ps(middle, _mm512_set1_ps(kCellsEnd / kCells), size);
  __m512 beyond = _mm512_permutexvar_ps(cell, _mm512_load_ps(kBeyond[4]));
#pragma GCC unroll 4
  for (int i = 3; i >= 0; --i) beyond = _mm512_fmadd_ps(beyond, part, _mm512_permutexvar_ps(cell, _mm512_load_ps(kBeyond[i])));
  beyond = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(size, _mm512_set1_ps(kCellsEnd), _CMP_LT_OQ), beyond);
  const __mmask16 is_negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
  return _mm512_mul_ps(x, _mm512_mask_sub_ps(beyond, static_cast<__mmask16>(~is_negative), _mm512_set1_ps(1.0f), beyond));
}

// x / (1 + e^(-1.702 x)), from the exponential of the smaller side.
OPTMEM_AVX512_BF16 OPTMEM_INLINE __m512 quick_gelu(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 small = power_of_two(_mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(-1.702f * 1.44269504088896341f)));
  const __mmask16 is_negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
  const __m512 above = _mm512_mask_mov_ps(one, is_negative, small);
  return _mm512_mul_ps(x, _mm512_div_ps(above, _mm512_add_ps(one, small)));
}

template <Activation kActivation>
OPTMEM_AVX512_BF16 OPTMEM_INLINE __m512 activated(__m512 x) {
  if constexpr (kActivation == Activation::gelu) return gelu(x);
  if constexpr (kActivation == Activation::quick_gelu) return quick_gelu(x);
  return x;
}

// One pair of columns of x: its products with a line of every block.
OPTMEM_AVX512_BF16 OPTMEM_INLINE void add_pair(const Bf16* const (&x)[kTile], int64_t p, const Line* lines,
                                               __m512 (&sums)[kTile][kBlocks]) {
#pragma GCC unroll 6
  for (int i = 0; i < kTile; ++i) {
    uint32_t pair;
    std::memcpy(&pair, x[i] + 2 * p, sizeof(pair));
#pragma GCC unroll 4
    for (int b = 0; b < kBlocks; ++b) sums[i][b] = multiply_add(sums[i][b], lines[p * kBlocks + b], pair);
  }
}

// A tile: `count` of kTile rows are there, the rest repeat the last.  What lies ahead is fetched meanwhile.
template <Activation kActivation>
OPTMEM_AVX512_BF16 void multiply(const Linear& job, int64_t row, int count, int64_t column, const Line* lines, const float* bias,
                                 Ahead ahead) {
  const Bf16* x[kTile];
#pragma GCC unroll 6
  for (int i = 0; i < kTile; ++i) x[i] = job.x + (row + std::min(i, count - 1)) * job.in;
  __m512 sums[kTile][kBlocks];
#pragma GCC unroll 6
  for (int i = 0; i < kTile; ++i) {
#pragma GCC unroll 4
    for (int b = 0; b < kBlocks; ++b) sums[i][b] = _mm512_loadu_ps(bias + b * kLanes);
  }
  const int64_t pairs = job.in / 2, fetching = std::min(pairs, ahead.lines);
  int64_t p = 0;
  for (; p < fetching; ++p) {
    _mm_prefetch(ahead.from + p * kLineBytes, _MM_HINT_T1);
    add_pair(x, p, lines, sums);
  }
  for (; p < pairs; ++p) add_pair(x, p, lines, sums);
#pragma GCC unroll 6
  for (int i = 0; i < kTile; ++i) {
    if (i >= count) break;
    Bf16* out = job.out + (row + i) * job.columns + column;
#pragma GCC unroll 4
    for (int b = 0; b < kBlocks; ++b) {
      const int64_t left = job.columns - column - b * kLanes;
      if (left <= 0) break;
      const __mmask16 there = left >= kLanes ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
      const __m256bh narrow = _mm512_cvtneps_pbh(activated<kActivation>(sums[i][b]));
      _mm256_mask_storeu_epi16(out + b * kLanes, there, (__m256i)narrow);
    }
  }
}

using Multiply = void (*)(const Linear& job, int64_t row, int count, int64_t column, const Line* lines, const float* bias,
                          Ahead ahead);

Multiply multiply_for(Activation activation) {
  switch (activation) {
    case Activation::gelu: return multiply<Activation::gelu>;
    case Activation::quick_gelu: return multiply<Activation::quick_gelu>;
    case Activation::none: break;
  }
  return multiply<Activation::none>;
}

// What a task multiplies: a panel's groups, a stretch's rows.
struct Task {
  int64_t first, groups, row, end;
};

Task task_at(const Linear& job, const Cut& how, int64_t index) {
  const int64_t part = index / how.stretches, stretch = index % how.stretches, first = how.groups * part / how.parts;
  return {first, how.groups * (part + 1) / how.parts - first, job.rows * stretch / how.stretches,
          job.rows * (stretch + 1) / how.stretches};
}

// `next`: what the thread does afterwards.  Its weights are fetched a little with every tile; nothing is read there.
void run(const Linear& job, const Task& task, const Task& next, Panel& panel) {
  const Multiply multiply = multiply_for(job.activation);
  const int64_t pairs = job.in / 2, tiles = (task.end - task.row + kTile - 1) / kTile;
  panel.lines.resize(static_cast<size_t>(task.groups * kBlocks * pairs));
  panel.bias.resize(static_cast<size_t>(task.groups * kGroup));
  turn_weights(job, task.first, task.groups, panel);
  const int64_t bytes = std::min(next.groups * kGroup, job.columns - next.first * kGroup) * job.in * static_cast<int64_t>(sizeof(Bf16));
  const int64_t lines = (bytes / kLineBytes + tiles * task.groups - 1) / (tiles * task.groups);
  Ahead ahead{reinterpret_cast<const char*>(job.weight + next.first * kGroup * job.in), lines};
  for (int64_t row = task.row; row < task.end; row += kTile) {
    const int count = static_cast<int>(std::min<int64_t>(kTile, task.end - row));
    for (int64_t g = 0; g < task.groups; ++g, ahead.from += lines * kLineBytes) {
      multiply(job, row, count, (task.first + g) * kGroup, &panel.lines[static_cast<size_t>(g * pairs * kBlocks)],
               &panel.bias[static_cast<size_t>(g * kGroup)], ahead);
    }
  }
}

}  // namespace

bool has_linear(int64_t in) { return has_bf16() && in > 0 && in % 2 == 0; }

void linear(const Linear& job, int num_threads) {
  check(has_linear(job.in), "linear: rows of ", job.in, " are not for this machine");
  if (job.rows == 0 || job.columns == 0) return;
  const Cut how = cut(job, num_threads);
  const int64_t tasks = how.parts * how.stretches;
  std::atomic<int64_t> taken{0};
#pragma omp parallel num_threads(num_threads)
  {
    Panel panel;
    // The first by its number: who came first would else take two at once, and of two tasks leave none.
    const int64_t team = omp_get_num_threads();
    for (int64_t task = omp_get_thread_num(); task < tasks;) {
      const int64_t next = team + taken++;
      run(job, task_at(job, how, task), next < tasks ? task_at(job, how, next) : Task{}, panel);
      task = next;
    }
  }
}

}  // namespace optmem
