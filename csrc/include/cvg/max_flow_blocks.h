// Exact maximum flow on a GPU: what a block does, and how its memory is laid out. The shared solver
// (cvg/max_flow.h), a warp a graph.
//
// A block reads the arcs of one position once and its warps solve the graphs of all tokens (and
// frames) there. Lanes share the breadth-first search and all copying; the depth-first search is
// one lane's.
//
// `Block` and `Lanes` (of a warp) work together by lane(), sync() and any(word). On a GPU these are
// the instructions (csrc/cuda/max_flow.cu), in tests fibers on the CPU.
#pragma once

#include <algorithm>

#include "cvg/max_flow_graphs.h"

namespace cvg {

constexpr int kMaxWarps = 8, kBlocksPerProcessor = 8;

// Bytes: `common` to the warps of a block; each warp's own, in the two parts of a Workspace.
struct FlowMemory {
  size_t common, near, far;
};

// What the device has: processors, and bytes of shared memory.
struct FlowDevice {
  int processors;
  size_t shared_of_block, shared_of_processor;
};

// How graphs are spread over the device, and which memory is shared memory: what is in use all the
// time is always, the rest where all warps of a block find room; else it is in device memory.
struct FlowPlan {
  int blocks, warps;
  FlowMemory memory;
  bool common_in_shared, far_in_shared;

  CVG_HD size_t shared_bytes() const {
    return (common_in_shared ? memory.common : 0) +
           warps * (memory.near + (far_in_shared ? memory.far : 0));
  }
  CVG_HD size_t device_bytes() const {  // of a block
    return (common_in_shared ? 0 : memory.common) + (far_in_shared ? 0 : warps * memory.far);
  }
  size_t scratch_bytes() const { return blocks * device_bytes(); }

  // Addresses in a block's memory; each warp's parts lie together, behind what is common.
  CVG_HD char* common(char* shared, char* device) const {
    return common_in_shared ? shared : device;
  }
  CVG_HD char* near(char* shared, int warp) const {
    return shared + (common_in_shared ? memory.common : 0) + warp * memory.near;
  }
  CVG_HD char* far(char* shared, char* device, int warp) const {
    return (far_in_shared ? near(shared, warps) : device + (common_in_shared ? 0 : memory.common)) +
           warp * memory.far;
  }
};

inline FlowPlan flow_plan(const FlowMemory& memory, int64_t warps_with_work,
                          int64_t blocks_with_work, const FlowDevice& device) {
  FlowPlan plan{1, 1, memory, false, false};
  plan.warps = static_cast<int>(std::clamp<int64_t>(warps_with_work, 1, kMaxWarps));
  plan.common_in_shared = memory.common + plan.warps * memory.near <= device.shared_of_block;
  const size_t all = memory.common + plan.warps * (memory.near + memory.far);
  plan.far_in_shared = all <= device.shared_of_block;
  const size_t fitting = std::max<size_t>(device.shared_of_block / memory.near, 1);
  plan.warps = static_cast<int>(std::min<size_t>(plan.warps, fitting));
  // Device memory is for the blocks that run at once: no more than there is shared memory for.
  const size_t resident = device.shared_of_processor / std::max<size_t>(plan.shared_bytes(), 1);
  const int most = plan.device_bytes() > 0
                       ? static_cast<int>(std::clamp<size_t>(resident, 1, kBlocksPerProcessor))
                       : kBlocksPerProcessor;
  plan.blocks =
      static_cast<int>(std::clamp<int64_t>(blocks_with_work, 1, int64_t{device.processors} * most));
  return plan;
}

CVG_HD int sinks_of(bool every_frame, int frames) {
  return every_frame ? frames : 1;
}

inline FlowPlan subgraph_plan(const SubgraphArgs& args, const FlowDevice& device) {
  const int layers = inner_layers(args);
  const int64_t graphs = args.tokens * sinks_of(args.every_frame, args.frames);
  const FlowMemory memory{Position::bytes(args.frames, args.hops),
                          Workspace::near_bytes(args.frames, layers, layers - 1),
                          Workspace::far_bytes(args.frames, layers, layers - 1)};
  return flow_plan(memory, graphs, args.batch * args.positions * graphs, device);
}

inline FlowPlan graph_plan(const GraphArgs& args, const FlowDevice& device) {
  return flow_plan({0, graph_near_bytes(args.nodes), graph_far_bytes(args.nodes)}, args.graphs,
                   args.graphs, device);
}

// Tasks a position: one, unless there are too few positions for the device; then as many as leave
// each warp a graph.
inline int64_t parts_of(const SubgraphArgs& args, const FlowPlan& plan) {
  const int64_t graphs = args.tokens * sinks_of(args.every_frame, args.frames);
  const int64_t positions = std::max<int64_t>(args.batch * args.positions, 1);
  return std::clamp<int64_t>(plan.blocks / positions, 1, std::max<int64_t>(graphs / plan.warps, 1));
}

// A warp for the solver. Lanes: lane(), sync(), any(word).
template <class Lanes>
struct WarpTeam : Lanes {
  CVG_HD explicit WarpTeam(const Lanes& lanes) : Lanes(lanes) {}
  CVG_HD int size() const { return 32; }
  CVG_HD uint64_t gather(uint64_t nodes, const uint64_t* words, int count, uint64_t) const {
    uint64_t found = 0;
    for (int node = this->lane(); node < count; node += 32) {
      found |= nodes & bit(node) ? words[node] : 0;
    }
    return this->any(found);
  }
};

// A block's share of the tasks. shared, device: the block's own memory.
template <typename T, class Block, class Lanes>
CVG_HD void subgraphs_of_block(const SubgraphArgs& args, const FlowPlan& plan, char* shared,
                               char* device, int64_t block, int warp, int64_t parts, Block whole,
                               Lanes lanes) {
  const int sinks = sinks_of(args.every_frame, args.frames);
  const Position position(plan.common(shared, device), args.frames, args.hops);
  char *near = plan.near(shared, warp), *far = plan.far(shared, device, warp);
  const int64_t graphs = args.tokens * sinks, tasks = args.batch * args.positions * parts;
  for (int64_t task = block; task < tasks; task += plan.blocks) {
    const int64_t part = task % parts, place = task / parts;
    const int64_t b = place / args.positions, l = place % args.positions;
    whole.sync();  // the arcs of the task before are done with
    const bool good = read_position<T>(args, b, l, whole, position);
    whole.sync();
    if (!good) {
      *args.bad = 1;
      continue;
    }
    const int64_t end = (part + 1) * graphs / parts;
    for (int64_t graph = part * graphs / parts + warp; graph < end; graph += plan.warps) {
      const int frame = args.every_frame ? static_cast<int>(graph % sinks) : -1;
      if (!solve_subgraph<T>(args, b, graph / sinks, l, frame, position, near, far,
                             WarpTeam<Lanes>(lanes))) {
        *args.bad = 1;
      }
    }
  }
}

template <typename T, class Lanes>
CVG_HD void graphs_of_block(const GraphArgs& args, const FlowPlan& plan, char* shared, char* device,
                            int64_t block, int warp, Lanes lanes) {
  for (int64_t graph = block * plan.warps + warp; graph < args.graphs;
       graph += int64_t{plan.blocks} * plan.warps) {
    if (!solve_graph<T>(args, graph, plan.near(shared, warp), plan.far(shared, device, warp),
                        WarpTeam<Lanes>(lanes))) {
      *args.bad = 1;
    }
  }
}

}  // namespace cvg
