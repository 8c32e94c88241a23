// Matrix products by tensor-core tiles of 16 rows, one warp each: how a warp loads, multiplies and
// stores.
//
// Matrices have up to 16 · R columns, which the warp's registers hold all at once, 8 · R floats a
// lane: element c of tile n, at[n][c], is
//
//     row lane / 4 + 8 · (c / 2) of the 16,   column 8 · n + 2 · (lane % 4) + c % 2
//
// That is how mma.m16n8k16 holds its sums.
//
// Everything here is written against a policy `W`, the warp: on a GPU its operations are the
// instructions (csrc/cuda/warp.cuh), in tests 32 lanes one after the other on the CPU. What a lane
// holds is a W::Per<T>, indexed by the lane; W::each(f) calls f for every lane.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cvg/host_device.h"
#include "cvg/temporal_args.h"

#ifdef __CUDACC__
#define CVG_TILE __device__ __forceinline__
#else
#define CVG_TILE inline
#endif

namespace cvg::tiles {

constexpr int kLanes = 32, kRows = 16;

CVG_HD int rounded(int dim) {
  return (dim + kRows - 1) / kRows * kRows;
}

using Half = uint16_t;  // the bits of a bfloat16 or a float16

// A tensor of 16-bit elements; wide: its rows can be moved eight elements at a time.
struct Rows {
  Tensor5 tensor;
  int dim;
  bool wide;
};

inline Rows rows_of(const Tensor5& tensor, int64_t dim) {
  bool wide = tensor.stride[4] == 1 && dim % 8 == 0;
  for (int axis = 0; axis < 4; ++axis) {
    wide = wide && tensor.stride[axis] % 8 == 0;
  }
  wide = wide && reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0;
  return {tensor, static_cast<int>(dim), wide};
}

// Where a warp works.
struct Place {
  int64_t b, p, at;  // at: the position counted through the batch
  int head, row;     // row: the first of its 16
  bool inside;       // there is such a sequence
};

template <int R>
struct Tile {
  float at[2 * R][4];
};
struct Pair {
  float at[2];  // one number of each of a lane's two rows
};
struct Columns {
  int at[2];
};
struct Quad {
  uint32_t at[4];  // four registers, a pair of elements each: a 16 × 16 matrix
};
template <int R>
struct Strip {
  Quad at[R];  // 16 rows of 16 · R elements
};
struct alignas(8) TwoWords {
  uint32_t at[2];
};
struct alignas(8) TwoFloats {
  float at[2];
};

CVG_TILE Half* row_address(const Rows& rows, const Place& place, int frame) {
  const int64_t* stride = rows.tensor.stride;
  return static_cast<Half*>(rows.tensor.data) + place.b * stride[0] + place.p * stride[1] +
         place.head * stride[2] + frame * stride[3];
}

// The warp's 16 rows of a tensor, into the same rows of shared memory; zero beyond frames and dim.
//
// Eight lanes share a row, each 16 bytes of it at a time, so that a quarter of the warp reads a
// line of 128 bytes and writes all banks. A lane's rows are four apart: its addresses are counted
// on, and no number is divided.
template <class W>
CVG_TILE void load_rows(Half* to, int pitch, const Rows& from, const Place& place, int frames) {
  constexpr int kLanesOfRow = 8, kRowsAtOnce = kLanes / kLanesOfRow;
  const int width = rounded(from.dim);
  W::each([&](int lane) {
    const int first = place.row + lane / kLanesOfRow;
    const int rows = place.inside ? frames - first : 0;  // that are there, of this lane's and below
    const int64_t step = kRowsAtOnce * from.tensor.stride[3];
    const Half* start = row_address(from, place, rows > 0 ? first : 0);
    for (int d = lane % kLanesOfRow * 8; d < width; d += kLanesOfRow * 8) {
      Half* target = to + first * pitch + d;
      if (from.wide) {
        const Half* source = d < from.dim ? start + d : start;
        const int count = d < from.dim ? rows : 0;
#pragma unroll
        for (int row = 0; row < kRows; row += kRowsAtOnce, target += kRowsAtOnce * pitch) {
          W::copy16(target, source, row < count);
          source += row + kRowsAtOnce < count ? step : 0;
        }
      } else {
        const Half* source = start;
#pragma unroll 1
        for (int row = 0; row < kRows; row += kRowsAtOnce, target += kRowsAtOnce * pitch) {
#pragma unroll 1
          for (int i = 0; i < 8; ++i) {
            const bool there = row < rows && d + i < from.dim;
            target[i] = there ? source[(d + i) * from.tensor.stride[4]] : Half{0};
          }
          source += row + kRowsAtOnce < rows ? step : 0;
        }
      }
    }
  });
}

// How the four 8 × 8 parts of a 16 × 16 matrix go to the four registers: downwards first, or
// rightwards first.
enum class Order { down, right };

// Part lane / 8 of the matrix is read from the rows whose addresses those eight lanes give.
template <class W, Order ORDER, bool TRANSPOSED>
CVG_TILE void load_matrix(typename W::template Per<Quad>& to, const Half* from, int pitch) {
  W::template load_matrix<TRANSPOSED>(to, [&](int lane) {
    const int second = lane / 8 % 2 * 8, third = lane / 16 * 8;
    const int row = lane % 8 + (ORDER == Order::down ? second : third);
    return from + row * pitch + (ORDER == Order::down ? third : second);
  });
}

// acc = A Bᵀ: A the 16 rows of `a` from place.row on, B all rows of `b`.
template <class W, bool BF16, int R>
CVG_TILE void multiply_rows(typename W::template Per<Tile<R>>& acc, const Half* a, const Half* b,
                            int row, int pitch, int dim) {
  W::each([&](int lane) { acc[lane] = {}; });
  for (int k = 0; k < dim; k += kRows) {
    typename W::template Per<Quad> x, y;
    load_matrix<W, Order::down, false>(x, a + row * pitch + k, pitch);
#pragma unroll
    for (int n = 0; n < R; ++n) {
      load_matrix<W, Order::right, false>(y, b + n * kRows * pitch + k, pitch);
      W::template mma<BF16, 0>([&](int lane) -> float* { return acc[lane].at[2 * n]; }, x, y);
      W::template mma<BF16, 2>([&](int lane) -> float* { return acc[lane].at[2 * n + 1]; }, x, y);
    }
  }
}

// Stores the sums of 16 rows and 16 columns. Two lanes swap halves first, so that four of them
// write 32 bytes of a row in one go: lane t of them columns 8 · (t % 2) + 4 · (t / 2) and on.
template <class W, bool BF16>
CVG_TILE void store_columns(const typename W::template Per<Tile<1>>& acc, const Rows& to,
                            const Place& place, int frames, int column) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    typename W::template Per<uint32_t> keep, give;
    W::each([&](int lane) {
      const auto& at = acc[lane].at;
      const uint32_t left = W::template pack<BF16>(at[0][2 * half], at[0][2 * half + 1]);
      const uint32_t right = W::template pack<BF16>(at[1][2 * half], at[1][2 * half + 1]);
      keep[lane] = lane % 2 ? right : left;
      give[lane] = lane % 2 ? left : right;
    });
    const auto taken = W::exchange(give, 1);
    W::each([&](int lane) {
      const int frame = place.row + lane / 4 + 8 * half;
      const int d = column + 8 * (lane % 2) + 4 * (lane % 4 / 2);
      if (!place.inside || frame >= frames) {
        return;
      }
      const uint32_t low = lane % 2 ? taken[lane] : keep[lane];
      const uint32_t high = lane % 2 ? keep[lane] : taken[lane];
      Half* row = row_address(to, place, frame);
      if (to.wide) {
        if (d < to.dim) {
          *reinterpret_cast<TwoWords*>(row + d) = {{low, high}};
        }
        return;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t word = i < 2 ? low : high;
        if (d + i < to.dim) {
          row[(d + i) * to.tensor.stride[4]] = static_cast<Half>(i % 2 ? word >> 16 : word);
        }
      }
    });
  }
}

// The warp's rows of A X, to memory: A 16 rows of 16 · R, X all rows of `x`.
template <class W, bool BF16, int R>
CVG_TILE void multiply_columns(const typename W::template Per<Strip<R>>& a, const Half* x,
                               int pitch, const Rows& to, const Place& place, int frames) {
  for (int column = 0; column < to.dim; column += kRows) {
    typename W::template Per<Tile<1>> acc;
    W::each([&](int lane) { acc[lane] = {}; });
#pragma unroll
    for (int k = 0; k < R; ++k) {
      typename W::template Per<Quad> left, right;
      W::each([&](int lane) { left[lane] = a[lane].at[k]; });
      load_matrix<W, Order::down, true>(right, x + k * kRows * pitch + column, pitch);
      W::template mma<BF16, 0>([&](int lane) -> float* { return acc[lane].at[0]; }, left, right);
      W::template mma<BF16, 2>([&](int lane) -> float* { return acc[lane].at[1]; }, left, right);
    }
    store_columns<W, BF16>(acc, to, place, frames, column);
  }
}

// Sums become a left factor, in the 16-bit type.
template <class W, bool BF16, int R>
CVG_TILE void as_factor(typename W::template Per<Strip<R>>& to,
                        const typename W::template Per<Tile<R>>& from) {
  W::each([&](int lane) {
#pragma unroll
    for (int i = 0; i < 4 * R; ++i) {
      const float* two = from[lane].at[i / 2] + i % 2 * 2;
      to[lane].at[i / 4].at[i % 4] = W::template pack<BF16>(two[0], two[1]);
    }
  });
}

// For every element of the tile: f(element, its place n and c, row, column).
template <int R, class F>
CVG_TILE void each_element(int lane, int first_row, F f) {
#pragma unroll
  for (int n = 0; n < 2 * R; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      f(n, c, first_row + lane / 4 + 8 * (c / 2), 8 * n + 2 * (lane % 4) + c % 2);
    }
  }
}

// Over the four lanes that share rows.
template <class W, class T, class Op>
CVG_TILE void reduce(typename W::template Per<T>& x, Op op) {
#pragma unroll
  for (int mask = 1; mask < 4; mask *= 2) {
    const auto other = W::exchange(x, mask);
    W::each([&](int lane) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        x[lane].at[half] = op(x[lane].at[half], other[lane].at[half]);
      }
    });
  }
}

// The warp's rows of an [F, F] matrix.
template <class W, int R>
CVG_TILE void store_matrix(const typename W::template Per<Tile<R>>& from, float* matrix, int frames,
                           int row) {
  W::each([&](int lane) {
#pragma unroll
    for (int n = 0; n < 2 * R; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = row + lane / 4 + 8 * half, j = 8 * n + 2 * (lane % 4);
        const float* two = from[lane].at[n] + 2 * half;
        float* at = matrix + i * frames + j;
        if (i < frames && j + 1 < frames && frames % 2 == 0) {
          *reinterpret_cast<TwoFloats*>(at) = {{two[0], two[1]}};
        } else if (i < frames) {
          for (int c = 0; c < 2 && j + c < frames; ++c) {
            at[c] = two[c];
          }
        }
      }
    }
  });
}

}  // namespace cvg::tiles
