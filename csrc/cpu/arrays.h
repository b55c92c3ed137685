// numpy arrays as the operators see them.  bf16 arrives as uint16: numpy has no such type.
#pragma once

#include <pybind11/numpy.h>

#include "checks.h"
#include "cpu/floats.h"

namespace optmem {

namespace py = pybind11;

template <typename T>
struct Stored {
  using type = T;
};
template <>
struct Stored<Bf16> {
  using type = uint16_t;
};

// A C-contiguous array of exactly this element type; anything else is refused, never copied.
template <typename T>
using Array = py::array_t<typename Stored<T>::type, py::array::c_style>;

// The array's memory, if it has this many elements: what is counted here cannot be overrun there.
template <typename T>
const T* in(const Array<T>& array, int64_t size, const char* name) {
  check(array.size() == size, name, " must have ", size, " elements, got ", array.size());
  return reinterpret_cast<const T*>(array.data());
}

template <typename T>
T* out(Array<T>& array, int64_t size, const char* name) {
  check(array.size() == size, name, " must have ", size, " elements, got ", array.size());
  return reinterpret_cast<T*>(array.mutable_data());
}

template <typename T>
int64_t side(const Array<T>& array, int axis, int dims, const char* name) {
  check(array.ndim() == dims, name, " must have ", dims, " axes, got ", array.ndim());
  return array.shape(axis);
}

inline void check_threads(int num_threads) { check(num_threads > 0, "num_threads must be positive, got ", num_threads); }

}  // namespace optmem
