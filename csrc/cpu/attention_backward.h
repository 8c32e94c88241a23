// Backward pass of attention with capture, for one way of scoring: a file for each compiles it.
//
//   P = exp(S' − lse),   dP = dO vᵀ,  dP[:, token_κ] += dC_κ,
//   δ = Σ_j P dP − dlse = Σ_d dO·O + Σ_κ dC·C − dlse,   dS' = P ∘ (dP − δ),
//   t = Σ_j (∂S'/∂m) dS',   dS = dS' + t at the place of m        where scores depend on m,
//   dq = scale · dS k,   dk = scale · dSᵀ q,   dv = Pᵀ dO,   dbias_κ = Σ_heads dS'[:, token_κ].
//
// Guidance wants dq alone, so that is a pass of its own over query tiles, of three products; dk and
// dv come from a second pass over key tiles, which sums over the queries in one order: no atomics.
// P is recomputed in both; dC is never spread over the heads in memory.
#pragma once

#include "cpu/backward_tile.h"
#include "cpu/chosen.h"

namespace cvg::CVG_LEVEL {

namespace {

// δ and t of every row, [B, H, N].
template <typename A>
struct RowSums {
  A *delta, *through_max;
};

// dq, and δ and t. A task is a tile of queries of one batch entry and head.
template <typename T, template <typename> class ScoreOf>
class QueryPass : BackwardTile<T, ScoreOf> {
  using Base = BackwardTile<T, ScoreOf>;
  using Base::args_, Base::in_, Base::tiles_, Base::has_out_, Base::lanes, Base::grads_,
      Base::first_key_, Base::keys_, Base::width_;
  using typename Base::A;
  using typename Base::Score;

 public:
  // `needs_row_max`: t is wanted even where dq is not.
  QueryPass(const AttentionArgs& args, const BackwardIn& in, const Tiles& tiles,
            const Target4& grad_query, bool needs_row_max, const RowSums<A>& sums)
      : Base(args, in, tiles, true),
        grad_query_(grad_query),
        sums_(sums),
        one_tile_(tiles.key_tiles == 1),
        goes_on_(grad_query.data || needs_row_max),
        dim_width_(round_up(args.dim, lanes)),
        chosen_(args, in.rows, in.grad_maps && !one_tile_ ? tiles.rows : 1),
        query_(tiles.rows * args.dim),
        grad_out_(has_out_ ? tiles.rows * args.value_dim : 0),
        out_(args.value_dim),
        key_rows_(tiles.keys * dim_width_),
        sum_(tiles.rows * dim_width_) {}

  void task(int64_t entry, int64_t tile) {
    const int64_t b = entry / args_.heads, h = entry % args_.heads;
    const int64_t first = tile * tiles_.rows, count = std::min(tiles_.rows, args_.queries - first);
    this->load_rows(args_.query, b, h, first, count, args_.dim, query_);
    if (has_out_) {
      this->load_rows(in_.grad_out, b, h, first, count, args_.value_dim, grad_out_);
    }
    A* delta = sums_.delta + entry * args_.queries + first;
    A* through_max = sums_.through_max + entry * args_.queries + first;
    std::fill_n(through_max, Score::kRowMax ? count : 0, A{0});
    if (!one_tile_) {
      delta_ahead(b, h, first, count, delta);
    }
    if (!goes_on_ && !one_tile_) {
      return;
    }
    const Matrix<T> key = matrix<T>(args_.key, b, h);
    for (int64_t key_tile = 0; key_tile < tiles_.key_tiles; ++key_tile) {
      this->load_keys(b, h, key_tile);
      if (grad_query_.data) {
        pack(key.row(first_key_), key.row_stride, key.dim_stride, keys_, args_.dim,
             static_cast<A*>(key_rows_));
      }
      for (int64_t row = 0; row < count; row += tiles_.sub_rows) {
        const int64_t rows = std::min(tiles_.sub_rows, count - row);
        this->products(query_ + row * args_.dim, grad_out_ + row * args_.value_dim, b, h,
                       first + row, rows);
        if (one_tile_) {
          this->to_weights(entry, first + row, rows, delta + row);
          for (int64_t r = row; r < row + rows; ++r) {
            delta[r] -= lse_grad(entry, first + r);
          }
        }
        if (goes_on_) {
          score_grads(entry, first + row, rows, delta + row, through_max + row);
        }
        if (grad_query_.data) {
          gemm<A>(grads_, width_, 1, key_rows_, round_up(rows, kRows<A>), dim_width_, keys_,
                  sum_ + row * dim_width_, dim_width_, key_tile > 0);
        }
      }
    }
    if (grad_query_.data) {
      if (Score::kRowMax && args_.band.row_max_grad) {
        const int32_t* row_argmax = in_.rows.row_argmax + entry * args_.queries + first;
        for (int64_t r = 0; r < count; ++r) {
          const T* k = key.row(row_argmax[r]);
          for (int64_t d = 0; d < args_.dim; ++d) {
            sum_[r * dim_width_ + d] += through_max[r] * widen(k[d * key.dim_stride]);
          }
        }
      }
      this->write(sum_, dim_width_, static_cast<A>(args_.scale), grad_query_, b, h, first, count,
                  args_.dim);
    }
  }

 private:
  void score_grads(int64_t entry, int64_t row, int64_t rows, const A* delta, A* through_max) {
    if (one_tile_) {
      this->template to_score_grads<true>(entry, row, rows, delta, through_max);
    } else {
      this->template to_score_grads<false>(entry, row, rows, delta, through_max);
    }
  }

  A lse_grad(int64_t entry, int64_t row) const {
    const A* grads = static_cast<const A*>(in_.grad_lse);
    return grads ? grads[entry * args_.queries + row] : A{0};
  }

  // δ = Σ_d dO·O + Σ_κ dC·C − dlse, for rows whose keys do not fit one tile. C is recomputed from
  // the chosen keys.
  void delta_ahead(int64_t b, int64_t h, int64_t first, int64_t count, A* delta) {
    for (int64_t r = 0; r < count; ++r) {
      delta[r] = -lse_grad(b * args_.heads + h, first + r);
      if (has_out_) {
        const Matrix<T> out = matrix<T>(in_.out, b, h);
        widen_row(out.row(first + r), out.dim_stride, args_.value_dim, args_.value_dim,
                  static_cast<A*>(out_));
        delta[r] += dot(grad_out_ + r * args_.value_dim, out_, args_.value_dim);
      }
    }
    if (in_.grad_maps) {
      chosen_.load_rows(b, first, count);
      const A *p = chosen_.probabilities(h), head_weight = this->map_weight();
      for (int64_t k = 0; k < args_.tokens; ++k, p += chosen_.width()) {
        const A* grad = this->map_grads(b, h, k) + first;
        for (int64_t r = 0; r < count; ++r) {
          delta[r] += grad[r] * head_weight * p[r];
        }
      }
    }
  }

  static A dot(const A* a, const A* b, int64_t length) {
    Vec<A> sum{};
    int64_t d = 0;
    for (; d + lanes <= length; d += lanes) {
      sum += load(a + d) * load(b + d);
    }
    A total = horizontal_sum<A>(sum);
    for (; d < length; ++d) {
      total += a[d] * b[d];
    }
    return total;
  }

  const Target4& grad_query_;
  const RowSums<A> sums_;
  const bool one_tile_, goes_on_;
  const int64_t dim_width_;
  Chosen<T, ScoreOf> chosen_;
  Scratch<A> query_, grad_out_, out_, key_rows_, sum_;
};

// dk and dv. A task is a tile of keys of one batch entry and head; δ and t are known where dk is
// wanted.
template <typename T, template <typename> class ScoreOf>
class KeyPass : BackwardTile<T, ScoreOf> {
  using Base = BackwardTile<T, ScoreOf>;
  using Base::args_, Base::in_, Base::tiles_, Base::lanes, Base::weights_, Base::grads_,
      Base::first_key_, Base::keys_, Base::width_;
  using typename Base::A;
  using typename Base::Score;

 public:
  KeyPass(const AttentionArgs& args, const BackwardIn& in, const Tiles& tiles,
          const BackwardOut& to, const RowSums<A>& sums)
      : Base(args, in, tiles, to.key.data != nullptr),
        to_(to),
        sums_(sums),
        dim_width_(round_up(args.dim, lanes)),
        value_width_(round_up(args.value_dim, lanes)),
        reads_grad_out_(to.key.data && in.grad_out.data),
        query_(tiles.sub_rows * args.dim),
        query_panels_(to.key.data ? tiles.sub_rows * dim_width_ : 0),
        grad_out_(reads_grad_out_ ? tiles.sub_rows * args.value_dim : 0),
        grad_out_panels_(to.value.data ? tiles.sub_rows * value_width_ : 0),
        key_sum_(to.key.data ? tiles.lanes_keys * dim_width_ : 0),
        value_sum_(to.value.data ? tiles.lanes_keys * value_width_ : 0) {}

  void task(int64_t entry, int64_t tile) {
    const int64_t b = entry / args_.heads, h = entry % args_.heads;
    const Matrix<T> query = matrix<T>(args_.query, b, h), grad = matrix<T>(in_.grad_out, b, h);
    this->load_keys(b, h, tile);
    for (int64_t row = 0; row < args_.queries; row += tiles_.sub_rows) {
      const int64_t rows = std::min(tiles_.sub_rows, args_.queries - row);
      const int64_t place = entry * args_.queries + row;
      this->load_rows(args_.query, b, h, row, rows, args_.dim, query_);
      if (reads_grad_out_) {
        this->load_rows(in_.grad_out, b, h, row, rows, args_.value_dim, grad_out_);
      }
      this->products(query_, grad_out_, b, h, row, rows);
      if (to_.key.data) {
        this->template to_score_grads<false>(entry, row, rows, sums_.delta + place, nullptr);
      } else {
        this->to_weights(entry, row, rows);
      }
      // The products run over the queries: row j of the left side is column j of P and dS.
      if (to_.value.data) {
        pack(grad.row(row), grad.row_stride, grad.dim_stride, rows, args_.value_dim,
             static_cast<A*>(grad_out_panels_));
        gemm<A>(weights_, 1, width_, grad_out_panels_, width_, value_width_, rows, value_sum_,
                value_width_, row > 0);
      }
      if (to_.key.data) {
        for (int64_t r = 0; r < rows && Score::kRowMax && args_.band.row_max_grad; ++r) {
          const int64_t j = in_.rows.row_argmax[place + r] - first_key_;
          if (j >= 0 && j < keys_) {
            grads_[r * width_ + j] += sums_.through_max[place + r];
          }
        }
        pack(query.row(row), query.row_stride, query.dim_stride, rows, args_.dim,
             static_cast<A*>(query_panels_));
        gemm<A>(grads_, 1, width_, query_panels_, width_, dim_width_, rows, key_sum_, dim_width_,
                row > 0);
      }
    }
    finish(key_sum_, dim_width_, static_cast<A>(args_.scale), to_.key, b, h, args_.dim);
    finish(value_sum_, value_width_, 1, to_.value, b, h, args_.value_dim);
  }

 private:
  void finish(A* sum, int64_t width, A factor, const Target4& to, int64_t b, int64_t h,
              int64_t dim) {
    if (!to.data) {
      return;
    }
    if (args_.queries == 0) {
      std::fill_n(sum, keys_ * width, A{0});
    }
    this->write(sum, width, factor, to, b, h, first_key_, keys_, dim);
  }

  const BackwardOut& to_;
  const RowSums<A> sums_;
  const int64_t dim_width_, value_width_;
  const bool reads_grad_out_;
  Scratch<A> query_, query_panels_, grad_out_, grad_out_panels_, key_sum_, value_sum_;
};

// The gradient of the bias on chosen tokens, from their columns alone. A task is a tile of queries
// of one batch entry, head after head. Of a key's occurrences the first has its share of dO and δ,
// and each its own dC.
template <typename T>
class TokenBiasPass {
  using A = Wide<T>;

 public:
  TokenBiasPass(const AttentionArgs& args, const BackwardIn& in, int64_t rows, A* grad_bias,
                const A* delta)
      : args_(args),
        in_(in),
        rows_(rows),
        grad_bias_(grad_bias),
        delta_(delta),
        chosen_(args, in.rows, rows),
        grads_(chosen_.padded_tokens() * round_up(rows, kLanes<A>)) {}

  void task(int64_t b, int64_t tile) {
    const int64_t first = tile * rows_, count = std::min(rows_, args_.queries - first);
    const int64_t* ids = args_.token_ids + b * args_.tokens;
    const A head_weight = args_.head_mean ? A{1} / static_cast<A>(args_.heads) : A{1};
    chosen_.load_rows(b, first, count);
    const int64_t width = chosen_.width();
    for (int64_t h = 0; h < args_.heads; ++h) {
      const A* delta = delta_ + (b * args_.heads + h) * args_.queries + first;
      const int64_t entry = args_.head_mean ? b : b * args_.heads + h;
      const A* p = chosen_.probabilities(h);
      if (in_.grad_out.data) {
        chosen_.products(args_.value, in_.grad_out, h, args_.value_dim, grads_);
      } else {
        std::fill_n(static_cast<A*>(grads_), args_.tokens * width, A{0});
      }
      for (int64_t k = 0; k < args_.tokens; ++k, p += width) {
        A* to = grad_bias_ + (b * args_.tokens + k) * args_.queries + first;
        A* grads = grads_ + k * width;
        const bool again = std::find(ids, ids + k, ids[k]) != ids + k;
        for (int64_t r = 0; r < count; ++r) {
          grads[r] = again ? A{0} : grads[r] - delta[r];
        }
        if (in_.grad_maps) {
          const A* own = static_cast<const A*>(in_.grad_maps) +
                         (entry * args_.tokens + k) * args_.queries + first;
          for (int64_t r = 0; r < count; ++r) {
            grads[r] += own[r] * head_weight;
          }
        }
        for (int64_t r = 0; r < count; ++r) {
          to[r] = h ? to[r] + p[r] * grads[r] : p[r] * grads[r];
        }
      }
    }
  }

 private:
  const AttentionArgs& args_;
  const BackwardIn& in_;
  const int64_t rows_;
  A* grad_bias_;
  const A* delta_;
  Chosen<T, KeyBias> chosen_;
  Scratch<A> grads_;
};

template <typename T, template <typename> class Score>
void attention_backward(const AttentionArgs& args, const BackwardIn& in, const BackwardOut& to) {
  using A = Wide<T>;
  const int64_t entries = args.batch * args.heads;
  const Tiles tiles = plan_tiles<A>(args, entries);
  const bool needs_row_max = args.band.key_frames && args.band.row_max_grad && to.key.data;
  Scratch<A> delta(entries * args.queries);
  Scratch<A> through_max(args.band.key_frames ? entries * args.queries : 0);
  const RowSums<A> sums{delta, through_max};
#pragma omp parallel num_threads(args.threads)
  {
    if ((to.query.data || to.key.data || to.token_bias) && args.queries) {
      QueryPass<T, Score> worker(args, in, tiles, to.query, needs_row_max, sums);
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < entries * tiles.row_tiles; ++task) {
        worker.task(task / tiles.row_tiles, task % tiles.row_tiles);
      }
    }
    if (to.key.data || to.value.data) {
      KeyPass<T, Score> worker(args, in, tiles, to, sums);
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < entries * tiles.key_tiles; ++task) {
        worker.task(task / tiles.key_tiles, task % tiles.key_tiles);
      }
    }
    if (to.token_bias && args.queries) {
      TokenBiasPass<T> worker(args, in, tiles.rows, static_cast<A*>(to.token_bias), delta);
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < args.batch * tiles.row_tiles; ++task) {
        worker.task(task / tiles.row_tiles, task % tiles.row_tiles);
      }
    }
  }
}

}  // namespace

}  // namespace cvg::CVG_LEVEL
