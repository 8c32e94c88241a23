// Exact maximum flow.
#include "bindings_cpu.h"
#include "max_flow_calls.h"

namespace cvg::bindings {

void bind_max_flow(py::module_& m) {
  const auto released = py::call_guard<py::gil_scoped_release>();
  m.def(
      "subgraph_max_flow",
      [](const FlowSizes& sizes, bool is_double, bool every_frame, double scale, double skip,
         const Strided4& cross, const std::vector<Strided4>& temporal, Address flow, Address cut,
         Address bad, int threads) {
        solve_subgraphs(subgraph_args(sizes, is_double, every_frame, scale, skip, cross, temporal,
                                      flow, cut, bad, threads));
      },
      released);
  m.def(
      "subgraph_max_flow_backward",
      [](const FlowSizes& sizes, bool is_double, bool every_frame, double scale, Address grad,
         Address cut, Address cross, const std::vector<Address>& temporal, int threads) {
        subgraph_gradients(subgraph_grad_args(sizes, is_double, every_frame, scale, grad, cut,
                                              cross, temporal, threads));
      },
      released);
  m.def(
      "max_flow",
      [](int64_t graphs, int nodes, int source, int sink, bool is_double, Address capacity,
         const std::array<int64_t, 3>& stride, Address flow, Address source_side, Address bad,
         int threads) {
        solve_graphs(graph_args(graphs, nodes, source, sink, is_double, capacity, stride, flow,
                                source_side, bad, threads));
      },
      released);
}

}  // namespace cvg::bindings
