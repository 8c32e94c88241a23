// The tile algorithm of the CUDA kernels on the CPU: the instructions of a warp as the PTX manual
// defines them, lane by lane, and the warps of a block by turns. Built by test_temporal_tiles.py.
#include <array>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#include "cvg/dtype.h"
#include "cvg/temporal_tiles_backward.h"
#include "cvg/temporal_tiles_forward.h"
#include "temporal_calls.h"

namespace cvg::tiles {

namespace {

void require(bool holds, const char* what) {
  if (!holds) {
    std::fprintf(stderr, "%s\n", what);
    std::abort();
  }
}

float widened(bool bf16, Half bits) {
  _Float16 half;
  std::memcpy(&half, &bits, sizeof half);
  return bf16 ? widen(BFloat16{bits}) : widen(half);
}

struct HostWarp {
  template <class T>
  struct Per {
    T lanes[kLanes];
    T& operator[](int lane) { return lanes[lane]; }
    const T& operator[](int lane) const { return lanes[lane]; }
  };

  template <class F>
  static void each(F f) {
    for (int lane = 0; lane < kLanes; ++lane) {
      f(lane);
    }
  }

  static void copy16(Half* to, const Half* from, bool read) {
    const auto address = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
    require(address % 16 == 0, "cp.async: an address is not a multiple of 16 bytes");
    read ? std::memcpy(to, from, 16) : std::memset(to, 0, 16);
  }
  static void wait_for_copies() {}

  // ldmatrix .x4: register r of a lane is from part r, whose rows start where lanes 8r … 8r + 7
  // say.
  template <bool TRANSPOSED, class F>
  static void load_matrix(Per<Quad>& to, F address) {
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int r = 0; r < 4; ++r) {
        uint32_t word = 0;
        for (int i = 0; i < 2; ++i) {
          const int row = TRANSPOSED ? lane % 4 * 2 + i : lane / 4;
          const int column = TRANSPOSED ? lane / 4 : lane % 4 * 2 + i;
          const Half* start = address(8 * r + row);
          require(reinterpret_cast<uintptr_t>(start) % 16 == 0, "ldmatrix: a row is not aligned");
          word |= uint32_t{start[column]} << 16 * i;
        }
        to[lane].at[r] = word;
      }
    }
  }

  // mma .m16n8k16 .row .col: fragments as in the PTX manual, sums in float.
  template <bool BF16, int FIRST, class F>
  static void mma(F sums, const Per<Quad>& x, const Per<Quad>& y) {
    float a[16][16], b[16][8];
    const auto half_of = [](uint32_t word, int i) {
      return widened(BF16, static_cast<Half>(word >> 16 * (i % 2)));
    };
    for (int lane = 0; lane < kLanes; ++lane) {
      const int group = lane / 4, thread = lane % 4;
      for (int i = 0; i < 8; ++i) {
        const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
        const int column = thread * 2 + (i & 1) + (i >= 4 ? 8 : 0);
        a[row][column] = half_of(x[lane].at[i / 2], i);
      }
      for (int i = 0; i < 4; ++i) {
        const int row = thread * 2 + (i & 1) + (i >= 2 ? 8 : 0);
        b[row][group] = half_of(y[lane].at[FIRST + i / 2], i);
      }
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = i < 2 ? lane / 4 : lane / 4 + 8, column = lane % 4 * 2 + (i & 1);
        for (int k = 0; k < 16; ++k) {
          sums(lane)[i] += a[row][k] * b[k][column];
        }
      }
    }
  }

  template <bool BF16>
  static uint32_t pack(float low, float high) {
    const auto bits_of = [](float x) {
      const _Float16 half = narrow<_Float16>(x);
      Half bits;
      std::memcpy(&bits, &half, sizeof bits);
      return BF16 ? narrow<BFloat16>(x).bits : bits;
    };
    return bits_of(low) | uint32_t{bits_of(high)} << 16;
  }

  static float exp2(float x) { return std::exp2(x); }

  template <class T>
  static Per<T> exchange(const Per<T>& x, int mask) {
    Per<T> result;
    each([&](int lane) { result[lane] = x[lane ^ mask]; });
    return result;
  }
};

// Warps run one at a time, each as far as its next barrier, forwards or backwards: without a
// barrier that is needed, one of them reads what is not there yet, or not there any more.
class Turns {
 public:
  Turns(int warps, bool backwards) : warps_(warps), backwards_(backwards) {}

  void wait(int warp) {
    const int mine = backwards_ ? warps_ - 1 - warp : warp;
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return turn_ % warps_ == mine; });
  }
  void pass() {
    std::lock_guard<std::mutex> lock(mutex_);
    ++turn_;
    changed_.notify_all();
  }

 private:
  int warps_, turn_ = 0;
  bool backwards_;
  std::mutex mutex_;
  std::condition_variable changed_;
};

template <int R, class State>
struct HostTeam {
  using Warp = HostWarp;

  int warp;
  Half* shared;
  Turns* turns;
  State own;

  Half* memory() const { return shared; }
  template <class F>
  void each(F f) {
    f(warp, own);
  }
  void sync() {
    if (R > 1) {
      turns->pass();
      turns->wait(warp);
    }
  }
};

struct Run {
  int64_t blocks, shared_bytes;
  bool backwards;
};

// All blocks of a launch, one after the other. Shared memory is NaN at first.
template <int R, class State, class Body>
void run_blocks(const Plan& plan, const Run& run, Body body) {
  struct alignas(16) Chunk {
    Half at[8];
  };
  require(plan.bytes() <= static_cast<size_t>(run.shared_bytes), "a block has not the memory");
  for (int64_t block = 0; block < run.blocks; ++block) {
    std::vector<Chunk> shared(plan.bytes() / sizeof(Chunk) + 1);
    std::memset(shared.data(), 0xff, shared.size() * sizeof(Chunk));
    const int warps = R * plan.groups;
    Turns turns(warps, run.backwards);
    std::vector<std::thread> threads;
    for (int warp = 0; warp < warps; ++warp) {
      threads.emplace_back([&, warp] {
        turns.wait(warp);
        HostTeam<R, State> team{warp, shared.data()->at, &turns, {}};
        body(team, block);
        turns.pass();
      });
    }
    for (auto& thread : threads) {
      thread.join();
    }
  }
}

void forward(const TemporalArgs& args, const TemporalForwardOut& to, const Run& run) {
  with_variant(args, to.maps != nullptr, [&](auto bf16, auto warps, auto maps) {
    constexpr int R = decltype(warps)::value;
    using State = ForwardState<HostWarp, R, maps>;
    Forward call = forward_of(args, to);
    call.plan = forward_plan(call.problem, R, run.shared_bytes);
    run_blocks<R, State>(call.plan, run, [&](auto& team, int64_t block) {
      forward_block<HostTeam<R, State>, bf16, R, maps>(team, call, block, run.blocks);
    });
  });
}

void backward(const TemporalArgs& args, const TemporalBackwardIn& in, const TemporalBackwardOut& to,
              const Run& run) {
  with_variant(args, to.added != nullptr, [&](auto bf16, auto warps, auto sums) {
    constexpr int R = decltype(warps)::value;
    using State = BackwardState<HostWarp, R, sums>;
    Backward call = backward_of(args, in, to);
    call.plan = backward_plan(call.problem, R, run.shared_bytes);
    run_blocks<R, State>(call.plan, run, [&](auto& team, int64_t block) {
      backward_block<HostTeam<R, State>, bf16, R, sums>(team, call, block, run.blocks);
    });
  });
}

// Shares of the gradient of `added` that a backward pass writes.
int64_t shares(int frames, int64_t blocks) {
  int64_t count = 0;
  with_warps(frames, [&](auto warps) { count = blocks * groups_of(warps); });
  return count;
}

}  // namespace

}  // namespace cvg::tiles

PYBIND11_MODULE(temporal_tiles_on_cpu, m) {
  using namespace cvg;
  m.def("shares", tiles::shares);
  bindings::bind_temporal_calls<std::array<int64_t, 3>>(
      m,
      [](const TemporalArgs& args, const TemporalForwardOut& to, const auto& run) {
        tiles::forward(args, to, {run[0], run[1], run[2] != 0});
      },
      [](const TemporalArgs& args, const TemporalBackwardIn& in, const TemporalBackwardOut& to,
         const auto& run) { tiles::backward(args, in, to, {run[0], run[1], run[2] != 0}); });
}
