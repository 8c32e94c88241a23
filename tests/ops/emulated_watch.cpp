// The watch, and the calls that -fsanitize=thread puts before every access, which tell it. This
// file itself is compiled without that.
#include "emulated_watch.h"

#include <algorithm>
#include <cstring>

#include "emulated_lanes.h"

namespace cvg::emulated {

namespace {

constexpr int64_t kMostAccesses = int64_t{1} << 30;  // of a block: more is a loop without end

// Whether what `before` did at `then` may be undone or unseen by what `by` does now.
bool unordered(const Actor& before, const Moment& then, const Actor& by, const Moment& now) {
  if (then.block < now.block) {
    return false;
  }
  if (before.warp != by.warp) {
    return true;
  }
  const bool same = before.lane == by.lane && by.lane >= 0;
  return then.warp == now.warp && !same;
}

std::string name(const Actor& who) {
  const std::string lane = who.lane < 0 ? "lanes" : "lane " + std::to_string(who.lane);
  return who.warp < 0 ? "several warps" : lane + " of warp " + std::to_string(who.warp);
}

}  // namespace

void Watch::add(char* start, size_t bytes) {
  lowest_ = regions_.empty() ? start : std::min<const char*>(lowest_, start);
  highest_ = std::max<const char*>(highest_, start + bytes);
  regions_.push_back({start, std::vector<Byte>(bytes)});
}

Watch::Region* Watch::region_of(const char* at) {
  for (Region& region : regions_) {
    const int64_t first = at - region.start;
    if (first >= 0 && first < static_cast<int64_t>(region.bytes.size())) {
      return &region;
    }
  }
  return nullptr;
}

std::string Watch::place_of(const Region& region, const char* at) const {
  return "region " + std::to_string(&region - regions_.data()) + ", byte " +
         std::to_string(at - region.start);
}

void Watch::access(const char* at, size_t size, bool write, const Actor& by, const Moment& now,
                   bool lands) {
  if (at + size <= lowest_ || at >= highest_) {
    return;
  }
  Region* region = region_of(at);
  if (region == nullptr) {
    return;
  }
  if (++accesses_ > kMostAccesses) {
    fail("it does not end");
  }
  const size_t first = at - region->start;
  if (first + size > region->bytes.size()) {
    fail(("an access runs over the end of " + place_of(*region, at)).c_str());
  }
  for (Byte *byte = &region->bytes[first], *end = byte + size; byte < end; ++byte) {
    if (byte->awaits_copy && !lands) {
      fail((name(by) + " comes before a copy that was not waited for: " + place_of(*region, at))
               .c_str());
    }
    if (unordered(byte->writer, byte->written, by, now)) {
      fail((name(by) + (write ? " writes" : " reads") + " what " + name(byte->writer) +
            " wrote, with no barrier between: " + place_of(*region, at))
               .c_str());
    }
    if (write) {
      if (unordered(byte->reader, byte->read, by, now)) {
        fail((name(by) + " writes what " + name(byte->reader) +
              " read, with no barrier between: " + place_of(*region, at))
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
}

void Watch::mark_copy(char* to, size_t bytes, bool awaited) {
  Region* region = region_of(to);
  if (region == nullptr) {
    fail("a copy goes to memory that is not shared");
  }
  for (size_t i = 0; i < bytes; ++i) {
    region->bytes[to - region->start + i].awaits_copy = awaited;
  }
}

}  // namespace cvg::emulated

// --- what -fsanitize=thread calls ---

using cvg::emulated::seen;

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
  seen(from, size, false);
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
