// What the binding files of cvg_kernels._native_cpu share. Each operation has one such file, with
// one function that adds its kernels to the module. Addresses come in, nothing is allocated here,
// and the GIL is released while a kernel runs.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "calls.h"

namespace cvg::bindings {

// Instruction-set levels that this machine can run, best last, and the one in use: the best, or
// what the environment variable CVG_CPU_ISA names.
const std::vector<std::string>& levels();
int level();

// The kernels of an operation for the level in use.
#ifdef CVG_X86_LEVELS
#define CVG_AT_LEVEL(kernels) \
  (std::array{kernels##_baseline, kernels##_avx2, kernels##_avx512}[cvg::bindings::level()]())
#else
#define CVG_AT_LEVEL(kernels) (kernels##_baseline())
#endif

void bind_attention(py::module_& m);
void bind_coupled_flow(py::module_& m);
void bind_flow(py::module_& m);
void bind_max_flow(py::module_& m);
void bind_temporal_attention(py::module_& m);
void bind_temporal_maps(py::module_& m);
void bind_guidance_mix(py::module_& m);

}  // namespace cvg::bindings
