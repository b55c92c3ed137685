// The vision encoder's part of optmem._cpu.
#include "cpu/bind_vision.h"

#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "checks.h"
#include "cpu/arrays.h"
#include "cpu/grid_attention.h"
#include "cpu/linear.h"

namespace py = pybind11;

namespace {

using optmem::Array;
using optmem::Bf16;
using optmem::check;
using optmem::in;
using optmem::side;

// The side of the window that a table of relative positions is for.
int64_t rows_of_table(const Array<Bf16>& table, int64_t dim, const char* name) {
  const int64_t rows = side<Bf16>(table, 0, 2, name);
  check(rows % 2 == 1 && table.shape(1) == dim, name, " must be [2 side - 1, ", dim, "]");
  return (rows + 1) / 2;
}

void grid_attention(const Array<Bf16>& qkv, const Array<Bf16>& bias, const Array<Bf16>& rel_pos_h, const Array<Bf16>& rel_pos_w,
                    Array<Bf16> result, int num_threads) {
  optmem::check_threads(num_threads);
  const int64_t grids = side<Bf16>(qkv, 0, 4, "qkv"), height = side<Bf16>(qkv, 1, 4, "qkv");
  const int64_t width = side<Bf16>(qkv, 2, 4, "qkv"), channels = side<Bf16>(qkv, 3, 4, "qkv");
  const int64_t dim = side<Bf16>(rel_pos_h, 1, 2, "rel_pos_h");
  check(dim > 0 && channels > 0 && channels % (3 * dim) == 0, "qkv must have 3 * heads * ", dim, " channels, got ", channels);
  const Bf16* packed = in<Bf16>(qkv, grids * height * width * channels, "qkv");
  const optmem::GridAttention job{packed, packed + channels / 3, packed + channels / 3 * 2, channels,
                                  in<Bf16>(bias, channels, "bias"),
                                  in<Bf16>(rel_pos_h, rel_pos_h.size(), "rel_pos_h"),
                                  in<Bf16>(rel_pos_w, rel_pos_w.size(), "rel_pos_w"),
                                  optmem::out<Bf16>(result, grids * height * width * channels / 3, "out"),
                                  grids, height, width, channels / 3 / dim, dim,
                                  rows_of_table(rel_pos_h, dim, "rel_pos_h"), rows_of_table(rel_pos_w, dim, "rel_pos_w")};
  py::gil_scoped_release unlocked;
  optmem::grid_attention(job, num_threads);
}

// All see all: a grid of one row.
void attention(const Array<Bf16>& queries, const Array<Bf16>& keys, const Array<Bf16>& values, Array<Bf16> result, int num_threads) {
  optmem::check_threads(num_threads);
  const int64_t batch = side<Bf16>(queries, 0, 4, "queries"), count = side<Bf16>(queries, 1, 4, "queries");
  const int64_t heads = side<Bf16>(queries, 2, 4, "queries"), dim = side<Bf16>(queries, 3, 4, "queries");
  const int64_t size = batch * count * heads * dim;
  const optmem::GridAttention job{in<Bf16>(queries, size, "queries"), in<Bf16>(keys, size, "keys"), in<Bf16>(values, size, "values"),
                                  heads * dim, nullptr, nullptr, nullptr, optmem::out<Bf16>(result, size, "out"),
                                  batch, 1, count, heads, dim, 1, count};
  py::gil_scoped_release unlocked;
  optmem::grid_attention(job, num_threads);
}

optmem::Activation activation_of(const std::string& name) {
  if (name == "none") return optmem::Activation::none;
  if (name == "gelu") return optmem::Activation::gelu;
  check(name == "quick_gelu", "activation must be none, gelu or quick_gelu, got '", name, "'");
  return optmem::Activation::quick_gelu;
}

void linear(const Array<Bf16>& x, const Array<Bf16>& weight, const std::optional<Array<Bf16>>& bias, Array<Bf16> result,
            const std::string& activation, int num_threads) {
  optmem::check_threads(num_threads);
  const int64_t rows = side<Bf16>(x, 0, 2, "x"), inputs = side<Bf16>(x, 1, 2, "x"), columns = side<Bf16>(weight, 0, 2, "weight");
  const optmem::Linear job{in<Bf16>(x, rows * inputs, "x"),
                           in<Bf16>(weight, columns * inputs, "weight"),
                           bias ? in<Bf16>(*bias, columns, "bias") : nullptr,
                           optmem::out<Bf16>(result, rows * columns, "out"),
                           rows, columns, inputs, activation_of(activation)};
  py::gil_scoped_release unlocked;
  optmem::linear(job, num_threads);
}

}  // namespace

void bind_vision(py::module_& m) {
  m.def("has_grid_attention", &optmem::has_grid_attention, py::arg("dim"), "Whether grid_attention serves heads of this width here.");
  m.def("grid_attention", &grid_attention, py::arg("qkv").noconvert(), py::arg("bias").noconvert(),
        py::arg("rel_pos_h").noconvert(), py::arg("rel_pos_w").noconvert(), py::arg("out").noconvert(), py::arg("num_threads"));
  m.def("attention", &attention, py::arg("queries").noconvert(), py::arg("keys").noconvert(), py::arg("values").noconvert(),
        py::arg("out").noconvert(), py::arg("num_threads"));
  m.def("has_linear", &optmem::has_linear, py::arg("in"), "Whether linear serves rows of this length here.");
  m.def("linear", &linear, py::arg("x").noconvert(), py::arg("weight").noconvert(), py::arg("bias").noconvert().none(true),
        py::arg("out").noconvert(), py::arg("activation"), py::arg("num_threads"));
}
