// Temporal attention on a GPU's tensor cores, of bfloat16 or float16: launchers.
#pragma once

#include <cuda_runtime.h>

#include <functional>

#include "cvg/tensor5.h"

namespace cvg {

struct TemporalTilesArgs {
  int64_t batch, positions;
  int heads, frames, dim, value_dim;
  bool bf16;
  Tensor5 query, key, value;
  const float* added;  // [F, F], or nullptr
  double scale;
  bool by_row_max;  // row i of `added` is multiplied by m_i
};

struct TemporalTilesGrads {
  Tensor5 grad_out;        // absent: zero
  const float* grad_maps;  // [B, P, F, F], or nullptr for zero
  bool row_max_grad;
  Tensor5 query, key, value;  // absent: not wanted
  // Gives memory for so many [F, F], whose sum is the gradient of `added`; empty: not wanted.
  std::function<float*(int64_t)> sums;
};

// out: [B, P, H, F, Dv]; maps: [B, P, F, F], or nullptr.
cudaError_t temporal_attention_forward(const TemporalTilesArgs& args, const Tensor5& out,
                                       float* maps, cudaStream_t stream);
cudaError_t temporal_attention_backward(const TemporalTilesArgs& args,
                                        const TemporalTilesGrads& grads, cudaStream_t stream);

}  // namespace cvg
