// Temporal attention on tensor cores, forward: a block is cvg/temporal_tiles_forward.h.
#include "cvg/temporal_attention_cuda.h"
#include "cvg/temporal_tiles_forward.h"
#include "temporal_launch.cuh"
#include "warp.cuh"

namespace cvg {

namespace tiles {

namespace {

template <bool BF16, int R, bool MAPS>
__global__ void __launch_bounds__(threads_of(R), 1)
    temporal_forward(const __grid_constant__ Forward args) {
  CudaTeam<R, ForwardState<CudaWarp, R, MAPS>> team;
  forward_block<decltype(team), BF16, R, MAPS>(team, args, blockIdx.x, gridDim.x);
}

}  // namespace

}  // namespace tiles

cudaError_t temporal_attention_forward(const TemporalArgs& args, const TemporalForwardOut& to,
                                       cudaStream_t stream) {
  tiles::Device device;
  cudaError_t error = tiles::read_device(&device);
  const int64_t positions = args.batch * args.positions;
  if (error != cudaSuccess || positions == 0) {
    return error;
  }
  tiles::with_variant(args, to.maps != nullptr, [&](auto bf16, auto warps, auto maps) {
    tiles::Forward call = tiles::forward_of(args, to);
    call.plan = tiles::forward_plan(call.problem, warps, device.shared_bytes);
    const int64_t blocks =
        tiles::blocks_of(maps ? positions : positions * args.heads, call.plan.groups);
    error = tiles::launch(tiles::temporal_forward<bf16, warps, maps>, call, warps, blocks, stream);
  });
  return error;
}

}  // namespace cvg
