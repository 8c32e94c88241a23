// The CUDA solver of maximum flow on the CPU: every lane a fiber. Compiled with -fsanitize=thread,
// for the watch over memory (emulated_lanes.h).
#include "max_flow_team_emulated.h"

#include <cstring>
#include <vector>

#include "emulated_lanes.h"

namespace cvg::emulated {

namespace {

struct HostLanes {
  int thread;
  int lane() const { return thread % kWarp; }
  void sync() const { emulated::sync(Scope::warp); }
  uint64_t any(uint64_t word) const { return emulated::any(Scope::warp, word); }
};

struct HostBlock {
  int thread, threads;
  int lane() const { return thread; }
  int size() const { return threads; }
  void sync() const { emulated::sync(Scope::block); }
  uint64_t any(uint64_t word) const { return emulated::any(Scope::block, word != 0) != 0; }
};

// body(block, thread, shared memory, device memory of the block). Memory is NaN at first.
template <class Body>
void run_blocks(const FlowPlan& plan, const FlowLaunch& launch, Body body) {
  std::vector<double> shared(plan.shared_bytes() / 8), scratch(plan.scratch_bytes() / 8);
  watch(shared.data(), shared.size() * 8, true);
  watch(scratch.data(), scratch.size() * 8, true);
  for (int block = 0; block < plan.blocks; ++block) {
    std::memset(shared.data(), 0xff, shared.size() * 8);
    run_block(plan.warps * kWarp, 1, [&](int thread) {
      body(block, thread, reinterpret_cast<char*>(shared.data()),
           reinterpret_cast<char*>(scratch.data()) + block * plan.device_bytes());
    });
  }
}

template <typename T>
FlowPlan subgraphs(const SubgraphArgs& args, const FlowLaunch& launch) {
  const FlowPlan plan = subgraph_plan(args, launch.device);
  const int64_t graphs =
      args.batch * args.tokens * args.positions * sinks_of(args.every_frame, args.frames);
  begin(launch.seed, launch.faults);
  watch(args.flow, graphs * sizeof(T), false);
  watch(args.cut, graphs * (args.hops + 1) * args.frames, false);
  run_blocks(plan, launch, [&](int block, int thread, char* shared, char* device) {
    subgraphs_of_block<T>(args, plan, shared, device, block, thread / kWarp, parts_of(args, plan),
                          HostBlock{thread, plan.warps * kWarp}, HostLanes{thread});
  });
  return plan;
}

template <typename T>
FlowPlan graphs(const GraphArgs& args, const FlowLaunch& launch) {
  const FlowPlan plan = graph_plan(args, launch.device);
  begin(launch.seed, launch.faults);
  watch(args.flow, args.graphs * sizeof(T), false);
  watch(args.source_side, args.graphs * args.nodes, false);
  run_blocks(plan, launch, [&](int block, int thread, char* shared, char* device) {
    graphs_of_block<T>(args, plan, shared, device, block, thread / kWarp, HostLanes{thread});
  });
  return plan;
}

}  // namespace

FlowPlan solve_subgraphs(const SubgraphArgs& args, const FlowLaunch& launch) {
  return args.is_double ? subgraphs<double>(args, launch) : subgraphs<float>(args, launch);
}

FlowPlan solve_graphs(const GraphArgs& args, const FlowLaunch& launch) {
  return args.is_double ? graphs<double>(args, launch) : graphs<float>(args, launch);
}

}  // namespace cvg::emulated
