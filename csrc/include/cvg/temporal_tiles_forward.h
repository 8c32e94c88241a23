// The forward pass of temporal attention by tensor-core tiles: what a block does.
//
// R warps share a sequence and a block has several. `Team` is the block: team.each(f) calls f with
// every warp and what it holds from step to step, team.sync() is a barrier.
#pragma once

#include "cvg/temporal_tiles.h"

namespace cvg::tiles {

struct Forward {
  Problem problem;
  Plan plan;
  Rows out;
  float* maps;  // [B, P, F, F], or nullptr
};

template <class W, int R, bool MAPS>
struct ForwardState {
  Place place;
  Half *query, *key, *value;
  typename W::template Per<Tile<R>> weights;
  typename W::template Per<Tile<MAPS ? R : 1>> maps;
};

inline Forward forward_of(const TemporalArgs& args, const TemporalForwardOut& to) {
  return {problem_of(args), {}, rows_of(to.out, args.value_dim), static_cast<float*>(to.maps)};
}

// limit: bytes of shared memory that a block can have.
inline Plan forward_plan(const Problem& problem, int warps_of_sequence, size_t limit) {
  const int pitch = pitch_of(problem), tensor = kRows * warps_of_sequence * pitch;
  Plan plan{groups_of(warps_of_sequence), pitch, false, 3 * tensor};
  if (plan.bytes() > limit) {
    plan.tight = true;  // v in the place of k
    plan.group_size = 2 * tensor;
  }
  return plan;
}

// A block's share: every blocks-th group of sequences. With MAPS a sequence is that of one
// position, all heads in turn, whose maps are summed in registers and written once.
template <class Team, bool BF16, int R, bool MAPS>
CVG_TILE void forward_block(Team& team, const Forward& args, int64_t block, int64_t blocks) {
  using W = typename Team::Warp;
  using State = ForwardState<W, R, MAPS>;
  const Problem& problem = args.problem;
  const Plan& plan = args.plan;
  const int frames = problem.frames, heads = MAPS ? problem.heads : 1;
  const int64_t sequences = problem.batch * problem.positions * (MAPS ? 1 : problem.heads);
  for (int64_t unit = block * plan.groups; unit < sequences; unit += blocks * plan.groups) {
    team.each([&](int warp, State& state) {
      state.place = place_of<MAPS>(problem, unit + warp / R, warp % R);
      const int tensor = R * kRows * plan.pitch;
      state.query = team.memory() + warp / R * plan.group_size;
      state.key = state.query + tensor;
      state.value = plan.tight ? state.key : state.key + tensor;
      if (MAPS) {
        W::each([&](int lane) { state.maps[lane] = {}; });
      }
    });
    for (int head = 0; head < heads; ++head) {
      team.each([&](int, State& state) {
        state.place.head = MAPS ? head : state.place.head;
        load_rows<W>(state.query, plan.pitch, problem.query, state.place, frames);
        load_rows<W>(state.key, plan.pitch, problem.key, state.place, frames);
        if (!plan.tight) {
          load_rows<W>(state.value, plan.pitch, problem.value, state.place, frames);
        }
        W::wait_for_copies();
      });
      team.sync();
      team.each([&](int, State& state) {
        const int row = state.place.row;
        typename W::template Per<Pair> m;
        typename W::template Per<Columns> first;
        multiply_rows<W, BF16, R>(state.weights, state.query, state.key, row, plan.pitch,
                                  rounded(problem.query.dim));
        regularise<W, R, false>(state.weights, m, first, problem, row);
        softmax<W, R>(state.weights);
      });
      if (plan.tight) {
        team.sync();
        team.each([&](int, State& state) {
          load_rows<W>(state.value, plan.pitch, problem.value, state.place, frames);
          W::wait_for_copies();
        });
        team.sync();
      }
      team.each([&](int, State& state) {
        if constexpr (MAPS) {  // first, so that the weights are done with before they are
                               // multiplied
          const float head_weight = 1.0f / problem.heads;
          W::each([&](int lane) {
            each_element<R>(lane, 0, [&](int n, int c, int, int) {
              state.maps[lane].at[n][c] += head_weight * state.weights[lane].at[n][c];
            });
          });
        }
        typename W::template Per<Strip<R>> factor;
        as_factor<W, BF16, R>(factor, state.weights);
        multiply_columns<W, BF16, R>(factor, state.value, plan.pitch, args.out, state.place,
                                     frames);
      });
      team.sync();  // before the next tensors are loaded
    }
    if constexpr (MAPS) {
      team.each([&](int, State& state) {
        if (state.place.inside) {
          float* map = args.maps + state.place.at * frames * frames;
          store_matrix<W, R>(state.maps, map, frames, state.place.row);
        }
      });
    }
  }
}

}  // namespace cvg::tiles
