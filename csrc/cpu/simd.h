// Vectors of one instruction-set level. Included only by files that are compiled once per level,
// with CVG_LEVEL (the namespace) and CVG_VECTOR_BYTES defined by the build.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cvg/level.h"

#if defined(__x86_64__)
#include <immintrin.h>
#if CVG_VECTOR_BYTES == 64
#define CVG_MM(operation) CVG_JOIN(_mm512, operation)
#elif CVG_VECTOR_BYTES == 32
#define CVG_MM(operation) CVG_JOIN(_mm256, operation)
#else
#define CVG_MM(operation) CVG_JOIN(_mm, operation)
#endif
#endif

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
// a < b ? a : b and a > b ? a : b; so b where either is NaN. By intrinsics, because a compiler that
// keeps to IEEE 754 makes two instructions of the plain form.
#if defined(__x86_64__)
inline Vec<float> vmin(Vec<float> a, Vec<float> b) {
  return CVG_MM(min_ps)(a, b);
}
inline Vec<double> vmin(Vec<double> a, Vec<double> b) {
  return CVG_MM(min_pd)(a, b);
}
inline Vec<float> vmax(Vec<float> a, Vec<float> b) {
  return CVG_MM(max_ps)(a, b);
}
inline Vec<double> vmax(Vec<double> a, Vec<double> b) {
  return CVG_MM(max_pd)(a, b);
}
#else
template <typename V>
inline V vmin(V a, V b) {
  return a < b ? a : b;
}
template <typename V>
inline V vmax(V a, V b) {
  return a > b ? a : b;
}
#endif

// 1/x of a normal x to about 1 ulp: the processor's estimate and a Newton step, a third of the time
// of a division.
#if defined(__x86_64__)
inline Vec<float> reciprocal(Vec<float> x) {
#if CVG_VECTOR_BYTES == 64
  const Vec<float> y = _mm512_rcp14_ps(x);
#else
  const Vec<float> y = CVG_MM(rcp_ps)(x);
#endif
  return y + y * (1.0f - x * y);
}
#else
inline Vec<float> reciprocal(Vec<float> x) {
  return 1.0f / x;
}
#endif
inline Vec<double> reciprocal(Vec<double> x) {
  return 1.0 / x;
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

// e^x for x ≤ 87 to about 1 ulp; below -87.3 (also -inf) it is 0.  x = n ln 2 + r, |r| ≤ ln 2 / 2.
inline Vec<float> vexp(Vec<float> x) {
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
inline Vec<double> vexp(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) {
    x[i] = std::exp(x[i]);
  }
  return x;
}

// ln x of a normal positive x to about 1 ulp; NaN stays NaN.  x = 2^n m, m in [√½, √2).
inline Vec<float> vlog(Vec<float> x) {
  typedef int32_t Ints __attribute__((vector_size(CVG_VECTOR_BYTES)));
  Ints bits;
  std::memcpy(&bits, &x, sizeof bits);
  const Ints n = (bits - 0x3f3504f3) >> 23;  // 0x3f3504f3: √½
  bits -= n << 23;
  Vec<float> m;
  std::memcpy(&m, &bits, sizeof m);
  const Vec<float> r = m - 1.0f;
  Vec<float> p = splat(7.0376836292e-2f);
  p = p * r - 1.1514610310e-1f;
  p = p * r + 1.1676998740e-1f;
  p = p * r - 1.2420140846e-1f;
  p = p * r + 1.4249322787e-1f;
  p = p * r - 1.6668057665e-1f;
  p = p * r + 2.0000714765e-1f;
  p = p * r - 2.4999993993e-1f;
  p = p * r + 3.3333331174e-1f;
  const Vec<float> exponent = __builtin_convertvector(n, Vec<float>);
  Vec<float> tail = p * r * r * r + exponent * -2.12194440e-4f - 0.5f * r * r;
  const Vec<float> y = r + tail + exponent * 0.693359375f;
  return x == x ? y : x;
}
inline Vec<double> vlog(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) {
    x[i] = std::log(x[i]);
  }
  return x;
}

}  // namespace cvg::CVG_LEVEL
