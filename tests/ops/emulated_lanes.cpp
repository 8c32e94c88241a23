// Fibers, barriers, the watch over memory, and the calls that -fsanitize=thread puts before every
// access. This file itself is compiled without it.
#include "emulated_lanes.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>

namespace cvg::emulated {

namespace {

constexpr size_t kStack = size_t{1} << 20;
constexpr int64_t kMostAccesses = int64_t{1} << 30;  // of a block: more is a loop without end

// When something happened. Block barriers order all threads, a warp's barriers its lanes.
struct Moment {
  int64_t block = -1, warp = -1;
};

// Who did something: a lane; a warp as a whole, or lanes of it (lane = −1); or several warps.
struct Actor {
  int warp = -1, lane = -1;
};

// What is known of a byte: its last writer, and who read it since the last barrier.
struct Byte {
  Actor writer, reader;
  Moment written, read;
  bool awaits_copy = false;
};

struct Region {
  char* start;
  std::vector<Byte> bytes;
};

struct Copy {
  char* to;
  const char* from;
  size_t bytes;
  bool read;
  Actor by;
};

enum class State { ready, waits_for_warp, waits_for_block, done };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state = State::ready;
  bool orders = true;  // whether the barrier it waits at is one for memory, too
  void* place = nullptr;
  int votes = 0;
};

struct World {
  std::mt19937_64 random;
  Faults faults;
  std::vector<uintptr_t> barriers, waits;  // the addresses where they were met
  std::vector<Region> regions;
  char *lowest = nullptr, *highest = nullptr;
  std::vector<Copy> copies;
  std::vector<Fiber> fibers;
  std::vector<Moment> now;  // of every warp
  std::vector<uint64_t> words[2];
  const std::function<void(int)>* body = nullptr;
  ucontext_t scheduler;
  std::string error;
  int64_t accesses = 0;
  int threads_of_fiber = 1, current = -1, lane = -1;
  Moment beyond;  // later than all there was before this block
};

World world;

Actor actor() {
  return world.threads_of_fiber == 1 ? Actor{world.current / kWarp, world.current % kWarp}
                                     : Actor{world.current, world.lane};
}

// Whether what `before` did at `then` may be undone or unseen by what `by` does now.
bool unordered(const Actor& before, const Moment& then, const Actor& by) {
  const Moment& now = world.now[by.warp];
  if (then.block < now.block) {
    return false;
  }
  if (before.warp != by.warp) {
    return true;
  }
  const bool same = before.lane == by.lane && by.lane >= 0;
  return then.warp == now.warp && !same;
}

std::string place_of(const Region& region, const char* at) {
  return "region " + std::to_string(&region - world.regions.data()) + ", byte " +
         std::to_string(at - region.start);
}

std::string name(const Actor& who) {
  const std::string lane = who.lane < 0 ? "lanes" : "lane " + std::to_string(who.lane);
  return who.warp < 0 ? "several warps" : lane + " of warp " + std::to_string(who.warp);
}

void access(const char* at, size_t size, bool write, const Actor& by, bool lands = false) {
  if (world.current < 0 || at + size <= world.lowest || at >= world.highest) {
    return;
  }
  for (Region& region : world.regions) {
    const int64_t first = at - region.start;
    if (first < 0 || first >= static_cast<int64_t>(region.bytes.size())) {
      continue;
    }
    if (++world.accesses > kMostAccesses) {
      fail("it does not end");
    }
    if (first + size > region.bytes.size()) {
      fail(("an access runs over the end of " + place_of(region, at)).c_str());
    }
    for (Byte *byte = &region.bytes[first], *end = byte + size; byte < end; ++byte) {
      if (byte->awaits_copy && !lands) {
        fail((name(by) + " comes before a copy that was not waited for: " + place_of(region, at))
                 .c_str());
      }
      if (unordered(byte->writer, byte->written, by)) {
        fail((name(by) + (write ? " writes" : " reads") + " what " + name(byte->writer) +
              " wrote, with no barrier between: " + place_of(region, at))
                 .c_str());
      }
      const Moment& now = world.now[by.warp];
      if (write) {
        if (unordered(byte->reader, byte->read, by)) {
          fail((name(by) + " writes what " + name(byte->reader) +
                " read, with no barrier between: " + place_of(region, at))
                   .c_str());
        }
        byte->writer = by;
        byte->written = now;
      } else if (byte->read.block < now.block) {
        byte->reader = by;
        byte->read = now;
      } else if (byte->reader.warp != by.warp) {
        byte->reader = {-1, -1};
      } else if (byte->read.warp < now.warp) {
        byte->reader = by;
        byte->read = now;
      } else if (byte->reader.lane != by.lane) {
        byte->reader.lane = -1;
      }
    }
    return;
  }
}

void mark_copy(char* to, size_t bytes, bool awaited) {
  for (Region& region : world.regions) {
    const int64_t first = to - region.start;
    if (first >= 0 && first < static_cast<int64_t>(region.bytes.size())) {
      for (size_t i = 0; i < bytes; ++i) {
        region.bytes[first + i].awaits_copy = awaited;
      }
      return;
    }
  }
  fail("a copy goes to memory that is not shared");
}

uintptr_t noted(std::vector<uintptr_t>& places, void* place) {
  const auto address = reinterpret_cast<uintptr_t>(place);
  if (std::find(places.begin(), places.end(), address) == places.end()) {
    places.push_back(address);
  }
  return address;
}

void enter() {
  (*world.body)(world.current);
  Fiber& fiber = world.fibers[world.current];
  fiber.state = State::done;
  swapcontext(&fiber.context, &world.scheduler);
}

void wait_at(Scope scope, void* place, bool orders) {
  Fiber& fiber = world.fibers[world.current];
  fiber.state = scope == Scope::warp ? State::waits_for_warp : State::waits_for_block;
  fiber.place = place;
  fiber.orders = orders;
  swapcontext(&fiber.context, &world.scheduler);
}

int fibers_of_warp() {
  return kWarp / world.threads_of_fiber;
}

// Lets go whom nothing keeps any more. Returns whether there was someone.
bool release(int first, int count, State state) {
  const auto begin = world.fibers.begin() + first, end = begin + count;
  if (!std::all_of(begin, end, [&](const Fiber& f) { return f.state == state; })) {
    return false;
  }
  if (!std::all_of(begin, end, [&](const Fiber& f) { return f.place == begin->place; })) {
    world.error = "lanes wait at different barriers";
  }
  const bool orders = begin->orders;
  for (auto fiber = begin; fiber != end; ++fiber) {
    fiber->state = State::ready;
  }
  if (!orders) {
    return true;
  }
  if (state == State::waits_for_block) {
    for (Moment& moment : world.now) {
      ++moment.block;
      ++moment.warp;
    }
  } else {
    ++world.now[first / fibers_of_warp()].warp;
  }
  return true;
}

void run_fibers() {
  std::vector<int> ready;
  while (world.error.empty()) {
    ready.clear();
    bool all_done = true;
    for (size_t i = 0; i < world.fibers.size(); ++i) {
      all_done = all_done && world.fibers[i].state == State::done;
      if (world.fibers[i].state == State::ready) {
        ready.push_back(static_cast<int>(i));
      }
    }
    if (all_done) {
      return;
    }
    if (ready.empty()) {
      world.error = "lanes wait for lanes that do not come";
      return;
    }
    std::shuffle(ready.begin(), ready.end(), world.random);
    for (size_t i = 0; i < ready.size() && world.error.empty(); ++i) {
      world.current = ready[i];
      swapcontext(&world.scheduler, &world.fibers[ready[i]].context);
    }
    world.current = -1;
    const int count = fibers_of_warp(), all = static_cast<int>(world.fibers.size());
    for (int first = 0; first < all; first += count) {
      release(first, count, State::waits_for_warp);
    }
    release(0, all, State::waits_for_block);
  }
}

}  // namespace

void begin(uint64_t seed, Faults faults) {
  const Moment beyond = world.beyond;
  world = World{};
  world.beyond = beyond;
  world.random.seed(seed);
  world.faults = faults;
}

std::vector<uintptr_t> barriers_met() {
  return world.barriers;
}
std::vector<uintptr_t> waits_met() {
  return world.waits;
}

void watch(void* data, size_t bytes, bool fresh) {
  if (bytes == 0) {
    return;
  }
  char* start = static_cast<char*>(data);
  if (fresh) {
    std::memset(data, 0xff, bytes);
  }
  world.lowest = world.regions.empty() ? start : std::min(world.lowest, start);
  world.highest = std::max(world.highest, start + bytes);
  world.regions.push_back({start, std::vector<Byte>(bytes)});
}

void run_block(int fibers, int threads_of_fiber, const std::function<void(int)>& body) {
  world.threads_of_fiber = threads_of_fiber;
  const int warps = fibers * threads_of_fiber / kWarp;
  world.beyond.block += 1;  // one block after the other
  world.now.assign(warps, {world.beyond.block, 0});
  for (auto& words : world.words) {
    words.assign(fibers, 0);
  }
  world.body = &body;
  world.accesses = 0;
  world.lane = -1;
  world.fibers.resize(fibers);
  for (Fiber& fiber : world.fibers) {
    if (!fiber.stack) {
      fiber.stack.reset(new char[kStack]);
    }
    fiber.state = State::ready;
    fiber.votes = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  run_fibers();
  world.current = -1;
  world.beyond.block = world.now[0].block;
  if (world.error.empty() && !world.copies.empty()) {
    world.error = "a block ends before its copies have landed";
  }
  world.copies.clear();
  if (!world.error.empty()) {
    throw std::runtime_error(world.error);
  }
}

__attribute__((noinline)) void sync(Scope scope) {
  void* place = __builtin_return_address(0);
  if (noted(world.barriers, place) == world.faults.barrier) {
    return;
  }
  wait_at(scope, place, true);
}

__attribute__((noinline)) uint64_t any(Scope scope, uint64_t word) {
  Fiber& fiber = world.fibers[world.current];
  auto& words = world.words[fiber.votes++ % 2];
  words[world.current] = word;
  wait_at(scope, __builtin_return_address(0), false);
  const int count = scope == Scope::warp ? fibers_of_warp() : static_cast<int>(words.size());
  const auto first = words.begin() + world.current / count * count;
  return std::accumulate(first, first + count, uint64_t{0}, std::bit_or<>{});
}

int lane() {
  return world.lane;
}
void set_lane(int lane) {
  world.lane = lane;
}

std::vector<int> drawn_order(int count) {
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), world.random);
  return order;
}

void copy_later(void* to, const void* from, size_t bytes, bool read) {
  char* target = static_cast<char*>(to);
  access(target, bytes, true, actor());
  mark_copy(target, bytes, true);
  std::memset(to, 0xff, bytes);
  world.copies.push_back({target, static_cast<const char*>(from), bytes, read, actor()});
}

__attribute__((noinline)) void wait_for_copies() {
  if (noted(world.waits, __builtin_return_address(0)) == world.faults.wait) {
    return;
  }
  std::shuffle(world.copies.begin(), world.copies.end(), world.random);
  const auto mine = [](const Copy& copy) { return copy.by.warp == actor().warp; };
  for (const Copy& copy : world.copies) {
    if (mine(copy)) {
      access(copy.to, copy.bytes, true, copy.by, true);
      mark_copy(copy.to, copy.bytes, false);
      copy.read ? std::memcpy(copy.to, copy.from, copy.bytes) : std::memset(copy.to, 0, copy.bytes);
    }
  }
  world.copies.erase(std::remove_if(world.copies.begin(), world.copies.end(), mine),
                     world.copies.end());
}

void read_by_warp(const void* at, size_t bytes) {
  access(static_cast<const char*>(at), bytes, false, {actor().warp, -1});
}

// Leaves the fiber for good: what called it may not be able to pass an exception on.
void fail(const char* what) {
  if (world.current < 0) {
    throw std::runtime_error(what);
  }
  world.error = what;
  setcontext(&world.scheduler);
  std::abort();
}

}  // namespace cvg::emulated

// --- what -fsanitize=thread calls ---

using cvg::emulated::access;
using cvg::emulated::actor;

#define TELL(SIZE)                              \
  void __tsan_read##SIZE(void* at) {            \
    seen(at, SIZE, false);                      \
  }                                             \
  void __tsan_write##SIZE(void* at) {           \
    seen(at, SIZE, true);                       \
  }                                             \
  void __tsan_unaligned_read##SIZE(void* at) {  \
    seen(at, SIZE, false);                      \
  }                                             \
  void __tsan_unaligned_write##SIZE(void* at) { \
    seen(at, SIZE, true);                       \
  }

namespace {

void seen(void* at, size_t size, bool write) {
  if (cvg::emulated::world.current >= 0) {
    access(static_cast<char*>(at), size, write, actor());
  }
}

}  // namespace

extern "C" {
TELL(1)
TELL(2)
TELL(4)
TELL(8)
TELL(16)
void __tsan_read_range(void* at, size_t size) {
  seen(at, size, false);
}
void __tsan_write_range(void* at, size_t size) {
  seen(at, size, true);
}
void* __tsan_memcpy(void* to, const void* from, size_t size) {
  seen(const_cast<void*>(from), size, false);
  seen(to, size, true);
  return std::memcpy(to, from, size);
}
void* __tsan_memset(void* to, int value, size_t size) {
  seen(to, size, true);
  return std::memset(to, value, size);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
