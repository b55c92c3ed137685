// optmem._cpu: the CPU operators over buffers.  Shapes and values a user can get wrong are checked in optmem/ops.py first; what is
// checked here keeps a wrong call from touching foreign memory.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "checks.h"
#include "cpu/draw_text.h"
#include "cpu/isa.h"

namespace py = pybind11;

namespace {

// A C-contiguous array of exactly this element type; anything else is refused, never copied.
template <typename T>
using Array = py::array_t<T, py::array::c_style>;

template <typename T>
const T* rows_of(const Array<T>& array, py::ssize_t columns, const char* name) {
  optmem::check(array.ndim() == 2 && array.shape(1) == columns, "draw_text: ", name, " must be [n, ", columns, "]");
  return array.data();
}

void draw_text(const Array<uint8_t>& ink, const Array<int32_t>& glyphs, const Array<int32_t>& placements,
               const Array<int64_t>& starts, Array<uint8_t> pages, int num_threads) {
  optmem::check(pages.ndim() == 3, "draw_text: pages must be [P, H, W]");
  optmem::check(starts.ndim() == 1 && starts.shape(0) == pages.shape(0) + 1, "draw_text: starts must be [P + 1]");
  const optmem::DrawText job{ink.data(),          ink.size(),
                             rows_of(glyphs, 3, "glyphs"),         glyphs.shape(0),
                             rows_of(placements, 3, "placements"), placements.shape(0),
                             starts.data(),       pages.shape(0),
                             pages.mutable_data(), pages.shape(1), pages.shape(2)};
  py::gil_scoped_release unlocked;
  optmem::draw_text(job, num_threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "optmem's CPU operators";
  m.def("isa", [] { return optmem::isa_name(optmem::current_isa()); }, "The instruction set in force: plain, avx2 or avx512.");
  m.def("force_isa", &optmem::force_isa, py::arg("name"), "Cap the instruction set; 'auto' lifts the cap.");
  m.def("draw_text", &draw_text, py::arg("ink").noconvert(), py::arg("glyphs").noconvert(), py::arg("placements").noconvert(),
        py::arg("starts").noconvert(), py::arg("pages").noconvert(), py::arg("num_threads"));
}
