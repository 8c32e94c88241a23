// Forward pass of attention with capture.
//
// A task is a tile of queries of one batch entry and head; or of all heads, one after the other,
// where maps are averaged over them, so that these are summed by one thread, in one order, straight
// into the output. The keys pass by in tiles:
//   S' = scale · q kᵀ + what the score policy adds;   h' = max(h, max_j S');   P = exp(S' − h')
//   l = l·e^(h−h') + Σ P;   O = O·e^(h−h') + P v
// and the scores of chosen tokens are put aside as they pass:  maps = exp(s_token − h) / l.
// A policy that needs m, the largest score of a row, has the keys pass by once more before that,
// unless they fit one tile: then all scores are on chip at once.
#include "cpu/score.h"

namespace cvg::CVG_LEVEL {

namespace {

template <typename T, template <typename> class ScoreOf>
class Forward {
  using A = Wide<T>;
  using Score = ScoreOf<A>;
  static constexpr int64_t lanes = kLanes<A>;
  static constexpr A kNone = -std::numeric_limits<A>::infinity();

 public:
  Forward(const AttentionArgs& args, const ForwardOut& to, const Tiles& tiles)
      : args_(args),
        to_(to),
        tiles_(tiles),
        value_width_(args.value.data ? round_up(args.value_dim, lanes) : 0),
        rows_width_(round_up(tiles.rows, lanes)),
        score_(args, tiles.lanes_keys),
        tokens_(args),
        query_(tiles.rows * args.dim),
        key_(tiles.lanes_keys * args.dim),
        value_(tiles.keys * value_width_),
        scores_(round_up(tiles.sub_rows, kRows<A>) * tiles.lanes_keys),
        out_(tiles.rows * value_width_),
        chosen_(args.tokens * rows_width_),
        running_max_(rows_width_),
        total_(rows_width_) {}

  void task(int64_t b, int64_t h, int64_t tile) {
    first_ = tile * tiles_.rows;
    count_ = std::min(tiles_.rows, args_.queries - first_);
    const Matrix<T> query = matrix<T>(args_.query, b, h);
    copy_rows(query.row(first_), query.row_stride, query.dim_stride, count_,
              round_up(count_, kRows<A>), args_.dim, static_cast<A*>(query_));
    std::fill_n(static_cast<A*>(running_max_), rows_width_, kNone);
    std::fill_n(static_cast<A*>(total_), rows_width_, A{0});
    if constexpr (Score::kRowMax) {
      const int64_t place = (b * args_.heads + h) * args_.queries + first_;
      row_max_ = static_cast<A*>(to_.rows.row_max) + place;
      row_argmax_ = to_.rows.row_argmax + place;
      std::fill_n(row_max_, count_, kNone);
      std::fill_n(row_argmax_, count_, 0);
      for (int64_t key_tile = 0; key_tile < tiles_.key_tiles && tiles_.key_tiles > 1; ++key_tile) {
        load_keys(b, h, key_tile);
        for (int64_t row = 0; row < count_; row += tiles_.sub_rows) {
          find_row_max(row, products(row));
        }
      }
    }
    for (int64_t key_tile = 0; key_tile < tiles_.key_tiles; ++key_tile) {
      load_keys(b, h, key_tile);
      tokens_.load_keys(b, first_key_, keys_);
      if (args_.value.data) {
        const Matrix<T> value = matrix<T>(args_.value, b, h);
        pack(value.row(first_key_), value.row_stride, value.dim_stride, keys_, args_.value_dim,
             static_cast<A*>(value_));
      }
      for (int64_t row = 0; row < count_; row += tiles_.sub_rows) {
        const int64_t rows = products(row);
        if constexpr (Score::kRowMax) {
          if (tiles_.key_tiles == 1) {
            find_row_max(row, rows);
          }
        }
        for (int64_t r = 0; r < rows; ++r) {
          softmax(scores_ + r * width_, row + r);
        }
        if (args_.value.data) {
          gemm<A>(scores_, width_, 1, value_, round_up(rows, kRows<A>), value_width_, keys_,
                  out_ + row * value_width_, value_width_, key_tile > 0);
        }
      }
    }
    write(b, h);
  }

 private:
  void load_keys(int64_t b, int64_t h, int64_t key_tile) {
    first_key_ = key_tile * tiles_.keys;
    keys_ = std::min(tiles_.keys, args_.keys - first_key_);
    width_ = round_up(keys_, lanes);
    const Matrix<T> key = matrix<T>(args_.key, b, h);
    pack_transposed(key.row(first_key_), key.row_stride, key.dim_stride, keys_, args_.dim,
                    static_cast<A*>(key_));
    score_.load_keys(b, first_key_, keys_);
  }

  // q kᵀ of the rows from `row` on, as many as are held at once; returns how many.
  int64_t products(int64_t row) {
    const int64_t rows = std::min(tiles_.sub_rows, count_ - row);
    gemm<A>(query_ + row * args_.dim, args_.dim, 1, key_, round_up(rows, kRows<A>), width_,
            args_.dim, scores_, width_, false);
    return rows;
  }

  // m and the first key that has it.
  void find_row_max(int64_t row, int64_t rows) {
    const A scale = static_cast<A>(args_.scale);
    const A* outside = score_.outside();
    for (int64_t r = 0; r < rows; ++r) {
      const A* scores = scores_ + r * width_;
      Vec<A> most = splat(kNone);
      for (int64_t j = 0; j < width_; j += lanes) {
        most = vmax(load(scores + j) * scale + load(outside + j), most);
      }
      const A found = horizontal_max<A>(most);
      if (found > row_max_[row + r]) {
        row_max_[row + r] = found;
        const A* at = std::find_if(scores, scores + keys_, [&](A s) { return s * scale == found; });
        row_argmax_[row + r] = static_cast<int32_t>(first_key_ + (at - scores));
      }
    }
  }

  // q kᵀ of a row becomes unnormalised probabilities, in place.
  void softmax(A* scores, int64_t row) {
    const auto added = score_.row(first_ + row, tokens_, Score::kRowMax ? row_max_[row] : A{0});
    const Vec<A> scale = splat(static_cast<A>(args_.scale));
    const int64_t width = width_;
    Vec<A> most = splat(kNone);
    for (int64_t j = 0; j < width; j += lanes) {
      const Vec<A> s = load(scores + j) * scale + added(j);
      store(scores + j, s);
      most = vmax(most, s);
    }
    for (const auto [token, column] : tokens_) {
      chosen_[token * rows_width_ + row] = scores[column];
    }
    const A before = running_max_[row], running_max = std::max(before, horizontal_max<A>(most));
    // Every key so far is masked, or not a number, which comparisons skip.
    if (running_max == kNone) {
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
      const Vec<A> p = vexp(load(scores + j) - running_max);
      store(scores + j, p);
      sum += p;
    }
    const A rescale = std::exp(before - running_max);
    running_max_[row] = running_max;
    total_[row] = total_[row] * rescale + horizontal_sum<A>(sum);
    if (first_key_ > 0 && rescale != 1) {
      A* out = out_ + row * value_width_;
      for (int64_t d = 0; d < value_width_; d += lanes) {
        store(out + d, load(out + d) * rescale);
      }
    }
  }

  void write(int64_t b, int64_t h) {
    A* lse = static_cast<A*>(to_.rows.lse) + (b * args_.heads + h) * args_.queries + first_;
    for (int64_t r = 0; r < count_; ++r) {
      lse[r] = total_[r] == 0 ? kNone : running_max_[r] + std::log(total_[r]);
      total_[r] = total_[r] == 0 ? A{0} : 1 / total_[r];
    }
    if (args_.value.data) {
      const int64_t* stride = to_.out.stride;
      T* out = static_cast<T*>(to_.out.data) + b * stride[0] + h * stride[1] + first_ * stride[2];
      for (int64_t r = 0; r < count_; ++r) {
        narrow_row<T, A>(out_ + r * value_width_, total_[r], args_.value_dim, out + r * stride[2]);
      }
    }
    const A head_weight = args_.head_mean ? A{1} / static_cast<A>(args_.heads) : A{1};
    const bool add = args_.head_mean && h > 0;
    const int64_t entry = args_.head_mean ? b : b * args_.heads + h;
    for (int64_t k = 0; k < args_.tokens; ++k) {
      A* maps = static_cast<A*>(to_.maps) + (entry * args_.tokens + k) * args_.queries + first_;
      A* chosen = chosen_ + k * rows_width_;
      for (int64_t r = 0; r < rows_width_; r += lanes) {
        const Vec<A> total = load(total_ + r), p = vexp(load(chosen + r) - load(running_max_ + r));
        store(chosen + r, total == 0 ? Vec<A>{} : p * total * head_weight);
      }
      for (int64_t r = 0; r < count_; ++r) {
        maps[r] = add ? maps[r] + chosen[r] : chosen[r];
      }
    }
  }

  const AttentionArgs& args_;
  const ForwardOut& to_;
  const Tiles& tiles_;
  const int64_t value_width_, rows_width_;
  Score score_;
  TokensOfTile tokens_;
  Scratch<A> query_, key_, value_, scores_, out_;
  Scratch<A> chosen_;               // scores of chosen tokens [K, rows]
  Scratch<A> running_max_, total_;  // h and l of each row
  A* row_max_ = nullptr;            // m
  int32_t* row_argmax_ = nullptr;
  int64_t first_ = 0, count_ = 0, first_key_ = 0, keys_ = 0, width_ = 0;
};

template <typename T, template <typename> class Score>
void forward(const AttentionArgs& args, const ForwardOut& to) {
  const int64_t heads = args.head_mean && args.tokens ? args.heads : 1;  // of a task
  const int64_t entries = args.batch * args.heads / heads;
  const Tiles tiles = plan_tiles<Wide<T>>(args, entries);
  const int64_t tasks = args.queries ? entries * tiles.row_tiles : 0;
#pragma omp parallel num_threads(args.threads)
  {
    Forward<T, Score> worker(args, to, tiles);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t first = task / tiles.row_tiles * heads;
      for (int64_t head = first; head < first + heads; ++head) {
        worker.task(head / args.heads, head % args.heads, task % tiles.row_tiles);
      }
    }
  }
}

}  // namespace

void attention_forward(const AttentionArgs& args, const ForwardOut& to) {
  by_policy(args, [&](auto zero, auto policy) {
    forward<decltype(zero), decltype(policy)::template Of>(args, to);
  });
}

}  // namespace cvg::CVG_LEVEL
