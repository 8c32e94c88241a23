// Exact maximum flow.
#include "bindings_cuda.h"
#include "cvg/max_flow_cuda.h"
#include "max_flow_calls.h"

namespace cvg::bindings {

// Each call takes `allocate`, which returns the address of so many bytes on the device.
void bind_max_flow(py::module_& m) {
  using Allocate = py::function;
  m.def("subgraph_max_flow",
        [](const FlowSizes& sizes, bool is_double, bool every_frame, double scale, double skip,
           const Strided4& cross, const std::vector<Strided4>& temporal, Address flow, Address cut,
           Address bad, const Allocate& allocate, Address stream) {
          const auto args = subgraph_args(sizes, is_double, every_frame, scale, skip, cross,
                                          temporal, flow, cut, bad, 0);
          FlowPlan plan;
          check(plan_subgraphs(args, &plan));
          void* scratch = pointer<void>(allocate(plan.scratch_bytes()).cast<Address>());
          check(solve_subgraphs(args, plan, scratch, pointer<CUstream_st>(stream)));
        });
  m.def("subgraph_max_flow_backward", [](const FlowSizes& sizes, bool is_double, bool every_frame,
                                         double scale, Address grad, Address cut, Address cross,
                                         const std::vector<Address>& temporal, Address stream) {
    check(subgraph_gradients(
        subgraph_grad_args(sizes, is_double, every_frame, scale, grad, cut, cross, temporal, 0),
        pointer<CUstream_st>(stream)));
  });
  m.def("max_flow", [](int64_t graphs, int nodes, int source, int sink, bool is_double,
                       Address capacity, const std::array<int64_t, 3>& stride, Address flow,
                       Address source_side, Address bad, const Allocate& allocate, Address stream) {
    const auto args = graph_args(graphs, nodes, source, sink, is_double, capacity, stride, flow,
                                 source_side, bad, 0);
    FlowPlan plan;
    check(plan_graphs(args, &plan));
    void* scratch = pointer<void>(allocate(plan.scratch_bytes()).cast<Address>());
    check(solve_graphs(args, plan, scratch, pointer<CUstream_st>(stream)));
  });
}

}  // namespace cvg::bindings
