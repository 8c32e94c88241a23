// Attention with a band by frame distance on the CPU: what a caller hands over. The formulas stand
// in python_ref/frame_band_attention.py.
#pragma once

#include <cstdint>

#include "cvg/dtype.h"
#include "cvg/level.h"
#include "cvg/tensor4.h"

namespace cvg {

struct FrameBandArgs {
  int64_t batch, heads, queries, keys, dim, value_dim;
  DType dtype;
  Tensor4 query, key, value;
  const int32_t* query_frames;  // [N], -1: of no frame
  const int32_t* key_frames;    // [M]
  double scale, sigma, strength;
  int threads;
};

// Of every row: lse and m in the wide type, and the place of m among the keys; all [B, H, N].
struct FrameBandRows {
  void* lse;
  void* highest;
  int32_t* place;
};

struct FrameBandForwardOut {
  Target4 out;
  FrameBandRows rows;
};

// Gradients that come in, either may be absent, and what the forward pass gave.
struct FrameBandBackwardIn {
  Tensor4 grad_out;
  const void* grad_lse;  // [B, H, N]
  Tensor4 out;
  FrameBandRows rows;
  bool row_max_grad;
};

// Gradients that go out; absent: not wanted.
struct FrameBandBackwardOut {
  Target4 query, key, value;
};

struct FrameBandKernels {
  void (*forward)(const FrameBandArgs&, const FrameBandForwardOut&);
  void (*backward)(const FrameBandArgs&, const FrameBandBackwardIn&, const FrameBandBackwardOut&);
};

CVG_DECLARE_LEVELS(FrameBandKernels, frame_band_kernels);

}  // namespace cvg
