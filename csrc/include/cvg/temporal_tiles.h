// Temporal attention by tensor-core tiles: what both passes share.
//
// Sequences have 16 · R frames, after padding: R warps share one, and each has 16 rows of it, whose
// logits it holds in registers.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cvg/tiles.h"

namespace cvg::tiles {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr int kMaxFrames = 128;

// Calls f with R, the warps of a sequence, as a constant: the least that holds its frames, of those
// that there are.
template <class F>
void with_warps(int frames, F f) {
  switch ((frames + kRows - 1) / kRows) {
    case 1:
      return f(std::integral_constant<int, 1>{});
    case 2:
      return f(std::integral_constant<int, 2>{});
    case 3:
      return f(std::integral_constant<int, 3>{});
    case 4:
      return f(std::integral_constant<int, 4>{});
    default:
      return f(std::integral_constant<int, 8>{});
  }
}

// Calls f(whether the elements are bfloat16, R, flag), constants all.
template <class F>
void with_variant(const TemporalArgs& args, bool flag, F f) {
  with_warps(static_cast<int>(args.frames), [&](auto warps) {
    const auto with_type = [&](auto bf16) {
      flag ? f(bf16, warps, std::true_type{}) : f(bf16, warps, std::false_type{});
    };
    args.dtype == DType::bf16 ? with_type(std::true_type{}) : with_type(std::false_type{});
  });
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
  bool scale_bias_by_row_max;  // row i of `added` is multiplied by m_i
};

inline Problem problem_of(const TemporalArgs& args) {
  return {args.batch,
          args.positions,
          static_cast<int>(args.heads),
          static_cast<int>(args.frames),
          rows_of(args.query, args.dim),
          rows_of(args.key, args.dim),
          rows_of(args.value, args.value_dim),
          static_cast<const float*>(args.added),
          static_cast<float>(args.scale),
          args.scale_bias_by_row_max};
}

// Elements between rows in shared memory: the widest tensor's, and 16 bytes more, which keep the
// eight rows that are read at once in different banks.
inline int pitch_of(const Problem& problem) {
  return rounded(std::max(problem.query.dim, problem.value.dim)) + 8;
}

// How a block's shared memory is laid out: each of its sequences has tensors of 16 · R rows.
struct Plan {
  int groups;  // sequences a block works on at once
  int pitch;
  bool tight;      // tensors take turns in the same memory, for there is not enough
  int group_size;  // elements

  size_t bytes() const { return size_t{2} * groups * group_size; }
};

// Sequence `unit` of all those that there are: of all heads, or one of all positions.
template <bool ALL_HEADS>
CVG_TILE Place place_of(const Problem& problem, int64_t unit, int warp_of_sequence) {
  const int heads = ALL_HEADS ? 1 : problem.heads;
  const int64_t at = unit / heads;
  return {at / problem.positions,
          at % problem.positions,
          at,
          static_cast<int>(unit % heads),
          warp_of_sequence * kRows,
          at < problem.batch * problem.positions};
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
  if (problem.scale_bias_by_row_max) {
    reduce<W, Pair>(m, [](float x, float y) { return fmaxf(x, y); });
  }
  if (FIRST && problem.scale_bias_by_row_max) {
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
      float& row_max = m[lane].at[half];
      row_max = row_max == -INFINITY ? 0.0f : row_max;  // of a row that is not there
    }
    each_element<R>(lane, row, [&](int n, int c, int i, int j) {
      if (i < frames && j < frames) {
        const float factor = problem.scale_bias_by_row_max ? m[lane].at[c / 2] : kLog2e;
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
      const float row_max = top[lane].at[c / 2];
      float& x = s[lane].at[n][c];
      x = W::exp2(x - (row_max == -INFINITY ? 0.0f : row_max));
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
    each_element<R>(lane, 0,
                    [&](int n, int c, int, int) { s[lane].at[n][c] *= total[lane].at[c / 2]; });
  });
}

}  // namespace cvg::tiles
