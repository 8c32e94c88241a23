// Backward pass of attention with capture.
//
//   P = exp(scale · q kᵀ + bias − lse),   dP = dO vᵀ,  dP[:, token_κ] += dC_κ,
//   δ = Σ_j P dP − dlse = Σ_d dO·O + Σ_κ dC·C − dlse,   dS = scale · P ∘ (dP − δ),
//   dq = dS k,   dk = dSᵀ q,   dv = Pᵀ dO.
//
// Guidance wants dq alone, so that is a pass of its own over query tiles; dk and dv come from a
// second pass over key tiles, which sums over the queries in one order: no atomics. P is recomputed
// in both; dC is never spread over the heads in memory.
#include "cpu/backward_tile.h"

namespace cvg::CVG_LEVEL {

namespace {

// What both passes share: the scores of some rows and keys turned into P and dS.
template <typename T>
class Backward : protected BackwardTile<T, AttentionArgs, BackwardIn> {
  using Base = BackwardTile<T, AttentionArgs, BackwardIn>;

 protected:
  using Base::args_, Base::in_, Base::tiles_, Base::lanes, Base::weights_, Base::grads_,
      Base::first_key_, Base::keys_, Base::width_;
  using typename Base::A;

  Backward(const AttentionArgs& args, const BackwardIn& in, const Tiles& tiles)
      : Base(args, in, tiles), bias_(tiles.lanes_keys) {}

  void load_keys(int64_t b, int64_t h, int64_t key_tile) {
    Base::load_keys(b, h, key_tile);
    tile_bias(args_, b, first_key_, keys_, tiles_.lanes_keys, static_cast<A*>(bias_));
  }

  // P and dP of `rows` queries, whose q and dO lie row-major in `query` and `grad_out`.
  void weights_and_grads(const A* query, const A* grad_out, int64_t b, int64_t h, int64_t row,
                         int64_t rows) {
    this->products(query, grad_out, rows);
    const A* lse = static_cast<const A*>(in_.lse) + (b * args_.heads + h) * args_.queries + row;
    const Vec<A> scale = splat(static_cast<A>(args_.scale));
    for (int64_t r = 0; r < rows; ++r) {
      A* p = weights_ + r * width_;
      if (lse[r] == -std::numeric_limits<A>::infinity()) {
        std::fill_n(p, width_, A{0});
        continue;
      }
      for (int64_t j = 0; j < width_; j += lanes) {
        // A rounding error may leave the difference a hair above 0.
        const Vec<A> s = load(p + j) * scale + load(bias_ + j) - lse[r];
        store(p + j, vexp(s > 0 ? Vec<A>{} : s));
      }
    }
    std::fill(weights_ + rows * width_, weights_ + round_up(rows, kRows<A>) * width_, A{0});
    if (in_.grad_maps) {
      const int64_t* ids = args_.token_ids + b * args_.tokens;
      for (int64_t k = 0; k < args_.tokens; ++k) {
        if (ids[k] >= first_key_ && ids[k] < first_key_ + keys_) {
          for (int64_t r = 0; r < rows; ++r) {
            grads_[r * width_ + ids[k] - first_key_] += map_grad(b, h, k, row + r);
          }
        }
      }
    }
  }

  // dC of one head; the mean over heads shares its gradient out evenly.
  A map_grad(int64_t b, int64_t h, int64_t k, int64_t row) const {
    const A* grads = static_cast<const A*>(in_.grad_maps);
    return args_.head_mean
               ? grads[(b * args_.tokens + k) * args_.queries + row] / args_.heads
               : grads[((b * args_.heads + h) * args_.tokens + k) * args_.queries + row];
  }

  A lse_grad(int64_t b, int64_t h, int64_t row) const {
    const A* grads = static_cast<const A*>(in_.grad_lse);
    return grads ? grads[(b * args_.heads + h) * args_.queries + row] : A{0};
  }

  // Σ_j P dP − dlse of a row all of whose keys are in the tile.
  A centre_of_row(int64_t r) const {
    Vec<A> sum{};
    for (int64_t j = 0; j < width_; j += lanes) {
      sum += load(weights_ + r * width_ + j) * load(grads_ + r * width_ + j);
    }
    return horizontal_sum<A>(sum);
  }

  // dP becomes dS in place.
  void grads_to_scores(const A* centre, int64_t rows) {
    const Vec<A> scale = splat(static_cast<A>(args_.scale));
    for (int64_t r = 0; r < rows; ++r) {
      A* g = grads_ + r * width_;
      for (int64_t j = 0; j < width_; j += lanes) {
        store(g + j, load(weights_ + r * width_ + j) * (load(g + j) - centre[r]) * scale);
      }
    }
    std::fill(grads_ + rows * width_, grads_ + round_up(rows, kRows<A>) * width_, A{0});
  }

  Scratch<A> bias_;
};

// dq, and δ of every row. A task is a tile of queries of one batch entry and head.
template <typename T>
class QueryPass : Backward<T> {
  using Base = Backward<T>;
  using Base::args_, Base::in_, Base::tiles_, Base::has_out_, Base::lanes, Base::weights_,
      Base::grads_, Base::first_key_, Base::keys_, Base::width_;
  using typename Base::A;

 public:
  QueryPass(const AttentionArgs& args, const BackwardIn& in, const Tiles& tiles, T* grad_query,
            A* centre)
      : Base(args, in, tiles),
        grad_query_(grad_query),
        centre_(centre),
        dim_width_(round_up(args.dim, lanes)),
        query_(tiles.rows * args.dim),
        grad_out_(has_out_ ? tiles.rows * args.value_dim : 0),
        key_rows_(tiles.keys * dim_width_),
        sum_(tiles.rows * dim_width_) {}

  void task(int64_t entry, int64_t tile) {
    const int64_t b = entry / args_.heads, h = entry % args_.heads;
    const int64_t first = tile * tiles_.rows, count = std::min(tiles_.rows, args_.queries - first);
    this->load_rows(args_.query, b, h, first, count, args_.dim, query_);
    if (has_out_) {
      this->load_rows(in_.grad_out, b, h, first, count, args_.value_dim, grad_out_);
    }
    A* centre = centre_ + entry * args_.queries + first;
    if (tiles_.key_tiles > 1) {
      centre_ahead(b, h, first, count, centre);
    }
    if (!grad_query_ && tiles_.key_tiles > 1) {
      return;
    }
    const Matrix<T> key = matrix<T>(args_.key, b, h);
    for (int64_t key_tile = 0; key_tile < tiles_.key_tiles; ++key_tile) {
      this->load_keys(b, h, key_tile);
      pack(key.row(first_key_), key.row_stride, key.dim_stride, keys_, args_.dim,
           static_cast<A*>(key_rows_));
      for (int64_t row = 0; row < count; row += tiles_.sub_rows) {
        const int64_t rows = std::min(tiles_.sub_rows, count - row);
        this->weights_and_grads(query_ + row * args_.dim, grad_out_ + row * args_.value_dim, b, h,
                                first + row, rows);
        for (int64_t r = 0; r < rows && tiles_.key_tiles == 1; ++r) {
          centre[row + r] = this->centre_of_row(r) - this->lse_grad(b, h, first + row + r);
        }
        if (grad_query_) {
          this->grads_to_scores(centre + row, rows);
          gemm<A>(grads_, width_, 1, key_rows_, round_up(rows, kRows<A>), dim_width_, keys_,
                  sum_ + row * dim_width_, dim_width_, key_tile > 0);
        }
      }
    }
    if (grad_query_) {
      T* to = grad_query_ + (entry * args_.queries + first) * args_.dim;
      for (int64_t r = 0; r < count; ++r) {
        for (int64_t d = 0; d < args_.dim; ++d) {
          *to++ = narrow<T>(sum_[r * dim_width_ + d]);
        }
      }
    }
  }

 private:
  // δ = Σ_d dO·O + Σ_κ dC·C − dlse, for rows whose keys do not fit one tile. C is recomputed from
  // the captured keys.
  void centre_ahead(int64_t b, int64_t h, int64_t first, int64_t count, A* centre) {
    const A* lse = static_cast<const A*>(in_.lse) + (b * args_.heads + h) * args_.queries + first;
    const A* bias = static_cast<const A*>(args_.bias);
    const int64_t* ids = args_.token_ids + b * args_.tokens;
    const Matrix<T> key = matrix<T>(args_.key, b, h);
    for (int64_t r = 0; r < count; ++r) {
      A sum = -this->lse_grad(b, h, first + r);
      if (has_out_) {
        const Matrix<T> out = matrix<T>(in_.out, b, h);
        const T* o = out.row(first + r);
        for (int64_t d = 0; d < args_.value_dim; ++d) {
          sum += grad_out_[r * args_.value_dim + d] * widen(o[d * out.dim_stride]);
        }
      }
      const bool seen = lse[r] > -std::numeric_limits<A>::infinity();
      for (int64_t k = 0; k < args_.tokens && in_.grad_maps && seen; ++k) {
        const T* row = key.row(ids[k]);
        A dot = 0;
        for (int64_t d = 0; d < args_.dim; ++d) {
          dot += query_[r * args_.dim + d] * widen(row[d * key.dim_stride]);
        }
        const A s =
            dot * static_cast<A>(args_.scale) + (bias ? bias[b * args_.keys + ids[k]] : A{0});
        sum += this->map_grad(b, h, k, first + r) * std::exp(s - lse[r]);
      }
      centre[r] = sum;
    }
  }

  T* grad_query_;
  A* centre_;  // δ [B, H, N]
  const int64_t dim_width_;
  Scratch<A> query_, grad_out_, key_rows_, sum_;
};

// dk and dv. A task is a tile of keys of one batch entry and head; δ is known.
template <typename T>
class KeyPass : Backward<T> {
  using Base = Backward<T>;
  using Base::args_, Base::in_, Base::tiles_, Base::has_out_, Base::lanes, Base::weights_,
      Base::grads_, Base::first_key_, Base::keys_, Base::width_;
  using typename Base::A;

 public:
  KeyPass(const AttentionArgs& args, const BackwardIn& in, const Tiles& tiles, T* grad_key,
          T* grad_value, const A* centre)
      : Base(args, in, tiles),
        grad_key_(grad_key),
        grad_value_(grad_value),
        centre_(centre),
        dim_width_(round_up(args.dim, lanes)),
        value_width_(round_up(args.value_dim, lanes)),
        query_(tiles.sub_rows * args.dim),
        query_panels_(tiles.sub_rows * dim_width_),
        grad_out_(has_out_ ? tiles.sub_rows * args.value_dim : 0),
        grad_out_panels_(grad_value ? tiles.sub_rows * value_width_ : 0),
        key_sum_(grad_key ? tiles.lanes_keys * dim_width_ : 0),
        value_sum_(grad_value ? tiles.lanes_keys * value_width_ : 0) {}

  void task(int64_t entry, int64_t tile) {
    const int64_t b = entry / args_.heads, h = entry % args_.heads;
    const Matrix<T> query = matrix<T>(args_.query, b, h), grad = matrix<T>(in_.grad_out, b, h);
    this->load_keys(b, h, tile);
    for (int64_t row = 0; row < args_.queries; row += tiles_.sub_rows) {
      const int64_t rows = std::min(tiles_.sub_rows, args_.queries - row);
      this->load_rows(args_.query, b, h, row, rows, args_.dim, query_);
      if (has_out_) {
        this->load_rows(in_.grad_out, b, h, row, rows, args_.value_dim, grad_out_);
      }
      this->weights_and_grads(query_, grad_out_, b, h, row, rows);
      // The products run over the queries: row j of the left side is column j of P and dS, and dS
      // needs no padding, as the depth is the exact number of rows.
      if (grad_value_) {
        pack(grad.row(row), grad.row_stride, grad.dim_stride, rows, args_.value_dim,
             static_cast<A*>(grad_out_panels_));
        gemm<A>(weights_, 1, width_, grad_out_panels_, width_, value_width_, rows, value_sum_,
                value_width_, row > 0);
      }
      if (grad_key_) {
        this->grads_to_scores(centre_ + entry * args_.queries + row, rows);
        pack(query.row(row), query.row_stride, query.dim_stride, rows, args_.dim,
             static_cast<A*>(query_panels_));
        gemm<A>(grads_, 1, width_, query_panels_, width_, dim_width_, rows, key_sum_, dim_width_,
                row > 0);
      }
    }
    write(key_sum_, grad_key_, entry, args_.dim, dim_width_);
    write(value_sum_, grad_value_, entry, args_.value_dim, value_width_);
  }

 private:
  void write(const A* sum, T* to, int64_t entry, int64_t dim, int64_t width) {
    if (!to) {
      return;
    }
    to += (entry * args_.keys + first_key_) * dim;
    for (int64_t j = 0; j < keys_; ++j) {
      for (int64_t d = 0; d < dim; ++d) {
        *to++ = narrow<T>(args_.queries ? sum[j * width + d] : A{0});
      }
    }
  }

  T *grad_key_, *grad_value_;
  const A* centre_;
  const int64_t dim_width_, value_width_;
  Scratch<A> query_, query_panels_, grad_out_, grad_out_panels_, key_sum_, value_sum_;
};

template <typename T>
void backward(const AttentionArgs& args, const BackwardIn& in, const BackwardOut& to) {
  const int64_t entries = args.batch * args.heads;
  const Tiles tiles = plan_tiles<Wide<T>>(args, entries);
  Scratch<Wide<T>> centre(entries * args.queries);
  T *query = static_cast<T*>(to.query), *key = static_cast<T*>(to.key),
    *value = static_cast<T*>(to.value);
#pragma omp parallel num_threads(args.threads)
  {
    if ((query || key) && args.queries) {
      QueryPass<T> worker(args, in, tiles, query, centre);
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < entries * tiles.row_tiles; ++task) {
        worker.task(task / tiles.row_tiles, task % tiles.row_tiles);
      }
    }
    if (key || value) {
      KeyPass<T> worker(args, in, tiles, key, value, centre);
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < entries * tiles.key_tiles; ++task) {
        worker.task(task / tiles.key_tiles, task % tiles.key_tiles);
      }
    }
  }
}

}  // namespace

void attention_backward(const AttentionArgs& args, const BackwardIn& in, const BackwardOut& to) {
  by_type(args.dtype, [&](auto zero) { backward<decltype(zero)>(args, in, to); });
}

void attention_forward(const AttentionArgs& args, const ForwardOut& to);

}  // namespace cvg::CVG_LEVEL

const cvg::AttentionKernels& cvg::CVG_OF_LEVEL(attention_kernels)() {
  static const AttentionKernels kernels{CVG_LEVEL::attention_forward,
                                        CVG_LEVEL::attention_backward};
  return kernels;
}
