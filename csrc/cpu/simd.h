// Vectors of one instruction-set level. Included only by files that are compiled once per level,
// with CVG_LEVEL (the namespace) and CVG_VECTOR_BYTES defined by the build.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace cvg::CVG_LEVEL {

template <typename A>
struct VectorOf {
  typedef A type __attribute__((vector_size(CVG_VECTOR_BYTES)));
  typedef A unaligned
      __attribute__((vector_size(CVG_VECTOR_BYTES), aligned(alignof(A)), may_alias));
};
template <typename A>
using Vec = typename VectorOf<A>::type;
template <typename A>
constexpr int64_t kLanes = CVG_VECTOR_BYTES / sizeof(A);

template <typename A>
inline Vec<A> load(const A* p) {
  return *reinterpret_cast<const typename VectorOf<A>::unaligned*>(p);
}
template <typename A>
inline void store(A* p, Vec<A> v) {
  *reinterpret_cast<typename VectorOf<A>::unaligned*>(p) = v;
}
template <typename A>
inline Vec<A> splat(A x) {
  return x - Vec<A>{};
}
template <typename A>
inline Vec<A> vmax(Vec<A> a, Vec<A> b) {
  return a > b ? a : b;
}
template <typename A>
inline A horizontal_max(Vec<A> v) {
  A x = v[0];
  for (int i = 1; i < kLanes<A>; ++i) {
    x = v[i] > x ? v[i] : x;
  }
  return x;
}
template <typename A>
inline A horizontal_sum(Vec<A> v) {
  A x = 0;
  for (int i = 0; i < kLanes<A>; ++i) {
    x += v[i];
  }
  return x;
}

constexpr int64_t round_up(int64_t n, int64_t to) {
  return (n + to - 1) / to * to;
}

// e^x for x ≤ 0 to about 1 ulp; below -87.3 (also -inf) it is 0.  x = n ln 2 + r, |r| ≤ ln 2 / 2.
inline Vec<float> exp_nonpositive(Vec<float> x) {
  typedef int32_t Ints __attribute__((vector_size(CVG_VECTOR_BYTES)));
  const Vec<float> magic = splat(12582912.0f);  // 1.5 · 2^23: adding it rounds to an integer
  const auto vanishes = x < splat(-87.3f);
  Vec<float> safe = vanishes ? splat(0.0f) : x;
  Vec<float> shifted = safe * 1.44269504088896341f + magic;
  Vec<float> n = shifted - magic;
  Vec<float> r = safe - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Vec<float> p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  Ints bits, exponent;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  std::memcpy(&bits, &p, sizeof bits);
  bits += exponent << 23;  // the low bits of `shifted` hold n
  std::memcpy(&p, &bits, sizeof p);
  return vanishes ? splat(0.0f) : p;
}
inline Vec<double> exp_nonpositive(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) {
    x[i] = std::exp(x[i]);
  }
  return x;
}

}  // namespace cvg::CVG_LEVEL
