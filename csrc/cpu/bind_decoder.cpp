// The decoder's part of optmem._cpu.
#include "cpu/bind_decoder.h"

#include "checks.h"
#include "cpu/arrays.h"
#include "cpu/expert_mlp.h"
#include "cpu/fixed.h"
#include "cpu/linear_rows.h"
#include "cpu/paged_attention.h"
#include "cpu/pick_token.h"
#include "cpu/rms_norm.h"
#include "cpu/rope_cache.h"
#include "cpu/route.h"
#include "cpu/silu_mul.h"

namespace py = pybind11;

namespace {

using optmem::Array;
using optmem::Bf16;
using optmem::check;
using optmem::check_threads;
using optmem::in;
using optmem::out;
using optmem::side;

// scales may be null, for weights that have none.
template <typename T, typename Out, typename W>
void run_linear_rows(const Array<T>& x, const Array<W>& weight, const Array<float>* scales, Array<Out>& result, int num_threads) {
  check_threads(num_threads);
  const int64_t tokens = side<T>(x, 0, 2, "x"), width = side<T>(x, 1, 2, "x"), rows = side<W>(weight, 0, 2, "weight");
  const optmem::LinearRows<T, Out, W> job{in<T>(x, tokens * width, "x"), in<W>(weight, rows * width, "weight"),
                                          scales ? in<float>(*scales, rows, "scales") : nullptr,
                                          out<Out>(result, tokens * rows, "out"), tokens, rows, width};
  py::gil_scoped_release unlocked;
  optmem::linear_rows(job, num_threads);
}

template <typename T, typename Out>
void linear_rows(const Array<T>& x, const Array<T>& weight, Array<Out> result, int num_threads) {
  run_linear_rows<T, Out, T>(x, weight, nullptr, result, num_threads);
}

template <typename T, typename Out>
void linear_rows_int8(const Array<T>& x, const Array<int8_t>& weight, const Array<float>& scales, Array<Out> result,
                      int num_threads) {
  run_linear_rows<T, Out, int8_t>(x, weight, &scales, result, num_threads);
}

template <typename T>
void rms_norm(const Array<T>& x, const Array<T>& weight, Array<T> result, float eps, int num_threads) {
  check_threads(num_threads);
  const int64_t tokens = side<T>(x, 0, 2, "x"), width = side<T>(x, 1, 2, "x"), size = tokens * width;
  const optmem::RmsNorm<T> job{in<T>(x, size, "x"), nullptr, in<T>(weight, width, "weight"), nullptr,
                               out<T>(result, size, "out"), tokens, width, eps};
  py::gil_scoped_release unlocked;
  optmem::rms_norm(job, num_threads);
}

template <typename T>
void add_rms_norm(const Array<T>& x, const Array<T>& residual, const Array<T>& weight, Array<T> sum, Array<T> result, float eps,
                  int num_threads) {
  check_threads(num_threads);
  const int64_t tokens = side<T>(x, 0, 2, "x"), width = side<T>(x, 1, 2, "x"), size = tokens * width;
  const optmem::RmsNorm<T> job{in<T>(x, size, "x"),   in<T>(residual, size, "residual"), in<T>(weight, width, "weight"),
                               out<T>(sum, size, "sum"), out<T>(result, size, "out"),       tokens, width, eps};
  py::gil_scoped_release unlocked;
  optmem::rms_norm(job, num_threads);
}

template <typename T>
void silu_mul(const Array<T>& gate, const Array<T>& up, Array<T> result, int num_threads) {
  check_threads(num_threads);
  const int64_t size = gate.size();
  const T* gates = in<T>(gate, size, "gate");
  const T* ups = in<T>(up, size, "up");
  T* results = out<T>(result, size, "out");
  py::gil_scoped_release unlocked;
  optmem::silu_mul(gates, ups, results, size, num_threads);
}

template <typename T>
void rope_cache(Array<T> queries, const Array<T>& keys, const Array<T>& values, const Array<T>& cos, const Array<T>& sin,
                const Array<int64_t>& slots, Array<T> key_cache, Array<T> value_cache, int num_threads) {
  check_threads(num_threads);
  const int64_t tokens = side<T>(queries, 0, 3, "queries"), heads = side<T>(queries, 1, 3, "queries");
  const int64_t dim = side<T>(queries, 2, 3, "queries"), size = tokens * heads * dim;
  check(dim % 2 == 0 && dim > 0 && heads > 0, "heads and dim must be positive and dim even");
  const int64_t cells = key_cache.size() / (heads * dim);
  const optmem::RopeCache<T> job{out<T>(queries, size, "queries"),
                                 in<T>(keys, size, "keys"),
                                 in<T>(values, size, "values"),
                                 in<T>(cos, tokens * dim / 2, "cos"),
                                 in<T>(sin, tokens * dim / 2, "sin"),
                                 in<int64_t>(slots, tokens, "slots"),
                                 out<T>(key_cache, cells * heads * dim, "key_cache"),
                                 out<T>(value_cache, cells * heads * dim, "value_cache"),
                                 tokens, heads, dim, cells};
  py::gil_scoped_release unlocked;
  optmem::rope_cache(job, num_threads);
}

template <typename T>
void paged_attention(const Array<T>& queries, const Array<T>& keys, const Array<T>& values, const Array<int32_t>& table,
                     const Array<int64_t>& starts, const Array<int64_t>& lengths, const Array<int64_t>& prompts, int64_t window,
                     float scale, Array<T> result, int num_threads) {
  check_threads(num_threads);
  const int64_t tokens = side<T>(queries, 0, 3, "queries"), heads = side<T>(queries, 1, 3, "queries");
  const int64_t dim = side<T>(queries, 2, 3, "queries"), pages = side<T>(keys, 0, 4, "keys");
  const int64_t page_size = side<T>(keys, 1, 4, "keys"), cells = pages * page_size * heads * dim;
  const int64_t sequences = side<int32_t>(table, 0, 2, "table"), width = side<int32_t>(table, 1, 2, "table");
  check(page_size > 0 && page_size % optmem::kPageUnit == 0, "a page must hold a multiple of ", optmem::kPageUnit,
        " tokens, got ", page_size);
  check(window >= 0, "window must not be negative, got ", window);
  const optmem::PagedAttention<T> job{in<T>(queries, tokens * heads * dim, "queries"),
                                      in<T>(keys, cells, "keys"),
                                      in<T>(values, cells, "values"),
                                      in<int32_t>(table, sequences * width, "table"),
                                      in<int64_t>(starts, sequences + 1, "starts"),
                                      in<int64_t>(lengths, sequences, "lengths"),
                                      in<int64_t>(prompts, sequences, "prompts"),
                                      out<T>(result, tokens * heads * dim, "out"),
                                      tokens, heads, dim, pages, page_size, sequences, width, window, scale};
  py::gil_scoped_release unlocked;
  optmem::paged_attention(job, num_threads);
}

void route(Array<float> scores, Array<int32_t> ids, Array<float> weights, Array<int32_t> order, Array<int32_t> starts,
           int num_threads) {
  check_threads(num_threads);
  const int64_t tokens = side<float>(scores, 0, 2, "scores"), experts = side<float>(scores, 1, 2, "scores");
  const int64_t top_k = side<int32_t>(ids, 1, 2, "ids"), pairs = tokens * top_k;
  check(top_k > 0 && top_k <= experts, "top_k must be 1 to ", experts, ", got ", top_k);
  const optmem::Route job{out<float>(scores, tokens * experts, "scores"), out<int32_t>(ids, pairs, "ids"),
                          out<float>(weights, pairs, "weights"),          out<int32_t>(order, pairs, "order"),
                          out<int32_t>(starts, experts + 1, "starts"),    tokens, experts, top_k};
  py::gil_scoped_release unlocked;
  optmem::route(job, num_threads);
}

// The scales of an expert's rows, for weights that have them.
struct ExpertScales {
  const Array<float>&gate_up, &down;
};

// scales may be null.
template <typename T, typename W>
void run_expert_mlp(const Array<T>& x, const Array<W>& gate_up, const Array<W>& down, const ExpertScales* scales,
                    const Array<float>& weights, const Array<int32_t>& order, const Array<int32_t>& starts, Array<T>& result,
                    int num_threads) {
  check_threads(num_threads);
  const int64_t tokens = side<T>(x, 0, 2, "x"), hidden = side<T>(x, 1, 2, "x");
  const int64_t experts = side<W>(down, 0, 3, "down"), width = side<W>(down, 2, 3, "down");
  const int64_t top_k = side<float>(weights, 1, 2, "weights"), pairs = tokens * top_k;
  check(top_k > 0, "weights must have at least one column");
  const optmem::ExpertMlp<T, W> job{in<T>(x, tokens * hidden, "x"),
                                    in<W>(gate_up, experts * 2 * width * hidden, "gate_up"),
                                    in<W>(down, experts * hidden * width, "down"),
                                    scales ? in<float>(scales->gate_up, experts * 2 * width, "gate_up_scales") : nullptr,
                                    scales ? in<float>(scales->down, experts * hidden, "down_scales") : nullptr,
                                    in<float>(weights, pairs, "weights"),
                                    in<int32_t>(order, pairs, "order"),
                                    in<int32_t>(starts, experts + 1, "starts"),
                                    out<T>(result, tokens * hidden, "out"),
                                    tokens, hidden, width, experts, top_k};
  py::gil_scoped_release unlocked;
  optmem::expert_mlp(job, num_threads);
}

template <typename T>
void expert_mlp(const Array<T>& x, const Array<T>& gate_up, const Array<T>& down, const Array<float>& weights,
                const Array<int32_t>& order, const Array<int32_t>& starts, Array<T> result, int num_threads) {
  run_expert_mlp<T, T>(x, gate_up, down, nullptr, weights, order, starts, result, num_threads);
}

template <typename T>
void expert_mlp_int8(const Array<T>& x, const Array<int8_t>& gate_up, const Array<int8_t>& down, const Array<float>& weights,
                     const Array<int32_t>& order, const Array<int32_t>& starts, const Array<float>& gate_up_scales,
                     const Array<float>& down_scales, Array<T> result, int num_threads) {
  const ExpertScales scales{gate_up_scales, down_scales};
  run_expert_mlp<T, int8_t>(x, gate_up, down, &scales, weights, order, starts, result, num_threads);
}

void pick_token(const Array<float>& logits, const Array<int64_t>& history, const Array<int64_t>& guard_size,
                const Array<int64_t>& guard_window, const Array<int64_t>& allowed, const Array<float>& temperature,
                int64_t most_guard, bool is_sampled, float confidence_temperature, Array<int64_t> ids, Array<float> logprobs,
                Array<float> confidence, int num_threads) {
  check_threads(num_threads);
  const int64_t rows = side<float>(logits, 0, 2, "logits"), vocab = side<float>(logits, 1, 2, "logits");
  const int64_t length = side<int64_t>(history, 1, 2, "history"), listed = side<int64_t>(allowed, 1, 2, "allowed");
  check(vocab > 0, "logits must have at least one column");
  const optmem::PickToken job{in<float>(logits, rows * vocab, "logits"),
                              in<int64_t>(history, rows * length, "history"),
                              in<int64_t>(guard_size, rows, "guard_size"),
                              in<int64_t>(guard_window, rows, "guard_window"),
                              in<int64_t>(allowed, rows * listed, "allowed"),
                              in<float>(temperature, rows, "temperature"),
                              out<int64_t>(ids, rows, "ids"),
                              out<float>(logprobs, rows, "logprobs"),
                              out<float>(confidence, rows, "confidence"),
                              rows, vocab, length, listed, most_guard, is_sampled, confidence_temperature};
  py::gil_scoped_release unlocked;
  optmem::pick_token(job, num_threads);
}

// pybind11 tries the overloads by element type; noconvert keeps it from copying into a type that was not given.
template <typename T>
void bind_type(py::module_& m) {
  const auto a = [](const char* name) { return py::arg(name).noconvert(); };
  const py::arg threads("num_threads");
  m.def("linear_rows", &linear_rows<T, T>, a("x"), a("weight"), a("out"), threads);
  m.def("rms_norm", &rms_norm<T>, a("x"), a("weight"), a("out"), py::arg("eps"), threads);
  m.def("add_rms_norm", &add_rms_norm<T>, a("x"), a("residual"), a("weight"), a("sum"), a("out"), py::arg("eps"), threads);
  m.def("silu_mul", &silu_mul<T>, a("gate"), a("up"), a("out"), threads);
  m.def("rope_cache", &rope_cache<T>, a("queries"), a("keys"), a("values"), a("cos"), a("sin"), a("slots"), a("key_cache"),
        a("value_cache"), threads);
  m.def("paged_attention", &paged_attention<T>, a("queries"), a("keys"), a("values"), a("table"), a("starts"), a("lengths"),
        a("prompts"), py::arg("window"), py::arg("scale"), a("out"), threads);
  m.def("expert_mlp", &expert_mlp<T>, a("x"), a("gate_up"), a("down"), a("weights"), a("order"), a("starts"), a("out"), threads);
  m.def("linear_rows", &linear_rows_int8<T, T>, a("x"), a("weight"), a("scales"), a("out"), threads);
  m.def("expert_mlp", &expert_mlp_int8<T>, a("x"), a("gate_up"), a("down"), a("weights"), a("order"), a("starts"),
        a("gate_up_scales"), a("down_scales"), a("out"), threads);
}

}  // namespace

void bind_decoder(py::module_& m) {
  bind_type<Bf16>(m);
  bind_type<float>(m);
  m.def("linear_rows", &linear_rows<Bf16, float>, py::arg("x").noconvert(), py::arg("weight").noconvert(),
        py::arg("out").noconvert(), py::arg("num_threads"));
  m.def("linear_rows", &linear_rows_int8<Bf16, float>, py::arg("x").noconvert(), py::arg("weight").noconvert(),
        py::arg("scales").noconvert(), py::arg("out").noconvert(), py::arg("num_threads"));
  m.def("has_fixed", &optmem::has_fixed, "Whether tokens of bf16 meet weights of int8 as 16-bit integers here.");
  m.def("route", &route, py::arg("scores").noconvert(), py::arg("ids").noconvert(), py::arg("weights").noconvert(),
        py::arg("order").noconvert(), py::arg("starts").noconvert(), py::arg("num_threads"));
  m.def("pick_token", &pick_token, py::arg("logits").noconvert(), py::arg("history").noconvert(),
        py::arg("guard_size").noconvert(), py::arg("guard_window").noconvert(), py::arg("allowed").noconvert(),
        py::arg("temperature").noconvert(), py::arg("most_guard"), py::arg("is_sampled"), py::arg("confidence_temperature"),
        py::arg("ids").noconvert(), py::arg("logprobs").noconvert(), py::arg("confidence").noconvert(), py::arg("num_threads"));
}
