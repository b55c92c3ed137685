// bf16 products of AVX-512: pairs of neighbouring numbers, laid out so that one instruction multiplies sixteen of them.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/isa.h"

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12's own AVX-512 header begins with an undefined register
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace optmem {

constexpr int kLanes = 16;  // floats of a register

// Two neighbouring numbers of each of sixteen rows.
struct alignas(64) Line {
  uint32_t pairs[kLanes];
};

// sum[i] + line.pairs[i] . pair, in fp32.
OPTMEM_AVX512_BF16 OPTMEM_INLINE __m512 multiply_add(__m512 sum, const Line& line, uint32_t pair) {
  return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_load_si512(&line), (__m512bh)_mm512_set1_epi32(static_cast<int>(pair)));
}

// 2^x to three millionths for x <= 0; below -127 as good as nothing.  A NaN stays one.
OPTMEM_AVX512_BF16 OPTMEM_INLINE __m512 power_of_two(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-127.0f), x);  // of two, max gives the second where one is a NaN
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 part = _mm512_sub_ps(x, whole);
  __m512 p = _mm512_set1_ps(9.570098974870683e-3f);
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(5.591786008896294e-2f));
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(2.4024744900374706e-1f));
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(6.931218147796623e-1f));
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(9.999992614238835e-1f));
  return _mm512_scalef_ps(p, whole);
}

// Sixteen rows of sixteen pairs become sixteen lines.
OPTMEM_AVX512_BF16 OPTMEM_INLINE void turn(__m512i (&rows)[kLanes]) {
  __m512i twos[kLanes], fours[kLanes];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    twos[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    twos[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 4) {
    fours[i] = _mm512_unpacklo_epi64(twos[i], twos[i + 2]);
    fours[i + 1] = _mm512_unpackhi_epi64(twos[i], twos[i + 2]);
    fours[i + 2] = _mm512_unpacklo_epi64(twos[i + 1], twos[i + 3]);
    fours[i + 3] = _mm512_unpackhi_epi64(twos[i + 1], twos[i + 3]);
  }
  // fours[i + j] holds, in its quarter q, pair 4 q + j of rows i .. i + 3.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i even_low = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0x88);
    const __m512i even_high = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0xdd);
    const __m512i odd_high = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0xdd);
    rows[j] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
    rows[8 + j] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
    rows[4 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    rows[12 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
}

}  // namespace optmem

#pragma GCC diagnostic pop
