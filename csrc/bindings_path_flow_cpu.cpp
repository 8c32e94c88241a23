// Min-max path flow.
#include "bindings_cpu.h"
#include "cvg/path_flow.h"

namespace cvg::bindings {

namespace {

PathFlowArgs path_flow_args(const std::array<int64_t, 4>& sizes, int dtype, const Strided4& cross,
                            const std::vector<Strided4>& temporal, double hop_weight,
                            double skip_weight, double temperature, int threads) {
  const auto [batch, tokens, frames, positions] = sizes;
  std::vector<Tensor4> hops;
  for (const Strided4& hop : temporal) {
    hops.push_back(tensor(hop));
  }
  return {batch,         tokens, frames,     positions,   static_cast<DType>(dtype),
          tensor(cross), hops,   hop_weight, skip_weight, temperature,
          threads};
}

}  // namespace

void bind_path_flow(py::module_& m) {
  static const PathFlowKernels& kernels = CVG_AT_LEVEL(path_flow_kernels);

  m.def("path_flow", [](const std::array<int64_t, 4>& sizes, int dtype, const Strided4& cross,
                        const std::vector<Strided4>& temporal, double hop_weight,
                        double skip_weight, double temperature, int threads, Address to) {
    const auto args = path_flow_args(sizes, dtype, cross, temporal, hop_weight, skip_weight,
                                     temperature, threads);
    py::gil_scoped_release release;
    kernels.forward(args, pointer<void>(to));
  });
  m.def("path_flow_backward",
        [](const std::array<int64_t, 4>& sizes, int dtype, const Strided4& cross,
           const std::vector<Strided4>& temporal, double hop_weight, double skip_weight,
           double temperature, int threads, const Strided4& grad, Address grad_cross,
           const std::vector<Address>& grad_temporal) {
          const auto args = path_flow_args(sizes, dtype, cross, temporal, hop_weight, skip_weight,
                                           temperature, threads);
          PathFlowGradients to{pointer<void>(grad_cross), {}};
          for (const Address hop : grad_temporal) {
            to.temporal.push_back(pointer<void>(hop));
          }
          py::gil_scoped_release release;
          kernels.backward(args, tensor(grad), to);
        });
}

}  // namespace cvg::bindings
