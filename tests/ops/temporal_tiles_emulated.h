// The launches of the CUDA kernels of temporal attention, on the CPU.
#pragma once

#include <cstdint>

#include "cvg/temporal_args.h"
#include "emulated_lanes.h"

namespace cvg::emulated {

struct Launch {
  int64_t blocks, shared_bytes, seed;
  Faults faults;
};

void temporal_forward(const TemporalArgs& args, const TemporalForwardOut& to, const Launch& launch);
void temporal_backward(const TemporalArgs& args, const TemporalBackwardIn& in,
                       const TemporalBackwardOut& to, const Launch& launch);

// Shares of the gradient of `added` that a backward pass writes.
int64_t temporal_partial_sums(int frames, int64_t blocks);

}  // namespace cvg::emulated
