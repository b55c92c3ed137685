#pragma once

#include "contact_sheet_pixel.h"

namespace optmem {

// Every page's box, one value at a time, through the function of the CUDA kernel: how that arithmetic is tested without a GPU.
// Throws std::invalid_argument where a page would read or write outside: num_bytes of pixels, num_coefficients.
void contact_sheet_scalar(const ContactSheet& job, int64_t num_bytes, int64_t num_coefficients);

}  // namespace optmem
