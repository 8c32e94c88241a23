// Exact maximum flow on a GPU: launchers.
#pragma once

#include <cuda_runtime.h>

#include "cvg/max_flow_blocks.h"

namespace cvg {

cudaError_t plan_subgraphs(const SubgraphArgs& args, FlowPlan* plan);
cudaError_t plan_graphs(const GraphArgs& args, FlowPlan* plan);

// scratch: device memory of plan.scratch_bytes().
cudaError_t solve_subgraphs(const SubgraphArgs& args, const FlowPlan& plan, void* scratch,
                            cudaStream_t stream);
cudaError_t solve_graphs(const GraphArgs& args, const FlowPlan& plan, void* scratch,
                         cudaStream_t stream);
cudaError_t subgraph_gradients(const SubgraphGradArgs& args, cudaStream_t stream);

}  // namespace cvg
