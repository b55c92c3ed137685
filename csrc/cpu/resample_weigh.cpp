#include "cpu/resample_weigh.h"

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "cpu/isa.h"

#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12's own AVX-512 header begins with an undefined register
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#define OPTMEM_VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))

namespace optmem {
namespace {

// Where tap t begins.  What lies past the last tap has weight zero and reads the last row again.
OPTMEM_INLINE int64_t tap_offset(int64_t t, int64_t count, int64_t stride) { return std::min(t, count - 1) * stride; }

void weigh_plain(const uint8_t* rows, int64_t stride, const int32_t* words, int64_t count, int64_t lanes, uint8_t* out) {
  constexpr int64_t kBlock = 64;
  for (int64_t start = 0; start < lanes; start += kBlock) {
    const int64_t width = std::min(kBlock, lanes - start);
    int32_t sums[kBlock];
    std::fill_n(sums, width, kResampleHalf);
    for (int64_t t = 0; t < count; ++t) {
      const uint8_t* row = rows + t * stride + start;
      for (int64_t i = 0; i < width; ++i) sums[i] += words[t] * row[i];
    }
    for (int64_t i = 0; i < width; ++i) out[start + i] = resample_clip(sums[i]);
  }
}

// A register of 32 bytes; of a narrow block only `width` are read.
template <bool kWhole>
OPTMEM_AVX2 inline __m256i load_avx2(const uint8_t* row, int64_t width) {
  if (kWhole) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row));
  alignas(32) uint8_t bytes[32] = {};
  std::memcpy(bytes, row, width);
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(bytes));
}

// The sums of eight lanes.  Named fields, not arrays: GCC keeps arrays of registers in memory.
struct SumsAvx2 {
  __m256i low, high;

  OPTMEM_AVX2 OPTMEM_INLINE SumsAvx2() : low(_mm256_set1_epi32(kResampleHalf)), high(_mm256_setzero_si256()) {}

  OPTMEM_AVX2 OPTMEM_INLINE void add(__m256i pairs, __m256i digit0, __m256i digit1) {
    low = _mm256_add_epi32(low, _mm256_madd_epi16(pairs, digit0));
    high = _mm256_add_epi32(high, _mm256_madd_epi16(pairs, digit1));
  }

  OPTMEM_AVX2 OPTMEM_INLINE __m256i total() const {
    return _mm256_srai_epi32(_mm256_add_epi32(low, _mm256_slli_epi32(high, 16)), kResampleBits);
  }
};

// Two taps of 32 lanes a round, in two digits of 16 bits.  Interleaving leaves the lanes in an order that packing undoes.
template <bool kWhole>
OPTMEM_AVX2 void weigh_block_avx2(const uint8_t* rows, int64_t stride, const int32_t* words, int64_t count, int64_t width,
                                  uint8_t* out) {
  const __m256i zero = _mm256_setzero_si256();
  SumsAvx2 sums0, sums1, sums2, sums3;
  for (int64_t t = 0; t < count; t += 2, words += 2) {
    const __m256i a = load_avx2<kWhole>(rows + t * stride, width);
    const __m256i b = load_avx2<kWhole>(rows + tap_offset(t + 1, count, stride), width);
    const __m256i left = _mm256_unpacklo_epi8(a, b), right = _mm256_unpackhi_epi8(a, b);
    const __m256i digit0 = _mm256_set1_epi32(words[0]), digit1 = _mm256_set1_epi32(words[1]);
    sums0.add(_mm256_unpacklo_epi8(left, zero), digit0, digit1);
    sums1.add(_mm256_unpackhi_epi8(left, zero), digit0, digit1);
    sums2.add(_mm256_unpacklo_epi8(right, zero), digit0, digit1);
    sums3.add(_mm256_unpackhi_epi8(right, zero), digit0, digit1);
  }
  // Packing saturates at 0 and 255: it is the clip.
  const __m256i pixels = _mm256_packus_epi16(_mm256_packs_epi32(sums0.total(), sums1.total()),
                                             _mm256_packs_epi32(sums2.total(), sums3.total()));
  alignas(32) uint8_t bytes[32];
  _mm256_store_si256(reinterpret_cast<__m256i*>(bytes), pixels);
  std::memcpy(out, bytes, kWhole ? 32 : width);
}

OPTMEM_AVX2 void weigh_avx2(const uint8_t* rows, int64_t stride, const int32_t* words, int64_t count, int64_t lanes,
                            uint8_t* out) {
  constexpr int64_t kBlock = 32;
  if (lanes < kBlock) return weigh_block_avx2<false>(rows, stride, words, count, lanes, out);
  for (int64_t i = 0; i < lanes; i += kBlock) {
    const int64_t start = std::min(i, lanes - kBlock);  // the last block overlaps the one before it
    weigh_block_avx2<true>(rows + start, stride, words, count, kBlock, out + start);
  }
}

// The sums of sixteen lanes.
struct SumsVnni {
  __m512i low, middle, high;

  OPTMEM_VNNI OPTMEM_INLINE SumsVnni() : low(_mm512_set1_epi32(kResampleHalf)), middle(_mm512_setzero_si512()), high(middle) {}

  OPTMEM_VNNI OPTMEM_INLINE void add(__m512i fours, __m512i digit0, __m512i digit1, __m512i digit2) {
    low = _mm512_dpbusd_epi32(low, fours, digit0);
    middle = _mm512_dpbusd_epi32(middle, fours, digit1);
    high = _mm512_dpbusd_epi32(high, fours, digit2);
  }

  OPTMEM_VNNI OPTMEM_INLINE __m512i total() const {
    const __m512i upper = _mm512_add_epi32(_mm512_slli_epi32(high, 8), middle);
    return _mm512_srai_epi32(_mm512_add_epi32(_mm512_slli_epi32(upper, 8), low), kResampleBits);
  }
};

// Four taps of 64 lanes a round, in three digits of 8 bits.  Lanes outside the mask are neither read nor written.
OPTMEM_VNNI void weigh_block_vnni(const uint8_t* rows, int64_t stride, const int32_t* words, int64_t count, __mmask64 mask,
                                  uint8_t* out) {
  SumsVnni sums0, sums1, sums2, sums3;
  for (int64_t t = 0; t < count; t += 4, words += 3) {
    const __m512i a = _mm512_maskz_loadu_epi8(mask, rows + t * stride);
    const __m512i b = _mm512_maskz_loadu_epi8(mask, rows + tap_offset(t + 1, count, stride));
    const __m512i c = _mm512_maskz_loadu_epi8(mask, rows + tap_offset(t + 2, count, stride));
    const __m512i d = _mm512_maskz_loadu_epi8(mask, rows + tap_offset(t + 3, count, stride));
    const __m512i left_ab = _mm512_unpacklo_epi8(a, b), right_ab = _mm512_unpackhi_epi8(a, b);
    const __m512i left_cd = _mm512_unpacklo_epi8(c, d), right_cd = _mm512_unpackhi_epi8(c, d);
    const __m512i digit0 = _mm512_set1_epi32(words[0]), digit1 = _mm512_set1_epi32(words[1]);
    const __m512i digit2 = _mm512_set1_epi32(words[2]);
    sums0.add(_mm512_unpacklo_epi16(left_ab, left_cd), digit0, digit1, digit2);
    sums1.add(_mm512_unpackhi_epi16(left_ab, left_cd), digit0, digit1, digit2);
    sums2.add(_mm512_unpacklo_epi16(right_ab, right_cd), digit0, digit1, digit2);
    sums3.add(_mm512_unpackhi_epi16(right_ab, right_cd), digit0, digit1, digit2);
  }
  // Packing saturates at 0 and 255: it is the clip.
  const __m512i pixels = _mm512_packus_epi16(_mm512_packs_epi32(sums0.total(), sums1.total()),
                                             _mm512_packs_epi32(sums2.total(), sums3.total()));
  _mm512_mask_storeu_epi8(out, mask, pixels);
}

OPTMEM_VNNI void weigh_vnni(const uint8_t* rows, int64_t stride, const int32_t* words, int64_t count, int64_t lanes,
                            uint8_t* out) {
  for (int64_t i = 0; i < lanes; i += 64) {
    const __mmask64 mask = lanes - i >= 64 ? ~__mmask64{0} : (__mmask64{1} << (lanes - i)) - 1;
    weigh_block_vnni(rows + i, stride, words, count, mask, out + i);
  }
}

// Takes the lowest digit of `bits` bits, between -2^(bits - 1) and 2^(bits - 1), off the weight.
uint32_t take_digit(int64_t& weight, int bits) {
  const int64_t size = int64_t{1} << bits, half = size / 2;
  const int64_t digit = ((weight + half) & (size - 1)) - half;
  weight = (weight - digit) >> bits;
  return static_cast<uint32_t>(digit);
}

}  // namespace

WeighKernel weigh_kernel() {
  if (current_isa() == Isa::plain) return {weigh_plain, 1, 1};
  const bool has_vnni = current_isa() == Isa::avx512 && __builtin_cpu_supports("avx512vnni");
  return has_vnni ? WeighKernel{weigh_vnni, 4, 3} : WeighKernel{weigh_avx2, 2, 2};
}

WeighTable weigh_table(int64_t size_in, int64_t size_out, const WeighKernel& kernel) {
  ResampleCoefficients coefficients = resample_coefficients(size_in, size_out);
  const int64_t taps = coefficients.taps, rounds = (taps + kernel.taps - 1) / kernel.taps, each = rounds * kernel.digits;
  const int bits = 32 / kernel.taps;
  const uint32_t mask = static_cast<uint32_t>((uint64_t{1} << bits) - 1);
  std::vector<uint32_t> words(size_out * each);
  for (int64_t i = 0; i < size_out; ++i) {
    for (int64_t t = 0; t < taps; ++t) {
      int64_t weight = coefficients.weights[i * taps + t];
      uint32_t* round = &words[i * each + t / kernel.taps * kernel.digits];
      for (int digit = 0; digit < kernel.digits; ++digit) {
        round[digit] |= (take_digit(weight, bits) & mask) << (t % kernel.taps * bits);
      }
    }
  }
  return {std::move(coefficients.bounds), {words.begin(), words.end()}, each, taps};
}

}  // namespace optmem
