// The backward pass of temporal attention by tensor-core tiles: what a block does. The formulas
// stand in python_ref/temporal_attention.py; `Team` is as in temporal_tiles_forward.h.
#pragma once

#include "cvg/temporal_tiles.h"

namespace cvg::tiles {

struct Backward {
  Problem problem;
  Plan plan;
  Rows grad_out;           // data == nullptr: zero
  const float* grad_maps;  // [B, P, F, F], or nullptr for zero
  bool row_max_grad;
  Rows grad_query, grad_key, grad_value;  // data == nullptr: not wanted
  float* sums;  // [blocks · groups, F, F]: partial sums of the gradient of `added`
};

// Products with Pᵀ and dSᵀ need columns of what the warps hold as rows: they pass through `turned`.
template <class W, int R, bool SUMS>
struct BackwardState {
  Place place;
  Half *query, *key, *value, *grad_out, *turned;
  Half* key_again;  // where k is for dq: loaded once more where v or P took its place
  typename W::template Per<Tile<R>> weights, grads;  // P; dP, then dS', then scale · dS
  typename W::template Per<Pair> m;
  typename W::template Per<Columns> first;
  typename W::template Per<Tile<SUMS ? R : 1>> sums;
};

CVG_HD constexpr int turned_pitch(int warps_of_sequence) {
  return kRows * warps_of_sequence + 8;
}

inline Backward backward_of(const TemporalArgs& args, const TemporalBackwardIn& in,
                            const TemporalBackwardOut& to) {
  return {problem_of(args),
          {},
          rows_of(in.grad_out, args.value_dim),
          static_cast<const float*>(in.grad_maps),
          in.row_max_grad,
          rows_of(to.query, args.dim),
          rows_of(to.key, args.dim),
          rows_of(to.value, args.value_dim),
          static_cast<float*>(to.added)};
}

// limit: bytes of shared memory that a block can have.
inline Plan backward_plan(const Problem& problem, int warps_of_sequence, size_t limit) {
  const int rows = kRows * warps_of_sequence, turned = turned_pitch(warps_of_sequence);
  const int pitch = pitch_of(problem);
  Plan plan{groups_of(warps_of_sequence), pitch, false, rows * (4 * pitch + turned)};
  if (plan.bytes() > limit) {
    plan.tight = true;  // q, dO, k, q in one place; k, v, P, dS in the other
    plan.group_size = rows * (pitch + std::max(pitch, turned));
  }
  return plan;
}

// The warp's rows of a tile, to shared memory in the 16-bit type.
template <class W, bool BF16, int R>
CVG_TILE void write_rows(Half* to, const typename W::template Per<Tile<R>>& from, int row) {
  W::each([&](int lane) {
#pragma unroll
    for (int i = 0; i < 4 * R; ++i) {
      const float* two = from[lane].at[i / 2] + i % 2 * 2;
      Half* at = to + (row + lane / 4 + 8 * (i % 2)) * turned_pitch(R) + i / 2 * 8 + lane % 4 * 2;
      *reinterpret_cast<uint32_t*>(at) = W::template pack<BF16>(two[0], two[1]);
    }
  });
}

// The warp's 16 columns of a matrix that all warps wrote, as rows.
template <class W, int R>
CVG_TILE void read_columns(typename W::template Per<Strip<R>>& to, const Half* from, int column) {
#pragma unroll
  for (int k = 0; k < R; ++k) {
    typename W::template Per<Quad> part;
    load_matrix<W, Order::right, true>(part, from + k * kRows * turned_pitch(R) + column,
                                       turned_pitch(R));
    W::each([&](int lane) { to[lane].at[k] = part[lane]; });
  }
}

// From P and dO Vᵀ: dS' and the sums for `added`, then scale · dS.
template <class W, int R, bool SUMS>
CVG_TILE void gradient_of_scores(BackwardState<W, R, SUMS>& state, const Backward& args) {
  const Problem& problem = args.problem;
  const int frames = problem.frames, row = state.place.row;
  const bool through_max = problem.scale_bias_by_row_max && args.row_max_grad;
  typename W::template Per<Pair> delta, passed;
  W::each([&](int lane) {
    auto &grads = state.grads[lane].at, &weights = state.weights[lane].at;
    if (args.grad_maps && state.place.inside) {
      const float head_weight = 1.0f / problem.heads;
      const float* map = args.grad_maps + state.place.at * frames * frames;
      each_element<R>(lane, row, [&](int n, int c, int i, int j) {
        if (i < frames && j < frames) {
          grads[n][c] += head_weight * map[i * frames + j];
        }
      });
    }
    delta[lane] = {};
    each_element<R>(lane, row, [&](int n, int c, int, int) {
      delta[lane].at[c / 2] += weights[n][c] * grads[n][c];
    });
  });
  reduce<W, Pair>(delta, [](float x, float y) { return x + y; });
  W::each([&](int lane) {
    auto &grads = state.grads[lane].at, &weights = state.weights[lane].at;
    passed[lane] = {};
    each_element<R>(lane, row, [&](int n, int c, int i, int j) {
      grads[n][c] = weights[n][c] * (grads[n][c] - delta[lane].at[c / 2]);
      if constexpr (SUMS) {
        const float factor = problem.scale_bias_by_row_max ? state.m[lane].at[c / 2] * kLn2 : 1.0f;
        state.sums[lane].at[n][c] += factor * grads[n][c];
      }
      if (through_max && i < frames && j < frames) {
        passed[lane].at[c / 2] += problem.added[i * frames + j] * grads[n][c];
      }
    });
  });
  if (through_max) {
    reduce<W, Pair>(passed, [](float x, float y) { return x + y; });
  }
  W::each([&](int lane) {
    each_element<R>(lane, row, [&](int n, int c, int, int j) {
      const bool is_row_max = through_max && j == state.first[lane].at[c / 2];
      float& x = state.grads[lane].at[n][c];
      x = problem.scale * (x + (is_row_max ? passed[lane].at[c / 2] : 0.0f));
    });
  });
}

// A block's share: every blocks-th group of sequences.
template <class Team, bool BF16, int R, bool SUMS>
CVG_TILE void backward_block(Team& team, const Backward& args, int64_t block, int64_t blocks) {
  using W = typename Team::Warp;
  using State = BackwardState<W, R, SUMS>;
  using Factor = typename W::template Per<Strip<R>>;
  const Problem& problem = args.problem;
  const Plan& plan = args.plan;
  const int frames = problem.frames, pitch = plan.pitch;
  const bool has_out = args.grad_out.tensor.data != nullptr;
  const int64_t sequences = problem.batch * problem.positions * problem.heads;
  team.each([&](int warp, State& state) {
    const int tensor = R * kRows * pitch;
    state.query = team.memory() + warp / R * plan.group_size;
    state.key = state.query + tensor;
    state.value = plan.tight ? state.key : state.key + tensor;
    state.grad_out = plan.tight ? state.query : state.value + tensor;
    state.turned = plan.tight ? state.key : state.grad_out + tensor;
    state.key_again = plan.tight ? state.query : state.key;
    if constexpr (SUMS) {
      W::each([&](int lane) { state.sums[lane] = {}; });
    }
  });
  const auto load_out = [&](State& state) {
    load_rows<W>(state.value, pitch, problem.value, state.place, frames);
    load_rows<W>(state.grad_out, pitch, args.grad_out, state.place, frames);
  };
  for (int64_t unit = block * plan.groups; unit < sequences; unit += blocks * plan.groups) {
    team.each([&](int warp, State& state) {
      state.place = place_of<false>(problem, unit + warp / R, warp % R);
      load_rows<W>(state.query, pitch, problem.query, state.place, frames);
      load_rows<W>(state.key, pitch, problem.key, state.place, frames);
      if (has_out && !plan.tight) {
        load_out(state);
      }
      W::wait_for_copies();
    });
    team.sync();
    team.each([&](int, State& state) {
      multiply_rows<W, BF16, R>(state.weights, state.query, state.key, state.place.row, pitch,
                                rounded(problem.query.dim));
      regularise<W, R, true>(state.weights, state.m, state.first, problem, state.place.row);
      softmax<W, R>(state.weights);
    });
    if (has_out && plan.tight) {
      team.sync();
      team.each([&](int, State& state) {
        load_out(state);
        W::wait_for_copies();
      });
      team.sync();
    }
    team.each([&](int, State& state) {
      multiply_rows<W, BF16, R>(state.grads, state.grad_out, state.value, state.place.row, pitch,
                                has_out ? rounded(problem.value.dim) : 0);
      gradient_of_scores<W, R, SUMS>(state, args);
    });
    if (args.grad_value.tensor.data) {
      if (plan.tight) {
        team.sync();  // v is done with
      }
      team.each([&](int, State& state) {
        write_rows<W, BF16, R>(state.turned, state.weights, state.place.row);
      });
      team.sync();
      team.each([&](int, State& state) {
        Factor factor;
        read_columns<W, R>(factor, state.turned, state.place.row);
        multiply_columns<W, BF16, R>(factor, state.grad_out, pitch, args.grad_value, state.place,
                                     frames);
      });
    }
    if (args.grad_query.tensor.data) {
      if (plan.tight) {
        team.sync();  // dO is done with
        team.each([&](int, State& state) {
          load_rows<W>(state.key_again, pitch, problem.key, state.place, frames);
          W::wait_for_copies();
        });
        team.sync();
      }
      team.each([&](int, State& state) {
        Factor factor;
        as_factor<W, BF16, R>(factor, state.grads);
        multiply_columns<W, BF16, R>(factor, state.key_again, pitch, args.grad_query, state.place,
                                     frames);
      });
    }
    if (args.grad_key.tensor.data) {
      team.sync();  // P is done with, and so are v and the second k
      team.each([&](int, State& state) {
        write_rows<W, BF16, R>(state.turned, state.grads, state.place.row);
        if (plan.tight) {
          load_rows<W>(state.query, pitch, problem.query, state.place, frames);
          W::wait_for_copies();
        }
      });
      team.sync();
      team.each([&](int, State& state) {
        Factor factor;
        read_columns<W, R>(factor, state.turned, state.place.row);
        multiply_columns<W, BF16, R>(factor, state.query, pitch, args.grad_key, state.place,
                                     frames);
      });
    }
    team.sync();  // before the next tensors are loaded
  }
  if constexpr (SUMS) {
    team.each([&](int warp, State& state) {
      float* partial_sum = args.sums + (block * plan.groups + warp / R) * frames * frames;
      store_matrix<W, R>(state.sums, partial_sum, frames, state.place.row);
    });
  }
}

}  // namespace cvg::tiles
