// optmem._cuda: the CUDA operators.  Pointers and the stream are integers, so one build serves every torch version.
#include <pybind11/pybind11.h>

#include "checks.h"
#include "cuda/contact_sheet.h"
#include "cuda/launch.h"
#include "cuda/resample.h"

namespace py = pybind11;

namespace {

void resample_pass(uintptr_t in, uintptr_t bounds, uintptr_t weights, uintptr_t out, int64_t outer, int32_t size_in,
                   int32_t size_out, int32_t inner, int32_t taps, uintptr_t stream) {
  optmem::check(outer >= 0 && size_in > 0 && size_out > 0 && inner > 0 && taps > 0, "resample: sizes must be positive");
  optmem::check(static_cast<int64_t>(size_out) * inner < (int64_t{1} << 31), "resample: ", size_out, " x ", inner,
                " values are more than a launch can count");
  optmem::resample_pass({reinterpret_cast<const uint8_t*>(in), reinterpret_cast<const int32_t*>(bounds),
                         reinterpret_cast<const int32_t*>(weights), reinterpret_cast<uint8_t*>(out), outer, size_in, size_out,
                         inner, taps},
                        reinterpret_cast<cudaStream_t>(stream));
}

void contact_sheet(uintptr_t pixels, uintptr_t coefficients, uintptr_t pages, uintptr_t sheet, int64_t num_pages, int64_t size,
                   int64_t channels, int64_t most_values, uintptr_t stream) {
  optmem::check(num_pages >= 0 && size > 0 && (channels == 1 || channels == 3), "contact_sheet: sizes must be positive");
  optmem::check(most_values >= 0 && most_values < (int64_t{1} << 31), "contact_sheet: ", most_values,
                " values of a page are more than a launch can count");
  optmem::contact_sheet({reinterpret_cast<const uint8_t*>(pixels), reinterpret_cast<const int32_t*>(coefficients),
                         reinterpret_cast<const optmem::SheetPage*>(pages), reinterpret_cast<uint8_t*>(sheet), num_pages, size,
                         channels},
                        most_values, reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "optmem's CUDA operators";
  m.def("device_count", &optmem::device_count, "The number of CUDA devices; 0 where there is no driver.");
  m.def("resample_pass", &resample_pass, py::arg("images"), py::arg("bounds"), py::arg("weights"), py::arg("out"),
        py::arg("outer"), py::arg("size_in"), py::arg("size_out"), py::arg("inner"), py::arg("taps"), py::arg("stream"));
  m.def("contact_sheet", &contact_sheet, py::arg("pixels"), py::arg("coefficients"), py::arg("pages"), py::arg("sheet"),
        py::arg("num_pages"), py::arg("size"), py::arg("channels"), py::arg("most_values"), py::arg("stream"));
}
