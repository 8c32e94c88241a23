// The matrix product that all of attention is made of, on packed panels.
//
//   C[rows, columns] (+)= A[rows, depth] · B[depth, columns]
//
// B lies in panels of one vector's width, B[panel][depth][lanes], zero-padded; A is read by
// broadcast with any strides; C is row-major and as wide as the panels. kRows × kPanels
// accumulators stay in registers.
#pragma once

#include <cstdint>

#include "cpu/simd.h"
#include "cvg/dtype.h"

namespace cvg::CVG_LEVEL {

template <typename A>
constexpr int64_t kRows = CVG_VECTOR_BYTES == 64 ? 8
                          : kLanes<A> < 4        ? kLanes<A>
                                                 : 4;
constexpr int64_t kPanels = 3;

template <int64_t Panels, typename A>
inline void gemm_block(const A* a, int64_t row_stride, int64_t depth_stride, const A* b,
                       int64_t depth, A* c, int64_t c_stride, bool accumulate) {
  constexpr int64_t lanes = kLanes<A>;
  Vec<A> sum[kRows<A>][Panels];
  for (int64_t r = 0; r < kRows<A>; ++r) {
    for (int64_t p = 0; p < Panels; ++p) {
      sum[r][p] = accumulate ? load(c + r * c_stride + p * lanes) : Vec<A>{};
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec<A> column[Panels];
    for (int64_t p = 0; p < Panels; ++p) {
      column[p] = load(b + (p * depth + k) * lanes);
    }
    for (int64_t r = 0; r < kRows<A>; ++r) {
      const A x = a[r * row_stride + k * depth_stride];
      for (int64_t p = 0; p < Panels; ++p) {
        sum[r][p] += x * column[p];
      }
    }
  }
  for (int64_t r = 0; r < kRows<A>; ++r) {
    for (int64_t p = 0; p < Panels; ++p) {
      store(c + r * c_stride + p * lanes, sum[r][p]);
    }
  }
}

// rows must be a multiple of kRows and columns of the vector's width, which kRows divides: callers
// pad.
template <typename A>
void gemm(const A* a, int64_t row_stride, int64_t depth_stride, const A* b, int64_t rows,
          int64_t columns, int64_t depth, A* c, int64_t c_stride, bool accumulate) {
  constexpr int64_t lanes = kLanes<A>;
  const int64_t panels = columns / lanes;
  for (int64_t p = 0; p < panels; p += kPanels) {
    const A* panel = b + p * depth * lanes;
    for (int64_t r = 0; r < rows; r += kRows<A>) {
      const A* left = a + r * row_stride;
      A* to = c + r * c_stride + p * lanes;
      switch (panels - p) {
        case 1:
          gemm_block<1>(left, row_stride, depth_stride, panel, depth, to, c_stride, accumulate);
          break;
        case 2:
          gemm_block<2>(left, row_stride, depth_stride, panel, depth, to, c_stride, accumulate);
          break;
        default:
          gemm_block<kPanels>(left, row_stride, depth_stride, panel, depth, to, c_stride,
                              accumulate);
      }
    }
  }
}

// Rows [first, first + count) of a strided matrix as row-major wide numbers, zero-padded to
// `padded` rows.
template <typename T, typename A>
void copy_rows(const T* from, int64_t row_stride, int64_t dim_stride, int64_t count, int64_t padded,
               int64_t dim, A* to) {
  for (int64_t r = 0; r < padded; ++r) {
    for (int64_t d = 0; d < dim; ++d) {
      to[r * dim + d] = r < count ? widen(from[r * row_stride + d * dim_stride]) : A{0};
    }
  }
}

// B = the matrix itself: depth runs over its rows, lanes over its columns.
template <typename T, typename A>
void pack(const T* from, int64_t row_stride, int64_t dim_stride, int64_t rows, int64_t dim, A* to) {
  constexpr int64_t lanes = kLanes<A>;
  for (int64_t first = 0; first < dim; first += lanes) {
    const int64_t width = dim - first < lanes ? dim - first : lanes;
    for (int64_t r = 0; r < rows; ++r, to += lanes) {
      const T* row = from + r * row_stride + first * dim_stride;
      for (int64_t i = 0; i < width; ++i) {
        to[i] = widen(row[i * dim_stride]);
      }
      for (int64_t i = width; i < lanes; ++i) {
        to[i] = 0;
      }
    }
  }
}

// B = the transpose: depth runs over the matrix's columns, lanes over its rows.
template <typename T, typename A>
void pack_transposed(const T* from, int64_t row_stride, int64_t dim_stride, int64_t rows,
                     int64_t dim, A* to) {
  constexpr int64_t lanes = kLanes<A>;
  for (int64_t first = 0; first < rows; first += lanes, to += dim * lanes) {
    const int64_t width = rows - first < lanes ? rows - first : lanes;
    for (int64_t i = 0; i < lanes; ++i) {
      const T* row = from + (first + i) * row_stride;
      for (int64_t d = 0; d < dim; ++d) {
        to[d * lanes + i] = i < width ? widen(row[d * dim_stride]) : A{0};
      }
    }
  }
}

}  // namespace cvg::CVG_LEVEL
