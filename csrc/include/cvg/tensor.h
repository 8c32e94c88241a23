// A tensor of four dimensions as a caller hands it over.
#pragma once

#include <cstdint>

namespace cvg {

// Strides in elements. data == nullptr: absent.
struct Tensor4 {
  const void* data = nullptr;
  int64_t stride[4] = {0, 0, 0, 0};
};

}  // namespace cvg
