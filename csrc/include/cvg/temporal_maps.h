// Maps between the frames of a video on the CPU: what a caller hands over. The formulas stand in
// python_ref/temporal_maps.py.
#pragma once

#include <cstdint>

#include "cvg/dtype_code.h"
#include "cvg/level.h"
#include "cvg/temporal_args.h"
#include "cvg/tensor4.h"

namespace cvg {

struct TemporalMapsArgs {
  int64_t batch, places, heads, frames, dim;
  DType dtype;
  Tensor5 query, key;  // [B, P, H, F, D]
  Tensor4 lse;         // [B, P, H, F] in the wide type; absent: maps are of the frames alone
  Tensor4 key_bias;    // [B, P, F] in the wide type, or absent
  double scale;
  bool head_mean;
  int threads;
};

// Gradients that go out; absent: not wanted.
struct TemporalMapsGradients {
  Tensor5 query, key;
  Target4 lse;
};

struct TemporalMapsKernels {
  // maps [B, P, F, F], or [B, H, P, F, F] unless head_mean, in the wide type.
  void (*forward)(const TemporalMapsArgs&, void* maps);
  void (*backward)(const TemporalMapsArgs&, const void* grad_maps, const TemporalMapsGradients&);
};

CVG_DECLARE_LEVELS(TemporalMapsKernels, temporal_maps_kernels);

}  // namespace cvg
