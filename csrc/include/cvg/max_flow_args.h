// Exact maximum flow: what a caller hands to the kernels, on the CPU or a GPU.
#pragma once

#include <cstdint>

#include "cvg/tensor4.h"

namespace cvg {

constexpr int kMaxHops = 16;

// All element types are float, or double where is_double. A hop's capacity is
// scale · (T + skip · I).
struct SubgraphArgs {
  int64_t batch, tokens, positions;
  int frames, hops;
  bool is_double, every_frame;  // every_frame: each output frame is a sink of its own
  double scale, skip;
  Tensor4 cross;               // [B, K, F, L]
  Tensor4 temporal[kMaxHops];  // [B, L, F, F]
  void* flow;                  // [B, K, L], or [B, K, F, L]
  uint8_t* cut;                // [B, K, L, hops + 1, F], or [B, K, L, F, hops + 1, F]
  int* bad;                    // set to 1 where input is no capacity: NaN, infinite or negative
  int threads;
};

// The gradient of a hop: scale · Σ over its graphs of grad · [tail on the source's side, head not].
struct SubgraphGradArgs {
  int64_t batch, tokens, positions;
  int frames, hops;
  bool is_double, every_frame;
  double scale;
  const void* grad;          // as flow
  const uint8_t* cut;        // as above
  void* cross;               // [B, K, F, L], contiguous as all that follow; nullptr: not wanted
  void* temporal[kMaxHops];  // [B, L, F, F]
  int threads;
};

struct GraphArgs {
  int64_t graphs;
  int nodes, source, sink;
  bool is_double;
  const void* capacity;  // [G, n, n] with strides
  int64_t stride[3];
  void* flow;            // [G]
  uint8_t* source_side;  // [G, n]
  int* bad;              // as above
  int threads;
};

// On the CPU; those for a GPU stand in cvg/max_flow_cuda.h.
void solve_subgraphs(const SubgraphArgs& args);
void subgraph_gradients(const SubgraphGradArgs& args);
void solve_graphs(const GraphArgs& args);

}  // namespace cvg
