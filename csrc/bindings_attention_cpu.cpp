// The attention core.
#include <optional>
#include <stdexcept>
#include <tuple>

#include "bindings_cpu.h"
#include "cvg/attention.h"

namespace cvg::bindings {

namespace {

// query_frames, key_frames, sigma, strength, row_max_grad
using GivenBand = std::tuple<Address, Address, double, double, bool>;

AttentionArgs make_args(const std::array<int64_t, 7>& sizes, int dtype, const Strided4& query,
                        const Strided4& key, const Strided4& value, Address token_ids,
                        Address key_bias, const Strided4& token_bias,
                        const std::optional<GivenBand>& band, double scale, bool head_mean,
                        int threads) {
  const auto [batch, heads, queries, keys, dim, value_dim, tokens] = sizes;
  AttentionArgs args{batch,
                     heads,
                     queries,
                     keys,
                     dim,
                     value_dim,
                     tokens,
                     static_cast<DType>(dtype),
                     tensor(query),
                     tensor(key),
                     tensor(value),
                     pointer<const int64_t>(token_ids),
                     pointer<const void>(key_bias),
                     tensor(token_bias),
                     {},
                     scale,
                     head_mean,
                     threads};
  if (band) {
    const auto [query_frames, key_frames, sigma, strength, row_max_grad] = *band;
    args.band = {pointer<const int32_t>(query_frames), pointer<const int32_t>(key_frames), sigma,
                 strength, row_max_grad};
    if (args.key_bias || args.token_bias.data) {
      throw std::invalid_argument("a band and a bias exclude each other");
    }
  }
  for (int64_t i = 0; i < batch * tokens; ++i) {
    if (args.token_ids[i] < 0 || args.token_ids[i] >= keys) {
      throw std::out_of_range("token_ids must lie in [0, " + std::to_string(keys) + "), got " +
                              std::to_string(args.token_ids[i]));
    }
  }
  return args;
}

AttentionRows rows_of(Address lse, Address row_max, Address row_argmax) {
  return {pointer<void>(lse), pointer<void>(row_max), pointer<int32_t>(row_argmax)};
}

}  // namespace

void bind_attention(py::module_& m) {
  static const AttentionKernels& kernels = CVG_AT_LEVEL(attention_kernels);
  py::class_<AttentionArgs>(m, "AttentionArgs", py::module_local()).def(py::init(&make_args));
  m.def("attention", [](const AttentionArgs& args, const Strided4& out, Address maps, Address lse,
                        Address row_max, Address row_argmax) {
    py::gil_scoped_release release;
    kernels.forward(args, {target(out), pointer<void>(maps), rows_of(lse, row_max, row_argmax)});
  });
  m.def("attention_backward", [](const AttentionArgs& args, const Strided4& grad_out,
                                 Address grad_maps, Address grad_lse, const Strided4& out,
                                 Address lse, Address row_max, Address row_argmax,
                                 const Strided4& grad_query, const Strided4& grad_key,
                                 const Strided4& grad_value, Address grad_token_bias) {
    const BackwardIn in{tensor(grad_out), pointer<const void>(grad_maps),
                        pointer<const void>(grad_lse), tensor(out),
                        rows_of(lse, row_max, row_argmax)};
    if (grad_value.first && !in.grad_out.data && args.queries > 0) {
      throw std::invalid_argument("the gradient of value needs grad_out, which is absent");
    }
    py::gil_scoped_release release;
    kernels.backward(
        args, in,
        {target(grad_query), target(grad_key), target(grad_value), pointer<void>(grad_token_bias)});
  });
  m.def("attention_capture", [](const AttentionArgs& args, Address lse, Address maps) {
    py::gil_scoped_release release;
    kernels.capture(args, pointer<const void>(lse), pointer<void>(maps));
  });
}

}  // namespace cvg::bindings
