// Forward pass of attention with capture.
//
// A task is a tile of queries of one batch entry; it goes through the heads one after the other, so
// that maps averaged over heads are summed by one thread, in one order, straight into the output.
// Per head the keys pass by in tiles:
//   S = scale · q kᵀ + bias;   m' = max(m, max_j S);   P = exp(S − m');   l = l·e^(m−m') + Σ P;   O
//   = O·e^(m−m') + P v
// and the scores of captured tokens are put aside as they pass:  maps = exp(s_token − m) / l.
#include "cpu/tiles.h"

namespace cvg::CVG_LEVEL {

namespace {

template <typename T>
class Forward {
  using A = Wide<T>;
  static constexpr int64_t lanes = kLanes<A>;
  static constexpr A kNone = -std::numeric_limits<A>::infinity();

 public:
  Forward(const AttentionArgs& args, const ForwardOut& to, const Tiles& tiles)
      : args_(args),
        to_(to),
        tiles_(tiles),
        value_width_(args.value.data ? round_up(args.value_dim, lanes) : 0),
        query_(tiles.rows * args.dim),
        key_(tiles.lanes_keys * args.dim),
        value_(tiles.keys * value_width_),
        bias_(tiles.lanes_keys),
        scores_(tiles.sub_rows * tiles.lanes_keys),
        out_(tiles.rows * value_width_),
        chosen_(args.tokens * tiles.rows),
        highest_(tiles.rows),
        total_(tiles.rows) {}

  void task(int64_t b, int64_t tile) {
    first_ = tile * tiles_.rows;
    count_ = std::min(tiles_.rows, args_.queries - first_);
    for (int64_t h = 0; h < args_.heads; ++h) {
      head(b, h);
    }
  }

 private:
  void head(int64_t b, int64_t h) {
    const Matrix<T> query = matrix<T>(args_.query, b, h), key = matrix<T>(args_.key, b, h);
    copy_rows(query.row(first_), query.row_stride, query.dim_stride, count_,
              round_up(count_, kRows<A>), args_.dim, static_cast<A*>(query_));
    std::fill_n(static_cast<A*>(highest_), tiles_.rows, kNone);
    std::fill_n(static_cast<A*>(total_), tiles_.rows, A{0});
    for (int64_t tile = 0; tile < tiles_.key_tiles; ++tile) {
      const int64_t first_key = tile * tiles_.keys;
      const int64_t keys = std::min(tiles_.keys, args_.keys - first_key);
      pack_transposed(key.row(first_key), key.row_stride, key.dim_stride, keys, args_.dim,
                      static_cast<A*>(key_));
      if (args_.value.data) {
        const Matrix<T> value = matrix<T>(args_.value, b, h);
        pack(value.row(first_key), value.row_stride, value.dim_stride, keys, args_.value_dim,
             static_cast<A*>(value_));
      }
      tile_bias(args_, b, first_key, keys, tiles_.lanes_keys, static_cast<A*>(bias_));
      for (int64_t row = 0; row < count_; row += tiles_.sub_rows) {
        rows_meet_keys(b, row, std::min(tiles_.sub_rows, count_ - row), first_key, keys);
      }
    }
    write(b, h);
  }

  void rows_meet_keys(int64_t b, int64_t row, int64_t rows, int64_t first_key, int64_t keys) {
    const int64_t width = round_up(keys, lanes), padded = round_up(rows, kRows<A>);
    gemm<A>(query_ + row * args_.dim, args_.dim, 1, key_, padded, width, args_.dim, scores_, width,
            false);
    for (int64_t r = 0; r < rows; ++r) {
      softmax(scores_ + r * width, width, b, row + r, first_key, keys);
    }
    if (args_.value.data) {
      gemm<A>(scores_, width, 1, value_, padded, value_width_, keys, out_ + row * value_width_,
              value_width_, first_key > 0);
    }
  }

  // Scores of a row become unnormalised probabilities, in place.
  void softmax(A* scores, int64_t width, int64_t b, int64_t row, int64_t first_key, int64_t keys) {
    const Vec<A> scale = splat(static_cast<A>(args_.scale));
    Vec<A> most = splat(kNone);
    for (int64_t j = 0; j < width; j += lanes) {
      const Vec<A> s = load(scores + j) * scale + load(bias_ + j);
      store(scores + j, s);
      most = vmax(most, s);
    }
    const int64_t* ids = args_.token_ids + b * args_.tokens;
    for (int64_t k = 0; k < args_.tokens; ++k) {
      if (ids[k] >= first_key && ids[k] < first_key + keys) {
        chosen_[k * tiles_.rows + row] = scores[ids[k] - first_key];
      }
    }
    const A before = highest_[row], highest = std::max(before, horizontal_max<A>(most));
    if (highest == kNone) {  // every key so far is masked, or not a number, which comparisons skip
      Vec<A> sum{};
      for (int64_t j = 0; j < width; j += lanes) {
        sum += load(scores + j);
      }
      const A found = horizontal_sum<A>(sum);
      if (found != found) {
        total_[row] = found;
      }
      std::fill_n(scores, width, A{0});
      return;
    }
    Vec<A> sum{};
    for (int64_t j = 0; j < width; j += lanes) {
      const Vec<A> p = vexp(load(scores + j) - highest);
      store(scores + j, p);
      sum += p;
    }
    const A fade = std::exp(before - highest);
    highest_[row] = highest;
    total_[row] = total_[row] * fade + horizontal_sum<A>(sum);
    if (first_key > 0 && fade != 1) {
      A* out = out_ + row * value_width_;
      for (int64_t d = 0; d < value_width_; d += lanes) {
        store(out + d, load(out + d) * fade);
      }
    }
  }

  void write(int64_t b, int64_t h) {
    const int64_t place = (b * args_.heads + h) * args_.queries + first_;
    A* lse = static_cast<A*>(to_.lse) + place;
    for (int64_t r = 0; r < count_; ++r) {
      lse[r] = total_[r] == 0 ? kNone : highest_[r] + std::log(total_[r]);
      total_[r] = total_[r] == 0 ? A{0} : 1 / total_[r];
    }
    if (args_.value.data) {
      T* out = static_cast<T*>(to_.out) + place * args_.value_dim;
      for (int64_t r = 0; r < count_; ++r) {
        for (int64_t d = 0; d < args_.value_dim; ++d) {
          *out++ = narrow<T>(out_[r * value_width_ + d] * total_[r]);
        }
      }
    }
    const A share = args_.head_mean ? A{1} / args_.heads : A{1};
    const bool add = args_.head_mean && h > 0;
    const int64_t entry = args_.head_mean ? b : b * args_.heads + h;
    for (int64_t k = 0; k < args_.tokens; ++k) {
      A* maps = static_cast<A*>(to_.maps) + (entry * args_.tokens + k) * args_.queries + first_;
      const A* chosen = chosen_ + k * tiles_.rows;
      for (int64_t r = 0; r < count_; ++r) {
        const A p = total_[r] == 0 ? A{0} : std::exp(chosen[r] - highest_[r]) * total_[r] * share;
        maps[r] = add ? maps[r] + p : p;
      }
    }
  }

  const AttentionArgs& args_;
  const ForwardOut& to_;
  const Tiles& tiles_;
  const int64_t value_width_;
  Scratch<A> query_, key_, value_, bias_, scores_, out_;
  Scratch<A> chosen_;           // scores of captured tokens [K, rows]
  Scratch<A> highest_, total_;  // m and l of each row
  int64_t first_ = 0, count_ = 0;
};

template <typename T>
void forward(const AttentionArgs& args, const ForwardOut& to) {
  const Tiles tiles = plan_tiles<Wide<T>>(args, args.batch);
  const int64_t tasks = args.queries ? args.batch * tiles.row_tiles : 0;
#pragma omp parallel num_threads(args.threads)
  {
    Forward<T> worker(args, to, tiles);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) {
      worker.task(task / tiles.row_tiles, task % tiles.row_tiles);
    }
  }
}

}  // namespace

void attention_forward(const AttentionArgs& args, const ForwardOut& to) {
  by_type(args.dtype, [&](auto zero) { forward<decltype(zero)>(args, to); });
}

}  // namespace cvg::CVG_LEVEL
