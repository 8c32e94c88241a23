// A warp's instructions as the PTX manual defines them, all 32 lanes at once.
#pragma once

#include <cstdint>

namespace cvg::emulated {

struct Registers {
  uint32_t at[4];
};

// ldmatrix .x4: register r of a lane is from part r, whose rows start where lanes 8r … 8r + 7 say.
void load_matrix(Registers* to, const uint16_t* const* rows, bool transposed);

// mma .m16n8k16 .row .col: sums += A B with sums in float; B is the registers `first` and
// `first` + 1 of y. sums[lane] points to four.
void mma(float* const* sums, const Registers* x, const Registers* y, int first, bool bf16);

// Two numbers as 16-bit elements, rounded to nearest even.
uint32_t pack(float low, float high, bool bf16);

}  // namespace cvg::emulated
