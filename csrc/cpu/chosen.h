// The chosen tokens of some queries by themselves, once the log-sum-exp of these is known: at the
// cost of K keys instead of M. All is [K, width], the queries innermost.
#pragma once

#include "cpu/score.h"

namespace cvg::CVG_LEVEL {

template <typename T, template <typename> class ScoreOf>
class Chosen {
  using A = Wide<T>;
  using Score = ScoreOf<A>;
  static constexpr int64_t lanes = kLanes<A>;

 public:
  Chosen(const AttentionArgs& args, const AttentionRows& known, int64_t rows)
      : args_(args),
        known_(known),
        padded_tokens_(round_up(args.tokens, kRows<A>)),
        most_rows_(round_up(rows, lanes)),
        score_(args, lanes),
        left_(padded_tokens_ * std::max(args.dim, args.value_dim)),
        right_(most_rows_ * std::max(args.dim, args.value_dim)),
        added_(args.tokens * most_rows_),
        weights_(padded_tokens_ * most_rows_) {}

  // Which queries of which batch entry; the heads follow.
  void load_rows(int64_t b, int64_t first, int64_t rows) {
    b_ = b;
    first_ = first;
    rows_ = rows;
    width_ = round_up(rows, lanes);
    score_.chosen(b, first, rows, width_, added_);
  }
  int64_t width() const { return width_; }

  // P of one head.
  const A* probabilities(int64_t h) {
    products(args_.key, args_.query, h, args_.dim, weights_);
    const int64_t place = (b_ * args_.heads + h) * args_.queries + first_;
    const A* lse = static_cast<const A*>(known_.lse) + place;
    const A* row_max = static_cast<const A*>(known_.row_max) + (Score::kRowMax ? place : 0);
    const Vec<A> scale = splat(static_cast<A>(args_.scale));
    for (int64_t r = 0; r < rows_; r += lanes) {
      const int64_t count = std::min(lanes, rows_ - r);
      const Vec<A> total = some(lse + r, count);
      const Vec<A> most = Score::kRowMax ? some(row_max + r, count) : Vec<A>{};
      for (int64_t k = 0; k < args_.tokens; ++k) {
        A* at = weights_ + k * width_ + r;
        const Vec<A> s = load(at) * scale + Score::added(load(added_ + k * width_ + r), most);
        const Vec<A> p = vexp(s - total > 0 ? Vec<A>{} : s - total);
        store(at, total == -std::numeric_limits<A>::infinity() ? Vec<A>{} : p);
      }
    }
    return weights_;
  }

  // Products of the chosen rows of one tensor, [B, H, M, dim], with the queries' rows of another;
  void products(const Tensor4& of_keys, const Tensor4& of_queries, int64_t h, int64_t dim, A* to) {
    const Matrix<T> keys = matrix<T>(of_keys, b_, h), queries = matrix<T>(of_queries, b_, h);
    const int64_t* ids = args_.token_ids + b_ * args_.tokens;
    for (int64_t k = 0; k < args_.tokens; ++k) {
      widen_row(keys.row(ids[k]), keys.dim_stride, dim, dim, left_ + k * dim);
    }
    std::fill(left_ + args_.tokens * dim, left_ + padded_tokens_ * dim, A{0});
    pack_transposed(queries.row(first_), queries.row_stride, queries.dim_stride, rows_, dim,
                    static_cast<A*>(right_));
    gemm<A>(left_, dim, 1, right_, padded_tokens_, width_, dim, to, width_, false);
  }

  // K in whole blocks of kRows.
  int64_t padded_tokens() const { return padded_tokens_; }

 private:
  static Vec<A> some(const A* from, int64_t count) {
    Vec<A> v{};
    std::memcpy(&v, from, count * sizeof(A));
    return v;
  }

  const AttentionArgs& args_;
  const AttentionRows known_;
  const int64_t padded_tokens_, most_rows_;
  Score score_;
  Scratch<A> left_, right_, added_, weights_;
  int64_t b_ = 0, first_ = 0, rows_ = 0, width_ = 0;
};

}  // namespace cvg::CVG_LEVEL
