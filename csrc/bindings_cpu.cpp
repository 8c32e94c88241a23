// The Python module cvg_kernels._native_cpu: addresses in, nothing allocated, the GIL released
// while kernels run.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "cvg/attention.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;
using Strided = std::pair<Address, std::array<int64_t, 4>>;  // (data_ptr, strides); 0: absent

// The levels that this machine can run, best last.
std::vector<const cvg::AttentionKernels*> runnable_levels() {
  std::vector<const cvg::AttentionKernels*> levels{&cvg::attention_kernels_baseline()};
#ifdef CVG_X86_LEVELS
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (avx2) {
    levels.push_back(&cvg::attention_kernels_avx2());
  }
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    levels.push_back(&cvg::attention_kernels_avx512());
  }
#endif
  return levels;
}

const cvg::AttentionKernels* choose_level() {
  const auto levels = runnable_levels();
  const char* wanted = std::getenv("CVG_CPU_ISA");
  if (!wanted) {
    return levels.back();
  }
  std::string there;
  for (const auto* level : levels) {
    if (std::string(wanted) == level->isa) {
      return level;
    }
    there += std::string(there.empty() ? "" : ", ") + level->isa;
  }
  throw std::runtime_error("CVG_CPU_ISA must be one of " + there + ", got " + wanted);
}

const cvg::AttentionKernels* kernels = nullptr;

cvg::Tensor4 tensor(const Strided& given) {
  cvg::Tensor4 t;
  t.data = reinterpret_cast<const void*>(given.first);
  std::copy(given.second.begin(), given.second.end(), t.stride);
  return t;
}

cvg::AttentionArgs make_args(const std::array<int64_t, 7>& sizes, int dtype, const Strided& query,
                             const Strided& key, const Strided& value, Address token_ids,
                             Address bias, double scale, bool head_mean, int threads) {
  const auto [batch, heads, queries, keys, dim, value_dim, tokens] = sizes;
  cvg::AttentionArgs args{batch,
                          heads,
                          queries,
                          keys,
                          dim,
                          value_dim,
                          tokens,
                          static_cast<cvg::DType>(dtype),
                          tensor(query),
                          tensor(key),
                          tensor(value),
                          reinterpret_cast<const int64_t*>(token_ids),
                          reinterpret_cast<const void*>(bias),
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

PYBIND11_MODULE(_native_cpu, m) {
  kernels = choose_level();
  m.doc() = "C++ kernels of cvg_kernels for CPU tensors.";
  m.def("isa", [] { return kernels->isa; }, "The instruction-set level in use.");
  m.def("levels", [] {
    std::vector<std::string> names;
    for (const auto* level : runnable_levels()) {
      names.push_back(level->isa);
    }
    return names;
  });
  m.def("attention_forward", [](const std::array<int64_t, 7>& sizes, int dtype,
                                const Strided& query, const Strided& key, const Strided& value,
                                Address token_ids, Address bias, double scale, bool head_mean,
                                int threads, Address out, Address maps, Address lse) {
    const auto args =
        make_args(sizes, dtype, query, key, value, token_ids, bias, scale, head_mean, threads);
    py::gil_scoped_release release;
    kernels->forward(args, {reinterpret_cast<void*>(out), reinterpret_cast<void*>(maps),
                            reinterpret_cast<void*>(lse)});
  });
  m.def("attention_backward", [](const std::array<int64_t, 7>& sizes, int dtype,
                                 const Strided& query, const Strided& key, const Strided& value,
                                 Address token_ids, Address bias, double scale, bool head_mean,
                                 int threads, const Strided& grad_out, Address grad_maps,
                                 Address grad_lse, const Strided& out, Address lse,
                                 Address grad_query, Address grad_key, Address grad_value) {
    const auto args =
        make_args(sizes, dtype, query, key, value, token_ids, bias, scale, head_mean, threads);
    const cvg::BackwardIn in{tensor(grad_out), reinterpret_cast<const void*>(grad_maps),
                             reinterpret_cast<const void*>(grad_lse), tensor(out),
                             reinterpret_cast<const void*>(lse)};
    py::gil_scoped_release release;
    kernels->backward(args, in,
                      {reinterpret_cast<void*>(grad_query), reinterpret_cast<void*>(grad_key),
                       reinterpret_cast<void*>(grad_value)});
  });
}
