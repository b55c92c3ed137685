#include "cuda/launch.h"
#include "cuda/resample.h"

namespace optmem {
namespace {

constexpr unsigned kBlock = 256;
constexpr int64_t kMaxSlices = 65535;  // the limit of gridDim.y

// One thread a value, neighbours side by side in memory; slices beyond the grid are taken in turns.
__global__ void __launch_bounds__(kBlock) resample_kernel(ResamplePass pass, uint32_t values) {
  const uint32_t index = blockIdx.x * kBlock + threadIdx.x;
  if (index >= values) return;
  for (int64_t slice = blockIdx.y; slice < pass.outer; slice += gridDim.y) resample_value(pass, slice, index);
}

}  // namespace

void resample_pass(const ResamplePass& pass, cudaStream_t stream) {
  const int64_t values = static_cast<int64_t>(pass.size_out) * pass.inner;
  if (values == 0 || pass.outer == 0) return;
  const dim3 grid(blocks_for(values, kBlock), static_cast<unsigned>(pass.outer < kMaxSlices ? pass.outer : kMaxSlices));
  resample_kernel<<<grid, kBlock, 0, stream>>>(pass, static_cast<uint32_t>(values));
  check_cuda(cudaGetLastError(), "resample");
}

}  // namespace optmem
