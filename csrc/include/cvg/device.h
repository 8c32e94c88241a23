// The GPU as the CUDA module sees it.
#pragma once

#include <cuda_runtime.h>

namespace cvg {

// Runs a small kernel on a device and checks its result.
cudaError_t self_check(int device);

}  // namespace cvg
