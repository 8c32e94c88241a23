// Temporal attention on tensor cores, backward: a block is cvg/temporal_tiles_backward.h.
#include "cvg/temporal_attention_cuda.h"
#include "cvg/temporal_tiles_backward.h"
#include "temporal_launch.cuh"
#include "warp.cuh"

namespace cvg {

namespace tiles {

namespace {

template <bool BF16, int R, bool SUMS>
__global__ void __launch_bounds__(threads_of(R), 1)
    temporal_backward(const __grid_constant__ Backward args) {
  CudaTeam<R, BackwardState<CudaWarp, R, SUMS>> team;
  backward_block<decltype(team), BF16, R, SUMS>(team, args, blockIdx.x, gridDim.x);
}

// Each group of warps sums the gradient of `added` in registers: as few blocks as keep the device
// busy.
int64_t summing_blocks(int64_t sequences, int groups, const Device& device) {
  constexpr int kBlocksPerProcessor = 8;
  return std::min<int64_t>(blocks_of(sequences, groups), kBlocksPerProcessor * device.processors);
}

}  // namespace

}  // namespace tiles

cudaError_t temporal_attention_partial_sums(int64_t sequences, int frames, int64_t* count) {
  tiles::Device device;
  const cudaError_t error = tiles::read_device(&device);
  tiles::with_warps(frames, [&](auto warps) {
    constexpr int kGroups = tiles::groups_of(warps);
    *count = tiles::summing_blocks(sequences, kGroups, device) * kGroups;
  });
  return error;
}

cudaError_t temporal_attention_backward(const TemporalArgs& args, const TemporalBackwardIn& in,
                                        const TemporalBackwardOut& to, cudaStream_t stream) {
  tiles::Device device;
  cudaError_t error = tiles::read_device(&device);
  const int64_t sequences = args.batch * args.positions * args.heads;
  if (error != cudaSuccess || sequences == 0) {
    return error;
  }
  tiles::with_variant(args, to.added != nullptr, [&](auto bf16, auto warps, auto sums) {
    tiles::Backward call = tiles::backward_of(args, in, to);
    call.plan = tiles::backward_plan(call.problem, warps, device.shared_bytes);
    const int groups = call.plan.groups;
    const int64_t blocks = sums ? tiles::summing_blocks(sequences, groups, device)
                                : tiles::blocks_of(sequences, groups);
    error = tiles::launch(tiles::temporal_backward<bf16, warps, sums>, call, warps, blocks, stream);
  });
  return error;
}

}  // namespace cvg
