// Min-max path flow, the min-max product, and the peaks of tokens.
#include "bindings_cpu.h"
#include "cvg/path_flow.h"
#include "cvg/token_peaks.h"

namespace cvg::bindings {

namespace {

PathFlowArgs flow_args(const std::array<int64_t, 4>& sizes, int dtype, const Strided4& cross,
                       const std::vector<Strided4>& temporal, double share, double skip,
                       double temperature, int threads) {
  const auto [batch, tokens, frames, positions] = sizes;
  std::vector<Tensor4> hops;
  for (const Strided4& hop : temporal) {
    hops.push_back(tensor(hop));
  }
  return {batch, tokens, frames,      positions, static_cast<DType>(dtype), tensor(cross), hops,
          share, skip,   temperature, threads};
}

MinMaxArgs product_args(const std::array<int64_t, 4>& sizes, int dtype, const Strided4& a,
                        const Strided4& b, double temperature, int threads) {
  const auto [batch, rows, depth, columns] = sizes;
  return {batch,     rows,      depth,       columns, static_cast<DType>(dtype),
          tensor(a), tensor(b), temperature, threads};
}

TokenPeaksArgs peaks_args(const std::array<int64_t, 5>& sizes, int dtype, Address flow,
                          double sharpness, double side, int threads) {
  const auto [batch, tokens, frames, height, width] = sizes;
  return {batch,     tokens, frames, height, width, static_cast<DType>(dtype), pointer<void>(flow),
          sharpness, side,   threads};
}

}  // namespace

void bind_flow(py::module_& m) {
  static const FlowKernels& flow = CVG_AT_LEVEL(flow_kernels);
  static const TokenPeaksKernels& peaks = CVG_AT_LEVEL(token_peaks_kernels);

  m.def("path_flow", [](const std::array<int64_t, 4>& sizes, int dtype, const Strided4& cross,
                        const std::vector<Strided4>& temporal, double share, double skip,
                        double temperature, int threads, Address to) {
    const auto args = flow_args(sizes, dtype, cross, temporal, share, skip, temperature, threads);
    py::gil_scoped_release release;
    flow.path_flow(args, pointer<void>(to));
  });
  m.def("path_flow_backward", [](const std::array<int64_t, 4>& sizes, int dtype,
                                 const Strided4& cross, const std::vector<Strided4>& temporal,
                                 double share, double skip, double temperature, int threads,
                                 const Strided4& grad, Address grad_cross,
                                 const std::vector<Address>& grad_temporal) {
    const auto args = flow_args(sizes, dtype, cross, temporal, share, skip, temperature, threads);
    PathFlowGradients to{pointer<void>(grad_cross), {}};
    for (const Address hop : grad_temporal) {
      to.temporal.push_back(pointer<void>(hop));
    }
    py::gil_scoped_release release;
    flow.path_flow_backward(args, tensor(grad), to);
  });
  m.def("min_max", [](const std::array<int64_t, 4>& sizes, int dtype, const Strided4& a,
                      const Strided4& b, double temperature, int threads, Address to) {
    const auto args = product_args(sizes, dtype, a, b, temperature, threads);
    py::gil_scoped_release release;
    flow.min_max(args, pointer<void>(to));
  });
  m.def("min_max_backward", [](const std::array<int64_t, 4>& sizes, int dtype, const Strided4& a,
                               const Strided4& b, double temperature, int threads, Address grad,
                               Address grad_a, Address grad_b) {
    const auto args = product_args(sizes, dtype, a, b, temperature, threads);
    py::gil_scoped_release release;
    flow.min_max_backward(args, pointer<void>(grad), pointer<void>(grad_a), pointer<void>(grad_b));
  });
  m.def("token_peaks", [](const std::array<int64_t, 5>& sizes, int dtype, Address from,
                          double sharpness, double side, int threads, Address to, Address sums) {
    const auto args = peaks_args(sizes, dtype, from, sharpness, side, threads);
    py::gil_scoped_release release;
    peaks.forward(args, pointer<void>(to), pointer<void>(sums));
  });
  m.def("token_peaks_backward",
        [](const std::array<int64_t, 5>& sizes, int dtype, Address from, double sharpness,
           double side, int threads, Address grad, Address sums, Address grad_flow) {
          const auto args = peaks_args(sizes, dtype, from, sharpness, side, threads);
          py::gil_scoped_release release;
          peaks.backward(args, pointer<void>(grad), pointer<void>(sums), pointer<void>(grad_flow));
        });
}

}  // namespace cvg::bindings
