// What every launcher shares: the grid arithmetic and the error check.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace optmem {

constexpr unsigned blocks_for(int64_t items, unsigned block) {
  return static_cast<unsigned>((items + block - 1) / block);
}

// Throws a RuntimeError that names the operator and CUDA's own words.
inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// The number of devices; a machine with no driver has none, which is not an error.
int device_count();

}  // namespace optmem
