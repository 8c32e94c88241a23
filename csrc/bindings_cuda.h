// What the binding files of cvg_kernels._native_cuda share. Each operation has one such file.
// Addresses and a stream come in; nothing is allocated here.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "calls.h"

namespace cvg::bindings {

// A launcher's error code becomes an exception.
inline void check(cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(cudaGetErrorName(error)) + ": " +
                             cudaGetErrorString(error));
  }
}

void bind_max_flow(py::module_& m);
void bind_temporal_attention(py::module_& m);

}  // namespace cvg::bindings
