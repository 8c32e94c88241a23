// Instruction-set levels: every CPU kernel file is compiled once per level, with CVG_LEVEL its name
// and namespace, and offers its kernels through one function whose name ends in the level.
#pragma once

#ifdef CVG_X86_LEVELS
#define CVG_DECLARE_LEVELS(Kernels, kernels) \
  const Kernels& kernels##_baseline();       \
  const Kernels& kernels##_avx2();           \
  const Kernels& kernels##_avx512()
#else
#define CVG_DECLARE_LEVELS(Kernels, kernels) const Kernels& kernels##_baseline()
#endif

// CVG_OF_LEVEL(attention_kernels) is attention_kernels_avx2 where CVG_LEVEL is avx2.
#define CVG_JOIN_(name, level) name##_##level
#define CVG_JOIN(name, level) CVG_JOIN_(name, level)
#define CVG_OF_LEVEL(name) CVG_JOIN(name, CVG_LEVEL)
