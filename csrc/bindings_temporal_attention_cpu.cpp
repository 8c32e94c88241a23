// Temporal attention.
#include <stdexcept>

#include "bindings_cpu.h"
#include "cvg/temporal_attention.h"

namespace cvg::bindings {

namespace {

using Strided = std::pair<Address, std::array<int64_t, 5>>;  // (data_ptr, strides)

Tensor5 tensor(const Strided& given) {
  Tensor5 t;
  t.data = pointer<void>(given.first);
  std::copy(given.second.begin(), given.second.end(), t.stride);
  return t;
}

TemporalArgs make_args(const std::array<int64_t, 6>& sizes, int dtype, const Strided& query,
                       const Strided& key, const Strided& value, Address added, double scale,
                       bool by_row_max, int threads) {
  if (by_row_max && !added) {
    throw std::invalid_argument("by_row_max needs added, which is absent");
  }
  const auto [batch, positions, heads, frames, dim, value_dim] = sizes;
  return {batch,
          positions,
          heads,
          frames,
          dim,
          value_dim,
          static_cast<DType>(dtype),
          tensor(query),
          tensor(key),
          tensor(value),
          pointer<const void>(added),
          scale,
          by_row_max,
          threads};
}

}  // namespace

void bind_temporal_attention(py::module_& m) {
  static const TemporalKernels& kernels = CVG_AT_LEVEL(temporal_kernels);
  m.def("temporal_attention_forward",
        [](const std::array<int64_t, 6>& sizes, int dtype, const Strided& query, const Strided& key,
           const Strided& value, Address added, double scale, bool by_row_max, int threads,
           const Strided& out, Address maps) {
          const auto args =
              make_args(sizes, dtype, query, key, value, added, scale, by_row_max, threads);
          py::gil_scoped_release release;
          kernels.forward(args, {tensor(out), pointer<void>(maps)});
        });
  m.def("temporal_attention_backward",
        [](const std::array<int64_t, 6>& sizes, int dtype, const Strided& query, const Strided& key,
           const Strided& value, Address added, double scale, bool by_row_max, int threads,
           const Strided& grad_out, Address grad_maps, bool row_max_grad, const Strided& grad_query,
           const Strided& grad_key, const Strided& grad_value, Address grad_added) {
          const auto args =
              make_args(sizes, dtype, query, key, value, added, scale, by_row_max, threads);
          if (grad_value.first && !grad_out.first) {
            throw std::invalid_argument("the gradient of value needs grad_out, which is absent");
          }
          py::gil_scoped_release release;
          kernels.backward(args, {tensor(grad_out), pointer<const void>(grad_maps), row_max_grad},
                           {tensor(grad_query), tensor(grad_key), tensor(grad_value),
                            pointer<void>(grad_added)});
        });
}

}  // namespace cvg::bindings
