#pragma once

#include <cuda_runtime.h>

#include "resample_pixel.h"

namespace optmem {

// One pass along one axis, on the stream.  All pointers are of the current device; size_out * inner must be below 2^31.
void resample_pass(const ResamplePass& pass, cudaStream_t stream);

}  // namespace optmem
