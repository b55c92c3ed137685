#include "cpu/pick_token.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "cpu/floats.h"

namespace optmem {
namespace {

constexpr int64_t kLanes = 32;              // partial results, so that a chunk is read in vectors and in a fixed order
constexpr int64_t kChunk = 4096;            // logits: 16 KiB, which stay in the first cache between the passes over them
constexpr int64_t kWorthAThread = 1 << 16;  // logits, or tokens of history: fewer are done before another thread is awake
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Of some logits of a row, or of all.
struct Mass {
  float highest;  // of those that are not NaN; -inf where there are none
  double plain;   // sum of e^(x - highest); NaN if a logit is NaN or +inf
  double heated;  // sum of e^((x - highest) / temperature of confidence)
};

OPTMEM_INLINE void highest_body(const float* x, int64_t count, float* out) {
  float lanes[kLanes];
  std::fill_n(lanes, kLanes, -kInfinity);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t k = 0; k < kLanes; ++k) lanes[k] = x[i + k] > lanes[k] ? x[i + k] : lanes[k];
  }
  for (; i < count; ++i) lanes[i % kLanes] = x[i] > lanes[i % kLanes] ? x[i] : lanes[i % kLanes];
  *out = *std::max_element(lanes, lanes + kLanes);
}

OPTMEM_INLINE void add_exponentials(const float* x, float base, float scale, float* lanes) {
  for (int64_t k = 0; k < kLanes; ++k) lanes[k] += exponential((x[k] - base) * scale);
}

// The sum of e^((x - base) * scale).  What is left behind the last whole vector is read from a copy, in the same way.
OPTMEM_INLINE double sum_body(const float* x, int64_t count, float base, float scale) {
  float lanes[kLanes] = {}, rest[kLanes];
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) add_exponentials(x + i, base, scale, lanes);
  std::fill_n(rest, kLanes, -kInfinity);
  std::copy(x + i, x + count, rest);
  add_exponentials(rest, base, scale, lanes);
  double sum = 0.0;
  for (float lane : lanes) sum += lane;
  return sum;
}

OPTMEM_INLINE void weigh_body(const float* x, int64_t count, float temperature, Mass* out) {
  highest_body(x, count, &out->highest);
  const float base = out->highest > -kInfinity ? out->highest : 0.0f;  // -inf - -inf would be NaN, and only the row may fail
  out->plain = sum_body(x, count, base, 1.0f);
  out->heated = temperature == 1.0f ? out->plain : sum_body(x, count, base, 1.0f / temperature);
}

OPTMEM_VARIANTS(highest, highest_body, (const float* x, int64_t count, float* out), (x, count, out))
OPTMEM_VARIANTS(weigh, weigh_body, (const float* x, int64_t count, float temperature, Mass* out), (x, count, temperature, out))

// The row's mass from that of its chunks, one after the other.  plain is NaN where the row is broken.
Mass total(const Mass* parts, int64_t chunks, float temperature) {
  Mass sum{-kInfinity, 0.0, 0.0};
  for (int64_t c = 0; c < chunks; ++c) sum.highest = std::max(sum.highest, parts[c].highest);
  for (int64_t c = 0; c < chunks; ++c) {
    const double below = static_cast<double>(parts[c].highest) - sum.highest;
    sum.plain += parts[c].plain * std::exp(below);
    sum.heated += parts[c].heated * std::exp(below / temperature);
  }
  return sum;
}

// The tokens that would end an n-gram of the window again and are not allowed, in rising order, each once.
std::vector<int64_t> banned_tokens(const PickToken& job, int64_t row) {
  std::vector<int64_t> banned;
  if (job.guard_size[row] <= 0 || job.guard_size[row] > job.length) return banned;
  const int64_t before = job.guard_size[row] - 1;  // tokens of an n-gram in front of its last
  const int64_t *said = job.history + row * job.length, *end = said + job.length;
  const int64_t known = std::count_if(said, end, [](int64_t token) { return token >= 0; });
  const int64_t first = job.length - std::max<int64_t>(std::min(known, job.guard_window[row]), 0);
  for (const int64_t* last = said + std::min(first + before, job.length); last < end; ++last) {
    const bool has_logit = *last >= 0 && *last < job.vocab;
    if (has_logit && std::equal(end - before, end, last - before)) banned.push_back(*last);
  }
  const int64_t *allowed = job.allowed + row * job.listed, *allowed_end = allowed + job.listed;
  const auto may_repeat = [=](int64_t token) { return std::find(allowed, allowed_end, token) != allowed_end; };
  banned.erase(std::remove_if(banned.begin(), banned.end(), may_repeat), banned.end());
  std::sort(banned.begin(), banned.end());
  banned.erase(std::unique(banned.begin(), banned.end()), banned.end());
  return banned;
}

// A row's logits by chunks, with those of banned tokens taken out.
class Guarded {
 public:
  Guarded(const float* logits, int64_t vocab, std::vector<int64_t> banned)
      : logits_(logits), vocab_(vocab), banned_(std::move(banned)) {}

  // The likeliest token, of equals the lower id; -1 where every finite logit is banned.
  int64_t likeliest(const Mass* parts) {
    const auto read_highest = OPTMEM_DISPATCH(highest);
    float best = -kInfinity;
    int64_t at = -1;
    for (int64_t start = 0; start < vocab_; start += kChunk, ++parts) {
      float top = parts->highest;
      if (top > best && is_guarded(start)) read_highest(chunk(start), size(start), &top);
      if (top > best) best = top, at = start;
    }
    if (at < 0) return -1;
    const float* x = is_guarded(at) ? chunk(at) : logits_ + at;
    return at + (std::find(x, x + size(at), best) - x);
  }

 private:
  using Place = std::vector<int64_t>::const_iterator;

  int64_t size(int64_t start) const { return std::min(kChunk, vocab_ - start); }
  Place place(int64_t token) const { return std::lower_bound(banned_.begin(), banned_.end(), token); }
  bool is_guarded(int64_t start) const { return !banned_.empty() && place(start) != place(start + kChunk); }

  // A copy without the banned ones, which the next chunk overwrites.
  const float* chunk(int64_t start) {
    std::copy_n(logits_ + start, size(start), copy_);
    for (Place token = place(start); token != place(start + kChunk); ++token) copy_[*token - start] = -kInfinity;
    return copy_;
  }

  const float* logits_;
  int64_t vocab_;
  std::vector<int64_t> banned_;
  float copy_[kChunk];
};

int64_t likeliest(const PickToken& job, int64_t row, const Mass* parts) {
  const float* logits = job.logits + row * job.vocab;
  const int64_t token = Guarded(logits, job.vocab, banned_tokens(job, row)).likeliest(parts);
  return token >= 0 ? token : Guarded(logits, job.vocab, {}).likeliest(parts);  // where nothing would be left, nothing is banned
}

// The row's token; -1 where it fails.
int64_t token_of(const PickToken& job, int64_t row, const Mass* parts, const Mass& sum) {
  const float temperature = job.temperature[row];
  if (std::isnan(sum.plain) || job.guard_size[row] > job.most_guard) return -1;
  if (temperature == 0.0f) return likeliest(job, row, parts);
  const bool draws = job.is_sampled && temperature > 0.0f && std::isfinite(temperature);
  return draws && job.ids[row] >= 0 && job.ids[row] < job.vocab ? job.ids[row] : -1;
}

void finish(const PickToken& job, int64_t row, const Mass* parts, int64_t chunks) {
  const float temperature = job.confidence_temperature;
  const Mass sum = total(parts, chunks, temperature);
  const int64_t token = job.ids[row] = token_of(job, row, parts, sum);
  job.logprobs[row] = job.confidence[row] = kNan;
  if (token < 0) return;
  const double below = static_cast<double>(job.logits[row * job.vocab + token]) - sum.highest;
  job.logprobs[row] = static_cast<float>(below - std::log(sum.plain));
  job.confidence[row] = static_cast<float>(std::exp(below / temperature) / sum.heated);
}

}  // namespace

void pick_token(const PickToken& job, int num_threads) {
  const auto weigh_chunk = OPTMEM_DISPATCH(weigh);
  const int64_t chunks = (job.vocab + kChunk - 1) / kChunk, parts = job.rows * chunks;
  std::vector<Mass> masses(parts);
#pragma omp parallel for num_threads(num_threads) if (job.rows * job.vocab > kWorthAThread)
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t row = part / chunks, start = part % chunks * kChunk;
    const float* logits = job.logits + row * job.vocab + start;
    weigh_chunk(logits, std::min(kChunk, job.vocab - start), job.confidence_temperature, &masses[part]);
  }
#pragma omp parallel for num_threads(num_threads) if (job.rows * (job.length + kChunk) > kWorthAThread)
  for (int64_t row = 0; row < job.rows; ++row) finish(job, row, &masses[row * chunks], chunks);
}

}  // namespace optmem
