// What the processor at hand can run.
#pragma once

#include <string>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace cvg {

// Instruction-set levels of this processor, best last.
//
// The processor is asked itself: not every compiler's __builtin_cpu_supports knows all of the
// names, and on Windows it needs a library that is not linked.
inline std::vector<std::string> processor_levels() {
  std::vector<std::string> found{"baseline"};
#if defined(__x86_64__)
  const auto has = [](unsigned word, int bit) { return ((word >> bit) & 1u) != 0; };
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) {
    return found;
  }
  const bool fma = has(ecx, 12), f16c = has(ecx, 29), xgetbv = has(ecx, 27);
  if (!fma || !f16c || !xgetbv || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) {
    return found;
  }
  const bool avx2 = has(ebx, 5);
  const bool avx512 =
      has(ebx, 16) && has(ebx, 17) && has(ebx, 30) && has(ebx, 31);  // f, dq, bw, vl
  unsigned saved = 0, above = 0;  // registers that the system keeps for every process
  __asm__ volatile("xgetbv" : "=a"(saved), "=d"(above) : "c"(0));
  const bool ymm = (saved & 0x06u) == 0x06u, zmm = (saved & 0xe6u) == 0xe6u;
  if (avx2 && ymm) {
    found.push_back("avx2");
    if (avx512 && zmm) {
      found.push_back("avx512");
    }
  }
#endif
  return found;
}

}  // namespace cvg
