// The launches of the CUDA solver of maximum flow, on the CPU.
#pragma once

#include <cstdint>

#include "cvg/max_flow_blocks.h"
#include "emulated_lanes.h"

namespace cvg::emulated {

struct FlowLaunch {
  FlowDevice device;
  int64_t seed;
  Faults faults;
};

// Each returns how the graphs were spread.
FlowPlan solve_subgraphs(const SubgraphArgs& args, const FlowLaunch& launch);
FlowPlan solve_graphs(const GraphArgs& args, const FlowLaunch& launch);

}  // namespace cvg::emulated
