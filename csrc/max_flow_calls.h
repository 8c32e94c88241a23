// Exact maximum flow: from what Python hands over to what the kernels take, for both modules.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "calls.h"
#include "cvg/max_flow_args.h"

namespace cvg::bindings {

using FlowSizes = std::array<int64_t, 4>;  // B, K, F, L

inline int count_hops(size_t hops) {
  if (hops > kMaxHops) {
    throw std::invalid_argument("too many hops");
  }
  return static_cast<int>(hops);
}

inline SubgraphArgs subgraph_args(const FlowSizes& sizes, bool is_double, bool every_frame,
                                  double scale, double skip, const Strided4& cross,
                                  const std::vector<Strided4>& temporal, Address flow, Address cut,
                                  Address bad, int threads) {
  SubgraphArgs args{sizes[0],
                    sizes[1],
                    sizes[3],
                    static_cast<int>(sizes[2]),
                    count_hops(temporal.size()),
                    is_double,
                    every_frame,
                    scale,
                    skip,
                    tensor(cross),
                    {},
                    pointer<void>(flow),
                    pointer<uint8_t>(cut),
                    pointer<int>(bad),
                    threads};
  std::transform(temporal.begin(), temporal.end(), args.temporal, tensor);
  return args;
}

inline SubgraphGradArgs subgraph_grad_args(const FlowSizes& sizes, bool is_double, bool every_frame,
                                           double scale, Address grad, Address cut, Address cross,
                                           const std::vector<Address>& temporal, int threads) {
  SubgraphGradArgs args{sizes[0],
                        sizes[1],
                        sizes[3],
                        static_cast<int>(sizes[2]),
                        count_hops(temporal.size()),
                        is_double,
                        every_frame,
                        scale,
                        pointer<const void>(grad),
                        pointer<const uint8_t>(cut),
                        pointer<void>(cross),
                        {},
                        threads};
  std::transform(temporal.begin(), temporal.end(), args.temporal, pointer<void>);
  return args;
}

inline GraphArgs graph_args(int64_t graphs, int nodes, int source, int sink, bool is_double,
                            Address capacity, const std::array<int64_t, 3>& stride, Address flow,
                            Address source_side, Address bad, int threads) {
  return {graphs,
          nodes,
          source,
          sink,
          is_double,
          pointer<const void>(capacity),
          {stride[0], stride[1], stride[2]},
          pointer<void>(flow),
          pointer<uint8_t>(source_side),
          pointer<int>(bad),
          threads};
}

}  // namespace cvg::bindings
