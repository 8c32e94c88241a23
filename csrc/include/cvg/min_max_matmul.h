// The min-max product of matrices on the CPU: what a caller hands over. The formulas stand in
// python_ref/min_max_matmul.py.
#pragma once

#include <cstdint>

#include "cvg/dtype.h"
#include "cvg/level.h"
#include "cvg/tensor4.h"

namespace cvg {

// C[B, rows, columns] = A[B, rows, depth] ⊙ B[B, depth, columns]. The first stride of a Tensor4 is
// the batch's, the last is unused.
struct MinMaxMatmulArgs {
  int64_t batch, rows, depth, columns;
  DType dtype;
  Tensor4 a, b;
  double temperature;
  int threads;
};

struct MinMaxMatmulKernels {
  void (*forward)(const MinMaxMatmulArgs&, void* c);
  void (*backward)(const MinMaxMatmulArgs&, const void* grad, void* grad_a, void* grad_b);
};

CVG_DECLARE_LEVELS(MinMaxMatmulKernels, min_max_matmul_kernels);

}  // namespace cvg
