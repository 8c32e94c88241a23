// Attention with capture on the CPU: what a caller hands over. The formulas stand in
// python_ref/attention.py.
#pragma once

#include <cstdint>

#include "cvg/dtype.h"
#include "cvg/level.h"
#include "cvg/tensor4.h"

namespace cvg {

struct AttentionArgs {
  int64_t batch, heads, queries, keys, dim, value_dim, tokens;
  DType dtype;
  Tensor4 query, key, value;
  const int64_t* token_ids;  // [B, K]
  const void* bias;          // [B, M] in the wide type, or nullptr
  double scale;
  bool head_mean;
  int threads;
};

// Outputs are contiguous; maps and lse are float (double for double input).
struct ForwardOut {
  void* out;   // [B, H, N, Dv] in the input's type; unused without values
  void* maps;  // [B, K, N] or [B, H, K, N]
  void* lse;   // [B, H, N]
};

// Gradients that come in; any may be absent. maps and lse are contiguous.
struct BackwardIn {
  Tensor4 grad_out;
  const void* grad_maps;
  const void* grad_lse;
  Tensor4 out;
  const void* lse;
};

// Gradients that go out, contiguous; nullptr: not wanted.
struct BackwardOut {
  void* query;
  void* key;
  void* value;
};

struct AttentionKernels {
  void (*forward)(const AttentionArgs&, const ForwardOut&);
  void (*backward)(const AttentionArgs&, const BackwardIn&, const BackwardOut&);
};

CVG_DECLARE_LEVELS(AttentionKernels, attention_kernels);

}  // namespace cvg
