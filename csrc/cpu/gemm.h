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
  // As even a cut as there is: four panels are two and two, for a block of one is slow.
  int64_t panels = columns / lanes, blocks = (panels + kPanels - 1) / kPanels;
  for (int64_t p = 0; blocks > 0; --blocks) {
    const int64_t count = (panels - p + blocks - 1) / blocks;
    const A* panel = b + p * depth * lanes;
    for (int64_t r = 0; r < rows; r += kRows<A>) {
      const A* left = a + r * row_stride;
      A* to = c + r * c_stride + p * lanes;
      switch (count) {
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
    p += count;
  }
}

}  // namespace cvg::CVG_LEVEL
