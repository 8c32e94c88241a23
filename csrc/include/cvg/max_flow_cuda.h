// Exact maximum flow on a GPU: launchers.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "cvg/flow_args.h"

namespace cvg {

// How graphs are spread over the device, and where their memory is: shared memory, or device memory
// where that is too small.
struct FlowPlan {
  int blocks, warps;
  size_t block_bytes;
  bool in_shared;

  size_t scratch_bytes() const { return in_shared ? 0 : blocks * block_bytes; }
};

cudaError_t plan_subgraphs(const SubgraphArgs& args, FlowPlan* plan);
cudaError_t plan_graphs(const GraphArgs& args, FlowPlan* plan);

// scratch: device memory of plan.scratch_bytes().
cudaError_t solve_subgraphs(const SubgraphArgs& args, const FlowPlan& plan, void* scratch,
                            cudaStream_t stream);
cudaError_t solve_graphs(const GraphArgs& args, const FlowPlan& plan, void* scratch,
                         cudaStream_t stream);
cudaError_t subgraph_gradients(const SubgraphGradArgs& args, cudaStream_t stream);

}  // namespace cvg
