// Min-max path flow on the CPU: what a caller hands over. The formulas stand in
// python_ref/path_flow.py.
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
  double hop_weight,
      skip_weight;     // a hop with its skip connection: hop_weight · T + skip_weight · I
  double temperature;  // 0: the hard form
  int threads;
};

// Contiguous; a hop whose gradient nobody wants is nullptr.
struct PathFlowGradients {
  void* cross;                  // [B, K, F, L], always made: it is the way through the hops
  std::vector<void*> temporal;  // [B, L, F, F]
};

struct PathFlowKernels {
  void (*forward)(const PathFlowArgs&, void* flow);
  void (*backward)(const PathFlowArgs&, const Tensor4& grad, const PathFlowGradients&);
};

CVG_DECLARE_LEVELS(PathFlowKernels, path_flow_kernels);

}  // namespace cvg
