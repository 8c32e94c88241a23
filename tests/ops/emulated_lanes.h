// The threads of a GPU's block on the CPU, one at a time, and a watch over the memory they share.
//
// Threads run as fibers, each up to its next barrier, in an order that is drawn anew every time. A
// fiber is one lane, or a whole warp, whose lanes then take turns by `each_lane`. Code compiled
// with -fsanitize=thread tells of every access to memory (emulated_watch.cpp answers those calls in
// place of that sanitizer), so that no luck of the order is needed: what one thread writes and
// another reads or writes with no barrier between them is an error, and so is memory that an
// asynchronous copy may still write to. Errors end the block and are thrown by run_block.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace cvg::emulated {

constexpr int kWarp = 32;

enum class Scope { warp, block };

// Calls to be left out, by their address in the code; 0: none.
struct Faults {
  uintptr_t barrier = 0, wait = 0;
};

// Before a launch: draws from `seed`, forgets what was watched.
void begin(uint64_t seed, Faults faults);

// Addresses in the code where barriers, or waits for copies, were called since `begin`.
std::vector<uintptr_t> barriers_met();
std::vector<uintptr_t> waits_met();

// Memory that threads share; its bytes are 0xff, a NaN in every type, if it is to be fresh.
void watch(void* data, size_t bytes, bool fresh);

// Runs body(fiber) for all fibers of a block, each of which is so many threads: 1 or 32.
void run_block(int fibers, int threads_of_fiber, const std::function<void(int)>& body);

// A barrier for the lanes of a warp or for the block.
void sync(Scope scope);
// One word from every lane, ORed. All wait for it, but it does not order what they do to memory.
uint64_t any(Scope scope, uint64_t word);

// For a fiber that is a warp.
template <class F>
void each_lane(F f);
int lane();  // whose turn it is; −1: the warp as a whole acts
void copy_later(void* to, const void* from, size_t bytes, bool read);  // else zeros
void wait_for_copies();
void read_by_warp(const void* at, size_t bytes);

[[noreturn]] void fail(const char* what);

// --- the rest serves each_lane ---

std::vector<int> drawn_order(int count);
void set_lane(int lane);

template <class F>
void each_lane(F f) {
  for (int lane : drawn_order(kWarp)) {
    set_lane(lane);
    f(lane);
  }
  set_lane(-1);
}

}  // namespace cvg::emulated
