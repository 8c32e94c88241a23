// Temporal attention on the CPU: what a caller hands over. The formulas stand in
// python_ref/temporal_attention.py.
#pragma once

#include <cstdint>

#include "cvg/dtype.h"
#include "cvg/level.h"
#include "cvg/tensor5.h"

namespace cvg {

struct TemporalArgs {
  int64_t batch, positions, heads, frames, dim, value_dim;
  DType dtype;
  Tensor5 query, key, value;
  const void* added;  // [F, F] in the wide type, or nullptr
  double scale;
  bool by_row_max;  // row i of `added` is multiplied by m_i
  int threads;
};

struct TemporalForwardOut {
  Tensor5 out;
  void* maps;  // [B, P, F, F], float (double for double input), or nullptr
};

// Gradients that come in; either may be absent.
struct TemporalBackwardIn {
  Tensor5 grad_out;
  const void* grad_maps;
  bool row_max_grad;
};

// Gradients that go out; absent: not wanted.
struct TemporalBackwardOut {
  Tensor5 query, key, value;
  void* added;  // [F, F] in the wide type
};

struct TemporalKernels {
  void (*forward)(const TemporalArgs&, const TemporalForwardOut&);
  void (*backward)(const TemporalArgs&, const TemporalBackwardIn&, const TemporalBackwardOut&);
};

CVG_DECLARE_LEVELS(TemporalKernels, temporal_kernels);

}  // namespace cvg
