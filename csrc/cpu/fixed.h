// Tokens of bf16 as 16-bit integers, for weights of int8: a row of weights is widened by one instruction where bf16 takes seven,
// products are summed exactly, and two of them are an instruction.
//
//     token[i] = step * steps[i],   step = 2^k, the least with which |steps[i]| < 2^15
//
// A bf16 has 8 bits, so all numbers down to a 128th of a token's largest are kept as they are; smaller ones are rounded to the step,
// 2^-14 of the largest or less.  Beyond 8,192 columns a bit is given up with every doubling.  A token that holds a NaN or an infinity
// has the step NaN, and so have all sums with it.
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

#include "cpu/floats.h"

namespace optmem {

constexpr int64_t kFixedStep = 64;  // columns that the kernel takes at once: 64 bytes of weights

// A number of a token's row.  Rows are padded with zeros to a multiple of kFixedStep, and behind it stands the step, an fp32.
struct Fixed {
  int16_t steps;
};

inline int64_t padded(int64_t in) { return (in + kFixedStep - 1) / kFixedStep * kFixedStep; }

// What one step of a row of `in` columns is worth.
OPTMEM_INLINE float step_of(const Fixed* row, int64_t in) {
  float step;
  std::memcpy(&step, row + padded(in), sizeof(step));
  return step;
}

// Whether instructions that multiply and add 16-bit integers are there and in force.
bool has_fixed();

// Whether tokens of T are turned into integers for weights of W, where the machine can.
template <typename T, typename W>
constexpr bool takes_fixed = std::is_same_v<T, Bf16> && std::is_same_v<W, int8_t>;

// One row.  out has padded(in) + 2 numbers.
void to_fixed(const Bf16* from, int64_t in, Fixed* out);

// Rows as a dot kernel takes them: as they are, or turned into integers one by one.
template <typename Token, typename T>
class Rows {
 public:
  static constexpr bool kTurned = false;
  Rows(const T* rows, int64_t, int64_t in) : rows_(rows), in_(in) {}
  const Token* operator[](int64_t row) const { return rows_ + row * in_; }
  void turn(int64_t) {}

 private:
  const T* rows_;
  int64_t in_;
};

template <>
class Rows<Fixed, Bf16> {
 public:
  static constexpr bool kTurned = true;
  Rows(const Bf16* rows, int64_t count, int64_t in)
      : rows_(rows), in_(in), lines_((padded(in) + kFixedStep) / kInLine), turned_(static_cast<size_t>(count * lines_)) {}
  const Fixed* operator[](int64_t row) const { return turned_[static_cast<size_t>(row * lines_)].numbers; }
  void turn(int64_t row) { to_fixed(rows_ + row * in_, in_, turned_[static_cast<size_t>(row * lines_)].numbers); }

 private:
  static constexpr int64_t kInLine = 32;
  struct alignas(64) Line {
    Fixed numbers[kInLine];
  };
  const Bf16* rows_;
  int64_t in_, lines_;  // of a row: its numbers and its step
  std::vector<Line> turned_;
};

}  // namespace optmem
