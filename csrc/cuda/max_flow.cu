// Exact maximum flow on a GPU: a block is cvg/max_flow_blocks.h.
#include <algorithm>

#include "cvg/max_flow_blocks.h"
#include "cvg/max_flow_cuda.h"

namespace cvg {

namespace {

constexpr int kLanes = 32;

struct CudaLanes {
  __device__ int lane() const { return threadIdx.x % kLanes; }
  __device__ void sync() const { __syncwarp(); }
  __device__ uint64_t any(uint64_t word) const {
    const uint64_t high = __reduce_or_sync(~0u, static_cast<unsigned>(word >> 32));
    return high << 32 | __reduce_or_sync(~0u, static_cast<unsigned>(word));
  }
};

struct CudaBlock {
  __device__ int lane() const { return threadIdx.x; }
  __device__ int size() const { return blockDim.x; }
  __device__ void sync() const { __syncthreads(); }
  __device__ uint64_t any(uint64_t word) const { return __syncthreads_or(word != 0); }
};

extern __shared__ double shared_memory[];

__device__ char* device_memory(const FlowPlan& plan, void* scratch) {
  return static_cast<char*>(scratch) + blockIdx.x * plan.device_bytes();
}

template <typename T>
__global__ void subgraphs(const __grid_constant__ SubgraphArgs args,
                          const __grid_constant__ FlowPlan plan, void* scratch, int64_t parts) {
  subgraphs_of_block<T>(args, plan, reinterpret_cast<char*>(shared_memory),
                        device_memory(plan, scratch), blockIdx.x, threadIdx.x / kLanes, parts,
                        CudaBlock{}, CudaLanes{});
}

template <typename T>
__global__ void graphs(const __grid_constant__ GraphArgs args,
                       const __grid_constant__ FlowPlan plan, void* scratch) {
  graphs_of_block<T>(args, plan, reinterpret_cast<char*>(shared_memory),
                     device_memory(plan, scratch), blockIdx.x, threadIdx.x / kLanes, CudaLanes{});
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

cudaError_t read_device(FlowDevice* device) {
  int current = 0, shared_of_block = 0, shared_of_processor = 0;
  cudaError_t error = cudaGetDevice(&current);
  const auto read = [&](int* to, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(to, attribute, current);
    }
  };
  read(&device->processors, cudaDevAttrMultiProcessorCount);
  read(&shared_of_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  read(&shared_of_processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  device->shared_of_block = shared_of_block;
  device->shared_of_processor = shared_of_processor;
  return error;
}

template <typename... Parameters, typename... Given>
cudaError_t launch(void (*kernel)(Parameters...), const FlowPlan& plan, cudaStream_t stream,
                   const Given&... given) {
  const size_t shared = plan.shared_bytes();
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
  FlowDevice device{};
  const cudaError_t error = read_device(&device);
  *plan = error == cudaSuccess ? subgraph_plan(args, device) : FlowPlan{};
  return error;
}

cudaError_t plan_graphs(const GraphArgs& args, FlowPlan* plan) {
  FlowDevice device{};
  const cudaError_t error = read_device(&device);
  *plan = error == cudaSuccess ? graph_plan(args, device) : FlowPlan{};
  return error;
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
    return FlowPlan{static_cast<int>(blocks), kMaxWarps, {0, 0, 0}, true, true};
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
