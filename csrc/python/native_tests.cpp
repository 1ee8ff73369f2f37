// The tests' view of host-side internals. pybind11 excludes Python's stable ABI, so this module stays out of the wheel.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cpu/random.h"
#include "../cpu/tiling.h"
#include "../csr_plan.h"
#include "../ops/lowrank_routes.h"

namespace py = pybind11;
using namespace spectral_ops::cpu;

namespace {

// A kernel as compiled for an instruction set, whichever is active; throws where that does not run here.
template <class Arguments> void run_on(const std::string& isa, const Arguments& arguments, int64_t begin, int64_t end) {
  for (int i = 0; i <= static_cast<int>(active_isa()); ++i)
    if (isa == isa_name(static_cast<Isa>(i))) return Kernels<Arguments>::compiled[i](arguments, begin, end);
  throw py::value_error("isa: " + isa + " does not run here");
}

std::vector<std::vector<bool>> keep(int64_t rows, int64_t columns, int64_t seed, double p, const std::string& isa,
                                    int64_t begin, int64_t end) {
  std::vector<uint32_t> words(static_cast<size_t>(rows * columns), 0x5a5a5a5a);  // rows outside [begin, end) keep this
  run_on(isa, KeepMask{words.data(), rows, columns, seed, p}, begin, end);
  std::vector<std::vector<bool>> mask;
  for (int64_t t = begin; t < end; ++t) {
    mask.emplace_back();
    for (int64_t i = 0; i < columns; ++i) {
      const uint32_t word = words[static_cast<size_t>(t * columns + i)];
      if (word != 0 && word != 0xffffffff) throw std::runtime_error("keep_mask: a word is neither all ones nor zero");
      mask.back().push_back(word != 0);
    }
  }
  for (int64_t e = 0; e < rows * columns; ++e)
    if ((e < begin * columns || e >= end * columns) && words[static_cast<size_t>(e)] != 0x5a5a5a5a)
      throw std::runtime_error("keep_mask: wrote outside its rows");
  return mask;
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (int i = 0; i <= static_cast<int>(active_isa()); ++i) names.emplace_back(isa_name(static_cast<Isa>(i)));
  return names;
}

}  // namespace

PYBIND11_MODULE(spectral_ops_native_tests, m) {
  m.attr("max_tile") = kMaxTile;
  m.def("isas", &isas, "Instruction sets that run here, the active one last.");
  m.def("keep_mask", &keep, py::arg("rows"), py::arg("columns"), py::arg("seed"), py::arg("p"), py::arg("isa"),
        py::arg("begin"), py::arg("end"), "bool rows [begin, end) of the dropout mask [rows, columns].");
  m.def("philox", [](int64_t first, int64_t count, int64_t seed, const std::string& isa) {
    std::vector<uint32_t> words(static_cast<size_t>(count));
    run_on(isa, PhiloxWords{words.data(), count, first, seed}, 0, 1);
    return words;
  }, py::arg("first"), py::arg("count"), py::arg("seed"), py::arg("isa"), "Words of elements [first, first + count).");
  m.def("period_copies", &period_copies, py::arg("columns"), py::arg("r"), py::arg("wanted"));
  using Offsets = std::vector<int32_t>;
  m.def("row_of_entry", [](const Offsets& row_offsets, int64_t p) {
    return spectral_ops::row_of_entry(row_offsets.data(), static_cast<int64_t>(row_offsets.size()) - 1, p);
  }, py::arg("row_offsets"), py::arg("p"));
  m.def("row_shares", [](const Offsets& row_offsets, int64_t parts) {
    std::vector<int64_t> begins;
    for (int64_t part = 0; part <= parts; ++part)
      begins.push_back(spectral_ops::row_share(row_offsets.data(), static_cast<int64_t>(row_offsets.size()) - 1, parts, part));
    return begins;
  }, py::arg("row_offsets"), py::arg("parts"), "Where each part's rows begin, and the last one's end.");
  m.def("entry_shares", [](int64_t nnz, int64_t parts) {
    std::vector<int64_t> begins;
    for (int64_t part = 0; part <= parts; ++part) begins.push_back(spectral_ops::entry_share(nnz, parts, part));
    return begins;
  }, py::arg("nnz"), py::arg("parts"), "Where each part's entries begin, and the last one's end.");
  m.def("slabs", [](int64_t tokens, int64_t columns, int64_t size, int64_t per_lane, int64_t most_groups) {
    const spectral_ops::Slabs s = spectral_ops::slabs_of(tokens, columns, size, per_lane, most_groups);
    return py::dict(py::arg("lanes") = s.lanes, py::arg("count") = s.count, py::arg("groups") = s.groups, py::arg("bytes") = s.bytes());
  }, py::arg("tokens"), py::arg("columns"), py::arg("size"), py::arg("per_lane"), py::arg("most_groups"));
  m.def("grain_rows", &grain_rows, py::arg("columns"), py::arg("dropout"));
  m.def("matmul_costs", [](int64_t rows, int64_t columns, int64_t inner, int64_t r, bool scaled, bool bias, bool tiled,
                           bool fused_runs, bool triton_runs) {
    const auto costs = spectral_ops::matmul_costs({rows, columns, inner, r, scaled, bias, tiled, fused_runs, triton_runs});
    const std::vector<double> seconds(costs.seconds, costs.seconds + 4);
    return py::make_tuple(seconds, costs.fills, static_cast<int>(costs.best()));
  }, "Seconds by route, whether our kernel's waves are full enough, and the route taken.");
}
