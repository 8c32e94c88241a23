// What Python hands over, for the bindings of both modules: addresses, and tensors as (address,
// strides).
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "cvg/tensor4.h"

namespace cvg::bindings {

namespace py = pybind11;

using Address = uintptr_t;  // a data_ptr() or a cudaStream_t; 0: absent

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

template <size_t N>
using Strided = std::pair<Address, std::array<int64_t, N>>;  // (data_ptr, strides)
using Strided4 = Strided<4>;

// T has `data` and `stride[N]`.
template <typename T, size_t N>
T as(const Strided<N>& given) {
  T t;
  t.data = pointer<std::remove_pointer_t<decltype(t.data)>>(given.first);
  std::copy(given.second.begin(), given.second.end(), t.stride);
  return t;
}

inline Tensor4 tensor(const Strided4& given) {
  return as<Tensor4>(given);
}

inline Target4 target(const Strided4& given) {
  return as<Target4>(given);
}

}  // namespace cvg::bindings
