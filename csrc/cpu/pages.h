// Memory pages of results that are about to be written for the first time.
#pragma once

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace cvg::CVG_LEVEL {

// Asks for huge pages where a large array is fresh from the system: taking it page by page of 4 KiB
// costs as much time as a kernel that is bound by memory. Only a hint; pages that exist stay.
inline void expect_writes(void* data, int64_t bytes) {
#ifdef __linux__
  constexpr int64_t huge = int64_t{2} << 20;
  const int64_t at = reinterpret_cast<intptr_t>(data);
  const int64_t first = (at + huge - 1) / huge * huge, end = (at + bytes) / huge * huge;
  if (data && end > first) {
    madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
  }
#else
  static_cast<void>(data);
  static_cast<void>(bytes);
#endif
}

}  // namespace cvg::CVG_LEVEL
