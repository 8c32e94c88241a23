// The min-max product of matrices.
#include "bindings_cpu.h"
#include "cvg/min_max_matmul.h"

namespace cvg::bindings {

namespace {

MinMaxMatmulArgs min_max_matmul_args(const std::array<int64_t, 4>& sizes, int dtype,
                                     const Strided4& a, const Strided4& b, double temperature,
                                     int threads) {
  const auto [batch, rows, depth, columns] = sizes;
  return {batch,     rows,      depth,       columns, static_cast<DType>(dtype),
          tensor(a), tensor(b), temperature, threads};
}

}  // namespace

void bind_min_max_matmul(py::module_& m) {
  static const MinMaxMatmulKernels& kernels = CVG_AT_LEVEL(min_max_matmul_kernels);

  m.def("min_max_matmul", [](const std::array<int64_t, 4>& sizes, int dtype, const Strided4& a,
                             const Strided4& b, double temperature, int threads, Address to) {
    const auto args = min_max_matmul_args(sizes, dtype, a, b, temperature, threads);
    py::gil_scoped_release release;
    kernels.forward(args, pointer<void>(to));
  });
  m.def("min_max_matmul_backward",
        [](const std::array<int64_t, 4>& sizes, int dtype, const Strided4& a, const Strided4& b,
           double temperature, int threads, Address grad, Address grad_a, Address grad_b) {
          const auto args = min_max_matmul_args(sizes, dtype, a, b, temperature, threads);
          py::gil_scoped_release release;
          kernels.backward(args, pointer<void>(grad), pointer<void>(grad_a), pointer<void>(grad_b));
        });
}

}  // namespace cvg::bindings
