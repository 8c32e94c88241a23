// Temporal attention: what a caller hands to the kernels, on the CPU or a GPU. The formulas stand
// in python_ref/temporal_attention.py.
#pragma once

#include <cstdint>

#include "cvg/dtype_code.h"

namespace cvg {

// A [B, P, H, F, dim] tensor with strides in elements. data == nullptr: absent.
struct Tensor5 {
  void* data = nullptr;
  int64_t stride[5] = {0, 0, 0, 0, 0};
};

struct TemporalArgs {
  int64_t batch, positions, heads, frames, dim, value_dim;
  DType dtype;
  Tensor5 query, key, value;
  const void* added;  // [F, F] in the wide type, or nullptr
  double scale;
  bool scale_bias_by_row_max;  // row i of `added` is multiplied by m_i
  int threads;                 // of the CPU
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
  void* added;  // [F, F] in the wide type; on a GPU several, whose sum it is
};

}  // namespace cvg
