// optmem._cuda: the CUDA operators.  Pointers and the stream are integers, so one build serves every torch version.
#include <pybind11/pybind11.h>

#include "cuda/launch.h"

namespace py = pybind11;

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "optmem's CUDA operators";
  m.def("device_count", &optmem::device_count, "The number of CUDA devices; 0 where there is no driver.");
}
