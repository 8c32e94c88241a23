// Attention with capture.
#include <stdexcept>

#include "bindings_cpu.h"
#include "cvg/attention.h"

namespace cvg::bindings {

namespace {

AttentionArgs make_args(const std::array<int64_t, 7>& sizes, int dtype, const Strided4& query,
                        const Strided4& key, const Strided4& value, Address token_ids, Address bias,
                        double scale, bool head_mean, int threads) {
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
                     pointer<const void>(bias),
                     scale,
                     head_mean,
                     threads};
  for (int64_t i = 0; i < batch * tokens; ++i) {
    if (args.token_ids[i] < 0 || args.token_ids[i] >= keys) {
      throw std::out_of_range("token_ids must lie in [0, " + std::to_string(keys) + "), got " +
                              std::to_string(args.token_ids[i]));
    }
  }
  return args;
}

}  // namespace

void bind_attention(py::module_& m) {
  static const AttentionKernels& kernels = CVG_AT_LEVEL(attention_kernels);
  m.def("attention_forward", [](const std::array<int64_t, 7>& sizes, int dtype,
                                const Strided4& query, const Strided4& key, const Strided4& value,
                                Address token_ids, Address bias, double scale, bool head_mean,
                                int threads, Address out, Address maps, Address lse) {
    const auto args =
        make_args(sizes, dtype, query, key, value, token_ids, bias, scale, head_mean, threads);
    py::gil_scoped_release release;
    kernels.forward(args, {pointer<void>(out), pointer<void>(maps), pointer<void>(lse)});
  });
  m.def("attention_backward", [](const std::array<int64_t, 7>& sizes, int dtype,
                                 const Strided4& query, const Strided4& key, const Strided4& value,
                                 Address token_ids, Address bias, double scale, bool head_mean,
                                 int threads, const Strided4& grad_out, Address grad_maps,
                                 Address grad_lse, const Strided4& out, Address lse,
                                 Address grad_query, Address grad_key, Address grad_value) {
    const auto args =
        make_args(sizes, dtype, query, key, value, token_ids, bias, scale, head_mean, threads);
    const BackwardIn in{tensor(grad_out), pointer<const void>(grad_maps),
                        pointer<const void>(grad_lse), tensor(out), pointer<const void>(lse)};
    if (grad_value && !in.grad_out.data && args.queries > 0) {
      throw std::invalid_argument("the gradient of value needs grad_out, which is absent");
    }
    py::gil_scoped_release release;
    kernels.backward(
        args, in, {pointer<void>(grad_query), pointer<void>(grad_key), pointer<void>(grad_value)});
  });
}

}  // namespace cvg::bindings
