#pragma once

#include <cuda_runtime.h>

#include "contact_sheet_pixel.h"

namespace optmem {

// Writes every page's box, on the stream.  All pointers are of the current device; most_values is the most of any page, below 2^31.
void contact_sheet(const ContactSheet& job, int64_t most_values, cudaStream_t stream);

}  // namespace optmem
