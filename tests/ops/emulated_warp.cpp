#include "emulated_warp.h"

#include <cstring>

#include "cvg/dtype.h"
#include "emulated_lanes.h"

namespace cvg::emulated {

namespace {

float widened(bool bf16, uint16_t bits) {
  _Float16 half;
  std::memcpy(&half, &bits, sizeof half);
  return bf16 ? widen(BFloat16{bits}) : widen(half);
}

}  // namespace

void load_matrix(Registers* to, const uint16_t* const* rows, bool transposed) {
  for (int lane = 0; lane < kWarp; ++lane) {
    if (reinterpret_cast<uintptr_t>(rows[lane]) % 16 != 0) {
      fail("ldmatrix: a row is not aligned");
    }
    read_by_warp(rows[lane], 16);
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int r = 0; r < 4; ++r) {
      uint32_t word = 0;
      for (int i = 0; i < 2; ++i) {
        const int row = transposed ? lane % 4 * 2 + i : lane / 4;
        const int column = transposed ? lane / 4 : lane % 4 * 2 + i;
        word |= uint32_t{rows[8 * r + row][column]} << 16 * i;
      }
      to[lane].at[r] = word;
    }
  }
}

void mma(float* const* sums, const Registers* x, const Registers* y, int first, bool bf16) {
  float a[16][16], b[16][8];
  const auto half_of = [&](uint32_t word, int i) {
    return widened(bf16, static_cast<uint16_t>(word >> 16 * (i % 2)));
  };
  for (int lane = 0; lane < kWarp; ++lane) {
    const int group = lane / 4, thread = lane % 4;
    for (int i = 0; i < 8; ++i) {
      const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
      const int column = thread * 2 + (i & 1) + (i >= 4 ? 8 : 0);
      a[row][column] = half_of(x[lane].at[i / 2], i);
    }
    for (int i = 0; i < 4; ++i) {
      const int row = thread * 2 + (i & 1) + (i >= 2 ? 8 : 0);
      b[row][group] = half_of(y[lane].at[first + i / 2], i);
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = i < 2 ? lane / 4 : lane / 4 + 8, column = lane % 4 * 2 + (i & 1);
      for (int k = 0; k < 16; ++k) {
        sums[lane][i] += a[row][k] * b[k][column];
      }
    }
  }
}

uint32_t pack(float low, float high, bool bf16) {
  const auto bits_of = [&](float x) {
    const _Float16 half = narrow<_Float16>(x);
    uint16_t bits;
    std::memcpy(&bits, &half, sizeof bits);
    return bf16 ? narrow<BFloat16>(x).bits : bits;
  };
  return bits_of(low) | uint32_t{bits_of(high)} << 16;
}

}  // namespace cvg::emulated
