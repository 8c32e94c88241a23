// Temporal attention on a GPU's tensor cores, of bfloat16 or float16: launchers.
#pragma once

#include <cuda_runtime.h>

#include "cvg/temporal_args.h"

namespace cvg {

// How many [F, F] the backward pass writes for the gradient of `added` of so many sequences.
cudaError_t temporal_attention_partial_sums(int64_t sequences, int frames, int64_t* count);

cudaError_t temporal_attention_forward(const TemporalArgs& args, const TemporalForwardOut& to,
                                       cudaStream_t stream);
cudaError_t temporal_attention_backward(const TemporalArgs& args, const TemporalBackwardIn& in,
                                        const TemporalBackwardOut& to, cudaStream_t stream);

}  // namespace cvg
