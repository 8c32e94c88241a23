// Temporal attention: the two calls from Python, the same for both modules.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <utility>

#include "cvg/temporal_args.h"

namespace cvg::bindings {

using Strided5 = std::pair<uintptr_t, std::array<int64_t, 5>>;  // (data_ptr, strides)
using TemporalSizes = std::array<int64_t, 6>;                   // B, P, H, F, D, Dv

inline Tensor5 tensor_of(const Strided5& given) {
  Tensor5 t;
  t.data = reinterpret_cast<void*>(given.first);
  std::copy(given.second.begin(), given.second.end(), t.stride);
  return t;
}

inline TemporalArgs temporal_args(const TemporalSizes& sizes, int dtype, const Strided5& query,
                                  const Strided5& key, const Strided5& value, uintptr_t added,
                                  double scale, bool by_row_max) {
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
          tensor_of(query),
          tensor_of(key),
          tensor_of(value),
          reinterpret_cast<const void*>(added),
          scale,
          by_row_max,
          1};
}

// Adds both passes to a module: forward(args, to, where) and backward(args, in, to, where), with
// `where` the number of threads (int) or the address of a stream.
template <typename Where, typename Forward, typename Backward>
void bind_temporal_calls(pybind11::module_& m, Forward forward, Backward backward) {
  m.def("temporal_attention_forward",
        [=](const TemporalSizes& sizes, int dtype, const Strided5& query, const Strided5& key,
            const Strided5& value, uintptr_t added, double scale, bool by_row_max,
            const Strided5& out, uintptr_t maps, Where where) {
          const auto args =
              temporal_args(sizes, dtype, query, key, value, added, scale, by_row_max);
          forward(args, TemporalForwardOut{tensor_of(out), reinterpret_cast<void*>(maps)}, where);
        });
  m.def("temporal_attention_backward",
        [=](const TemporalSizes& sizes, int dtype, const Strided5& query, const Strided5& key,
            const Strided5& value, uintptr_t added, double scale, bool by_row_max,
            const Strided5& grad_out, uintptr_t grad_maps, bool row_max_grad,
            const Strided5& grad_query, const Strided5& grad_key, const Strided5& grad_value,
            uintptr_t grad_added, Where where) {
          if (grad_value.first && !grad_out.first) {
            throw std::invalid_argument("the gradient of value needs grad_out, which is absent");
          }
          const auto args =
              temporal_args(sizes, dtype, query, key, value, added, scale, by_row_max);
          const TemporalBackwardIn in{tensor_of(grad_out), reinterpret_cast<const void*>(grad_maps),
                                      row_max_grad};
          const TemporalBackwardOut to{tensor_of(grad_query), tensor_of(grad_key),
                                       tensor_of(grad_value), reinterpret_cast<void*>(grad_added)};
          backward(args, in, to, where);
        });
}

}  // namespace cvg::bindings
