// The Python module cvg_kernels._native_cuda. It imports without a GPU.
#include "bindings_cuda.h"

#include <optional>

#include "cvg/device.h"

PYBIND11_MODULE(_native_cuda, m) {
  using namespace cvg::bindings;
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
  bind_max_flow(m);
  bind_temporal_attention(m);
}
