// Instruction-set levels: every CPU kernel file is compiled once per level, with CVG_LEVEL its name
// and namespace, and offers its kernels through one function whose name ends in the level. Which
// levels beyond the baseline there are, the build says: CVG_HAS_AVX2, CVG_HAS_AVX512.
#pragma once

#ifdef CVG_HAS_AVX2
#define CVG_IF_AVX2(...) __VA_ARGS__
#else
#define CVG_IF_AVX2(...)
#endif
#ifdef CVG_HAS_AVX512
#define CVG_IF_AVX512(...) __VA_ARGS__
#else
#define CVG_IF_AVX512(...)
#endif

#define CVG_DECLARE_LEVELS(Kernels, kernels)    \
  CVG_IF_AVX2(const Kernels& kernels##_avx2();) \
  CVG_IF_AVX512(const Kernels& kernels##_avx512();) const Kernels& kernels##_baseline()

// CVG_OF_LEVEL(attention_kernels) is attention_kernels_avx2 where CVG_LEVEL is avx2.
#define CVG_JOIN_(name, level) name##_##level
#define CVG_JOIN(name, level) CVG_JOIN_(name, level)
#define CVG_OF_LEVEL(name) CVG_JOIN(name, CVG_LEVEL)
