// Exact maximum flow: from what Python hands over to what the kernels take, for both modules.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cvg/flow_args.h"

namespace cvg::bindings {

using StridedAddress = std::pair<uintptr_t, std::array<int64_t, 4>>;  // (data_ptr, strides)
using FlowSizes = std::array<int64_t, 4>;                             // B, K, F, L

inline Tensor4 tensor_of(const StridedAddress& given) {
  Tensor4 t;
  t.data = reinterpret_cast<const void*>(given.first);
  std::copy(given.second.begin(), given.second.end(), t.stride);
  return t;
}

inline int count_hops(size_t hops) {
  if (hops > kMaxHops) {
    throw std::invalid_argument("too many hops");
  }
  return static_cast<int>(hops);
}

inline SubgraphArgs subgraph_args(const FlowSizes& sizes, bool is_double, bool every_frame,
                                  double scale, double skip, const StridedAddress& cross,
                                  const std::vector<StridedAddress>& temporal, uintptr_t flow,
                                  uintptr_t cut, uintptr_t bad, int threads) {
  SubgraphArgs args{sizes[0],
                    sizes[1],
                    sizes[3],
                    static_cast<int>(sizes[2]),
                    count_hops(temporal.size()),
                    is_double,
                    every_frame,
                    scale,
                    skip,
                    tensor_of(cross)};
  std::transform(temporal.begin(), temporal.end(), args.temporal, tensor_of);
  args.flow = reinterpret_cast<void*>(flow);
  args.cut = reinterpret_cast<uint8_t*>(cut);
  args.bad = reinterpret_cast<int*>(bad);
  args.threads = threads;
  return args;
}

inline SubgraphGradArgs subgraph_grad_args(const FlowSizes& sizes, bool is_double, bool every_frame,
                                           double scale, uintptr_t grad, uintptr_t cut,
                                           uintptr_t cross, const std::vector<uintptr_t>& temporal,
                                           int threads) {
  SubgraphGradArgs args{
      sizes[0],  sizes[1],    sizes[3], static_cast<int>(sizes[2]), count_hops(temporal.size()),
      is_double, every_frame, scale};
  args.grad = reinterpret_cast<const void*>(grad);
  args.cut = reinterpret_cast<const uint8_t*>(cut);
  args.cross = reinterpret_cast<void*>(cross);
  std::transform(temporal.begin(), temporal.end(), args.temporal,
                 [](uintptr_t address) { return reinterpret_cast<void*>(address); });
  args.threads = threads;
  return args;
}

inline GraphArgs graph_args(int64_t graphs, int nodes, int source, int sink, bool is_double,
                            uintptr_t capacity, const std::array<int64_t, 3>& stride,
                            uintptr_t flow, uintptr_t source_side, uintptr_t bad, int threads) {
  GraphArgs args{graphs, nodes, source, sink, is_double, reinterpret_cast<const void*>(capacity)};
  std::copy(stride.begin(), stride.end(), args.stride);
  args.flow = reinterpret_cast<void*>(flow);
  args.source_side = reinterpret_cast<uint8_t*>(source_side);
  args.bad = reinterpret_cast<int*>(bad);
  args.threads = threads;
  return args;
}

}  // namespace cvg::bindings
