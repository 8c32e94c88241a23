// Exact maximum flow on a GPU: the shared solver (cvg/max_flow.h), a warp a graph.
//
// A block reads the arcs of one position once and its warps solve the graphs of all tokens (and
// frames) there. Lanes share the breadth-first search and all copying; the depth-first search is
// one lane's. Everything stays in shared memory, unless it is too large: then in device memory.
#include <algorithm>

#include "cvg/flow_graphs.h"
#include "cvg/max_flow_cuda.h"

namespace cvg {

namespace {

constexpr int kLanes = 32, kMaxWarps = 8, kBlocksPerProcessor = 8;

struct Warp {
  __device__ int lane() const { return threadIdx.x % kLanes; }
  __device__ int size() const { return kLanes; }
  __device__ void sync() const { __syncwarp(); }
  __device__ uint64_t any(uint64_t word) const {
    __syncwarp();  // a reduction alone does not order memory
    const uint64_t high = __reduce_or_sync(~0u, static_cast<unsigned>(word >> 32));
    return high << 32 | __reduce_or_sync(~0u, static_cast<unsigned>(word));
  }
  __device__ uint64_t gather(uint64_t nodes, const uint64_t* words, int count, uint64_t) const {
    uint64_t found = 0;
    for (int node = lane(); node < count; node += kLanes) {
      found |= nodes & bit(node) ? words[node] : 0;
    }
    return any(found);
  }
};

struct Block {
  __device__ int lane() const { return threadIdx.x; }
  __device__ int size() const { return blockDim.x; }
  __device__ uint64_t any(uint64_t word) const { return __syncthreads_or(word != 0); }
};

__device__ char* block_memory(const FlowPlan& plan, void* scratch) {
  extern __shared__ double shared[];
  return plan.in_shared ? reinterpret_cast<char*>(shared)
                        : static_cast<char*>(scratch) + blockIdx.x * plan.block_bytes;
}

__host__ __device__ int sinks_of(bool every_frame, int frames) {
  return every_frame ? frames : 1;
}

template <typename T>
__global__ void subgraphs(const __grid_constant__ SubgraphArgs args,
                          const __grid_constant__ FlowPlan plan, void* scratch, int64_t parts) {
  const int layers = inner_layers(args), sinks = sinks_of(args.every_frame, args.frames);
  const int warp = threadIdx.x / kLanes;
  char* memory = block_memory(plan, scratch);
  const Position position(memory, args.frames, args.hops);
  void* work = memory + Position::bytes(args.frames, args.hops) +
               warp * Workspace::bytes(args.frames, layers, layers - 1);
  const int64_t graphs = args.tokens * sinks, tasks = args.batch * args.positions * parts;
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t part = task % parts, place = task / parts;
    const int64_t b = place / args.positions, l = place % args.positions;
    __syncthreads();  // the arcs of the task before are done with
    const bool good = read_position<T>(args, b, l, Block{}, position);
    __syncthreads();
    if (!good) {
      *args.bad = 1;
      continue;
    }
    const int64_t end = (part + 1) * graphs / parts;
    for (int64_t graph = part * graphs / parts + warp; graph < end; graph += plan.warps) {
      const int frame = args.every_frame ? static_cast<int>(graph % sinks) : -1;
      if (!solve_subgraph<T>(args, b, graph / sinks, l, frame, position, work, Warp{})) {
        *args.bad = 1;
      }
    }
  }
}

template <typename T>
__global__ void graphs(const __grid_constant__ GraphArgs args,
                       const __grid_constant__ FlowPlan plan, void* scratch) {
  const int64_t warp = threadIdx.x / kLanes;
  char* memory = block_memory(plan, scratch) + warp * graph_bytes(args.nodes);
  for (int64_t graph = int64_t{blockIdx.x} * plan.warps + warp; graph < args.graphs;
       graph += int64_t{gridDim.x} * plan.warps) {
    if (!solve_graph<T>(args, graph, memory, Warp{})) {
      *args.bad = 1;
    }
  }
}

// One thread an entry of the gradient of cross, or of one position's hop.
template <typename T>
__global__ void gradient_of_cross(const __grid_constant__ SubgraphGradArgs args) {
  const int64_t width = args.frames, layers = args.hops + 1;
  const int sinks = sinks_of(args.every_frame, args.frames);
  const int64_t entries = args.batch * args.tokens * width * args.positions;
  for (int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; at < entries;
       at += int64_t{gridDim.x} * blockDim.x) {
    const int64_t l = at % args.positions, node = at / args.positions % width;
    const int64_t token = at / args.positions / width;
    double sum = 0;
    for (int64_t s = 0; s < sinks; ++s) {
      const int64_t graph = (token * args.positions + l) * sinks + s;
      const T grad = static_cast<const T*>(args.grad)[(token * sinks + s) * args.positions + l];
      sum += args.cut[graph * layers * width + node] ? 0 : grad;
    }
    static_cast<T*>(args.cross)[at] = static_cast<T>(sum);
  }
}

template <typename T>
__global__ void gradient_of_hop(const __grid_constant__ SubgraphGradArgs args, int hop) {
  const int64_t width = args.frames, layers = args.hops + 1;
  const int sinks = sinks_of(args.every_frame, args.frames);
  const int64_t entries = args.batch * args.positions * width * width;
  for (int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; at < entries;
       at += int64_t{gridDim.x} * blockDim.x) {
    const int64_t tail = at % width, head = at / width % width;
    const int64_t l = at / width / width % args.positions, b = at / width / width / args.positions;
    double sum = 0;
    for (int64_t k = 0; k < args.tokens; ++k) {
      const int64_t token = b * args.tokens + k;
      for (int64_t s = 0; s < sinks; ++s) {
        const int64_t graph = (token * args.positions + l) * sinks + s;
        const uint8_t* side = args.cut + (graph * layers + hop) * width;
        const T grad = static_cast<const T*>(args.grad)[(token * sinks + s) * args.positions + l];
        sum += side[tail] && !side[width + head] ? grad : 0;
      }
    }
    static_cast<T*>(args.temporal[hop])[at] = static_cast<T>(args.scale * sum);
  }
}

// As many warps as fit a block's shared memory, up to those that have work.
cudaError_t make_plan(size_t common, size_t each, int64_t warps_with_work, int64_t blocks_with_work,
                      FlowPlan* plan) {
  int device = 0, processors = 0, limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error != cudaSuccess) {
    return error;
  }
  const int useful = static_cast<int>(std::clamp<int64_t>(warps_with_work, 1, kMaxWarps));
  const size_t fitting = size_t(limit) > common ? (limit - common) / each : 0;
  plan->in_shared = fitting > 0;
  plan->warps = plan->in_shared ? static_cast<int>(std::min<size_t>(useful, fitting)) : useful;
  plan->block_bytes = common + plan->warps * each;
  plan->blocks =
      static_cast<int>(std::clamp<int64_t>(blocks_with_work, 1, processors * kBlocksPerProcessor));
  return cudaSuccess;
}

// Tasks a position: one, unless there are too few positions for the device; then as many as leave
// each warp a graph.
int64_t parts_of(const SubgraphArgs& args, const FlowPlan& plan) {
  const int64_t graphs = args.tokens * sinks_of(args.every_frame, args.frames);
  const int64_t positions = std::max<int64_t>(args.batch * args.positions, 1);
  return std::clamp<int64_t>(plan.blocks / positions, 1, std::max<int64_t>(graphs / plan.warps, 1));
}

template <typename... Parameters, typename... Given>
cudaError_t launch(void (*kernel)(Parameters...), const FlowPlan& plan, cudaStream_t stream,
                   const Given&... given) {
  const size_t shared = plan.in_shared ? plan.block_bytes : 0;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (error != cudaSuccess) {
    return error;
  }
  kernel<<<plan.blocks, plan.warps * kLanes, shared, stream>>>(given...);
  return cudaGetLastError();
}

}  // namespace

cudaError_t plan_subgraphs(const SubgraphArgs& args, FlowPlan* plan) {
  const int layers = inner_layers(args);
  const int64_t graphs = args.tokens * sinks_of(args.every_frame, args.frames);
  return make_plan(Position::bytes(args.frames, args.hops),
                   Workspace::bytes(args.frames, layers, layers - 1), graphs,
                   args.batch * args.positions * graphs, plan);
}

cudaError_t plan_graphs(const GraphArgs& args, FlowPlan* plan) {
  return make_plan(0, graph_bytes(args.nodes), args.graphs, args.graphs, plan);
}

cudaError_t solve_subgraphs(const SubgraphArgs& args, const FlowPlan& plan, void* scratch,
                            cudaStream_t stream) {
  const int64_t parts = parts_of(args, plan);
  return args.is_double ? launch(subgraphs<double>, plan, stream, args, plan, scratch, parts)
                        : launch(subgraphs<float>, plan, stream, args, plan, scratch, parts);
}

cudaError_t solve_graphs(const GraphArgs& args, const FlowPlan& plan, void* scratch,
                         cudaStream_t stream) {
  return args.is_double ? launch(graphs<double>, plan, stream, args, plan, scratch)
                        : launch(graphs<float>, plan, stream, args, plan, scratch);
}

cudaError_t subgraph_gradients(const SubgraphGradArgs& args, cudaStream_t stream) {
  const auto plan_for = [](int64_t entries) {
    const int64_t threads = kMaxWarps * kLanes;
    const int64_t blocks = std::clamp<int64_t>((entries + threads - 1) / threads, 1, 1 << 20);
    return FlowPlan{static_cast<int>(blocks), kMaxWarps, 0, true};
  };
  cudaError_t error = cudaSuccess;
  const int64_t width = args.frames, places = args.batch * args.positions;
  if (args.cross) {
    const FlowPlan plan = plan_for(places * args.tokens * width);
    error = args.is_double ? launch(gradient_of_cross<double>, plan, stream, args)
                           : launch(gradient_of_cross<float>, plan, stream, args);
  }
  for (int hop = 0; hop < args.hops && error == cudaSuccess; ++hop) {
    if (args.temporal[hop]) {
      const FlowPlan plan = plan_for(places * width * width);
      error = args.is_double ? launch(gradient_of_hop<double>, plan, stream, args, hop)
                             : launch(gradient_of_hop<float>, plan, stream, args, hop);
    }
  }
  return error;
}

}  // namespace cvg
