// The algebra that a flow is computed in: chooses the form of the min-max product that is right for
// the numbers at hand, and brings elements into its domain and back.
#pragma once

#include "cpu/min_max_matmul.h"

namespace cvg::CVG_LEVEL {

// Smallest and largest of some elements, and whether one of them is not finite.
template <typename A>
class Range {
 public:
  // Of `count` vectors.
  void cover(const A* elements, int64_t count) {
    for (int64_t n = 0; n < count; ++n) {
      const Vec<A> x = load(elements + n * kLanes<A>);
      low_ = vmin(x, low_);
      high_ = vmax(x, high_);
      odd_ += x - x;  // NaN for NaN and for ±∞
    }
  }
  A low() const { return -horizontal_max<A>(-low_); }
  A high() const { return horizontal_max<A>(high_); }
  bool finite() const { return horizontal_sum<A>(odd_) == 0; }

 private:
  Vec<A> low_ = splat(std::numeric_limits<A>::infinity());
  Vec<A> high_ = splat(-std::numeric_limits<A>::infinity());
  Vec<A> odd_{};
};

template <typename A>
class Algebra {
 public:
  // temperature 0 is the hard form.
  explicit Algebra(double temperature) : temperature_(static_cast<A>(temperature)) {}

  // Chooses the form for elements of this range.
  void choose(const Range<A>& range) {
    finite_ = range.finite();
    offset_ = (range.low() + range.high()) / 2;
    scaled_ = temperature_ > 0 && finite_ && fits(range);
  }

  // Takes in more elements. False: they do not fit the domain, which is another one now, and what
  // has entered it must enter again.
  bool admit(const Range<A>& range) {
    finite_ = finite_ && range.finite();
    if (!scaled_ || (finite_ && fits(range))) {
      return true;
    }
    scaled_ = false;
    return false;
  }

  // Brings `count` vectors of elements into the domain of the form, and back.
  void enter(A* elements, int64_t count) const {
    if (temperature_ > 0) {
      each(elements, count, [this](Vec<A> x) {
        return scaled_ ? vexp((offset_ - x) / temperature_) : x / temperature_;
      });
    }
  }
  void leave(A* elements, int64_t count) const {
    if (temperature_ > 0) {
      each(elements, count, [this](Vec<A> x) {
        return scaled_ ? offset_ - temperature_ * vlog(x) : temperature_ * x;
      });
    }
  }

  // C = A ⊙ B.
  template <bool kOneForAll>
  void multiply(const A* a, const A* b, int64_t rows, int64_t depth, int64_t columns, A* c) const {
    if (scaled_) {
      product<Scaled<A>, kOneForAll, A>(a, b, rows, depth, columns, nullptr, c);
    } else if (finite_ || temperature_ > 0) {
      product<Hard<A, false>, kOneForAll, A>(a, b, rows, depth, columns, nullptr, c);
      if (temperature_ > 0) {
        product<Soft<A>, kOneForAll, A>(a, b, rows, depth, columns, c, c);
      }
    } else {
      product<Hard<A, true>, kOneForAll, A>(a, b, rows, depth, columns, nullptr, c);
    }
  }

  // dA += …, dB = …, each where it is given a place. `grad`, of C, is used up.
  template <bool kOneForAll>
  void gradient(const A* a, const A* b, const A* c, A* grad, int64_t rows, int64_t depth,
                int64_t columns, A* grad_a, A* grad_b) const {
    if (scaled_) {
      for (int64_t n = 0; n < rows * columns * kLanes<A>; n += kLanes<A>) {
        store(grad + n, load(grad + n) * load(c + n));
      }
      product_gradient<Scaled<A>, kOneForAll>(a, b, c, grad, rows, depth, columns, grad_a, grad_b);
    } else if (temperature_ > 0) {
      product_gradient<Soft<A>, kOneForAll>(a, b, c, grad, rows, depth, columns, grad_a, grad_b);
    } else {
      divide_among_ties<kOneForAll>(a, b, c, rows, depth, columns, grad);
      product_gradient<Hard<A, false>, kOneForAll>(a, b, c, grad, rows, depth, columns, grad_a,
                                                   grad_b);
    }
  }

 private:
  bool fits(const Range<A>& range) const {
    const A reach = static_cast<A>(kScaledRange / 2) * temperature_;
    return range.low() >= offset_ - reach && range.high() <= offset_ + reach;
  }

  template <typename Change>
  static void each(A* elements, int64_t count, Change change) {
    for (int64_t n = 0; n < count * kLanes<A>; n += kLanes<A>) {
      store(elements + n, change(load(elements + n)));
    }
  }

  A temperature_, offset_ = 0;
  bool scaled_ = false, finite_ = true;
};

}  // namespace cvg::CVG_LEVEL
