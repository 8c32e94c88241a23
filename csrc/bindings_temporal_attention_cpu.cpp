// Temporal attention.
#include "bindings_cpu.h"
#include "cvg/temporal_attention.h"
#include "temporal_calls.h"

namespace cvg::bindings {

void bind_temporal_attention(py::module_& m) {
  static const TemporalKernels& kernels = CVG_AT_LEVEL(temporal_kernels);
  bind_temporal_calls<int>(
      m,
      [](TemporalArgs args, const TemporalForwardOut& to, int threads) {
        args.threads = threads;
        py::gil_scoped_release release;
        kernels.forward(args, to);
      },
      [](TemporalArgs args, const TemporalBackwardIn& in, const TemporalBackwardOut& to,
         int threads) {
        args.threads = threads;
        py::gil_scoped_release release;
        kernels.backward(args, in, to);
      });
}

}  // namespace cvg::bindings
