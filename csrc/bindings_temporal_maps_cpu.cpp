// Maps between the frames of a video.
#include "bindings_cpu.h"
#include "cvg/temporal_maps.h"

namespace cvg::bindings {

namespace {

using Strided5 = Strided<5>;
using Sizes = std::array<int64_t, 5>;  // B, P, H, F, D

TemporalMapsArgs maps_args(const Sizes& sizes, int dtype, const Strided5& query,
                           const Strided5& key, const Strided4& lse, const Strided4& key_bias,
                           double scale, bool head_mean, int threads) {
  const auto [batch, places, heads, frames, dim] = sizes;
  return {batch,
          places,
          heads,
          frames,
          dim,
          static_cast<DType>(dtype),
          as<Tensor5>(query),
          as<Tensor5>(key),
          tensor(lse),
          tensor(key_bias),
          scale,
          head_mean,
          threads};
}

}  // namespace

void bind_temporal_maps(py::module_& m) {
  static const TemporalMapsKernels& kernels = CVG_AT_LEVEL(temporal_maps_kernels);
  m.def("temporal_maps", [](const Sizes& sizes, int dtype, const Strided5& query,
                            const Strided5& key, const Strided4& lse, const Strided4& key_bias,
                            double scale, bool head_mean, int threads, Address maps) {
    const auto args = maps_args(sizes, dtype, query, key, lse, key_bias, scale, head_mean, threads);
    py::gil_scoped_release release;
    kernels.forward(args, pointer<void>(maps));
  });
  m.def("temporal_maps_backward", [](const Sizes& sizes, int dtype, const Strided5& query,
                                     const Strided5& key, const Strided4& lse,
                                     const Strided4& key_bias, double scale, bool head_mean,
                                     int threads, Address grad_maps, const Strided5& grad_query,
                                     const Strided5& grad_key, const Strided4& grad_lse) {
    const auto args = maps_args(sizes, dtype, query, key, lse, key_bias, scale, head_mean, threads);
    const TemporalMapsGradients to{as<Tensor5>(grad_query), as<Tensor5>(grad_key),
                                   target(grad_lse)};
    py::gil_scoped_release release;
    kernels.backward(args, pointer<const void>(grad_maps), to);
  });
}

}  // namespace cvg::bindings
