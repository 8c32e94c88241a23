// A tensor as the kernels take it.
#pragma once

#include <cstdint>

namespace cvg {

// Four dimensions, strides in elements. data == nullptr: absent.
struct Tensor4 {
  const void* data = nullptr;
  int64_t stride[4] = {0, 0, 0, 0};
};

// One that they write.
struct Target4 {
  void* data = nullptr;
  int64_t stride[4] = {0, 0, 0, 0};
};

}  // namespace cvg
