#include "cpu/fixed.h"

#include <algorithm>
#include <limits>

#include "checks.h"
#include "cpu/isa.h"

namespace optmem {
namespace {

constexpr int64_t kLanes = 16;           // sums of 32 bits that the columns of a row are spread over
constexpr int64_t kMostInALane = 512;    // products of 2^7 and 2^15 - 2^7 whose sum has 31 bits
constexpr int kBits = 14;                // behind the first of the largest number
constexpr int64_t kMostColumns = 1 << 20;  // beyond it so few bits are left that rounding up makes one more

// Bits of steps that a long row gives up, so that no sum leaves 32 bits.
int bits_less(int64_t in) {
  int less = 0;
  for (int64_t most = kMostInALane; most < padded(in) / kLanes; most *= 2) ++less;
  return less;
}

// The bits of the largest size: sizes of bf16 are ordered as their bits are, and a NaN is above them all.
OPTMEM_INLINE uint32_t largest_body(const Bf16* from, int64_t in) {
  uint32_t most = 0;
  for (int64_t i = 0; i < in; ++i) {
    const uint32_t size = from[i].bits & 0x7fffu;
    most = size > most ? size : most;
  }
  return most;
}

OPTMEM_INLINE void divide_body(const Bf16* from, int64_t in, float per_unit, int16_t* out) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding and taking it away rounds to an integer
  for (int64_t i = 0; i < in; ++i) out[i] = static_cast<int16_t>((widen(from[i]) * per_unit + kRound) - kRound);
}

// Only where has_fixed: AVX-512.
OPTMEM_AVX512 uint32_t largest(const Bf16* from, int64_t in) { return largest_body(from, in); }
OPTMEM_AVX512 void divide(const Bf16* from, int64_t in, float per_unit, int16_t* out) { divide_body(from, in, per_unit, out); }

}  // namespace

bool has_fixed() { return current_isa() == Isa::avx512 && __builtin_cpu_supports("avx512vnni"); }

void to_fixed(const Bf16* from, int64_t in, Fixed* out) {
  check(in <= kMostColumns, "rows must have at most ", kMostColumns, " columns, got ", in);
  int16_t* steps = reinterpret_cast<int16_t*>(out);
  const int exponent = static_cast<int>(largest(from, in) >> 7);  // as it is stored: 127 is that of 1
  const int of_step = exponent - kBits + bits_less(in);
  float step = 0.0f;
  if (exponent == 255 || of_step < 1) {  // not finite, or below 2^-112: as good as zero
    step = exponent == 255 ? std::numeric_limits<float>::quiet_NaN() : 0.0f;
    std::fill(steps, steps + padded(in), 0);
  } else {
    step = bits_as<float>(static_cast<uint32_t>(of_step) << 23);
    divide(from, in, bits_as<float>(static_cast<uint32_t>(254 - of_step) << 23), steps);
    std::fill(steps + in, steps + padded(in), 0);
  }
  std::memcpy(steps + padded(in), &step, sizeof(step));
}

}  // namespace optmem
