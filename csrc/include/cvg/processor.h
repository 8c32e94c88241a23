// What the processor at hand can run.
#pragma once

#include <string>
#include <vector>

namespace cvg {

// Instruction-set levels of this processor, best last.
inline std::vector<std::string> processor_levels() {
  std::vector<std::string> found{"baseline"};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
      !__builtin_cpu_supports("f16c")) {
    return found;
  }
  found.push_back("avx2");
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    found.push_back("avx512");
  }
#endif
  return found;
}

}  // namespace cvg
