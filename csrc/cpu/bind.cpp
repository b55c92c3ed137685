// optmem._cpu: the CPU operators over buffers.  Shapes and values a user can get wrong are checked in optmem/ops/ first; what is
// checked here keeps a wrong call from touching foreign memory.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>

#include "checks.h"
#include "cpu/bind_decoder.h"
#include "cpu/bind_vision.h"
#include "cpu/contact_sheet.h"
#include "cpu/draw_text.h"
#include "cpu/isa.h"
#include "cpu/resample.h"
#include "resample_coefficients.h"

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

optmem::Resample resample_job(const Array<uint8_t>& images, Array<uint8_t>& out) {
  optmem::check(images.ndim() == 4 && out.ndim() == 4, "resample: images and out must be [N, H, W, C]");
  optmem::check(images.shape(0) == out.shape(0) && images.shape(3) == out.shape(3),
                "resample: images and out must agree in N and C");
  for (int side : {1, 2}) {
    optmem::check(images.shape(side) > 0 && out.shape(side) > 0, "resample: a side must have at least one pixel");
    optmem::check(images.shape(side) <= optmem::kResampleMaxSide && out.shape(side) <= optmem::kResampleMaxSide,
                  "resample: a side must have at most ", optmem::kResampleMaxSide, " pixels");
  }
  return {images.data(),   out.mutable_data(), images.shape(0), images.shape(1),
          images.shape(2), out.shape(1),       out.shape(2),    images.shape(3)};
}

void resample(const Array<uint8_t>& images, Array<uint8_t> out, int num_threads) {
  const optmem::Resample job = resample_job(images, out);
  optmem::check(num_threads > 0, "resample: num_threads must be positive, got ", num_threads);
  py::gil_scoped_release unlocked;
  optmem::resample(job, num_threads);
}

void resample_scalar(const Array<uint8_t>& images, Array<uint8_t> out) { optmem::resample_scalar(resample_job(images, out)); }

py::tuple resample_coefficients(int64_t size_in, int64_t size_out) {
  optmem::check(size_in > 0 && size_out > 0 && std::max(size_in, size_out) <= optmem::kResampleMaxSide,
                "resample: sizes must be 1 to ", optmem::kResampleMaxSide, ", got ", size_in, " and ", size_out);
  const optmem::ResampleCoefficients table = optmem::resample_coefficients(size_in, size_out);
  return py::make_tuple(Array<int32_t>({size_out, int64_t{2}}, table.bounds.data()),
                        Array<int32_t>({size_out, int64_t{table.taps}}, table.weights.data()));
}

void contact_sheet_scalar(const Array<uint8_t>& pixels, const Array<int32_t>& coefficients, const Array<int64_t>& pages,
                          Array<uint8_t> sheet) {
  optmem::check(pages.ndim() == 2 && pages.shape(1) == optmem::kSheetColumns, "contact_sheet: pages must be [n, ",
                optmem::kSheetColumns, "]");
  optmem::check(sheet.ndim() == 3 && sheet.shape(0) == sheet.shape(1) && (sheet.shape(2) == 1 || sheet.shape(2) == 3),
                "contact_sheet: the sheet must be [S, S, C] with C 1 or 3");
  const optmem::ContactSheet job{pixels.data(),       coefficients.data(), reinterpret_cast<const optmem::SheetPage*>(pages.data()),
                                 sheet.mutable_data(), pages.shape(0),      sheet.shape(0),
                                 sheet.shape(2)};
  optmem::contact_sheet_scalar(job, pixels.size(), coefficients.size());
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "optmem's CPU operators";
  m.def("isa", [] { return optmem::isa_name(optmem::current_isa()); }, "The instruction set in force: plain, avx2 or avx512.");
  m.def("force_isa", &optmem::force_isa, py::arg("name"), "Cap the instruction set; 'auto' lifts the cap.");
  m.def("draw_text", &draw_text, py::arg("ink").noconvert(), py::arg("glyphs").noconvert(), py::arg("placements").noconvert(),
        py::arg("starts").noconvert(), py::arg("pages").noconvert(), py::arg("num_threads"));
  m.def("resample", &resample, py::arg("images").noconvert(), py::arg("out").noconvert(), py::arg("num_threads"));
  m.def("resample_scalar", &resample_scalar, py::arg("images").noconvert(), py::arg("out").noconvert(),
        "The arithmetic of the CUDA kernel, one value at a time.");
  m.def("resample_coefficients", &resample_coefficients, py::arg("size_in"), py::arg("size_out"),
        "Bounds int32 [out, 2] and weights int32 [out, taps] of one axis.");
  m.def("contact_sheet_scalar", &contact_sheet_scalar, py::arg("pixels").noconvert(), py::arg("coefficients").noconvert(),
        py::arg("pages").noconvert(), py::arg("sheet").noconvert(), "The arithmetic of the CUDA kernel, one value at a time.");
  bind_decoder(m);
  bind_vision(m);
}
