// Exact maximum flow through all positions of a video at once, on the CPU: what a caller hands
// over. The graph stands in python_ref/coupled_max_flow.py.
#pragma once

#include <cstdint>
#include <vector>

namespace cvg {

// All contiguous; hops have their skip connections mixed in.
struct CoupledMaxFlowArgs {
  int64_t batch, tokens, frames, positions;
  const double* cross;                  // [B, K, F, L]
  const double* spatial;                // [B, F, L, L] or nullptr, row = attending position
  std::vector<const double*> temporal;  // [B, L, F, F], row = attending frame
  int threads;
};

// flow [B, K]; side [B, K, layers, F, L], 1 on the token's side of the minimum cut. False: some
// capacity is NaN, infinite or negative, and nothing was computed.
bool coupled_max_flow(const CoupledMaxFlowArgs& args, double* flow, uint8_t* side);

}  // namespace cvg
