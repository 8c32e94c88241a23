// Temporal attention.
#include "bindings_cuda.h"
#include "cvg/temporal_attention_cuda.h"
#include "temporal_calls.h"

namespace cvg::bindings {

void bind_temporal_attention(py::module_& m) {
  m.def("temporal_attention_partial_sums", [](int64_t sequences, int frames) {
    int64_t count = 0;
    check(temporal_attention_partial_sums(sequences, frames, &count));
    return count;
  });
  bind_temporal_calls<Address>(
      m,
      [](const TemporalArgs& args, const TemporalForwardOut& to, Address stream) {
        check(temporal_attention_forward(args, to, pointer<CUstream_st>(stream)));
      },
      [](const TemporalArgs& args, const TemporalBackwardIn& in, const TemporalBackwardOut& to,
         Address stream) {
        check(temporal_attention_backward(args, in, to, pointer<CUstream_st>(stream)));
      });
}

}  // namespace cvg::bindings
