// A tile of keys in the backward pass of attention, and the probabilities and gradients of some
// queries with it: what the passes over queries and over keys share.
#pragma once

#include "cpu/score.h"

namespace cvg::CVG_LEVEL {

template <typename T, template <typename> class ScoreOf>
class BackwardTile {
 protected:
  using A = Wide<T>;
  using Score = ScoreOf<A>;
  static constexpr int64_t lanes = kLanes<A>;

  BackwardTile(const AttentionArgs& args, const BackwardIn& in, const Tiles& tiles, bool has_grads)
      : args_(args),
        in_(in),
        tiles_(tiles),
        has_grads_(has_grads),
        has_out_(in.grad_out.data != nullptr),
        score_(args, tiles.lanes_keys),
        tokens_(args),
        key_(tiles.lanes_keys * args.dim),
        value_(has_grads && has_out_ ? tiles.lanes_keys * args.value_dim : 0),
        weights_(round_up(tiles.sub_rows, kRows<A>) * tiles.lanes_keys),
        grads_(has_grads ? round_up(tiles.sub_rows, kRows<A>) * tiles.lanes_keys : 0) {}

  void load_keys(int64_t b, int64_t h, int64_t key_tile) {
    first_key_ = key_tile * tiles_.keys;
    keys_ = std::min(tiles_.keys, args_.keys - first_key_);
    width_ = round_up(keys_, lanes);
    const Matrix<T> key = matrix<T>(args_.key, b, h);
    pack_transposed(key.row(first_key_), key.row_stride, key.dim_stride, keys_, args_.dim,
                    static_cast<A*>(key_));
    if (has_grads_ && has_out_) {
      const Matrix<T> value = matrix<T>(args_.value, b, h);
      pack_transposed(value.row(first_key_), value.row_stride, value.dim_stride, keys_,
                      args_.value_dim, static_cast<A*>(value_));
    }
    score_.load_keys(b, first_key_, keys_);
    tokens_.load_keys(b, first_key_, keys_);
  }

  void load_rows(const Tensor4& from, int64_t b, int64_t h, int64_t first, int64_t rows,
                 int64_t dim, A* to) {
    const Matrix<T> m = matrix<T>(from, b, h);
    copy_rows(m.row(first), m.row_stride, m.dim_stride, rows, round_up(rows, kRows<A>), dim, to);
  }

  // q kᵀ of `rows` queries from `row` on and, where wanted, dP = dO vᵀ + dC on the chosen tokens.
  // q and dO lie row-major, padded to whole blocks.
  void products(const A* query, const A* grad_out, int64_t b, int64_t h, int64_t row,
                int64_t rows) {
    const int64_t padded = round_up(rows, kRows<A>);
    gemm<A>(query, args_.dim, 1, key_, padded, width_, args_.dim, weights_, width_, false);
    if (!has_grads_) {
      return;
    }
    if (has_out_) {
      gemm<A>(grad_out, args_.value_dim, 1, value_, padded, width_, args_.value_dim, grads_, width_,
              false);
    } else {
      std::fill_n(static_cast<A*>(grads_), padded * width_, A{0});
    }
    if (in_.grad_maps) {
      const A head_weight = map_weight();
      for (const auto [token, column] : tokens_) {
        const A* grad = map_grads(b, h, token) + row;
        for (int64_t r = 0; r < rows; ++r) {
          grads_[r * width_ + column] += grad[r] * head_weight;
        }
      }
    }
  }

  // q kᵀ becomes P.
  void to_weights(int64_t entry, int64_t row, int64_t rows) {
    const int64_t width = width_;
    each_row<true>(entry, row, rows, [&](int64_t, A* weights, const auto&, auto weight) {
      for (int64_t j = 0; j < width; j += lanes) {
        store(weights + j, weight(j));
      }
    });
  }

  // The same, and Σ_j P dP of every row.
  void to_weights(int64_t entry, int64_t row, int64_t rows, A* sum) {
    const int64_t width = width_;
    each_row<true>(entry, row, rows, [&](int64_t r, A* weights, const auto&, auto weight) {
      const A* grads = grads_ + r * width;
      Vec<A> total{};
      for (int64_t j = 0; j < width; j += lanes) {
        const Vec<A> p = weight(j);
        store(weights + j, p);
        total += p * load(grads + j);
      }
      sum[r] = horizontal_sum<A>(total);
    });
  }

  // dP becomes dS' = P ∘ (dP − δ). q kᵀ becomes P first, unless it is (kMade). t of these keys is
  // added to `through_max`, where that is given and the policy knows m.
  template <bool kMade>
  void to_score_grads(int64_t entry, int64_t row, int64_t rows, const A* delta, A* through_max) {
    const int64_t width = width_;
    each_row<!kMade>(entry, row, rows, [&](int64_t r, A* weights, const auto& added, auto weight) {
      A* grads = grads_ + r * width;
      const Vec<A> middle = splat(delta[r]);
      Vec<A> sum{};
      for (int64_t j = 0; j < width; j += lanes) {
        const Vec<A> p = weight(j), ds = p * (load(grads + j) - middle);
        if (!kMade) {
          store(weights + j, p);
        }
        store(grads + j, ds);
        if constexpr (Score::kRowMax) {
          sum += added.factor(j) * ds;
        }
      }
      if (Score::kRowMax && through_max) {
        through_max[r] += horizontal_sum<A>(sum);
      }
    });
  }

  // The gradients of one head's maps are `map_grads` · `map_weight`: a mean shares its own out
  // evenly.
  const A* map_grads(int64_t b, int64_t h, int64_t token) const {
    const int64_t entry = args_.head_mean ? b : b * args_.heads + h;
    return static_cast<const A*>(in_.grad_maps) + (entry * args_.tokens + token) * args_.queries;
  }
  A map_weight() const { return args_.head_mean ? A{1} / static_cast<A>(args_.heads) : A{1}; }

  // factor · sums are a gradient.
  static void write(const A* sum, int64_t width, A factor, const Target4& to, int64_t b, int64_t h,
                    int64_t first, int64_t rows, int64_t dim) {
    T* at = static_cast<T*>(to.data) + b * to.stride[0] + h * to.stride[1] + first * to.stride[2];
    for (int64_t r = 0; r < rows; ++r) {
      narrow_row<T, A>(sum + r * width, factor, dim, at + r * to.stride[2]);
    }
  }

  const AttentionArgs& args_;
  const BackwardIn& in_;
  const Tiles& tiles_;
  const bool has_grads_, has_out_;
  Score score_;
  TokensOfTile tokens_;
  Scratch<A> key_, value_;
  Scratch<A> weights_;  // q kᵀ, then P
  Scratch<A> grads_;    // dP, then dS'
  int64_t first_key_ = 0, keys_ = 0, width_ = 0;

 private:
  // Calls work(r, weights, added, weight) for every row; weight(j) is P at a vector of keys, made
  // of q kᵀ where kMake, else read. A row that sees no key has q kᵀ = −inf set for it, so P = 0.
  template <bool kMake, typename Work>
  void each_row(int64_t entry, int64_t row, int64_t rows, Work work) {
    constexpr A kNone = -std::numeric_limits<A>::infinity();
    const int64_t place = entry * args_.queries + row;
    const A* lse = static_cast<const A*>(in_.rows.lse) + place;
    const A* row_max = static_cast<const A*>(in_.rows.row_max);
    const Vec<A> scale = splat(static_cast<A>(args_.scale));
    for (int64_t r = 0; r < rows; ++r) {
      A* weights = weights_ + r * width_;
      const auto added = score_.row(row + r, tokens_, Score::kRowMax ? row_max[place + r] : A{0});
      const bool unseen = lse[r] == kNone;
      const Vec<A> total = splat(unseen ? std::numeric_limits<A>::infinity() : lse[r]);
      work(r, weights, added, [=](int64_t j) {
        if (!kMake) {
          return load(weights + j);
        }
        // A rounding error may leave the difference a hair above 0.
        const Vec<A> s = load(weights + j) * scale + added(j) - total;
        return vexp(s > 0 ? Vec<A>{} : s);
      });
    }
  }
};

}  // namespace cvg::CVG_LEVEL
