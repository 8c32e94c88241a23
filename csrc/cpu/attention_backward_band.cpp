// Attention's backward pass for scores with a band between frames.
#include "cpu/attention_backward.h"

namespace cvg::CVG_LEVEL {

void attention_backward_band(const AttentionArgs& args, const BackwardIn& in,
                             const BackwardOut& to) {
  by_type(args.dtype,
          [&](auto zero) { attention_backward<decltype(zero), FrameBand>(args, in, to); });
}

}  // namespace cvg::CVG_LEVEL
