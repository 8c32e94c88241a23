// The peaks of tokens.
#include "bindings_cpu.h"
#include "cvg/token_peaks.h"

namespace cvg::bindings {

namespace {

TokenPeaksArgs token_peaks_args(const std::array<int64_t, 5>& sizes, int dtype, Address flow,
                                double sharpness, double side, int threads) {
  const auto [batch, tokens, frames, height, width] = sizes;
  return {batch,     tokens, frames, height, width, static_cast<DType>(dtype), pointer<void>(flow),
          sharpness, side,   threads};
}

}  // namespace

void bind_token_peaks(py::module_& m) {
  static const TokenPeaksKernels& kernels = CVG_AT_LEVEL(token_peaks_kernels);

  m.def("token_peaks", [](const std::array<int64_t, 5>& sizes, int dtype, Address from,
                          double sharpness, double side, int threads, Address to, Address sums) {
    const auto args = token_peaks_args(sizes, dtype, from, sharpness, side, threads);
    py::gil_scoped_release release;
    kernels.forward(args, pointer<void>(to), pointer<void>(sums));
  });
  m.def("token_peaks_backward", [](const std::array<int64_t, 5>& sizes, int dtype, Address from,
                                   double sharpness, double side, int threads, Address grad,
                                   Address sums, Address grad_flow) {
    const auto args = token_peaks_args(sizes, dtype, from, sharpness, side, threads);
    py::gil_scoped_release release;
    kernels.backward(args, pointer<void>(grad), pointer<void>(sums), pointer<void>(grad_flow));
  });
}

}  // namespace cvg::bindings
