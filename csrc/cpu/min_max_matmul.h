// The min-max product on packed blocks, C[rows][columns] = A[rows][depth] ⊙ B[depth][columns],
// and its gradient. An element of B and C is a vector (of positions, or of neighbouring columns);
// one of A is a vector too, or a number that serves all lanes.
//
// A form says what ⊙ means and in which domain the elements are kept:
//
//   Hard     C = max_r min(A_r, B_r)
//   Soft     C = T log Σ_r exp(−log(e^{−A_r/T} + e^{−B_r/T})), the elements divided by T
//   Scaled   the same in the exponential domain: an element x stands as e^{(o − x)/T} with an
//   offset
//            o, so that  1/C = Σ_r 1/(A_r + B_r)  and no exponential is left. Its gradient is
//            dA_r = A_r q², q = 1/(A_r + B_r), times C dC. It serves where all elements lie within
//            kScaledRange · T of each other, which attention at T = 0.01 always does.
#pragma once

#include <cstdint>

#include "cpu/simd.h"

namespace cvg::CVG_LEVEL {

constexpr double kScaledRange = 120;  // e^±60: squares of it are still floats, with room for sums

template <typename A>
struct Gradients {
  Vec<A> a, b;
};

// kNaN: there is a NaN among the elements, and it must reach the result as torch has it.
template <typename A, bool kNaN>
struct Hard {
  static Vec<A> narrow(Vec<A> a, Vec<A> b) { return kNaN ? (a == a ? vmin(a, b) : a) : vmin(a, b); }
  static constexpr A kNothing = -std::numeric_limits<A>::infinity();
  static Vec<A> step(Vec<A> most, Vec<A> a, Vec<A> b, Vec<A>) {
    return kNaN ? (most == most ? vmax(most, narrow(a, b)) : most) : vmax(most, narrow(a, b));
  }
  static Vec<A> finish(Vec<A> most, Vec<A>) { return most; }

  // Widest paths that tie share the gradient, and so do the edges of one path.
  static Vec<A> hits(Vec<A> a, Vec<A> b, Vec<A> c) {
    return narrow(a, b) == c ? splat(A(1)) : splat(A(0));
  }
  static Gradients<A> vjp(Vec<A> a, Vec<A> b, Vec<A> c, Vec<A> grad) {
    const Vec<A> whole = narrow(a, b) == c ? grad : splat(A(0));
    const Vec<A> to_a = a < b ? whole : (a == b ? whole * A(0.5) : splat(A(0)));
    return {to_a, whole - to_a};
  }
  static Vec<A> weight(Vec<A>) { return splat(A(1)); }
};

template <typename A>
struct Soft {
  static constexpr A kNothing = 0;
  // e^{y − x}; what is cut off is e^{−40} of the sum it stands in.
  static Vec<A> below(Vec<A> y, Vec<A> x) {
    const Vec<A> distance = y - x;
    return vexp(distance > splat(A(40)) ? splat(A(40)) : distance);
  }
  static Vec<A> step(Vec<A> sum, Vec<A> a, Vec<A> b, Vec<A> most) {
    return sum + reciprocal(below(most, a) + below(most, b));
  }
  static Vec<A> finish(Vec<A> sum, Vec<A> most) { return most + vlog(sum); }

  static Gradients<A> vjp(Vec<A> a, Vec<A> b, Vec<A> c, Vec<A> grad) {
    const Vec<A> to_a = below(c, a), to_b = below(c, b);
    const Vec<A> q = reciprocal(to_a + to_b);
    const Vec<A> whole = q * q * grad;
    return {whole * to_a, whole * to_b};
  }
  static Vec<A> weight(Vec<A>) { return splat(A(1)); }
};

template <typename A>
struct Scaled {
  static constexpr A kNothing = 0;
  static Vec<A> step(Vec<A> sum, Vec<A> a, Vec<A> b, Vec<A>) { return sum + reciprocal(a + b); }
  static Vec<A> finish(Vec<A> sum, Vec<A>) { return reciprocal(sum); }

  static Gradients<A> vjp(Vec<A> a, Vec<A> b, Vec<A>, Vec<A> grad) {
    const Vec<A> q = reciprocal(a + b);
    const Vec<A> whole = q * (q * grad);
    return {whole, whole};
  }
  static Vec<A> weight(Vec<A> x) { return x; }
};

// A number for all lanes, or a vector.
template <bool kOneForAll, typename A>
inline Vec<A> element(const A* a, int64_t at) {
  return kOneForAll ? splat(a[at]) : load(a + at * kLanes<A>);
}

template <typename A>
constexpr int kBlockRows = CVG_VECTOR_BYTES == 64 ? 4 : 2;
constexpr int kBlockColumns = 4;

// C[Rows][Columns] at a corner of the product, accumulated in registers. `most` is C's Hard form
// where Form is Soft.
template <typename Form, bool kOneForAll, int Rows, int Columns, typename A>
inline void product_block(const A* a, const A* b, int64_t depth, int64_t columns, const A* most,
                          A* c) {
  constexpr int64_t lanes = kLanes<A>;
  Vec<A> sum[Rows][Columns], top[Rows][Columns];
  for (int i = 0; i < Rows; ++i) {
    for (int k = 0; k < Columns; ++k) {
      sum[i][k] = splat(Form::kNothing);
      top[i][k] = most ? load(most + (i * columns + k) * lanes) : Vec<A>{};
    }
  }
  for (int64_t r = 0; r < depth; ++r) {
    for (int i = 0; i < Rows; ++i) {
      const Vec<A> x = element<kOneForAll>(a, i * depth + r);
      for (int k = 0; k < Columns; ++k) {
        sum[i][k] = Form::step(sum[i][k], x, load(b + (r * columns + k) * lanes), top[i][k]);
      }
    }
  }
  for (int i = 0; i < Rows; ++i) {
    for (int k = 0; k < Columns; ++k) {
      store(c + (i * columns + k) * lanes, Form::finish(sum[i][k], top[i][k]));
    }
  }
}

template <typename Form, bool kOneForAll, int Rows, typename A>
inline void product_rows(const A* a, const A* b, int64_t depth, int64_t columns, const A* most,
                         A* c) {
  constexpr int64_t lanes = kLanes<A>;
  int64_t k = 0;
  for (; k + kBlockColumns <= columns; k += kBlockColumns) {
    product_block<Form, kOneForAll, Rows, kBlockColumns>(
        a, b + k * lanes, depth, columns, most ? most + k * lanes : nullptr, c + k * lanes);
  }
  for (; k < columns; ++k) {
    product_block<Form, kOneForAll, Rows, 1>(a, b + k * lanes, depth, columns,
                                             most ? most + k * lanes : nullptr, c + k * lanes);
  }
}

// C = A ⊙ B. `c` may be `most`.
template <typename Form, bool kOneForAll, typename A>
void product(const A* a, const A* b, int64_t rows, int64_t depth, int64_t columns, const A* most,
             A* c) {
  const int64_t a_row = depth * (kOneForAll ? 1 : kLanes<A>), c_row = columns * kLanes<A>;
  int64_t i = 0;
  for (; i + kBlockRows<A> <= rows; i += kBlockRows<A>) {
    product_rows<Form, kOneForAll, kBlockRows<A>>(a + i * a_row, b, depth, columns,
                                                  most ? most + i * c_row : nullptr, c + i * c_row);
  }
  for (; i < rows; ++i) {
    product_rows<Form, kOneForAll, 1>(a + i * a_row, b, depth, columns,
                                      most ? most + i * c_row : nullptr, c + i * c_row);
  }
}

// Divides the gradient of C by the number of nodes that its widest path may lead through.
template <bool kOneForAll, typename A>
void divide_among_ties(const A* a, const A* b, const A* c, int64_t rows, int64_t depth,
                       int64_t columns, A* grad) {
  constexpr int64_t lanes = kLanes<A>;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < columns; ++k) {
      const int64_t at = (i * columns + k) * lanes;
      const Vec<A> width = load(c + at);
      Vec<A> ties{};
      for (int64_t r = 0; r < depth; ++r) {
        ties += Hard<A, false>::hits(element<kOneForAll>(a, i * depth + r),
                                     load(b + (r * columns + k) * lanes), width);
      }
      store(grad + at, load(grad + at) / ties);
    }
  }
}

// For `Columns` columns of B:  dA += …  where grad_a is given, dB = …  where grad_b is.
template <typename Form, bool kOneForAll, int Columns, typename A>
inline void columns_vjp(const A* a, const A* b, const A* c, const A* grad, int64_t rows,
                        int64_t depth, int64_t columns, A* grad_a, A* grad_b) {
  constexpr int64_t lanes = kLanes<A>;
  for (int64_t r = 0; r < depth; ++r) {
    Vec<A> x[Columns], to_b[Columns];
    for (int k = 0; k < Columns; ++k) {
      x[k] = load(b + (r * columns + k) * lanes);
      to_b[k] = Vec<A>{};
    }
    for (int64_t i = 0; i < rows; ++i) {
      const Vec<A> edge = element<kOneForAll>(a, i * depth + r);
      Vec<A> to_a{};
      for (int k = 0; k < Columns; ++k) {
        const int64_t at = (i * columns + k) * lanes;
        const Gradients<A> gradients = Form::vjp(edge, x[k], load(c + at), load(grad + at));
        to_a += gradients.a;
        to_b[k] += gradients.b;
      }
      if (grad_a) {
        to_a *= Form::weight(edge);
        A* into = grad_a + (i * depth + r) * (kOneForAll ? 1 : lanes);
        if (kOneForAll) {
          *into += horizontal_sum<A>(to_a);
        } else {
          store(into, load(into) + to_a);
        }
      }
    }
    if (grad_b) {
      for (int k = 0; k < Columns; ++k) {
        store(grad_b + (r * columns + k) * lanes, to_b[k] * Form::weight(x[k]));
      }
    }
  }
}

// The gradient of C = A ⊙ B, of both or of the one that is given a place.
template <typename Form, bool kOneForAll, typename A>
void product_gradient(const A* a, const A* b, const A* c, const A* grad, int64_t rows,
                      int64_t depth, int64_t columns, A* grad_a, A* grad_b) {
  constexpr int64_t lanes = kLanes<A>;
  int64_t k = 0;
  const auto at = [](auto* p, int64_t column) { return p ? p + column * lanes : nullptr; };
  for (; k + kBlockColumns <= columns; k += kBlockColumns) {
    columns_vjp<Form, kOneForAll, kBlockColumns>(a, at(b, k), at(c, k), at(grad, k), rows, depth,
                                                 columns, grad_a, at(grad_b, k));
  }
  for (; k < columns; ++k) {
    columns_vjp<Form, kOneForAll, 1>(a, at(b, k), at(c, k), at(grad, k), rows, depth, columns,
                                     grad_a, at(grad_b, k));
  }
}

}  // namespace cvg::CVG_LEVEL
