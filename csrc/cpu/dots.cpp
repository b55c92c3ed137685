#include "cpu/dots.h"

#include <immintrin.h>

#include <algorithm>
#include <utility>

#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12's own AVX-512 header begins with an undefined register
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions only

namespace optmem {
namespace {

using Floats = float __attribute__((vector_size(64)));
using Words = uint32_t __attribute__((vector_size(64)));
using Ints = int32_t __attribute__((vector_size(64)));

// What a step takes of a row of int8 for bf16 tokens, which hold two neighbours in a word.
struct Neighbours {
  Floats even, odd;
};

// 64 bytes of a row; what lies behind its end is zero.
template <typename T>
OPTMEM_INLINE Words load(const T* from, int64_t count) {
  Words words = {};
  if (count * sizeof(T) >= 64) {
    std::memcpy(&words, from, 64);
  } else {
    std::memcpy(&words, from, count * sizeof(T));
  }
  return words;
}

template <typename T>
OPTMEM_INLINE Words load_row(const T* from, int64_t count, T) {
  return load(from, count);
}

// Sixteen columns of int8, or what is left of them.
OPTMEM_INLINE Floats load_row(const int8_t* from, int64_t count, float) {
  using Bytes = int8_t __attribute__((vector_size(16)));
  Bytes bytes = {};
  if (count >= 16) {
    std::memcpy(&bytes, from, 16);
  } else {
    std::memcpy(&bytes, from, count);
  }
  return __builtin_convertvector(__builtin_convertvector(bytes, Ints), Floats);
}

// Thirty-two columns of int8, or what is left of them.
OPTMEM_INLINE Neighbours load_row(const int8_t* from, int64_t count, Bf16) {
  using Pairs = int16_t __attribute__((vector_size(32)));
  Pairs pairs = {};
  if (count >= 32) {
    std::memcpy(&pairs, from, 32);
  } else {
    std::memcpy(&pairs, from, count);
  }
  const Ints ints = __builtin_convertvector(pairs, Ints);
  const Ints even = reinterpret_cast<Ints>(reinterpret_cast<Words>(ints) << 24) >> 24;
  return {__builtin_convertvector(even, Floats), __builtin_convertvector(ints >> 8, Floats)};
}

OPTMEM_INLINE void add_products(const Words& weight, const Words& token, float, Floats& sum) {
  sum += reinterpret_cast<Floats>(weight) * reinterpret_cast<Floats>(token);
}

OPTMEM_INLINE void add_products(const Floats& weight, const Words& token, float, Floats& sum) {
  sum += weight * reinterpret_cast<Floats>(token);
}

OPTMEM_INLINE void add_products(const Neighbours& weight, const Words& token, Bf16, Floats& sum) {
  sum += weight.even * reinterpret_cast<Floats>(token << 16);
  sum += weight.odd * reinterpret_cast<Floats>(token & 0xffff0000u);
}

// A word holds two neighbours: the lower becomes a float by a shift, the upper by a mask.
OPTMEM_INLINE void add_products(const Words& weight, const Words& token, Bf16, Floats& sum) {
  sum += reinterpret_cast<Floats>(weight << 16) * reinterpret_cast<Floats>(token << 16);
  sum += reinterpret_cast<Floats>(weight & 0xffff0000u) * reinterpret_cast<Floats>(token & 0xffff0000u);
}

OPTMEM_INLINE float total(const Floats& lanes) {
  float half[8];
  for (int i = 0; i < 8; ++i) half[i] = lanes[i] + lanes[i + 8];
  for (int width = 4; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) half[i] += half[i + width];
  }
  return half[0];
}

template <typename T, typename W, int kRows, int kTokens>
OPTMEM_INLINE void dots_body(const W* weight, int64_t stride, int64_t in, const T* const* tokens, const W* /*ahead*/, float* sums) {
  constexpr int64_t kStep = 64 / sizeof(T);
  Floats lanes[kRows][kTokens] = {};
  for (int64_t i = 0; i < in; i += kStep) {
    decltype(load_row(weight, in, T{})) rows[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) rows[r] = load_row(weight + r * stride + i, in - i, T{});
#pragma GCC unroll 8
    for (int m = 0; m < kTokens; ++m) {
      const Words token = load(tokens[m] + i, in - i);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) add_products(rows[r], token, T{}, lanes[r][m]);
    }
  }
  for (int m = 0; m < kTokens; ++m) {
    for (int r = 0; r < kRows; ++r) sums[kDotRows * m + r] = total(lanes[r][m]);
  }
}

// The sums of four registers, side by side.
OPTMEM_AVX512_BF16 inline __m128 total4(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512 abcd = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

OPTMEM_AVX512_BF16 OPTMEM_INLINE __m512bh load_bf16(const Bf16* from, __mmask32 mask) {
  return (__m512bh)_mm512_maskz_loadu_epi16(mask, from);
}

// A step of 32 columns; `there` says which of them the rows have.
template <int kRows, int kTokens, int kFetched>
OPTMEM_AVX512_BF16 OPTMEM_INLINE void add_bf16(const Bf16* weight, int64_t stride, int64_t column, __mmask32 there,
                                               const Bf16* const (&tokens)[kTokens], const Bf16* ahead,
                                               __m512 (&lanes)[kDotRows][kTokens]) {
  __m512bh rows[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    // To the second cache alone: to the first, few loads can be on their way at once.  GB/s of one Zen 4 core with one / four /
    // six tokens: 13 / 13 / 13 without or to the first, 22 / 20 / 23 to the second.
    if (r < kFetched) _mm_prefetch(reinterpret_cast<const char*>(ahead + r * stride + column), _MM_HINT_T1);
    rows[r] = load_bf16(weight + r * stride + column, there);
  }
#pragma GCC unroll 8
  for (int m = 0; m < kTokens; ++m) {
    const __m512bh token = load_bf16(tokens[m] + column, there);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) lanes[r][m] = _mm512_dpbf16_ps(lanes[r][m], rows[r], token);
  }
}

// Two products an instruction, summed in fp32.
template <int kRows, int kTokens, int kFetched>
OPTMEM_AVX512_BF16 void dots_bf16(const Bf16* weight, int64_t stride, int64_t in, const Bf16* const* tokens, const Bf16* ahead,
                                  float* sums) {
  const Bf16* own[kTokens];
#pragma GCC unroll 8
  for (int m = 0; m < kTokens; ++m) own[m] = tokens[m];
  __m512 lanes[kDotRows][kTokens];
#pragma GCC unroll 4
  for (int r = 0; r < kDotRows; ++r) {
#pragma GCC unroll 8
    for (int m = 0; m < kTokens; ++m) lanes[r][m] = _mm512_setzero_ps();
  }
  int64_t i = 0;
  for (; i + 32 <= in; i += 32) add_bf16<kRows, kTokens, kFetched>(weight, stride, i, ~__mmask32{0}, own, ahead, lanes);
  if (i < in) add_bf16<kRows, kTokens, kFetched>(weight, stride, i, (__mmask32{1} << (in - i)) - 1, own, ahead, lanes);
#pragma GCC unroll 8
  for (int m = 0; m < kTokens; ++m) {
    _mm_storeu_ps(sums + kDotRows * m, total4(lanes[0][m], lanes[1][m], lanes[2][m], lanes[3][m]));
  }
}

// 32 columns of rows of int8, widened to 16 bits; `there` says which of them the rows have.
template <bool kWhole, int kRows, int kTokens>
OPTMEM_AVX512_VNNI OPTMEM_INLINE void add_fixed(const int8_t* weight, int64_t stride, int64_t column, __mmask32 there,
                                                const Fixed* const* tokens, __m512i (&lanes)[kDotRows][kTokens]) {
  __m512i rows[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const __m256i* from = reinterpret_cast<const __m256i*>(weight + r * stride + column);
    rows[r] = _mm512_cvtepi8_epi16(kWhole ? _mm256_loadu_si256(from) : _mm256_maskz_loadu_epi8(there, from));
  }
#pragma GCC unroll 8
  for (int m = 0; m < kTokens; ++m) {
    __m512i token = _mm512_load_si512(tokens[m] + column);
    asm("" : "+v"(token));  // in a register: GCC would load it for every row, and loads are what there are most of
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) lanes[r][m] = _mm512_dpwssd_epi32(lanes[r][m], rows[r], token);
  }
}

// Sums of up to kRows rows, two products an instruction, exactly in 32 bits.
template <int kRows, int kTokens, bool kFetches>
OPTMEM_AVX512_VNNI OPTMEM_INLINE void sum_fixed(const int8_t* weight, int64_t stride, int64_t in, const Fixed* const* tokens,
                                                const int8_t* ahead, __m512i (&lanes)[kDotRows][kTokens]) {
  int64_t i = 0;
  for (; i + kFixedStep <= in; i += kFixedStep) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {  // to the second cache, as in dots_bf16
      if (kFetches) _mm_prefetch(reinterpret_cast<const char*>(ahead + r * stride + i), _MM_HINT_T1);
    }
    add_fixed<true, kRows>(weight, stride, i, 0, tokens, lanes);
    add_fixed<true, kRows>(weight, stride, i + 32, 0, tokens, lanes);
  }
  for (; i < in; i += 32) {
    const __mmask32 there = in - i >= 32 ? ~__mmask32{0} : (__mmask32{1} << (in - i)) - 1;
    add_fixed<false, kRows>(weight, stride, i, there, tokens, lanes);
  }
}

// GCC 12 keeps at most 16 sums in registers here: four rows by four tokens, or twice two rows by eight.
template <int kRows, int kTokens, bool kFetches>
OPTMEM_AVX512_VNNI void dots_fixed(const int8_t* weight, int64_t stride, int64_t in, const Fixed* const* tokens, const int8_t* ahead,
                                   float* sums) {
  constexpr int kAtOnce = kTokens > 4 && kRows > 2 ? 2 : kRows;
  __m512i totals[kTokens][kDotRows];
#pragma GCC unroll 4
  for (int first = 0; first < kRows; first += kAtOnce) {
    __m512i lanes[kDotRows][kTokens];
#pragma GCC unroll 4
    for (int r = 0; r < kAtOnce; ++r) {
#pragma GCC unroll 8
      for (int m = 0; m < kTokens; ++m) lanes[r][m] = _mm512_setzero_si512();
    }
    sum_fixed<kAtOnce, kTokens, kFetches>(weight + first * stride, stride, in, tokens, ahead + first * stride, lanes);
#pragma GCC unroll 4
    for (int r = 0; r < kAtOnce; ++r) {
#pragma GCC unroll 8
      for (int m = 0; m < kTokens; ++m) totals[m][first + r] = lanes[r][m];
    }
  }
  for (int m = 0; m < kTokens; ++m) {
    const __m512i* row = totals[m];
    const __m128 sum = total4(_mm512_cvtepi32_ps(row[0]), _mm512_cvtepi32_ps(row[kRows > 1 ? 1 : 0]),
                              _mm512_cvtepi32_ps(row[kRows > 2 ? 2 : 0]), _mm512_cvtepi32_ps(row[kRows > 3 ? 3 : 0]));
    _mm_storeu_ps(sums + kDotRows * m, _mm_mul_ps(sum, _mm_set1_ps(step_of(tokens[m], in))));
  }
}

// Eight floats of a row; what lies behind its end is zero.
OPTMEM_AVX2 OPTMEM_INLINE __m256 load_8(const float* from, int64_t count) {
  if (count >= 8) return _mm256_loadu_ps(from);
  float part[8] = {};
  std::memcpy(part, from, static_cast<size_t>(count) * sizeof(float));
  return _mm256_loadu_ps(part);
}

OPTMEM_AVX2 OPTMEM_INLINE __m256 load_8(const Bf16* from, int64_t count) {
  __m128i bits;
  if (count >= 8) {
    bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  } else {
    Bf16 part[8] = {};
    std::memcpy(part, from, static_cast<size_t>(count) * sizeof(Bf16));
    bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(part));
  }
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

OPTMEM_AVX2 OPTMEM_INLINE __m256 load_8(const int8_t* from, int64_t count) {
  int64_t bytes = 0;
  if (count >= 8) {
    std::memcpy(&bytes, from, 8);
  } else {
    std::memcpy(&bytes, from, static_cast<size_t>(count));
  }
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(bytes)));
}

OPTMEM_AVX2 OPTMEM_INLINE float total_8(__m256 lanes) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

// The compiler keeps the sums of the generic kernel in memory here: 7 GFLOP/s on two Zen 3 cores.  Four rows by three tokens are
// twelve of the sixteen registers.
template <typename T, typename W, int kRows, int kTokens>
OPTMEM_AVX2 void dots_fma(const W* weight, int64_t stride, int64_t in, const T* const* tokens, const W* /*ahead*/, float* sums) {
  __m256 lanes[kRows][kTokens];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int m = 0; m < kTokens; ++m) lanes[r][m] = _mm256_setzero_ps();
  }
  for (int64_t i = 0; i < in; i += 8) {
    __m256 columns[kTokens];
#pragma GCC unroll 8
    for (int m = 0; m < kTokens; ++m) columns[m] = load_8(tokens[m] + i, in - i);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const __m256 row = load_8(weight + r * stride + i, in - i);
#pragma GCC unroll 8
      for (int m = 0; m < kTokens; ++m) lanes[r][m] = _mm256_fmadd_ps(row, columns[m], lanes[r][m]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kTokens; ++m) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) sums[kDotRows * m + r] = total_8(lanes[r][m]);
  }
}

// One struct for every tile, so that OPTMEM_VARIANTS can make its three functions.
template <typename T, typename W, int kRows, int kTokens>
struct Tile {
  OPTMEM_VARIANTS(dots, (dots_body<T, W, kRows, kTokens>),
                  (const W* weight, int64_t stride, int64_t in, const T* const* tokens, const W* ahead, float* sums),
                  (weight, stride, in, tokens, ahead, sums))
};

template <typename Any>
auto tile_dots() {
  return OPTMEM_DISPATCH(Any::dots);
}

template <typename T, typename W>
DotKernel<T, W> without_slow(const Dots<T, W> (&four)[kDotTokens], const Dots<T, W> (&one)[kDotTokens], int tokens, int ahead) {
  DotKernel<T, W> kernel{};
  std::copy(four, four + kDotTokens, kernel.four);
  std::copy(one, one + kDotTokens, kernel.one);
  kernel.tokens = tokens;
  kernel.ahead = ahead;
  kernel.many = kNever;
  return kernel;
}

// Kernels that leave fetching to the machine.
template <typename T, typename W, int... kLess>
DotKernel<T, W> generic_kernel(std::integer_sequence<int, kLess...>) {
  if (current_isa() == Isa::avx2) {
    return without_slow<T, W>({dots_fma<T, W, kDotRows, kLess + 1>...}, {dots_fma<T, W, 1, kLess + 1>...}, 3, 0);
  }
  const int tokens = current_isa() == Isa::avx512 ? 6 : 2;
  return without_slow<T, W>({tile_dots<Tile<T, W, kDotRows, kLess + 1>>()...}, {tile_dots<Tile<T, W, 1, kLess + 1>>()...}, tokens, 0);
}

template <int... kLess>
DotKernel<Bf16> bf16_kernel(std::integer_sequence<int, kLess...>) {
  return {{dots_bf16<4, kLess + 1, 4>...}, {dots_bf16<4, kLess + 1, 1>...}, {dots_bf16<1, kLess + 1, 0>...}, 6, kDotRows, 4};
}

template <int... kLess>
DotKernel<Fixed, int8_t> fixed_kernel(std::integer_sequence<int, kLess...>) {
  // Half the bytes are fetched in time.
  const Dots<Fixed, int8_t> four[] = {dots_fixed<4, kLess + 1, true>...}, one[] = {dots_fixed<1, kLess + 1, false>...};
  return without_slow(four, one, 8, 2 * kDotRows);
}

using Tokens = std::make_integer_sequence<int, kDotTokens>;

}  // namespace

template <>
DotKernel<float> dot_kernel() {
  return generic_kernel<float, float>(Tokens{});
}

template <>
DotKernel<float, int8_t> dot_kernel() {
  return generic_kernel<float, int8_t>(Tokens{});
}

template <>
DotKernel<Bf16> dot_kernel() {
  return has_bf16() ? bf16_kernel(Tokens{}) : generic_kernel<Bf16, Bf16>(Tokens{});
}

template <>
DotKernel<Bf16, int8_t> dot_kernel() {
  return generic_kernel<Bf16, int8_t>(Tokens{});
}

template <>
DotKernel<Fixed, int8_t> dot_kernel() {
  return fixed_kernel(Tokens{});
}

}  // namespace optmem
