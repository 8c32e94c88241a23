// What both passes of temporal attention share on the host: what the device has, how many blocks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "cvg/temporal_tiles.h"

namespace cvg::tiles {

constexpr int threads_of(int warps_of_sequence) {
  return groups_of(warps_of_sequence) * warps_of_sequence * kLanes;
}

struct Device {
  int processors = 0, shared_bytes = 0;
};

inline cudaError_t read_device(Device* device) {
  int current = 0;
  cudaError_t error = cudaGetDevice(&current);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&device->processors, cudaDevAttrMultiProcessorCount, current);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&device->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                   current);
  }
  return error;
}

// Blocks lie along x alone, which goes to 2³¹ − 1; beyond, each takes several turns.
inline int64_t blocks_of(int64_t sequences, int groups) {
  return std::min<int64_t>((sequences + groups - 1) / groups, std::numeric_limits<int>::max());
}

template <class Args>
cudaError_t launch(void (*kernel)(Args), const Args& args, int warps_of_sequence, int64_t blocks,
                   cudaStream_t stream) {
  const int bytes = static_cast<int>(args.plan.bytes());
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) {
    return error;
  }
  kernel<<<static_cast<unsigned>(blocks), threads_of(warps_of_sequence), bytes, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace cvg::tiles
