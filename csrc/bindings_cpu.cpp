// The Python module cvg_kernels._native_cpu.
#include "bindings_cpu.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

namespace cvg::bindings {

const std::vector<std::string>& levels() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> found{"baseline"};
#ifdef CVG_X86_LEVELS
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    if (avx2) {
      found.push_back("avx2");
    }
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
      found.push_back("avx512");
    }
#endif
    return found;
  }();
  return names;
}

int level() {
  static const int chosen = [] {
    const char* wanted = std::getenv("CVG_CPU_ISA");
    if (!wanted || !*wanted) {
      return static_cast<int>(levels().size()) - 1;
    }
    const auto found = std::find(levels().begin(), levels().end(), wanted);
    if (found == levels().end()) {
      std::string there;
      for (const std::string& name : levels()) {
        there += (there.empty() ? "" : ", ") + name;
      }
      throw std::runtime_error("CVG_CPU_ISA must be one of what this machine can run (" + there +
                               "), got '" + wanted + "'");
    }
    return static_cast<int>(found - levels().begin());
  }();
  return chosen;
}

}  // namespace cvg::bindings

PYBIND11_MODULE(_native_cpu, m) {
  using namespace cvg::bindings;
  m.doc() = "C++ kernels of cvg_kernels for CPU tensors.";
  m.def("isa", [] { return levels()[level()]; }, "The instruction-set level in use.");
  m.def("levels", &levels, "The levels that this machine can run.");
  bind_attention(m);
  bind_flow(m);
  bind_coupled_flow(m);
  bind_max_flow(m);
  bind_temporal_attention(m);
  bind_temporal_maps(m);
  bind_guidance_mix(m);
}
