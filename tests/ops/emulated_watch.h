// The watch over the memory that the emulated threads share: who wrote and who read each byte, and
// when.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace cvg::emulated {

// When something happened. Block barriers order all threads, a warp's barriers its lanes.
struct Moment {
  int64_t block = -1, warp = -1;
};

// Who did something: a lane; a warp as a whole, or lanes of it (lane = −1); or several warps.
struct Actor {
  int warp = -1, lane = -1;
};

class Watch {
 public:
  void add(char* start, size_t bytes);
  void begin_block() { accesses_ = 0; }

  // An access of `by` at its warp's moment `now`; fails if no barrier orders it, or where a copy is
  // awaited, unless it is the copy that lands.
  void access(const char* at, size_t size, bool write, const Actor& by, const Moment& now,
              bool lands = false);
  void mark_copy(char* to, size_t bytes, bool awaited);

 private:
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

  Region* region_of(const char* at);
  std::string place_of(const Region& region, const char* at) const;

  std::vector<Region> regions_;
  const char *lowest_ = nullptr, *highest_ = nullptr;
  int64_t accesses_ = 0;
};

// Tells the watch of an access by whoever's turn it is.
void seen(const void* at, size_t size, bool write);

}  // namespace cvg::emulated
