// Guidance as a sum of differences between predictions: one pass over all of them.
//
//   mix = p₀ + s₁ (p₁ − p₀) + … + sₙ (pₙ − pₙ₋₁),   and with rescale φ  mix · (φ · std(pₙ) /
//   std(mix) + 1 − φ)
//
// Products are rounded before they are added (this file is compiled without contraction to fused
// multiply-adds), so that float32 results are those of the expression written out in PyTorch. A
// rescale takes a pass of its own before, for the moments of mix and pₙ.
#include "cvg/guidance_mix.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cpu/tiles.h"

namespace cvg::CVG_LEVEL {

namespace {

constexpr int64_t kBlock = 2048;       // numbers summed at once: they stay in a core's L1
constexpr int64_t kPerThread = 32768;  // numbers that make up for waking a thread

// Sums of x and x² of mix and of the last prediction.
struct Moments {
  double mix = 0, mix2 = 0, last = 0, last2 = 0;
};

template <typename T>
class Mix {
  using A = Wide<T>;

 public:
  Mix(const GuidanceMixArgs& args, void* out)
      : args_(args),
        out_(static_cast<T*>(out)),
        blocks_((args.elements + kBlock - 1) / kBlock),
        tasks_(args.batch * blocks_),
        threads_(static_cast<int>(
            std::clamp<int64_t>(args.batch * args.elements / kPerThread, 1, args.threads))) {}

  void run() const {
    const std::vector<A> factors = args_.rescale ? rescale_factors() : std::vector<A>();
#pragma omp parallel for num_threads(threads_) schedule(static)
    for (int64_t task = 0; task < tasks_; ++task) {
      const int64_t sample = task / blocks_, first = task % blocks_ * kBlock;
      T* out = out_ + sample * args_.elements + first;
      if constexpr (std::is_same_v<T, A>) {
        if (factors.empty()) {
          sum(sample, first, out);
          continue;
        }
      }
      A mix[kBlock];
      const int64_t count = sum(sample, first, mix);
      const A factor = factors.empty() ? A{1} : factors[sample];
      for (int64_t j = 0; j < count; ++j) {
        out[j] = narrow<T>(mix[j] * factor);
      }
    }
  }

 private:
  const T* prediction(size_t i, int64_t sample, int64_t first) const {
    return static_cast<const T*>(args_.predictions[i]) + sample * args_.elements + first;
  }

  // One block of the mix; returns how many numbers it has.
  int64_t sum(int64_t sample, int64_t first, A* mix) const {
    const int64_t count = std::min(kBlock, args_.elements - first);
    const size_t n = args_.predictions.size() - 1;
    const double* scales = args_.scales.data() + sample;  // of step i: scales[i · batch]
    size_t i = 0;
    while (i < n && scales[i * args_.batch] == 1) {
      ++i;  // the sum so far is pᵢ itself
    }
    switch (std::min<size_t>(n - i, 2)) {
      case 0:
        start<0>(i, sample, first, count, mix);
        break;
      case 1:
        start<1>(i, sample, first, count, mix);
        break;
      default:
        start<2>(i, sample, first, count, mix);
    }
    for (i += 2; i < n; ++i) {
      const A scale = static_cast<A>(scales[i * args_.batch]);
      const T *before = prediction(i, sample, first), *after = prediction(i + 1, sample, first);
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) {
        mix[j] += scale * (widen(after[j]) - widen(before[j]));
      }
    }
    return count;
  }

  // pᵢ and the steps that follow, up to two in registers: classifier-free and temporal guidance.
  template <int kSteps>
  void start(size_t i, int64_t sample, int64_t first, int64_t count, A* mix) const {
    const T* p[kSteps + 1];
    A scale[kSteps + 1];
    for (int k = 0; k <= kSteps; ++k) {
      p[k] = prediction(i + k, sample, first);
      scale[k] = k < kSteps ? static_cast<A>(args_.scales[(i + k) * args_.batch + sample]) : A{0};
    }
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      A before = widen(p[0][j]), total = before;
      for (int k = 0; k < kSteps; ++k) {
        const A after = widen(p[k + 1][j]);
        total += scale[k] * (after - before);
        before = after;
      }
      mix[j] = total;
    }
  }

  // φ · std(pₙ) / std(mix) + 1 − φ of each sample. Moments are summed in blocks and the blocks in
  // order, whatever the number of threads.
  std::vector<A> rescale_factors() const {
    std::vector<Moments> parts(tasks_);
#pragma omp parallel for num_threads(threads_) schedule(static)
    for (int64_t task = 0; task < tasks_; ++task) {
      const int64_t sample = task / blocks_, first = task % blocks_ * kBlock;
      A mix[kBlock];
      const int64_t count = sum(sample, first, mix);
      const T* last = prediction(args_.predictions.size() - 1, sample, first);
      double m = 0, m2 = 0, l = 0, l2 = 0;
#pragma omp simd reduction(+ : m, m2, l, l2)
      for (int64_t j = 0; j < count; ++j) {
        const double x = mix[j], y = widen(last[j]);
        m += x;
        m2 += x * x;
        l += y;
        l2 += y * y;
      }
      parts[task] = {m, m2, l, l2};
    }
    std::vector<A> factors(args_.batch);
    for (int64_t sample = 0; sample < args_.batch; ++sample) {
      Moments all;
      for (int64_t block = 0; block < blocks_; ++block) {
        const Moments& part = parts[sample * blocks_ + block];
        all.mix += part.mix;
        all.mix2 += part.mix2;
        all.last += part.last;
        all.last2 += part.last2;
      }
      const double n = static_cast<double>(args_.elements);
      const double mix_variance = std::max(all.mix2 - all.mix * all.mix / n, 0.0);
      const double last_variance = std::max(all.last2 - all.last * all.last / n, 0.0);
      const double ratio = std::sqrt(last_variance / mix_variance);
      factors[sample] = static_cast<A>(args_.rescale * ratio + (1 - args_.rescale));
    }
    return factors;
  }

  const GuidanceMixArgs& args_;
  T* out_;
  int64_t blocks_, tasks_;
  int threads_;
};

void guidance_mix(const GuidanceMixArgs& args, void* out) {
  switch (args.dtype) {
    case DType::f32:
      return Mix<float>(args, out).run();
    case DType::f64:
      return Mix<double>(args, out).run();
    case DType::bf16:
      return Mix<BFloat16>(args, out).run();
    case DType::f16:
      return Mix<_Float16>(args, out).run();
  }
}

}  // namespace

}  // namespace cvg::CVG_LEVEL

const cvg::GuidanceMixKernels& cvg::CVG_OF_LEVEL(guidance_mix_kernels)() {
  static const GuidanceMixKernels kernels{cvg::CVG_LEVEL::guidance_mix};
  return kernels;
}
