// 16-bit brain floats and an exponential, as plain arithmetic that the compiler vectorises for every instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/isa.h"

namespace optmem {

// The upper half of an fp32.
struct Bf16 {
  uint16_t bits;
};

template <typename To, typename From>
OPTMEM_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

OPTMEM_INLINE float widen(float value) { return value; }
OPTMEM_INLINE float widen(Bf16 value) { return bits_as<float>(static_cast<uint32_t>(value.bits) << 16); }

template <typename T>
T narrow(float value);

template <>
OPTMEM_INLINE float narrow<float>(float value) {
  return value;
}

// To nearest, ties to even; a NaN stays one.
template <>
OPTMEM_INLINE Bf16 narrow<Bf16>(float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded)};
}

// One of two floats, by their bits: a ?: in a long loop becomes a branch, for whose sake GCC 12 vectorises for AVX-512 alone.
OPTMEM_INLINE float choose(bool is_first, float first, float second) {
  const uint32_t mask = -static_cast<uint32_t>(is_first);
  return bits_as<float>((bits_as<uint32_t>(first) & mask) | (bits_as<uint32_t>(second) & ~mask));
}

// e^x to about one unit in the last place (Cephes' polynomial); 0 below -87, where fp32 becomes subnormal.
OPTMEM_INLINE float exponential(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding and taking it away rounds to an integer
  const float clipped = choose(x < -87.0f, -87.0f, choose(x > 88.0f, 88.0f, x));
  const float n = (clipped * 1.44269504088896341f + kRound) - kRound;
  const float r = (clipped - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const float scaled = p * bits_as<float>(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
  return choose(x < -87.0f, 0.0f, scaled);
}

OPTMEM_INLINE float silu(float x) { return x / (1.0f + exponential(-x)); }

}  // namespace optmem
