// The emulated kernels of temporal attention as a module of Python; test_temporal_attention_cuda.py
// builds it.
#include "emulated_lanes.h"
#include "temporal_calls.h"
#include "temporal_tiles_emulated.h"

PYBIND11_MODULE(temporal_tiles_on_cpu, m) {
  using namespace cvg;
  using Where = std::array<uintptr_t, 5>;
  const auto launch = [](const Where& at) {
    const auto number = [&](int i) { return static_cast<int64_t>(at[i]); };
    return emulated::Launch{number(0), number(1), number(2), {at[3], at[4]}};
  };
  m.def("partial_sums", emulated::temporal_partial_sums);
  m.def("barriers_met", emulated::barriers_met);
  m.def("waits_met", emulated::waits_met);
  bindings::bind_temporal_calls<Where>(
      m,
      [=](const TemporalArgs& args, const TemporalForwardOut& to, const Where& where) {
        emulated::temporal_forward(args, to, launch(where));
      },
      [=](const TemporalArgs& args, const TemporalBackwardIn& in, const TemporalBackwardOut& to,
          const Where& where) { emulated::temporal_backward(args, in, to, launch(where)); });
}
