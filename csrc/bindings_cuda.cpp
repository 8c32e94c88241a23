// The Python module cvg_kernels._native_cuda. It imports without a GPU; a launcher's error code
// becomes an exception.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "cvg/device.h"

namespace py = pybind11;

namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(cudaGetErrorName(error)) + ": " +
                             cudaGetErrorString(error));
  }
}

}  // namespace

PYBIND11_MODULE(_native_cuda, m) {
  m.doc() = "CUDA kernels of cvg_kernels.";
  m.attr("architectures") = CVG_CUDA_ARCHITECTURES;
  m.attr("runtime_version") = CUDART_VERSION;
  m.def(
      "device_count",
      [] {
        int count = 0;
        const cudaError_t error = cudaGetDeviceCount(&count);
        if (error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver) {
          return 0;
        }
        check(error);
        return count;
      },
      "Number of GPUs; 0 without a driver.");
  m.def(
      "self_check",
      [](int device) -> std::optional<std::string> {
        try {
          check(cvg::self_check(device));
        } catch (const std::runtime_error& error) {
          return error.what();
        }
        return std::nullopt;
      },
      "Runs a small kernel on a device; None, or what went wrong.");
}
