#pragma once

#include <pybind11/pybind11.h>

// Adds the vision encoder's operators to optmem._cpu.
void bind_vision(pybind11::module_& m);
