// The Python module cvg_kernels._native_cpu.
#include "bindings_cpu.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

#include "cvg/processor.h"

namespace cvg::bindings {

const std::vector<std::string>& built_levels() {
  static const std::vector<std::string> names{"baseline",
                                              CVG_IF_AVX2("avx2", ) CVG_IF_AVX512("avx512", )};
  return names;
}

const std::vector<std::string>& levels() {
  static const std::vector<std::string> names = [] {
    const std::vector<std::string> here = processor_levels();
    std::vector<std::string> found;
    std::copy_if(built_levels().begin(), built_levels().end(), std::back_inserter(found),
                 [&](const std::string& name) {
                   return std::find(here.begin(), here.end(), name) != here.end();
                 });
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
      throw std::runtime_error(
          "CVG_CPU_ISA must be one of what was built and this machine can run (" + there +
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
  m.def("levels", &levels, "The levels that were built and that this machine can run, best last.");
  m.def("built_levels", &built_levels, "The levels that were built.");
  m.def("processor_levels", &cvg::processor_levels, "The levels that this machine can run.");
  bind_attention(m);
  bind_coupled_max_flow(m);
  bind_guidance_mix(m);
  bind_max_flow(m);
  bind_min_max_matmul(m);
  bind_path_flow(m);
  bind_temporal_attention(m);
  bind_temporal_maps(m);
  bind_token_peaks(m);
}
