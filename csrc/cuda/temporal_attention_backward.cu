// Temporal attention on tensor cores, backward: a block is cvg/temporal_tiles_backward.h.
#include "cvg/temporal_tiles_backward.h"
#include "temporal_launch.cuh"
#include "warp.cuh"

namespace cvg {

namespace tiles {

namespace {

// Where each block sums a gradient of its own, as many as keep the device busy.
constexpr int kSummingBlocksPerProcessor = 8;

template <bool BF16, int R, bool SUMS>
__global__ void __launch_bounds__(threads_of(R), 1)
    temporal_backward(const __grid_constant__ Backward args) {
  CudaTeam<R, BackwardState<CudaWarp, R, SUMS>> team;
  backward_block<decltype(team), BF16, R, SUMS>(team, args, blockIdx.x, gridDim.x);
}

template <bool BF16, int R>
cudaError_t launch_backward(Backward args, const std::function<float*(int64_t)>& sums,
                            const Device& device, cudaStream_t stream) {
  const Problem& problem = args.problem;
  const int dim = std::max(problem.query.dim, problem.value.dim);
  args.plan = backward_plan(R, groups_of(R), dim, device.shared_bytes);
  int64_t blocks =
      blocks_of(problem.batch * problem.positions * problem.heads, args.plan.groups);
  if (!sums) {
    return launch(temporal_backward<BF16, R, false>, args, R, blocks, stream);
  }
  blocks = std::min<int64_t>(blocks, kSummingBlocksPerProcessor * device.processors);
  args.sums = sums(blocks * args.plan.groups);
  return launch(temporal_backward<BF16, R, true>, args, R, blocks, stream);
}

}  // namespace

}  // namespace tiles

cudaError_t temporal_attention_backward(const TemporalTilesArgs& given,
                                        const TemporalTilesGrads& grads, cudaStream_t stream) {
  const tiles::Backward args{tiles::problem_of(given),
                             {},
                             tiles::rows_of(grads.grad_out, given.value_dim),
                             grads.grad_maps,
                             grads.row_max_grad,
                             tiles::rows_of(grads.query, given.dim),
                             tiles::rows_of(grads.key, given.dim),
                             tiles::rows_of(grads.value, given.value_dim),
                             nullptr};
  tiles::Device device;
  const cudaError_t error = tiles::read_device(&device);
  if (error != cudaSuccess || given.batch * given.positions == 0) {
    return error;
  }
  return tiles::with_warps(given.frames, [&](auto warps) {
    constexpr int kWarps = decltype(warps)::value;
    return given.bf16 ? tiles::launch_backward<true, kWarps>(args, grads.sums, device, stream)
                      : tiles::launch_backward<false, kWarps>(args, grads.sums, device, stream);
  });
}

}  // namespace cvg
