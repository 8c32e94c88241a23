// Guidance as a sum of differences between predictions: what the kernel is given.
#pragma once

#include <cstdint>
#include <vector>

#include "cvg/dtype.h"
#include "cvg/level.h"

namespace cvg {

// Every prediction holds `batch` samples of `elements` numbers, one after the other, in one order.
struct GuidanceMixArgs {
  int64_t batch, elements;
  DType dtype;
  std::vector<const void*> predictions;  // n + 1
  std::vector<double> scales;            // [n, B]
  double rescale;
  int threads;
};

struct GuidanceMixKernels {
  void (*mix)(const GuidanceMixArgs&, void* out);
};

CVG_DECLARE_LEVELS(GuidanceMixKernels, guidance_mix_kernels);

}  // namespace cvg
