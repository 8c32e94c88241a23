// Short row-major matrices, read where they lie: products without packing, and transposes.
//
// Edges are met by overlap instead of padding: the last block of a row or column begins early
// enough to end with it, and what two blocks share is computed twice, alike.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/pack.h"

namespace cvg::CVG_LEVEL {

// Rows of at least one vector's width, each contiguous.
template <typename A>
struct Rows {
  A* data;
  int64_t stride;
};

// C = A · B for Count rows and Panels vectors; the last panel begins at column `last`.
template <int64_t Count, int64_t Panels, typename A>
inline void rows_block(const A* a, int64_t row_stride, int64_t depth_stride, const A* b,
                       int64_t b_stride, int64_t depth, int64_t last, A* c, int64_t c_stride) {
  constexpr int64_t lanes = kLanes<A>;
  // Unrolled from the start: else the compiler keeps the sums in memory on the way in and out.
  Vec<A> sum[Count][Panels];
#pragma GCC unroll 8
  for (int64_t r = 0; r < Count; ++r) {
#pragma GCC unroll 8
    for (int64_t p = 0; p < Panels; ++p) {
      sum[r][p] = Vec<A>{};
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec<A> column[Panels];
#pragma GCC unroll 8
    for (int64_t p = 0; p < Panels; ++p) {
      column[p] = load(b + k * b_stride + (p + 1 < Panels ? p * lanes : last));
    }
#pragma GCC unroll 8
    for (int64_t r = 0; r < Count; ++r) {
      const A x = a[r * row_stride + k * depth_stride];
#pragma GCC unroll 8
      for (int64_t p = 0; p < Panels; ++p) {
        sum[r][p] += x * column[p];
      }
    }
  }
#pragma GCC unroll 8
  for (int64_t r = 0; r < Count; ++r) {
#pragma GCC unroll 8
    for (int64_t p = 0; p < Panels; ++p) {
      store(c + r * c_stride + (p + 1 < Panels ? p * lanes : last), sum[r][p]);
    }
  }
}

template <int64_t Count, typename A>
void rows_strip(const A* a, int64_t row_stride, int64_t depth_stride, Rows<const A> b,
                int64_t columns, int64_t depth, A* c, int64_t c_stride) {
  constexpr int64_t lanes = kLanes<A>;
  int64_t panels = (columns + lanes - 1) / lanes;
  for (int64_t at = 0; panels > 0;) {
    const int64_t blocks = (panels + kPanels - 1) / kPanels, count = (panels + blocks - 1) / blocks;
    const int64_t last = std::min((count - 1) * lanes, columns - lanes - at);
    const auto block = count == 1   ? rows_block<Count, 1, A>
                       : count == 2 ? rows_block<Count, 2, A>
                                    : rows_block<Count, kPanels, A>;
    block(a, row_stride, depth_stride, b.data + at, b.stride, depth, last, c + at, c_stride);
    at += count * lanes;
    panels -= count;
  }
}

// C[rows, columns] = A[rows, depth] · B[depth, columns]; A with any strides, B and C row-major,
// columns at least one vector's width.
template <typename A>
void multiply(const A* a, int64_t row_stride, int64_t depth_stride, Rows<const A> b, int64_t rows,
              int64_t columns, int64_t depth, Rows<A> c) {
  if (rows < kRows<A>) {
    for (int64_t r = 0; r < rows; ++r) {
      rows_strip<1>(a + r * row_stride, row_stride, depth_stride, b, columns, depth,
                    c.data + r * c.stride, c.stride);
    }
    return;
  }
  for (int64_t next = 0; next < rows; next += kRows<A>) {
    const int64_t r = std::min(next, rows - kRows<A>);
    rows_strip<kRows<A>>(a + r * row_stride, row_stride, depth_stride, b, columns, depth,
                         c.data + r * c.stride, c.stride);
  }
}

// to[d, i] = factor · from[i, d]; columns of `to` beyond the rows, up to whole vectors, become 0.
template <typename A>
void transpose(Rows<const A> from, int64_t rows, int64_t width, A factor, Rows<A> to) {
  constexpr int64_t lanes = kLanes<A>;
  for (int64_t i = 0; i < rows; i += lanes) {
    const int64_t count = std::min(lanes, rows - i);
    if (width < lanes) {
      for (int64_t d = 0; d < width; ++d) {
        for (int64_t r = 0; r < lanes; ++r) {
          to.data[d * to.stride + i + r] =
              r < count ? factor * from.data[(i + r) * from.stride + d] : A{0};
        }
      }
      continue;
    }
    for (int64_t next = 0; next < width; next += lanes) {
      const int64_t d = std::min(next, width - lanes);
      Vec<A> v[lanes];
      for (int64_t r = 0; r < lanes; ++r) {
        v[r] = r < count ? load(from.data + (i + r) * from.stride + d) * factor : Vec<A>{};
      }
      transpose_block<A>(v);
      for (int64_t r = 0; r < lanes; ++r) {
        store(to.data + (d + r) * to.stride + i, v[r]);
      }
    }
  }
}

// A strided matrix as rows of wide numbers: where it lies, or else copied to `scratch`, zero-padded
// to one vector's width.
template <typename T, typename A>
Rows<const A> read_rows(const T* from, int64_t row_stride, int64_t dim_stride, int64_t rows,
                        int64_t dim, A* scratch) {
  if constexpr (std::is_same_v<T, A>) {
    if (dim_stride == 1 && dim >= kLanes<A>) {
      return {from, row_stride};
    }
  }
  const int64_t width = std::max(dim, kLanes<A>);
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = from + r * row_stride;
    A* to = scratch + r * width;
    if (dim_stride == 1) {
      for (int64_t d = 0; d < dim; ++d) {
        to[d] = widen(row[d]);
      }
    } else {
      for (int64_t d = 0; d < dim; ++d) {
        to[d] = widen(row[d * dim_stride]);
      }
    }
    std::fill(to + dim, to + width, A{0});
  }
  return {scratch, width};
}

// Where rows are to be computed: in place, or in `scratch`, from which write_rows then takes them.
template <typename T, typename A>
Rows<A> target_rows(T* to, int64_t row_stride, int64_t dim_stride, int64_t dim, A* scratch) {
  if constexpr (std::is_same_v<T, A>) {
    if (dim_stride == 1 && dim >= kLanes<A>) {
      return {to, row_stride};
    }
  }
  return {scratch, std::max(dim, kLanes<A>)};
}

template <typename T, typename A>
void write_rows(Rows<A> from, T* to, int64_t row_stride, int64_t dim_stride, int64_t rows,
                int64_t dim) {
  if (static_cast<const void*>(from.data) == to) {
    return;
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t d = 0; d < dim; ++d) {
      to[r * row_stride + d * dim_stride] = narrow<T>(from.data[r * from.stride + d]);
    }
  }
}

}  // namespace cvg::CVG_LEVEL
