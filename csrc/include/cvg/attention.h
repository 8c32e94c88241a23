// The attention core on the CPU: what a caller hands over. The formulas stand in
// python_ref/attention.py. "Wide" is float, or double for double input.
#pragma once

#include <cstdint>

#include "cvg/dtype.h"
#include "cvg/level.h"
#include "cvg/tensor4.h"

namespace cvg {

// A band by the distance of frames; without key_frames there is none.
struct Band {
  const int32_t* query_frames;  // [N], -1: of no frame
  const int32_t* key_frames;    // [M]
  double sigma, strength;
  bool row_max_grad;  // whether a gradient flows through m
};

// A band excludes both biases.
struct AttentionArgs {
  int64_t batch, heads, queries, keys, dim, value_dim, tokens;
  DType dtype;
  Tensor4 query, key, value;  // value may be absent: maps only
  const int64_t* token_ids;   // [B, K]; K may be 0: no maps
  const void* key_bias;       // wide [B, M], or nullptr
  Tensor4 token_bias;         // wide [B, K, N], or absent; the same for all occurrences of a key
  Band band;
  double scale;
  bool head_mean;
  int threads;
};

// Of every row, all [B, H, N]: the log-sum-exp and, under a band, m (both wide) and m's place among
// the keys.
struct AttentionRows {
  void* lse;
  void* row_max;
  int32_t* row_argmax;
};

// The last axis of a Target4 is contiguous, here and below.
struct ForwardOut {
  Target4 out;  // [B, H, N, Dv]; absent without values
  void* maps;   // wide [B, K, N] or [B, H, K, N]
  AttentionRows rows;
};

// Gradients that come in, any of which may be absent, and what the forward pass gave.
struct BackwardIn {
  Tensor4 grad_out;
  const void* grad_maps;  // as the maps
  const void* grad_lse;   // wide [B, H, N]
  Tensor4 out;
  AttentionRows rows;
};

// Gradients that go out; absent: not wanted.
struct BackwardOut {
  Target4 query, key, value;
  void* token_bias;  // wide [B, K, N]; over the occurrences of a key they add up to its gradient
};

struct AttentionKernels {
  void (*forward)(const AttentionArgs&, const ForwardOut&);
  void (*backward)(const AttentionArgs&, const BackwardIn&, const BackwardOut&);
  // Maps from a known log-sum-exp, without a band.
  void (*capture)(const AttentionArgs&, const void* lse, void* maps);
};

CVG_DECLARE_LEVELS(AttentionKernels, attention_kernels);

}  // namespace cvg
