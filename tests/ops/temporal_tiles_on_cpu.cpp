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

  // ldmatrix .x4: register r of a lane is from part r, whose rows start where lanes 8r … 8r + 7 say.
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

// Warps run one at a time, each as far as its next barrier, forwards or backwards: without a barrier
// that is needed, one of them reads what is not there yet, or not there any more.
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

// All blocks of a launch, one after the other. Shared memory is NaN at first.
template <int R, class State, class Body>
void run_blocks(const Plan& plan, int blocks, bool backwards, Body body) {
  struct alignas(16) Chunk {
    Half at[8];
  };
  for (int block = 0; block < blocks; ++block) {
    std::vector<Chunk> shared(plan.bytes() / sizeof(Chunk) + 1);
    std::memset(shared.data(), 0xff, shared.size() * sizeof(Chunk));
    const int warps = R * plan.groups;
    Turns turns(warps, backwards);
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

using Given = std::array<int64_t, 6>;  // address and strides

Tensor5 tensor(const Given& given) {
  Tensor5 t;
  t.data = reinterpret_cast<void*>(given[0]);
  std::copy(given.begin() + 1, given.end(), t.stride);
  return t;
}

}  // namespace

}  // namespace cvg::tiles

// How it is run: blocks of a launch, bytes of shared memory, the order of the warps.
struct Run {
  int64_t blocks, shared_bytes, backwards;
};

struct Call {
  int64_t sizes[6];
  int64_t bf16;
  std::array<int64_t, 6> query, key, value;
  const float* added;
  double scale;
  int64_t by_row_max;
  Run run;
};

namespace {

using namespace cvg::tiles;

Problem problem_of(const Call& call) {
  const int64_t* sizes = call.sizes;
  return {sizes[0],
          sizes[1],
          static_cast<int>(sizes[2]),
          static_cast<int>(sizes[3]),
          rows_of(tensor(call.query), sizes[4]),
          rows_of(tensor(call.key), sizes[4]),
          rows_of(tensor(call.value), sizes[5]),
          call.added,
          static_cast<float>(call.scale),
          call.by_row_max != 0};
}

int larger_dim(const Problem& problem) {
  return std::max(problem.query.dim, problem.value.dim);
}

template <bool BF16, int R, bool MAPS>
void forward(Forward args, const Run& run) {
  using State = ForwardState<HostWarp, R, MAPS>;
  args.plan = forward_plan(R, groups_of(R), larger_dim(args.problem), run.shared_bytes);
  require(args.plan.bytes() <= size_t(run.shared_bytes), "the forward pass does not fit");
  run_blocks<R, State>(args.plan, run.blocks, run.backwards, [&](auto& team, int block) {
    forward_block<HostTeam<R, State>, BF16, R, MAPS>(team, args, block, run.blocks);
  });
}

template <bool BF16, int R, bool SUMS>
void backward(Backward args, const Run& run) {
  using State = BackwardState<HostWarp, R, SUMS>;
  args.plan = backward_plan(R, groups_of(R), larger_dim(args.problem), run.shared_bytes);
  require(args.plan.bytes() <= size_t(run.shared_bytes), "the backward pass does not fit");
  run_blocks<R, State>(args.plan, run.blocks, run.backwards, [&](auto& team, int block) {
    backward_block<HostTeam<R, State>, BF16, R, SUMS>(team, args, block, run.blocks);
  });
}

}  // namespace

extern "C" {

// Shares of the gradient of `added` that a backward pass writes.
int64_t temporal_shares(const Call* call) {
  return with_warps(static_cast<int>(call->sizes[3]),
                    [&](auto warps) { return call->run.blocks * groups_of(warps); });
}

void temporal_forward(const Call* call, const int64_t* out, float* maps) {
  Given where;
  std::copy(out, out + 6, where.begin());
  const Forward args{problem_of(*call), {}, rows_of(tensor(where), call->sizes[5]), maps};
  with_warps(args.problem.frames, [&](auto warps) {
    constexpr int R = decltype(warps)::value;
    if (call->bf16) {
      maps ? forward<true, R, true>(args, call->run) : forward<true, R, false>(args, call->run);
    } else {
      maps ? forward<false, R, true>(args, call->run) : forward<false, R, false>(args, call->run);
    }
  });
}

// tensors: grad_out and the gradients of query, key and value.
void temporal_backward(const Call* call, const int64_t* tensors, const float* grad_maps,
                       int64_t row_max_grad, float* sums) {
  Rows rows[4];
  for (int i = 0; i < 4; ++i) {
    Given where;
    std::copy(tensors + 6 * i, tensors + 6 * i + 6, where.begin());
    rows[i] = rows_of(tensor(where), call->sizes[i % 3 ? 4 : 5]);
  }
  const Backward args{problem_of(*call), {},      rows[0], grad_maps, row_max_grad != 0,
                      rows[1],           rows[2], rows[3], sums};
  with_warps(args.problem.frames, [&](auto warps) {
    constexpr int R = decltype(warps)::value;
    if (call->bf16) {
      sums ? backward<true, R, true>(args, call->run) : backward<true, R, false>(args, call->run);
    } else {
      sums ? backward<false, R, true>(args, call->run) : backward<false, R, false>(args, call->run);
    }
  });
}
}
