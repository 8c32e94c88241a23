// Temporal attention on tensor cores, forward: a block is cvg/temporal_tiles_forward.h.
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

template <bool BF16, int R>
cudaError_t launch_forward(Forward args, const Device& device, cudaStream_t stream) {
  const Problem& problem = args.problem;
  const int64_t positions = problem.batch * problem.positions;
  const int64_t sequences = args.maps ? positions : positions * problem.heads;
  const int dim = std::max(problem.query.dim, problem.value.dim);
  args.plan = forward_plan(R, groups_of(R), dim, device.shared_bytes);
  const auto kernel = args.maps ? temporal_forward<BF16, R, true> : temporal_forward<BF16, R, false>;
  return launch(kernel, args, R, blocks_of(sequences, args.plan.groups), stream);
}

}  // namespace

}  // namespace tiles

cudaError_t temporal_attention_forward(const TemporalTilesArgs& given, const Tensor5& out,
                                       float* maps, cudaStream_t stream) {
  const tiles::Forward args{tiles::problem_of(given), {}, tiles::rows_of(out, given.value_dim),
                            maps};
  tiles::Device device;
  const cudaError_t error = tiles::read_device(&device);
  if (error != cudaSuccess || given.batch * given.positions == 0) {
    return error;
  }
  return tiles::with_warps(given.frames, [&](auto warps) {
    constexpr int kWarps = decltype(warps)::value;
    return given.bf16 ? tiles::launch_forward<true, kWarps>(args, device, stream)
                      : tiles::launch_forward<false, kWarps>(args, device, stream);
  });
}

}  // namespace cvg
