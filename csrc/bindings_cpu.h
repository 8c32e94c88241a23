// What the binding files of cvg_kernels._native_cpu share. Each operation has one such file, with
// one function that adds its kernels to the module. Addresses come in, nothing is allocated here,
// and the GIL is released while a kernel runs.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "calls.h"
#include "cvg/level.h"

namespace cvg::bindings {

// Instruction-set levels that were built, those of them that this machine can run, best last, and
// the one in use, a place in the latter: the best, or what the environment variable CVG_CPU_ISA
// names. A processor that runs a level runs those before it.
const std::vector<std::string>& built_levels();
const std::vector<std::string>& levels();
int level();

// The kernels of an operation for the level in use.
#define CVG_AT_LEVEL(kernels)                                                  \
  (std::array{kernels##_baseline, CVG_IF_AVX2(kernels##_avx2, ) CVG_IF_AVX512( \
                                      kernels##_avx512, )}[cvg::bindings::level()]())

void bind_attention(py::module_& m);
void bind_coupled_max_flow(py::module_& m);
void bind_guidance_mix(py::module_& m);
void bind_max_flow(py::module_& m);
void bind_min_max_matmul(py::module_& m);
void bind_path_flow(py::module_& m);
void bind_temporal_attention(py::module_& m);
void bind_temporal_maps(py::module_& m);
void bind_token_peaks(py::module_& m);

}  // namespace cvg::bindings
