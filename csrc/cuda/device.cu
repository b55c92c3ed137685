#include "cuda/launch.h"

namespace optmem {

int device_count() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaErrorNoDevice || status == cudaErrorInsufficientDriver) {
    cudaGetLastError();  // the error is sticky; it would be reported by the next launch
    return 0;
  }
  check_cuda(status, "device_count");
  return count;
}

}  // namespace optmem
