#include "cuda/contact_sheet.h"

#include "cuda/launch.h"

namespace optmem {
namespace {

constexpr unsigned kBlock = 256;
constexpr int64_t kMaxPages = 65535;  // the limit of gridDim.y

// One thread a value, neighbours side by side on the sheet; pages beyond the grid are taken in turns.
__global__ void __launch_bounds__(kBlock) contact_sheet_kernel(ContactSheet job) {
  const uint32_t index = blockIdx.x * kBlock + threadIdx.x;
  for (int64_t number = blockIdx.y; number < job.num_pages; number += gridDim.y) {
    const SheetPage& page = job.pages[number];
    if (index < sheet_values(page)) sheet_value(job, page, index);
  }
}

}  // namespace

void contact_sheet(const ContactSheet& job, int64_t most_values, cudaStream_t stream) {
  if (most_values == 0 || job.num_pages == 0) return;
  const dim3 grid(blocks_for(most_values, kBlock), static_cast<unsigned>(job.num_pages < kMaxPages ? job.num_pages : kMaxPages));
  contact_sheet_kernel<<<grid, kBlock, 0, stream>>>(job);
  check_cuda(cudaGetLastError(), "contact_sheet");
}

}  // namespace optmem
