// Attention with a band by frame distance.
#include <stdexcept>

#include "bindings_cpu.h"
#include "cvg/frame_band_attention.h"

namespace cvg::bindings {

namespace {

FrameBandArgs make_args(const std::array<int64_t, 6>& sizes, int dtype, const Strided4& query,
                        const Strided4& key, const Strided4& value, Address query_frames,
                        Address key_frames, double scale, double sigma, double strength,
                        int threads) {
  const auto [batch, heads, queries, keys, dim, value_dim] = sizes;
  return {batch,
          heads,
          queries,
          keys,
          dim,
          value_dim,
          static_cast<DType>(dtype),
          tensor(query),
          tensor(key),
          tensor(value),
          pointer<const int32_t>(query_frames),
          pointer<const int32_t>(key_frames),
          scale,
          sigma,
          strength,
          threads};
}

}  // namespace

void bind_frame_band_attention(py::module_& m) {
  static const FrameBandKernels& kernels = CVG_AT_LEVEL(frame_band_kernels);
  m.def("frame_band_attention_forward",
        [](const std::array<int64_t, 6>& sizes, int dtype, const Strided4& query,
           const Strided4& key, const Strided4& value, Address query_frames, Address key_frames,
           double scale, double sigma, double strength, int threads, const Strided4& out,
           Address lse, Address highest, Address place) {
          const auto args = make_args(sizes, dtype, query, key, value, query_frames, key_frames,
                                      scale, sigma, strength, threads);
          py::gil_scoped_release release;
          kernels.forward(
              args,
              {target(out), {pointer<void>(lse), pointer<void>(highest), pointer<int32_t>(place)}});
        });
  m.def(
      "frame_band_attention_backward",
      [](const std::array<int64_t, 6>& sizes, int dtype, const Strided4& query, const Strided4& key,
         const Strided4& value, Address query_frames, Address key_frames, double scale,
         double sigma, double strength, int threads, const Strided4& grad_out, Address grad_lse,
         const Strided4& out, Address lse, Address highest, Address place, bool row_max_grad,
         const Strided4& grad_query, const Strided4& grad_key, const Strided4& grad_value) {
        const auto args = make_args(sizes, dtype, query, key, value, query_frames, key_frames,
                                    scale, sigma, strength, threads);
        if (grad_value.first && !grad_out.first && args.queries > 0) {
          throw std::invalid_argument("the gradient of value needs grad_out, which is absent");
        }
        const FrameBandBackwardIn in{
            tensor(grad_out),
            pointer<const void>(grad_lse),
            tensor(out),
            {pointer<void>(lse), pointer<void>(highest), pointer<int32_t>(place)},
            row_max_grad};
        py::gil_scoped_release release;
        kernels.backward(args, in, {target(grad_query), target(grad_key), target(grad_value)});
      });
}

}  // namespace cvg::bindings
