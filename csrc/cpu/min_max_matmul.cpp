// The min-max product C = A ⊙ B of whole matrices, forward and backward.
//
// Lanes are neighbouring columns. The forward pass and dA go by panels of rows, each task with all
// of B packed; dB goes by panels of columns, each task with all of A packed. So nothing is added up
// across tasks.
#include "cvg/min_max_matmul.h"

#include "cpu/algebra.h"
#include "cpu/scratch.h"

namespace cvg::CVG_LEVEL {

namespace {

constexpr int64_t kRowPanel = 32;
constexpr int64_t kColumnPanel = 4;  // vectors

template <typename A>
class MinMaxMatmulPanel {
  static constexpr int64_t lanes = kLanes<A>;

 public:
  MinMaxMatmulPanel(const MinMaxMatmulArgs& args, int64_t rows, int64_t vectors)
      : args_(args),
        algebra_(args.temperature),
        a_(round_up(rows * args.depth, lanes)),
        b_(args.depth * vectors * lanes),
        c_(rows * vectors * lanes),
        grad_(rows * vectors * lanes),
        grad_a_(rows * args.depth),
        grad_b_(args.depth * vectors * lanes) {}

  // C of the panel that begins at (row, column), stored.
  void forward(int64_t b, int64_t row, int64_t rows, int64_t column, int64_t columns, A* to) {
    product_of(b, row, rows, column, columns);
    algebra_.leave(c_, rows * vectors_);
    for (int64_t i = 0; i < rows; ++i) {
      std::copy_n(c_ + i * vectors_ * lanes, columns,
                  to + ((b * args_.rows + row + i) * args_.columns + column));
    }
  }

  // dA of a panel of rows if `to_a`, dB of a panel of columns if `to_b`.
  void backward(int64_t b, int64_t row, int64_t rows, int64_t column, int64_t columns,
                const A* grad, A* to_a, A* to_b) {
    product_of(b, row, rows, column, columns);
    const Tensor4 whole{grad, {args_.rows * args_.columns, args_.columns, 1, 0}};
    pack_vectors(whole, b, row, rows, column, columns, true, grad_);
    std::fill_n(static_cast<A*>(grad_a_), rows * args_.depth, A{0});
    algebra_.template gradient<true>(a_, b_, c_, grad_, rows, args_.depth, vectors_,
                                     to_a ? static_cast<A*>(grad_a_) : nullptr,
                                     to_b ? static_cast<A*>(grad_b_) : nullptr);
    if (to_a) {
      std::copy_n(static_cast<A*>(grad_a_), rows * args_.depth,
                  to_a + (b * args_.rows + row) * args_.depth);
    }
    if (to_b) {
      for (int64_t r = 0; r < args_.depth; ++r) {
        std::copy_n(grad_b_ + r * vectors_ * lanes, columns,
                    to_b + ((b * args_.depth + r) * args_.columns + column));
      }
    }
  }

 private:
  void product_of(int64_t b, int64_t row, int64_t rows, int64_t column, int64_t columns) {
    vectors_ = (columns + lanes - 1) / lanes;
    const Tensor4& from = args_.a;
    const A* base = static_cast<const A*>(from.data) + b * from.stride[0];
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t r = 0; r < args_.depth; ++r) {
        a_[i * args_.depth + r] = base[(row + i) * from.stride[1] + r * from.stride[2]];
      }
    }
    const int64_t count = round_up(rows * args_.depth, lanes) / lanes;
    std::fill(a_ + rows * args_.depth, a_ + count * lanes, a_[0]);
    pack_vectors(args_.b, b, 0, args_.depth, column, columns, false, b_);
    Range<A> range;
    range.cover(a_, count);
    range.cover(b_, args_.depth * vectors_);
    algebra_.choose(range);
    algebra_.enter(a_, count);
    algebra_.enter(b_, args_.depth * vectors_);
    algebra_.template multiply<true>(a_, b_, rows, args_.depth, vectors_, c_);
  }

  // to[r][v][lane] = from[b, row + r, column + v·lanes + lane]; lanes beyond the last column repeat
  // it, or are 0.
  void pack_vectors(const Tensor4& from, int64_t b, int64_t row, int64_t rows, int64_t column,
                    int64_t columns, bool zeros, A* to) const {
    for (int64_t r = 0; r < rows; ++r) {
      const A* source = static_cast<const A*>(from.data) + b * from.stride[0] +
                        (row + r) * from.stride[1] + column * from.stride[2];
      A* vectors = to + r * vectors_ * lanes;
      for (int64_t n = 0; n < columns; ++n) {
        vectors[n] = source[n * from.stride[2]];
      }
      std::fill(vectors + columns, vectors + vectors_ * lanes, zeros ? A{0} : vectors[columns - 1]);
    }
  }

  const MinMaxMatmulArgs& args_;
  Algebra<A> algebra_;
  Scratch<A> a_, b_, c_;  // [rows][depth] numbers, [depth][v] and [rows][v] vectors
  Scratch<A> grad_, grad_a_, grad_b_;
  int64_t vectors_ = 0;
};

// Runs `task(worker, b, first, count)` for panels of `step` out of `size`.
template <typename A, typename Task>
void for_panels(const MinMaxMatmulArgs& args, int64_t size, int64_t step, int64_t rows,
                int64_t vectors, Task task) {
  const int64_t panels = (size + step - 1) / step;
#pragma omp parallel num_threads(args.threads)
  {
    MinMaxMatmulPanel<A> worker(args, rows, vectors);
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < args.batch * panels; ++n) {
      const int64_t first = n % panels * step;
      task(worker, n / panels, first, std::min(step, size - first));
    }
  }
}

template <typename A>
void forward(const MinMaxMatmulArgs& args, void* c) {
  const int64_t vectors = (args.columns + kLanes<A> - 1) / kLanes<A>;
  for_panels<A>(args, args.rows, kRowPanel, kRowPanel, vectors,
                [&](MinMaxMatmulPanel<A>& worker, int64_t b, int64_t first, int64_t count) {
                  worker.forward(b, first, count, 0, args.columns, static_cast<A*>(c));
                });
}

template <typename A>
void backward(const MinMaxMatmulArgs& args, const void* grad, void* grad_a, void* grad_b) {
  const A* arriving = static_cast<const A*>(grad);
  const int64_t vectors = (args.columns + kLanes<A> - 1) / kLanes<A>;
  if (grad_a) {
    for_panels<A>(args, args.rows, kRowPanel, kRowPanel, vectors,
                  [&](MinMaxMatmulPanel<A>& worker, int64_t b, int64_t first, int64_t count) {
                    worker.backward(b, first, count, 0, args.columns, arriving,
                                    static_cast<A*>(grad_a), nullptr);
                  });
  }
  if (grad_b) {
    for_panels<A>(args, args.columns, kColumnPanel * kLanes<A>, args.rows, kColumnPanel,
                  [&](MinMaxMatmulPanel<A>& worker, int64_t b, int64_t first, int64_t count) {
                    worker.backward(b, 0, args.rows, first, count, arriving, nullptr,
                                    static_cast<A*>(grad_b));
                  });
  }
}

}  // namespace

void min_max_matmul(const MinMaxMatmulArgs& args, void* c) {
  by_wide_type(args.dtype, [&](auto zero) { forward<decltype(zero)>(args, c); });
}

void min_max_matmul_backward(const MinMaxMatmulArgs& args, const void* grad, void* grad_a,
                             void* grad_b) {
  by_wide_type(args.dtype,
               [&](auto zero) { backward<decltype(zero)>(args, grad, grad_a, grad_b); });
}

}  // namespace cvg::CVG_LEVEL

const cvg::MinMaxMatmulKernels& cvg::CVG_OF_LEVEL(min_max_matmul_kernels)() {
  static const MinMaxMatmulKernels kernels{CVG_LEVEL::min_max_matmul,
                                           CVG_LEVEL::min_max_matmul_backward};
  return kernels;
}
