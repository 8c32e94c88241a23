// Attention's backward pass for scores with a key bias, and the table of attention's kernels.
#include "cpu/attention_backward.h"

namespace cvg::CVG_LEVEL {

void attention_forward(const AttentionArgs& args, const ForwardOut& to);
void attention_backward_band(const AttentionArgs& args, const BackwardIn& in,
                             const BackwardOut& to);
void attention_capture(const AttentionArgs& args, const void* lse, void* maps);

void attention_backward(const AttentionArgs& args, const BackwardIn& in, const BackwardOut& to) {
  if (args.band.key_frames) {
    attention_backward_band(args, in, to);
    return;
  }
  by_type(args.dtype,
          [&](auto zero) { attention_backward<decltype(zero), KeyBias>(args, in, to); });
}

}  // namespace cvg::CVG_LEVEL

const cvg::AttentionKernels& cvg::CVG_OF_LEVEL(attention_kernels)() {
  static const AttentionKernels kernels{CVG_LEVEL::attention_forward, CVG_LEVEL::attention_backward,
                                        CVG_LEVEL::attention_capture};
  return kernels;
}
