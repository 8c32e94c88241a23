// A tensor as the kernels of temporal attention take it.
#pragma once

#include <cstdint>

namespace cvg {

// A [B, P, H, F, dim] tensor with strides in elements. data == nullptr: absent.
struct Tensor5 {
  void* data = nullptr;
  int64_t stride[5] = {0, 0, 0, 0, 0};
};

}  // namespace cvg
