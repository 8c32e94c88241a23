// Temporal attention by tensor-core tiles: what a warp does with 16 rows of one sequence.
//
// Sequences have 16 · R frames, after padding, so a row's logits are in a warp's registers all at
// once, 8 · R floats a lane: element c of tile n, at[n][c], is
//
//     row 16 · w + lane / 4 + 8 · (c / 2),   column 8 · n + 2 · (lane % 4) + c % 2
//
// with w the warp's place among the R of its sequence. That is how mma.m16n8k16 holds its sums.
//
// Everything here is written against a policy `W`, the warp: on a GPU its operations are the
// instructions (csrc/cuda/warp.cuh), in tests 32 lanes one after the other on the CPU. What a lane
// holds is a W::Per<T>, indexed by the lane; W::each(f) calls f for every lane.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cvg/host_device.h"
#include "cvg/tensor5.h"

#ifdef __CUDACC__
#define CVG_TILE __device__ __forceinline__
#else
#define CVG_TILE inline
#endif

namespace cvg::tiles {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr int kLanes = 32, kRows = 16;
constexpr int kMaxFrames = 128, kMaxDim = 160;

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

// Calls f with R, the warps of a sequence, as a constant: the least that holds its frames, of those
// that there are.
template <class F>
auto with_warps(int frames, F f) {
  switch ((frames + kRows - 1) / kRows) {
    case 1:
      return f(std::integral_constant<int, 1>{});
    case 2:
      return f(std::integral_constant<int, 2>{});
    case 3:
      return f(std::integral_constant<int, 3>{});
    case 4:
      return f(std::integral_constant<int, 4>{});
    case 5:
    case 6:
      return f(std::integral_constant<int, 6>{});
    default:
      return f(std::integral_constant<int, 8>{});
  }
}

// Sequences a block works on at once: about four warps' worth.
constexpr int groups_of(int warps_of_sequence) {
  return warps_of_sequence < 4 ? 4 / warps_of_sequence : 1;
}

struct Problem {
  int64_t batch, positions;
  int heads, frames;
  Rows query, key, value;
  const float* added;  // [F, F], or nullptr
  float scale;
  bool by_row_max;  // row i of `added` is multiplied by m_i
};

// How a block's shared memory is laid out: each of its sequences has tensors of 16 · R rows, `pitch`
// apart, which keeps the eight rows of a load in eight different banks.
struct Plan {
  int groups;  // sequences a block works on at once
  int pitch;
  bool tight;      // tensors take turns in the same memory, for there is not enough
  int group_size;  // elements

  size_t bytes() const { return size_t{2} * groups * group_size; }
};

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
template <class W>
CVG_TILE void load_rows(Half* to, int pitch, const Rows& from, const Place& place, int frames) {
  const int chunks = rounded(from.dim) / 8;
  W::each([&](int lane) {
    int row = lane / chunks, chunk = lane % chunks;
    while (row < kRows) {
      const int frame = place.row + row;
      const bool there = place.inside && frame < frames;
      const Half* source = row_address(from, place, there ? frame : 0);
      Half* target = to + frame * pitch + 8 * chunk;
      if (from.wide) {
        const bool read = there && 8 * chunk < from.dim;
        W::copy16(target, read ? source + 8 * chunk : source, read);
      } else {
        for (int d = 8 * chunk; d < 8 * chunk + 8; ++d, ++target) {
          *target = there && d < from.dim ? source[d * from.tensor.stride[4]] : Half{0};
        }
      }
      row += kLanes / chunks;
      chunk += kLanes % chunks;
      if (chunk >= chunks) {
        chunk -= chunks;
        ++row;
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

// Stores the sums of 16 rows and 16 columns. Two lanes swap halves first, so that four of them write
// 32 bytes of a row in one go: lane t of them columns 8 · (t % 2) + 4 · (t / 2) and on.
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

// From raw products: S', base 2; m, likewise; and if wanted the first column that reaches m.
template <class W, int R, bool FIRST>
CVG_TILE void regularise(typename W::template Per<Tile<R>>& s, typename W::template Per<Pair>& m,
                         typename W::template Per<Columns>& first, const Problem& problem,
                         int row) {
  const int frames = problem.frames;
  const float scale = problem.scale * kLog2e;
  W::each([&](int lane) {
    m[lane] = {{-INFINITY, -INFINITY}};
    each_element<R>(lane, row, [&](int n, int c, int i, int j) {
      float& x = s[lane].at[n][c];
      x = i < frames && j < frames ? x * scale : -INFINITY;
      m[lane].at[c / 2] = fmaxf(m[lane].at[c / 2], x);
    });
  });
  if (!problem.added) {
    return;
  }
  if (problem.by_row_max) {
    reduce<W, Pair>(m, [](float x, float y) { return fmaxf(x, y); });
  }
  if (FIRST && problem.by_row_max) {
    W::each([&](int lane) {
      first[lane] = {{kMaxFrames, kMaxFrames}};
      each_element<R>(lane, row, [&](int n, int c, int, int j) {
        int& least = first[lane].at[c / 2];
        least = s[lane].at[n][c] == m[lane].at[c / 2] && j < least ? j : least;
      });
    });
    reduce<W, Columns>(first, [](int x, int y) { return x < y ? x : y; });
  }
  W::each([&](int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& highest = m[lane].at[half];
      highest = highest == -INFINITY ? 0.0f : highest;  // of a row that is not there
    }
    each_element<R>(lane, row, [&](int n, int c, int i, int j) {
      if (i < frames && j < frames) {
        const float factor = problem.by_row_max ? m[lane].at[c / 2] : kLog2e;
        s[lane].at[n][c] += factor * problem.added[i * frames + j];
      }
    });
  });
}

// P from S'; a row that sees no key is 0.
template <class W, int R>
CVG_TILE void softmax(typename W::template Per<Tile<R>>& s) {
  typename W::template Per<Pair> top, total;
  W::each([&](int lane) {
    top[lane] = {{-INFINITY, -INFINITY}};
    each_element<R>(lane, 0, [&](int n, int c, int, int) {
      top[lane].at[c / 2] = fmaxf(top[lane].at[c / 2], s[lane].at[n][c]);
    });
  });
  reduce<W, Pair>(top, [](float x, float y) { return fmaxf(x, y); });
  W::each([&](int lane) {
    total[lane] = {};
    each_element<R>(lane, 0, [&](int n, int c, int, int) {
      const float highest = top[lane].at[c / 2];
      float& x = s[lane].at[n][c];
      x = W::exp2(x - (highest == -INFINITY ? 0.0f : highest));
      total[lane].at[c / 2] += x;
    });
  });
  reduce<W, Pair>(total, [](float x, float y) { return x + y; });
  W::each([&](int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& sum = total[lane].at[half];
      sum = 1.0f / (sum == 0.0f ? 1.0f : sum);
    }
    each_element<R>(lane, 0, [&](int n, int c, int, int) {
      s[lane].at[n][c] *= total[lane].at[c / 2];
    });
  });
}

// Two neighbours of a row of an [F, F] matrix, as far as they are there.
CVG_TILE TwoFloats load_two(const float* matrix, int frames, int i, int j) {
  const float* at = matrix + i * frames + j;
  if (i < frames && j + 1 < frames) {
    return frames % 2 ? TwoFloats{{at[0], at[1]}} : *reinterpret_cast<const TwoFloats*>(at);
  }
  return {{i < frames && j < frames ? at[0] : 0.0f, 0.0f}};
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

// Sequence `unit` of all those that there are: of all heads, or one of all positions.
template <bool ALL_HEADS>
CVG_TILE Place place_of(const Problem& problem, int64_t unit, int warp_of_sequence) {
  const int heads = ALL_HEADS ? 1 : problem.heads;
  const int64_t at = unit / heads;
  return {at / problem.positions, at % problem.positions, at,
          static_cast<int>(unit % heads), warp_of_sequence * kRows,
          at < problem.batch * problem.positions};
}

}  // namespace cvg::tiles
