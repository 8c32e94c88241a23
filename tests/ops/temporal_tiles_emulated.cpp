// The tile algorithm of the CUDA kernels on the CPU: every warp a fiber, its lanes by turns.
// Compiled with -fsanitize=thread, for the watch over memory (emulated_lanes.h).
#include "temporal_tiles_emulated.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cvg/temporal_tiles_backward.h"
#include "cvg/temporal_tiles_forward.h"
#include "emulated_lanes.h"
#include "emulated_warp.h"

#ifndef ONLY_WARPS
#define ONLY_WARPS 0  // R of the variants that are built, in float16 alone; 0: all
#endif

namespace cvg::tiles {

namespace {

struct HostWarp {
  // What a lane holds is not to be had by another, nor by nobody in particular.
  template <class T>
  struct Per {
    T lanes[kLanes];
    T& operator[](int lane) {
      check(lane);
      return lanes[lane];
    }
    const T& operator[](int lane) const {
      check(lane);
      return lanes[lane];
    }
    static void check(int lane) {
      if (lane != emulated::lane()) {
        emulated::fail("a lane takes what another one holds");
      }
    }
  };

  template <class F>
  static void each(F f) {
    emulated::each_lane(f);
  }

  static void copy16(Half* to, const Half* from, bool read) {
    const auto address = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
    if (address % 16 != 0) {
      emulated::fail("cp.async: an address is not a multiple of 16 bytes");
    }
    emulated::copy_later(to, from, 16, read);
  }
  static void wait_for_copies() { emulated::wait_for_copies(); }

  template <bool TRANSPOSED, class F>
  static void load_matrix(Per<Quad>& to, F address) {
    const Half* rows[kLanes];
    each([&](int lane) { rows[lane] = address(lane); });
    emulated::load_matrix(registers(to), rows, TRANSPOSED);
  }

  template <bool BF16, int FIRST, class F>
  static void mma(F sums, const Per<Quad>& x, const Per<Quad>& y) {
    float* of_lane[kLanes];
    each([&](int lane) { of_lane[lane] = sums(lane); });
    emulated::mma(of_lane, registers(x), registers(y), FIRST, BF16);
  }

  template <bool BF16>
  static uint32_t pack(float low, float high) {
    return emulated::pack(low, high, BF16);
  }

  static float exp2(float x) { return std::exp2(x); }

  template <class T>
  static Per<T> exchange(const Per<T>& x, int mask) {
    Per<T> result;
    for (int lane = 0; lane < kLanes; ++lane) {
      result.lanes[lane] = x.lanes[lane ^ mask];
    }
    return result;
  }

 private:
  static emulated::Registers* registers(Per<Quad>& x) {
    return reinterpret_cast<emulated::Registers*>(x.lanes);
  }
  static const emulated::Registers* registers(const Per<Quad>& x) {
    return reinterpret_cast<const emulated::Registers*>(x.lanes);
  }
};

template <int R, class State>
struct HostTeam {
  using Warp = HostWarp;

  int warp;
  Half* shared;
  State own;

  Half* memory() const { return shared; }
  template <class F>
  void each(F f) {
    f(warp, own);
  }
  void sync() { emulated::sync(R == 1 ? emulated::Scope::warp : emulated::Scope::block); }
};

// All blocks of a launch, one after the other. Shared memory is NaN at first.
template <int R, class State, class Body>
void run_blocks(const Plan& plan, const emulated::Launch& launch, Body body) {
  struct alignas(16) Chunk {
    Half at[8];
  };
  if (plan.bytes() > static_cast<size_t>(launch.shared_bytes)) {
    emulated::fail("a block has not the memory");
  }
  std::vector<Chunk> shared(plan.bytes() / sizeof(Chunk));
  emulated::begin(launch.seed, launch.faults);
  emulated::watch(shared.data(), plan.bytes(), true);
  for (int64_t block = 0; block < launch.blocks; ++block) {
    std::memset(static_cast<void*>(shared.data()), 0xff, plan.bytes());
    emulated::run_block(R * plan.groups, kLanes, [&](int warp) {
      HostTeam<R, State> team{warp, shared.data()->at, {}};
      body(team, block);
    });
  }
}

template <bool BF16, int R>
constexpr bool built() {
  return ONLY_WARPS == 0 || (ONLY_WARPS == R && !BF16);
}

}  // namespace

}  // namespace cvg::tiles

namespace cvg::emulated {

using namespace cvg::tiles;

void temporal_forward(const TemporalArgs& args, const TemporalForwardOut& to,
                      const Launch& launch) {
  with_variant(args, to.maps != nullptr, [&](auto bf16, auto warps, auto maps) {
    constexpr int R = decltype(warps)::value;
    if constexpr (built<bf16, R>()) {
      using State = ForwardState<HostWarp, R, maps>;
      Forward call = forward_of(args, to);
      call.plan = forward_plan(call.problem, R, launch.shared_bytes);
      run_blocks<R, State>(call.plan, launch, [&](auto& team, int64_t block) {
        forward_block<HostTeam<R, State>, bf16, R, maps>(team, call, block, launch.blocks);
      });
    } else {
      fail("this variant is not built");
    }
  });
}

void temporal_backward(const TemporalArgs& args, const TemporalBackwardIn& in,
                       const TemporalBackwardOut& to, const Launch& launch) {
  with_variant(args, to.added != nullptr, [&](auto bf16, auto warps, auto sums) {
    constexpr int R = decltype(warps)::value;
    if constexpr (built<bf16, R>()) {
      using State = BackwardState<HostWarp, R, sums>;
      Backward call = backward_of(args, in, to);
      call.plan = backward_plan(call.problem, R, launch.shared_bytes);
      run_blocks<R, State>(call.plan, launch, [&](auto& team, int64_t block) {
        backward_block<HostTeam<R, State>, bf16, R, sums>(team, call, block, launch.blocks);
      });
    } else {
      fail("this variant is not built");
    }
  });
}

int64_t temporal_partial_sums(int frames, int64_t blocks) {
  int64_t count = 0;
  with_warps(frames, [&](auto warps) { count = blocks * groups_of(warps); });
  return count;
}

}  // namespace cvg::emulated
