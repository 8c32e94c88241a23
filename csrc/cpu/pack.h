// How matrices of any element type get into the form that products want, and out of it again.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "cpu/gemm.h"
#include "cvg/dtype.h"

namespace cvg::CVG_LEVEL {

// A vector of elements in the type that arithmetic is done in, and back.
inline Vec<float> load_wide(const float* p) {
  return load(p);
}
inline Vec<double> load_wide(const double* p) {
  return load(p);
}
inline void store_narrow(float* p, Vec<float> v) {
  store(p, v);
}
inline void store_narrow(double* p, Vec<double> v) {
  store(p, v);
}

typedef uint32_t Words __attribute__((vector_size(CVG_VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(CVG_VECTOR_BYTES / 2)));

inline Vec<float> load_wide(const BFloat16* p) {
  Halves halves;
  std::memcpy(&halves, p, sizeof halves);
  const Words bits = __builtin_convertvector(halves, Words) << 16;
  Vec<float> v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
inline void store_narrow(BFloat16* p, Vec<float> v) {
  Words bits;
  std::memcpy(&bits, &v, sizeof bits);
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words kept = v == v ? rounded : (bits >> 16) | 0x40;
  const Halves halves = __builtin_convertvector(kept, Halves);
  std::memcpy(p, &halves, sizeof halves);
}

#if CVG_VECTOR_BYTES == 64
inline Vec<float> load_wide(const _Float16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store_narrow(_Float16* p, Vec<float> v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif CVG_VECTOR_BYTES == 32
inline Vec<float> load_wide(const _Float16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store_narrow(_Float16* p, Vec<float> v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
inline Vec<float> load_wide(const _Float16* p) {
  Vec<float> v{};
  for (int64_t i = 0; i < kLanes<float>; ++i) {
    v[i] = widen(p[i]);
  }
  return v;
}
inline void store_narrow(_Float16* p, Vec<float> v) {
  for (int64_t i = 0; i < kLanes<float>; ++i) {
    p[i] = narrow<_Float16>(v[i]);
  }
}
#endif

// One row, widened; zeros from its end to `padded`.
template <typename T, typename A>
inline void widen_row(const T* from, int64_t dim_stride, int64_t dim, int64_t padded, A* to) {
  constexpr int64_t lanes = kLanes<A>;
  int64_t d = 0;
  if (dim_stride == 1) {
    for (; d + lanes <= dim; d += lanes) {
      store(to + d, load_wide(from + d));
    }
  }
  for (; d < dim; ++d) {
    to[d] = widen(from[d * dim_stride]);
  }
  for (; d < padded; ++d) {
    to[d] = 0;
  }
}

// factor · one row, narrowed.
template <typename T, typename A>
inline void narrow_row(const A* from, A factor, int64_t dim, T* to) {
  constexpr int64_t lanes = kLanes<A>;
  int64_t d = 0;
  for (; d + lanes <= dim; d += lanes) {
    store_narrow(to + d, load(from + d) * factor);
  }
  for (; d < dim; ++d) {
    to[d] = narrow<T>(from[d] * factor);
  }
}

// One half of a and b, lane by lane in turn: a0 b0 a1 b1 …
template <typename A, int64_t First, size_t... Lane>
inline Vec<A> interleave(Vec<A> a, Vec<A> b, std::index_sequence<Lane...>) {
  constexpr int64_t lanes = kLanes<A>;
#ifdef __clang__
  return __builtin_shufflevector(a, b, (First + Lane / 2 + Lane % 2 * lanes)...);
#else
  typedef decltype(a < b) Places;
  return __builtin_shuffle(a, b, Places{(First + Lane / 2 + Lane % 2 * lanes)...});
#endif
}

// A square block: log₂ lanes rounds, each interleaving the upper half of the rows with the lower.
template <typename A>
inline void transpose_block(Vec<A> (&v)[kLanes<A>]) {
  constexpr int64_t lanes = kLanes<A>;
  constexpr auto all = std::make_index_sequence<lanes>{};
  for (int64_t round = 1; round < lanes; round *= 2) {
    Vec<A> next[lanes];
    for (int64_t r = 0; r < lanes / 2; ++r) {
      next[2 * r] = interleave<A, 0>(v[r], v[r + lanes / 2], all);
      next[2 * r + 1] = interleave<A, lanes / 2>(v[r], v[r + lanes / 2], all);
    }
    std::copy_n(next, lanes, v);
  }
}

// Rows of a strided matrix as row-major wide numbers, zero-padded to `padded` rows.
template <typename T, typename A>
void copy_rows(const T* from, int64_t row_stride, int64_t dim_stride, int64_t count, int64_t padded,
               int64_t dim, A* to) {
  for (int64_t r = 0; r < count; ++r) {
    widen_row(from + r * row_stride, dim_stride, dim, dim, to + r * dim);
  }
  std::fill(to + count * dim, to + std::max(count, padded) * dim, A{0});
}

// The panels of a product's right side, B = the matrix itself: depth runs over its rows, lanes over
// its columns.
template <typename T, typename A>
void pack(const T* from, int64_t row_stride, int64_t dim_stride, int64_t rows, int64_t dim, A* to) {
  constexpr int64_t lanes = kLanes<A>;
  for (int64_t first = 0; first < dim; first += lanes) {
    const int64_t width = std::min(dim - first, lanes);
    for (int64_t r = 0; r < rows; ++r, to += lanes) {
      widen_row(from + r * row_stride + first * dim_stride, dim_stride, width, lanes, to);
    }
  }
}

// B = the transpose: depth runs over the matrix's columns, lanes over its rows.
template <typename T, typename A>
void pack_transposed(const T* from, int64_t row_stride, int64_t dim_stride, int64_t rows,
                     int64_t dim, A* to) {
  constexpr int64_t lanes = kLanes<A>;
  const bool by_blocks = dim_stride == 1 && dim >= lanes;
  for (int64_t first = 0; first < rows; first += lanes, to += dim * lanes) {
    const int64_t width = std::min(rows - first, lanes);
    const T* corner = from + first * row_stride;
    // The last block begins early enough to end with the row.
    for (int64_t next = 0; next < dim && by_blocks; next += lanes) {
      const int64_t d = std::min(next, dim - lanes);
      Vec<A> v[lanes];
      for (int64_t i = 0; i < lanes; ++i) {
        v[i] = i < width ? load_wide(corner + i * row_stride + d) : Vec<A>{};
      }
      transpose_block<A>(v);
      for (int64_t i = 0; i < lanes; ++i) {
        store(to + (d + i) * lanes, v[i]);
      }
    }
    for (int64_t i = 0; i < lanes && !by_blocks; ++i) {
      for (int64_t d = 0; d < dim; ++d) {
        to[d * lanes + i] = i < width ? widen(corner[i * row_stride + d * dim_stride]) : A{0};
      }
    }
  }
}

}  // namespace cvg::CVG_LEVEL
