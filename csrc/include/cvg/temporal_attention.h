// Temporal attention on the CPU.
#pragma once

#include "cvg/level.h"
#include "cvg/temporal_args.h"

namespace cvg {

struct TemporalKernels {
  void (*forward)(const TemporalArgs&, const TemporalForwardOut&);
  void (*backward)(const TemporalArgs&, const TemporalBackwardIn&, const TemporalBackwardOut&);
};

CVG_DECLARE_LEVELS(TemporalKernels, temporal_kernels);

}  // namespace cvg
