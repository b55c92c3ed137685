#include "cpu/expert_mlp.h"

#include <algorithm>
#include <vector>

#include "checks.h"
#include "cpu/dots.h"

namespace optmem {
namespace {

template <typename T, typename W>
void check_job(const ExpertMlp<T, W>& job) {
  check(job.starts[0] == 0 && job.starts[job.experts] == job.pairs(), "expert_mlp: starts must run from 0 to ", job.pairs(),
        ", got ", job.starts[0], " to ", job.starts[job.experts]);
  for (int64_t e = 0; e < job.experts; ++e) {
    check(job.starts[e] <= job.starts[e + 1], "expert_mlp: starts must not decrease, but do at expert ", e);
  }
  for (int64_t i = 0; i < job.pairs(); ++i) {
    check(job.order[i] >= 0 && job.order[i] < job.pairs(), "expert_mlp: order names pair ", job.order[i], " of ", job.pairs());
  }
}

template <typename T>
OPTMEM_INLINE void gate_body(const float* gate, const float* up, int64_t count, T* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = narrow<T>(silu(gate[i]) * up[i]);
}

template <typename T>
OPTMEM_INLINE void narrow_body(const float* from, int64_t count, T* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = narrow<T>(from[i]);
}

OPTMEM_INLINE void add_body(const float* from, float weight, float* sums) {
  for (int64_t i = 0; i < kChunk; ++i) sums[i] += weight * from[i];
}

template <typename T>
struct Finish {
  OPTMEM_VARIANTS(gate, gate_body<T>, (const float* gate, const float* up, int64_t count, T* out), (gate, up, count, out))
  OPTMEM_VARIANTS(store, narrow_body<T>, (const float* from, int64_t count, T* out), (from, count, out))
  OPTMEM_VARIANTS(add, add_body, (const float* from, float weight, float* sums), (from, weight, sums))
};

// The first expert from `e` on that has tokens, or their number.
template <typename T, typename W>
int64_t next_expert(const ExpertMlp<T, W>& job, int64_t e) {
  while (e < job.experts && job.starts[e] == job.starts[e + 1]) ++e;
  return e;
}

// A piece of the first projection: one expert, up to kChunk columns of its width.
struct Piece {
  int64_t expert, first;
};

template <typename T, typename W>
std::vector<Piece> pieces_of(const ExpertMlp<T, W>& job) {
  std::vector<Piece> pieces;
  for (int64_t e = 0; e < job.experts; ++e) {
    if (job.starts[e] == job.starts[e + 1]) continue;
    for (int64_t first = 0; first < job.width; first += kChunk) pieces.push_back({e, first});
  }
  return pieces;
}

// inner[i] = silu(gate) * up for the expert's pairs and the piece's columns; tokens[i] is the row of x of the i-th pair in order.
template <typename Token, typename T, typename W>
void project_in(const ExpertMlp<T, W>& job, const DotKernel<Token, W>& kernel, Piece piece, const Token* const* tokens, T* inner) {
  const int64_t rows = std::min(kChunk, job.width - piece.first);
  const int64_t gate_row = piece.expert * 2 * job.width + piece.first, end = job.starts[piece.expert + 1];
  const ChunkRows<W> gate_rows = rows_from(job.gate_up, job.gate_up_scales, gate_row, rows, job.hidden);
  const ChunkRows<W> up_rows = rows_from(job.gate_up, job.gate_up_scales, gate_row + job.width, rows, job.hidden);
  const auto apply = OPTMEM_DISPATCH(Finish<T>::gate);
  float gate[kChunk * kDotTokens], up[kChunk * kDotTokens];
  each_tile(kernel, tokens, job.starts[piece.expert], end, [&](int64_t i, const TokenTile<Token>& tile) {
    dot_rows(kernel, gate_rows, tile, gate);
    dot_rows(kernel, up_rows, tile, up);
    for (int m = 0; m < tile.count; ++m) apply(gate + kChunk * m, up + kChunk * m, rows, inner + (i + m) * job.width + piece.first);
  });
}

// The tokens of an expert, added to their sums: the columns of `down_rows` of out, rows of sums `span` apart.
template <typename Token, typename T, typename W>
void add_expert(const ExpertMlp<T, W>& job, const DotKernel<Token, W>& kernel, int64_t expert, const ChunkRows<W>& down_rows,
                const Token* const* inner, float* sums, int64_t span) {
  const auto add = OPTMEM_DISPATCH(Finish<T>::add);
  float dots[kChunk * kDotTokens] = {};
  each_tile(kernel, inner, job.starts[expert], job.starts[expert + 1], [&](int64_t i, const TokenTile<Token>& tile) {
    dot_rows(kernel, down_rows, tile, dots);
    for (int m = 0; m < tile.count; ++m) {
      const int32_t pair = job.order[i + m];
      add(dots + kChunk * m, job.weights[pair], sums + pair / job.top_k * span);
    }
  });
}

// Columns first .. first + columns of out, for all tokens and experts.  sums becomes [tokens, span]: whole chunks are added.  Of an
// expert these are neighbouring rows, so what is fetched ahead of a chunk is the next chunk.
template <typename Token, typename T, typename W>
void project_out(const ExpertMlp<T, W>& job, const DotKernel<Token, W>& kernel, int64_t first, int64_t columns,
                 const Token* const* inner, std::vector<float>& sums) {
  const auto store = OPTMEM_DISPATCH(Finish<T>::store);
  const int64_t span = (columns + kChunk - 1) / kChunk * kChunk;
  sums.assign(static_cast<size_t>(job.tokens * span), 0.0f);
  for (int64_t e = next_expert(job, 0); e < job.experts;) {
    const int64_t after = next_expert(job, e + 1);
    for (int64_t c = 0; c < columns; c += kChunk) {
      ChunkRows<W> rows = rows_from(job.down, job.down_scales, e * job.hidden + first + c, std::min(kChunk, columns - c), job.width);
      if (c + kChunk >= columns) rows.next = job.down + (after * job.hidden + first) * job.width;
      add_expert(job, kernel, e, rows, inner, sums.data() + c, span);
    }
    e = after;
  }
  for (int64_t t = 0; t < job.tokens; ++t) store(&sums[static_cast<size_t>(t * span)], columns, job.out + t * job.hidden + first);
}

// Tokens of the kind that the kernel takes.
template <typename Token, typename T, typename W>
void run(const ExpertMlp<T, W>& job, int num_threads) {
  const DotKernel<Token, W> kernel = dot_kernel<Token, W>();
  const std::vector<Piece> pieces = pieces_of(job);
  std::vector<T> inner(job.pairs() * job.width);
  Rows<Token, T> x(job.x, job.tokens, job.hidden), inner_rows(inner.data(), job.pairs(), job.width);
  std::vector<const Token*> of_x(job.pairs()), of_inner(job.pairs());
  for (int64_t t = 0; t < job.tokens; ++t) x.turn(t);
  for (int64_t i = 0; i < job.pairs(); ++i) {
    of_x[i] = x[job.order[i] / job.top_k];
    of_inner[i] = inner_rows[i];
  }
  const int64_t num_pieces = static_cast<int64_t>(pieces.size());
  Shares in(num_pieces, num_threads), out((job.hidden + kChunk - 1) / kChunk, num_threads);
#pragma omp parallel num_threads(num_threads)
  {
    for (Shares::Range range = in.take(); range.first < range.end; range = in.take()) {
      for (int64_t p = range.first; p < range.end; ++p) project_in(job, kernel, pieces[p], of_x.data(), inner.data());
    }
#pragma omp barrier
    if constexpr (Rows<Token, T>::kTurned) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < job.pairs(); ++i) inner_rows.turn(i);
    }
    std::vector<float> sums;
    for (Shares::Range range = out.take(); range.first < range.end; range = out.take()) {
      const int64_t first = range.first * kChunk;
      project_out(job, kernel, first, std::min(range.end * kChunk, job.hidden) - first, of_inner.data(), sums);
    }
  }
}

}  // namespace

template <typename T, typename W>
void expert_mlp(const ExpertMlp<T, W>& job, int num_threads) {
  check_job(job);
  if constexpr (takes_fixed<T, W>) {
    if (has_fixed()) return run<Fixed>(job, num_threads);
  }
  run<T>(job, num_threads);
}

template void expert_mlp(const ExpertMlp<Bf16>&, int);
template void expert_mlp(const ExpertMlp<float>&, int);
template void expert_mlp(const ExpertMlp<Bf16, int8_t>&, int);
template void expert_mlp(const ExpertMlp<float, int8_t>&, int);

}  // namespace optmem
