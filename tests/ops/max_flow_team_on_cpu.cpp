// The emulated solver of maximum flow as a module of Python; test_max_flow_cuda.py builds it.
#include "emulated_lanes.h"
#include "max_flow_calls.h"
#include "max_flow_team_emulated.h"

PYBIND11_MODULE(max_flow_team_on_cpu, m) {
  using namespace cvg;
  using namespace cvg::bindings;
  // Processors, bytes of shared memory of a block and of a processor, seed, barrier to leave out.
  using Where = std::array<uintptr_t, 5>;
  const auto launch = [](const Where& at) {
    const FlowDevice device{static_cast<int>(at[0]), at[1], at[2]};
    return emulated::FlowLaunch{device, static_cast<int64_t>(at[3]), {at[4], 0}};
  };
  const auto told = [](const FlowPlan& plan) {
    return py::dict(py::arg("blocks") = plan.blocks, py::arg("warps") = plan.warps,
                    py::arg("shared") = plan.shared_bytes(),
                    py::arg("scratch") = plan.scratch_bytes(),
                    py::arg("common_in_shared") = plan.common_in_shared,
                    py::arg("far_in_shared") = plan.far_in_shared);
  };
  m.def("barriers_met", emulated::barriers_met);
  m.def("subgraph_max_flow", [=](const FlowSizes& sizes, bool is_double, bool every_frame,
                                 double scale, double skip, const Strided4& cross,
                                 const std::vector<Strided4>& temporal, Address flow, Address cut,
                                 Address bad, const Where& where) {
    return told(emulated::solve_subgraphs(subgraph_args(sizes, is_double, every_frame, scale, skip,
                                                        cross, temporal, flow, cut, bad, 0),
                                          launch(where)));
  });
  m.def("max_flow", [=](int64_t graphs, int nodes, int source, int sink, bool is_double,
                        Address capacity, const std::array<int64_t, 3>& stride, Address flow,
                        Address source_side, Address bad, const Where& where) {
    return told(emulated::solve_graphs(graph_args(graphs, nodes, source, sink, is_double, capacity,
                                                  stride, flow, source_side, bad, 0),
                                       launch(where)));
  });
}
