// Element types, and how they become the type that arithmetic is done in.
#pragma once

#include <cstdint>
#include <cstring>

namespace cvg {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

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

}  // namespace cvg
