// Temporal attention: the two calls from Python, the same for both modules.
#pragma once

#include <array>
#include <cstdint>
#include <stdexcept>

#include "calls.h"
#include "cvg/temporal_args.h"

namespace cvg::bindings {

using Strided5 = Strided<5>;
using TemporalSizes = std::array<int64_t, 6>;  // B, P, H, F, D, Dv

inline TemporalArgs temporal_args(const TemporalSizes& sizes, int dtype, const Strided5& query,
                                  const Strided5& key, const Strided5& value, Address added,
                                  double scale, bool scale_bias_by_row_max) {
  if (scale_bias_by_row_max && !added) {
    throw std::invalid_argument("scale_bias_by_row_max needs added, which is absent");
  }
  const auto [batch, positions, heads, frames, dim, value_dim] = sizes;
  return {batch,
          positions,
          heads,
          frames,
          dim,
          value_dim,
          static_cast<DType>(dtype),
          as<Tensor5>(query),
          as<Tensor5>(key),
          as<Tensor5>(value),
          pointer<const void>(added),
          scale,
          scale_bias_by_row_max,
          1};
}

// Adds both passes to a module: forward(args, to, where) and backward(args, in, to, where), with
// `where` the number of threads (int) or the address of a stream.
template <typename Where, typename Forward, typename Backward>
void bind_temporal_calls(py::module_& m, Forward forward, Backward backward) {
  m.def("temporal_attention",
        [=](const TemporalSizes& sizes, int dtype, const Strided5& query, const Strided5& key,
            const Strided5& value, Address added, double scale, bool scale_bias_by_row_max,
            const Strided5& out, Address maps, Where where) {
          const auto args =
              temporal_args(sizes, dtype, query, key, value, added, scale, scale_bias_by_row_max);
          forward(args, TemporalForwardOut{as<Tensor5>(out), pointer<void>(maps)}, where);
        });
  m.def("temporal_attention_backward",
        [=](const TemporalSizes& sizes, int dtype, const Strided5& query, const Strided5& key,
            const Strided5& value, Address added, double scale, bool scale_bias_by_row_max,
            const Strided5& grad_out, Address grad_maps, bool row_max_grad,
            const Strided5& grad_query, const Strided5& grad_key, const Strided5& grad_value,
            Address grad_added, Where where) {
          if (grad_value.first && !grad_out.first) {
            throw std::invalid_argument("the gradient of value needs grad_out, which is absent");
          }
          const auto args =
              temporal_args(sizes, dtype, query, key, value, added, scale, scale_bias_by_row_max);
          const TemporalBackwardIn in{as<Tensor5>(grad_out), pointer<const void>(grad_maps),
                                      row_max_grad};
          const TemporalBackwardOut to{as<Tensor5>(grad_query), as<Tensor5>(grad_key),
                                       as<Tensor5>(grad_value), pointer<void>(grad_added)};
          backward(args, in, to, where);
        });
}

}  // namespace cvg::bindings
