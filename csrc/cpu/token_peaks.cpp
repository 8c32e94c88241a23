// A_k = max (G ∗ softmax_K(sharpness · flow))_k, forward and backward.
//
// The softmax is never held: the flow of the largest logit and the sum of exponentials below it
// are, two numbers a voxel (their one logarithm would cost digits), and the share of a token is
// made anew in the scratch of the thread that smooths it. Flows are subtracted, not logits: a fused
// sharpness · flow − logit is no longer 0 at the largest, and of huge numbers the exponential ends.
#include "cvg/token_peaks.h"

#include <vector>

#include "cpu/scratch.h"

namespace cvg::CVG_LEVEL {

namespace {

template <typename A>
class Peaks {
  static constexpr int64_t lanes = kLanes<A>;

 public:
  explicit Peaks(const TokenPeaksArgs& args)
      : args_(args),
        voxels_(args.frames * args.height * args.width),
        flow_(static_cast<const A*>(args.flow)),
        sharpness_(static_cast<A>(args.sharpness)),
        side_(static_cast<A>(args.side)),
        share_(round_up(voxels_, lanes)),
        work_(round_up(voxels_, lanes)) {}

  // The flow x of the largest s = sharpness · flow, and Σ_k e^{s_k − s(x)}, at a vector of voxels.
  void denominator(int64_t b, int64_t first, A* sums) const {
    const int64_t count = std::min(lanes, voxels_ - first);
    const A sign = sharpness_ < 0 ? A{-1} : A{1};
    Vec<A> most = splat(-std::numeric_limits<A>::infinity());
    for (int64_t k = 0; k < args_.tokens; ++k) {
      most = vmax(sign * some(token(b, k) + first, count), most);
    }
    most *= sign;
    Vec<A> total{};
    for (int64_t k = 0; k < args_.tokens; ++k) {
      total += vexp(sharpness_ * (some(token(b, k) + first, count) - most));
    }
    put(sums + 2 * b * voxels_ + first, count, most);
    put(sums + (2 * b + 1) * voxels_ + first, count, total);
  }

  A peak(int64_t b, int64_t k, const A* sums) {
    const A* smooth = smoothed_share(b, k, sums);
    A most = smooth[0];
    for (int64_t v = 1; v < voxels_; ++v) {
      most = smooth[v] > most || smooth[v] != smooth[v] ? smooth[v] : most;
    }
    return most;
  }

  // The gradient of token k's share, into `to`: Gᵀ of the peak's voxels, which split it evenly.
  void share_vjp(int64_t b, int64_t k, A grad, const A* sums, A* to) {
    const A* smooth = smoothed_share(b, k, sums);
    const A most = *std::max_element(smooth, smooth + voxels_);
    const auto ties = std::count(smooth, smooth + voxels_, most);
    for (int64_t v = 0; v < voxels_; ++v) {
      share_[v] = smooth[v] == most ? grad / static_cast<A>(ties) : A{0};
    }
    const A* grad_share = along_axes<&Peaks::smooth_vjp>();
    std::copy_n(grad_share, voxels_, to);
  }

  // From the gradient of the shares to that of the flow, at a vector of voxels, in place:
  // dflow_k = sharpness · share_k (dshare_k − Σ_j dshare_j share_j).
  void softmax_vjp(int64_t b, int64_t first, const A* sums, A* grad) const {
    const int64_t count = std::min(lanes, voxels_ - first);
    bool any = false;
    for (int64_t k = 0; k < args_.tokens && !any; ++k) {
      const A* g = grad + (b * args_.tokens + k) * voxels_ + first;
      any = std::any_of(g, g + count, [](A x) { return x != 0; });
    }
    if (!any) {
      return;
    }
    Vec<A> mean{};
    for (int64_t k = 0; k < args_.tokens; ++k) {
      mean += share(b, k, first, count, sums) *
              some(grad + (b * args_.tokens + k) * voxels_ + first, count);
    }
    for (int64_t k = 0; k < args_.tokens; ++k) {
      A* g = grad + (b * args_.tokens + k) * voxels_ + first;
      put(g, count, sharpness_ * share(b, k, first, count, sums) * (some(g, count) - mean));
    }
  }

 private:
  const A* token(int64_t b, int64_t k) const { return flow_ + (b * args_.tokens + k) * voxels_; }

  static Vec<A> some(const A* from, int64_t count) {
    if (count == lanes) {
      return load(from);
    }
    Vec<A> x{};
    std::memcpy(&x, from, count * sizeof(A));
    return x;
  }
  static void put(A* to, int64_t count, Vec<A> x) { std::memcpy(to, &x, count * sizeof(A)); }

  // softmax_K(sharpness · flow) of token k at a vector of voxels.
  Vec<A> share(int64_t b, int64_t k, int64_t first, int64_t count, const A* sums) const {
    const Vec<A> most = some(sums + 2 * b * voxels_ + first, count);
    const Vec<A> total = some(sums + (2 * b + 1) * voxels_ + first, count);
    return vexp(sharpness_ * (some(token(b, k) + first, count) - most)) / total;
  }

  const A* smoothed_share(int64_t b, int64_t k, const A* sums) {
    for (int64_t v = 0; v < voxels_; v += lanes) {
      const int64_t count = std::min(lanes, voxels_ - v);
      put(share_ + v, count, share(b, k, v, count, sums));
    }
    return along_axes<&Peaks::smooth>();
  }

  // Applies a pass from share_ along each axis in turn; returns where the result is.
  template <void (Peaks::*pass)(const A*, A*, int64_t, int64_t, int64_t) const>
  const A* along_axes() {
    const int64_t image = args_.height * args_.width;
    (this->*pass)(share_, work_, 1, args_.frames, image);
    (this->*pass)(work_, share_, args_.frames, args_.height, args_.width);
    (this->*pass)(share_, work_, args_.frames * args_.height, args_.width, 1);
    return work_;
  }

  // to_j = (from_j + side (from_{j−1} + from_{j+1})) / (1 + 2 side), reflected at the ends, along
  // the middle of [outer, size, inner].
  void smooth(const A* from, A* to, int64_t outer, int64_t size, int64_t inner) const {
    const A scale = 1 / (1 + 2 * side_);
    for (int64_t o = 0; o < outer; ++o) {
      for (int64_t j = 0; j < size; ++j) {
        const A* here = from + (o * size + j) * inner;
        const A* before = from + (o * size + reflected(j - 1, size)) * inner;
        const A* after = from + (o * size + reflected(j + 1, size)) * inner;
        for (int64_t n = 0; n < inner; ++n) {
          to[(o * size + j) * inner + n] = (here[n] + side_ * (before[n] + after[n])) * scale;
        }
      }
    }
  }

  // The transpose of `smooth`.
  void smooth_vjp(const A* from, A* to, int64_t outer, int64_t size, int64_t inner) const {
    const A scale = 1 / (1 + 2 * side_);
    std::fill_n(to, voxels_, A{0});
    for (int64_t o = 0; o < outer; ++o) {
      for (int64_t j = 0; j < size; ++j) {
        A* here = to + (o * size + j) * inner;
        A* before = to + (o * size + reflected(j - 1, size)) * inner;
        A* after = to + (o * size + reflected(j + 1, size)) * inner;
        for (int64_t n = 0; n < inner; ++n) {
          const A grad = from[(o * size + j) * inner + n] * scale;
          here[n] += grad;
          before[n] += side_ * grad;
          after[n] += side_ * grad;
        }
      }
    }
  }

  static int64_t reflected(int64_t j, int64_t size) {
    if (size == 1) {
      return 0;
    }
    return j < 0 ? 1 : j == size ? size - 2 : j;
  }

  const TokenPeaksArgs& args_;
  const int64_t voxels_;
  const A* flow_;
  const A sharpness_, side_;
  Scratch<A> share_, work_;  // [F, h, w]
};

template <typename A>
void forward(const TokenPeaksArgs& args, A* peaks, A* sums) {
  const int64_t vectors = (args.frames * args.height * args.width + kLanes<A> - 1) / kLanes<A>;
#pragma omp parallel num_threads(args.threads)
  {
    Peaks<A> worker(args);
#pragma omp for
    for (int64_t n = 0; n < args.batch * vectors; ++n) {
      worker.denominator(n / vectors, n % vectors * kLanes<A>, sums);
    }
#pragma omp for
    for (int64_t n = 0; n < args.batch * args.tokens; ++n) {
      peaks[n] = worker.peak(n / args.tokens, n % args.tokens, sums);
    }
  }
}

template <typename A>
void backward(const TokenPeaksArgs& args, const A* grad_peaks, const A* sums, A* grad_flow) {
  const int64_t voxels = args.frames * args.height * args.width;
  const int64_t vectors = (voxels + kLanes<A> - 1) / kLanes<A>;
#pragma omp parallel num_threads(args.threads)
  {
    Peaks<A> worker(args);
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < args.batch * args.tokens; ++n) {
      A* to = grad_flow + n * voxels;
      if (grad_peaks[n] == 0) {
        std::fill_n(to, voxels, A{0});
      } else {
        worker.share_vjp(n / args.tokens, n % args.tokens, grad_peaks[n], sums, to);
      }
    }
#pragma omp for
    for (int64_t n = 0; n < args.batch * vectors; ++n) {
      worker.softmax_vjp(n / vectors, n % vectors * kLanes<A>, sums, grad_flow);
    }
  }
}

}  // namespace

void token_peaks_forward(const TokenPeaksArgs& args, void* peaks, void* sums) {
  by_wide_type(args.dtype, [&](auto zero) {
    using A = decltype(zero);
    forward(args, static_cast<A*>(peaks), static_cast<A*>(sums));
  });
}

void token_peaks_backward(const TokenPeaksArgs& args, const void* grad_peaks, const void* sums,
                          void* grad_flow) {
  by_wide_type(args.dtype, [&](auto zero) {
    using A = decltype(zero);
    backward(args, static_cast<const A*>(grad_peaks), static_cast<const A*>(sums),
             static_cast<A*>(grad_flow));
  });
}

}  // namespace cvg::CVG_LEVEL

const cvg::TokenPeaksKernels& cvg::CVG_OF_LEVEL(token_peaks_kernels)() {
  static const TokenPeaksKernels kernels{CVG_LEVEL::token_peaks_forward,
                                         CVG_LEVEL::token_peaks_backward};
  return kernels;
}
