// Many short sequences, of F rows each: one sequence's scores, and products with them.
//
// Scores lie transposed, Sᵀ = k (scale · q)ᵀ: row j holds key j, the lanes of a vector hold
// queries. So every reduction over the keys runs down the rows and never across a vector.
#pragma once

#include "cpu/rows.h"
#include "cpu/scratch.h"
#include "cvg/temporal_args.h"

namespace cvg::CVG_LEVEL {

// The [F, dim] matrix of one position and head.
template <typename T>
struct Matrix5 {
  T* data;
  int64_t row_stride, dim_stride;
};
template <typename T>
Matrix5<T> matrix(const Tensor5& t, int64_t b, int64_t p, int64_t h) {
  return {static_cast<T*>(t.data) + b * t.stride[0] + p * t.stride[1] + h * t.stride[2],
          t.stride[3], t.stride[4]};
}

template <typename T>
class Sequences {
 protected:
  using A = Wide<T>;
  static constexpr int64_t lanes = kLanes<A>;

  Sequences(int64_t frames, int64_t dim)
      : frames_(frames),
        width_(round_up(frames, lanes)),
        dim_width_(std::max(dim, lanes)),
        query_(frames_ * dim_width_),
        key_(frames_ * dim_width_),
        query_columns_(dim_width_ * width_),
        weights_(frames_ * width_) {}

  // A matrix of the inputs as rows of wide numbers.
  Rows<const A> rows(const Tensor5& t, int64_t b, int64_t p, int64_t h, int64_t dim, A* scratch) {
    const Matrix5<const T> m = matrix<const T>(t, b, p, h);
    return read_rows(m.data, m.row_stride, m.dim_stride, frames_, dim, scratch);
  }

  // to = A · B, with B[F, width ≥ dim], into a matrix of the results.
  void write_product(const A* a, int64_t row_stride, int64_t depth_stride, Rows<const A> b,
                     int64_t dim, const Tensor5& t, int64_t at, int64_t p, int64_t h, A* scratch) {
    const Matrix5<T> m = matrix<T>(t, at, p, h);
    const Rows<A> to = target_rows(m.data, m.row_stride, m.dim_stride, dim, scratch);
    multiply(a, row_stride, depth_stride, b, frames_, std::max(dim, lanes), frames_, to);
    write_rows(to, m.data, m.row_stride, m.dim_stride, frames_, dim);
  }

  // Sᵀ into weights_.
  void scores(Rows<const A> query, Rows<const A> key, int64_t dim, double scale) {
    transpose<A>(query, frames_, dim, static_cast<A>(scale), {query_columns_, width_});
    multiply<A>(key.data, key.stride, 1, {query_columns_, width_}, frames_, width_, dim,
                {weights_, width_});
  }

  const int64_t frames_, width_, dim_width_;
  Scratch<A> query_, key_;
  Scratch<A> query_columns_;  // scale · qᵀ [D, width]
  Scratch<A> weights_;        // Sᵀ, then Pᵀ [F, width]
};

// The exponentials of one vector of queries, a column of `width` numbers a row whose largest is
// `most`, become probabilities in place.
template <typename A>
void normalise(A* s, int64_t frames, int64_t width, Vec<A> most) {
  const auto unseen = most == splat(-std::numeric_limits<A>::infinity());
  most = unseen ? Vec<A>{} : most;
  Vec<A> total{};
  for (int64_t j = 0; j < frames; ++j) {
    const Vec<A> p = vexp(load(s + j * width) - most);
    store(s + j * width, p);
    total += p;
  }
  // Without a key the total is 0, and stays it; a NaN among hidden keys is in it.
  const Vec<A> inverse = unseen ? total : 1 / total;
  for (int64_t j = 0; j < frames; ++j) {
    store(s + j * width, load(s + j * width) * inverse);
  }
}

// Calls worker(task, first, end) for runs of positions counted through the batch.
template <typename Worker>
void each_task(int64_t total, int64_t tasks, Worker&& worker) {
#pragma omp for schedule(dynamic, 1)
  for (int64_t task = 0; task < tasks; ++task) {
    worker(task, total * task / tasks, total * (task + 1) / tasks);
  }
}

}  // namespace cvg::CVG_LEVEL
