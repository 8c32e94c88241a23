// Guidance as a sum of differences between predictions.
#include <stdexcept>

#include "bindings_cpu.h"
#include "cvg/guidance_mix.h"

namespace cvg::bindings {

void bind_guidance_mix(py::module_& m) {
  static const GuidanceMixKernels& kernels = CVG_AT_LEVEL(guidance_mix_kernels);
  m.def("guidance_mix",
        [](int64_t batch, int64_t elements, int dtype, const std::vector<Address>& predictions,
           std::vector<double> scales, double rescale, int threads, Address out) {
          GuidanceMixArgs args{batch,   elements, static_cast<DType>(dtype), {}, std::move(scales),
                               rescale, threads};
          for (const Address address : predictions) {
            args.predictions.push_back(pointer<const void>(address));
          }
          if (args.predictions.empty() ||
              args.scales.size() != (args.predictions.size() - 1) * static_cast<size_t>(batch)) {
            throw std::invalid_argument("scales must hold a number for each step and sample");
          }
          py::gil_scoped_release release;
          kernels.mix(args, pointer<void>(out));
        });
}

}  // namespace cvg::bindings
