// Element types, and how they become the type that arithmetic is done in.
#pragma once

#include <cstdint>
#include <cstring>

#include "cvg/dtype_code.h"

namespace cvg {

struct BFloat16 {
  uint16_t bits;
};

inline float widen(BFloat16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}
inline float widen(_Float16 x) {
  return static_cast<float>(x);
}
inline float widen(float x) {
  return x;
}
inline double widen(double x) {
  return x;
}

template <typename T>
inline T narrow(decltype(widen(T{})) x) {
  return static_cast<T>(x);
}
// Round to nearest, ties to even; NaN stays NaN.
template <>
inline BFloat16 narrow<BFloat16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) {
    return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  }
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

// Calls with a number of the type that `dtype` names, for the sake of that type:
//   by_type(dtype, [&](auto zero) { work<decltype(zero)>(…); })
template <typename Call>
void by_type(DType dtype, Call call) {
  switch (dtype) {
    case DType::f32:
      return call(float{});
    case DType::f64:
      return call(double{});
    case DType::bf16:
      return call(BFloat16{});
    case DType::f16:
      return call(_Float16{});
  }
}

// The same where only float and double are served.
template <typename Call>
void by_wide_type(DType dtype, Call call) {
  dtype == DType::f64 ? call(double{}) : call(float{});
}

}  // namespace cvg
