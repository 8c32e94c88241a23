// Temporal attention.
#include <pybind11/functional.h>

#include <optional>

#include "bindings_cuda.h"
#include "cvg/temporal_attention_cuda.h"

namespace cvg::bindings {

namespace {

using Strided = std::pair<Address, std::array<int64_t, 5>>;  // (data_ptr, strides)

Tensor5 tensor(const Strided& given) {
  Tensor5 t;
  t.data = pointer<void>(given.first);
  std::copy(given.second.begin(), given.second.end(), t.stride);
  return t;
}

TemporalTilesArgs make_args(const std::array<int64_t, 6>& sizes, bool bf16, const Strided& query,
                            const Strided& key, const Strided& value, Address added, double scale,
                            bool by_row_max) {
  if (by_row_max && !added) {
    throw std::invalid_argument("by_row_max needs added, which is absent");
  }
  const auto [batch, positions, heads, frames, dim, value_dim] = sizes;
  return {batch,
          positions,
          static_cast<int>(heads),
          static_cast<int>(frames),
          static_cast<int>(dim),
          static_cast<int>(value_dim),
          bf16,
          tensor(query),
          tensor(key),
          tensor(value),
          pointer<const float>(added),
          scale,
          by_row_max};
}

}  // namespace

// The backward pass takes `sums`, which returns the address of so many [F, F] of float32 on the
// device, or None where the gradient of `added` is not wanted.
void bind_temporal_attention(py::module_& m) {
  m.def("temporal_attention_forward",
        [](const std::array<int64_t, 6>& sizes, bool bf16, const Strided& query, const Strided& key,
           const Strided& value, Address added, double scale, bool by_row_max, const Strided& out,
           Address maps, Address stream) {
          const auto args =
              make_args(sizes, bf16, query, key, value, added, scale, by_row_max);
          check(temporal_attention_forward(args, tensor(out), pointer<float>(maps),
                                           pointer<CUstream_st>(stream)));
        });
  m.def("temporal_attention_backward",
        [](const std::array<int64_t, 6>& sizes, bool bf16, const Strided& query, const Strided& key,
           const Strided& value, Address added, double scale, bool by_row_max,
           const Strided& grad_out, Address grad_maps, bool row_max_grad, const Strided& grad_query,
           const Strided& grad_key, const Strided& grad_value,
           const std::optional<std::function<Address(int64_t)>>& sums, Address stream) {
          const auto args =
              make_args(sizes, bf16, query, key, value, added, scale, by_row_max);
          if (grad_value.first && !grad_out.first) {
            throw std::invalid_argument("the gradient of value needs grad_out, which is absent");
          }
          TemporalTilesGrads grads{tensor(grad_out),
                                   pointer<const float>(grad_maps),
                                   row_max_grad,
                                   tensor(grad_query),
                                   tensor(grad_key),
                                   tensor(grad_value),
                                   {}};
          if (sums) {
            grads.sums = [&](int64_t count) { return pointer<float>((*sums)(count)); };
          }
          check(temporal_attention_backward(args, grads, pointer<CUstream_st>(stream)));
        });
}

}  // namespace cvg::bindings
