// Exact maximum flow through all positions at once.
#include "bindings_cpu.h"
#include "cvg/coupled_max_flow.h"

namespace cvg::bindings {

void bind_coupled_max_flow(py::module_& m) {
  m.def("coupled_max_flow",
        [](const std::array<int64_t, 4>& sizes, Address cross, Address spatial,
           const std::vector<Address>& temporal, int threads, Address flow, Address side) {
          const auto [batch, tokens, frames, positions] = sizes;
          CoupledMaxFlowArgs args{batch,
                                  tokens,
                                  frames,
                                  positions,
                                  pointer<const double>(cross),
                                  pointer<const double>(spatial),
                                  {},
                                  threads};
          for (const Address hop : temporal) {
            args.temporal.push_back(pointer<const double>(hop));
          }
          py::gil_scoped_release release;
          return coupled_max_flow(args, pointer<double>(flow), pointer<uint8_t>(side));
        });
}

}  // namespace cvg::bindings
