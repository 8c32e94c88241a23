// The memory a thread works in, and the type that arithmetic is done in.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <type_traits>

#include "cpu/simd.h"

namespace cvg::CVG_LEVEL {

// An aligned array that is not initialised: every use writes before it reads.
template <typename A>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<A*>(
            std::aligned_alloc(64, round_up(std::max<int64_t>(count, 1) * sizeof(A), 64)))) {}
  operator A*() const { return data_.get(); }

 private:
  struct Free {
    void operator()(A* p) const { std::free(p); }
  };
  std::unique_ptr<A, Free> data_;
};

template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

}  // namespace cvg::CVG_LEVEL
