// Vico's score of tokens on the CPU: what a caller hands over. The formulas stand in
// python_ref/token_peaks.py.
#pragma once

#include <cstdint>

#include "cvg/dtype.h"
#include "cvg/level.h"

namespace cvg {

struct TokenPeaksArgs {
  int64_t batch, tokens, frames, height, width;
  DType dtype;       // f32 or f64
  const void* flow;  // [B, K, F, h, w], contiguous
  double sharpness;
  double side;  // what a neighbour weighs in the smoothing, the centre being 1
  int threads;
};

struct TokenPeaksKernels {
  // peaks [B, K]; sums [B, 2, F, h, w], the flow of the largest logit and the softmax's
  // denominator below it.
  void (*forward)(const TokenPeaksArgs&, void* peaks, void* sums);
  // grad_flow [B, K, F, h, w] from grad_peaks [B, K].
  void (*backward)(const TokenPeaksArgs&, const void* grad_peaks, const void* sums,
                   void* grad_flow);
};

CVG_DECLARE_LEVELS(TokenPeaksKernels, token_peaks_kernels);

}  // namespace cvg
