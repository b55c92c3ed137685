#pragma once

#include <pybind11/pybind11.h>

// Adds the decoder's operators to optmem._cpu.
void bind_decoder(pybind11::module_& m);
