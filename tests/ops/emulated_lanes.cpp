// Fibers, barriers and late copies. This file is compiled without the watch.
#include "emulated_lanes.h"

#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>

#include "emulated_watch.h"

namespace cvg::emulated {

namespace {

constexpr size_t kStack = size_t{1} << 20;

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
  Watch watch;
  std::vector<Copy> copies;
  std::vector<Fiber> fibers;
  std::vector<Moment> now;  // of every warp
  std::vector<uint64_t> words[2];
  const std::function<void(int)>* body = nullptr;
  ucontext_t scheduler;
  std::string error;
  int threads_of_fiber = 1, current = -1, lane = -1;
  Moment beyond;  // later than all there was before this block
};

World world;

Actor actor() {
  return world.threads_of_fiber == 1 ? Actor{world.current / kWarp, world.current % kWarp}
                                     : Actor{world.current, world.lane};
}

void access(const char* at, size_t size, bool write, const Actor& by, bool lands = false) {
  if (world.current >= 0) {
    world.watch.access(at, size, write, by, world.now[by.warp], lands);
  }
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
  world.watch.add(start, bytes);
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
  world.watch.begin_block();
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
  world.watch.mark_copy(target, bytes, true);
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
      world.watch.mark_copy(copy.to, copy.bytes, false);
      copy.read ? std::memcpy(copy.to, copy.from, copy.bytes) : std::memset(copy.to, 0, copy.bytes);
    }
  }
  world.copies.erase(std::remove_if(world.copies.begin(), world.copies.end(), mine),
                     world.copies.end());
}

void read_by_warp(const void* at, size_t bytes) {
  access(static_cast<const char*>(at), bytes, false, {actor().warp, -1});
}

void seen(const void* at, size_t size, bool write) {
  if (world.current >= 0) {
    access(static_cast<const char*>(at), size, write, actor());
  }
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
