// What the CUDA module can say of the machine, and the smallest kernel: does this binary's code run
// on that GPU?
#include "cvg/device.h"

namespace {

__global__ void double_each(int* values) {
  values[threadIdx.x] *= 2;
}

}  // namespace

cudaError_t cvg::self_check(int device) {
  constexpr int count = 32;
  int host[count];
  for (int i = 0; i < count; ++i) {
    host[i] = i;
  }
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error != cudaSuccess || (error = cudaSetDevice(device)) != cudaSuccess) {
    return error;
  }
  int* values = nullptr;
  error = cudaMalloc(&values, sizeof host);
  if (error == cudaSuccess) {
    error = cudaMemcpy(values, host, sizeof host, cudaMemcpyHostToDevice);
  }
  if (error == cudaSuccess) {
    double_each<<<1, count>>>(values);
    error = cudaGetLastError();
  }
  if (error == cudaSuccess) {
    error = cudaMemcpy(host, values, sizeof host, cudaMemcpyDeviceToHost);
  }
  for (int i = 0; i < count && error == cudaSuccess; ++i) {
    error = host[i] == 2 * i ? cudaSuccess : cudaErrorAssert;
  }
  cudaFree(values);
  cudaSetDevice(before);
  return error;
}
