// A warp and a block as policies of the tile algorithms (cvg/tiles.h): the instructions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cvg/tiles.h"

namespace cvg::tiles {

struct CudaWarp {
  // Each thread is one lane and holds what is its own.
  template <class T>
  struct Per {
    T own;
    CVG_TILE T& operator[](int) { return own; }
    CVG_TILE const T& operator[](int) const { return own; }
  };

  template <class F>
  static CVG_TILE void each(F f) {
    f(static_cast<int>(threadIdx.x) % kLanes);
  }

  static CVG_TILE unsigned shared_address(const Half* at) {
    return static_cast<unsigned>(__cvta_generic_to_shared(at));
  }

  static CVG_TILE void copy16(Half* to, const Half* from, bool read) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(read ? 16 : 0)
                 : "memory");
  }
  static CVG_TILE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

  template <bool TRANSPOSED, class F>
  static CVG_TILE void load_matrix(Per<Quad>& to, F address) {
    const unsigned from = shared_address(address(static_cast<int>(threadIdx.x) % kLanes));
    uint32_t* r = to.own.at;
    if (TRANSPOSED) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                   : "r"(from)
                   : "memory");
    } else {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                   : "r"(from)
                   : "memory");
    }
  }

  // sums += A B, 16 × 16 by 16 × 8; B is two registers of y.
  template <bool BF16, int FIRST, class F>
  static CVG_TILE void mma(F sums, const Per<Quad>& x, const Per<Quad>& y) {
    float* c = sums(0);
    const uint32_t *a = x.own.at, *b = y.own.at + FIRST;
    if (BF16) {
      asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
          "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
      asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
          "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
  }

  template <bool BF16>
  static CVG_TILE uint32_t pack(float low, float high) {
    uint32_t word;
    if (BF16) {
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    } else {
      asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    }
    return word;
  }

  static CVG_TILE float exp2(float x) { return ::exp2f(x); }

  // Words from the lane whose number differs in the bits of `mask`.
  static CVG_TILE Per<uint32_t> exchange(const Per<uint32_t>& x, int mask) {
    return {__shfl_xor_sync(~0u, x.own, mask)};
  }
  template <class T>
  static CVG_TILE Per<T> exchange(const Per<T>& x, int mask) {
    return {{__shfl_xor_sync(~0u, x.own.at[0], mask), __shfl_xor_sync(~0u, x.own.at[1], mask)}};
  }
};

// R warps a sequence. A warp alone with its sequence waits for no other.
template <int R, class State>
struct CudaTeam {
  using Warp = CudaWarp;

  State own;

  CVG_TILE Half* memory() const {
    extern __shared__ uint4 shared[];
    return reinterpret_cast<Half*>(shared);
  }
  template <class F>
  CVG_TILE void each(F f) {
    f(static_cast<int>(threadIdx.x) / kLanes, own);
  }
  CVG_TILE void sync() const {
    if (R == 1) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }
};

}  // namespace cvg::tiles
