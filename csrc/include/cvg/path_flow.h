// Min-max path flow and the min-max product on the CPU: what a caller hands over. The formulas
// stand in python_ref/path_flow.py.
#pragma once

#include <cstdint>
#include <vector>

#include "cvg/dtype.h"
#include "cvg/level.h"
#include "cvg/tensor4.h"

namespace cvg {

struct PathFlowArgs {
  int64_t batch, tokens, frames, positions;
  DType dtype;                    // f32 or f64
  Tensor4 cross;                  // [B, K, F, L]
  std::vector<Tensor4> temporal;  // hops of [B, L, F, F]
  double share, skip;             // a hop with its skip connection: share · T + skip · I
  double temperature;             // 0: the hard form
  int threads;
};

// Contiguous; a hop whose gradient nobody wants is nullptr.
struct PathFlowGradients {
  void* cross;                  // [B, K, F, L], always made: it is the way through the hops
  std::vector<void*> temporal;  // [B, L, F, F]
};

// C[B, rows, columns] = A[B, rows, depth] ⊙ B[B, depth, columns]. The first stride of a Tensor4 is
// the batch's, the last is unused.
struct MinMaxArgs {
  int64_t batch, rows, depth, columns;
  DType dtype;
  Tensor4 a, b;
  double temperature;
  int threads;
};

struct FlowKernels {
  void (*path_flow)(const PathFlowArgs&, void* flow);
  void (*path_flow_backward)(const PathFlowArgs&, const Tensor4& grad, const PathFlowGradients&);
  void (*min_max)(const MinMaxArgs&, void* c);
  void (*min_max_backward)(const MinMaxArgs&, const void* grad, void* grad_a, void* grad_b);
};

CVG_DECLARE_LEVELS(FlowKernels, flow_kernels);

}  // namespace cvg
