// Forward pass of attention with a band by frame distance.
//
// A task is a tile of queries of one batch entry and head. The keys pass by twice:
//   m = max_j S,   S = scale · q kᵀ                                       first pass
//   S' = S + m · band;   P = exp(S' − max S');   l = Σ P;   O = Σ P v     second pass, running max
// Keys that fit one tile need no first pass: their scores are all on chip at once.
#include "cpu/frame_band.h"

namespace cvg::CVG_LEVEL {

namespace {

template <typename T>
class Forward {
  using A = Wide<T>;
  static constexpr int64_t lanes = kLanes<A>;
  static constexpr A kNone = -std::numeric_limits<A>::infinity();

 public:
  Forward(const FrameBandArgs& args, const FrameBandForwardOut& to, const Tiles& tiles)
      : args_(args),
        to_(to),
        tiles_(tiles),
        value_width_(round_up(args.value_dim, lanes)),
        band_(args, tiles.lanes_keys),
        query_(tiles.rows * args.dim),
        key_(tiles.lanes_keys * args.dim),
        value_(tiles.keys * value_width_),
        scores_(round_up(tiles.sub_rows, kRows<A>) * tiles.lanes_keys),
        out_(tiles.rows * value_width_),
        most_(tiles.rows),
        total_(tiles.rows) {}

  void task(int64_t entry, int64_t tile) {
    const int64_t b = entry / args_.heads, h = entry % args_.heads;
    first_ = tile * tiles_.rows;
    count_ = std::min(tiles_.rows, args_.queries - first_);
    const int64_t place = entry * args_.queries + first_;
    highest_ = static_cast<A*>(to_.rows.highest) + place;
    place_ = to_.rows.place + place;
    const Matrix<T> query = matrix<T>(args_.query, b, h), value = matrix<T>(args_.value, b, h);
    copy_rows(query.row(first_), query.row_stride, query.dim_stride, count_,
              round_up(count_, kRows<A>), args_.dim, static_cast<A*>(query_));
    std::fill_n(highest_, count_, kNone);
    std::fill_n(place_, count_, 0);
    std::fill_n(static_cast<A*>(most_), tiles_.rows, kNone);
    std::fill_n(static_cast<A*>(total_), tiles_.rows, A{0});
    for (int64_t key_tile = 0; key_tile < tiles_.key_tiles && tiles_.key_tiles > 1; ++key_tile) {
      load_keys(b, h, key_tile);
      for (int64_t row = 0; row < count_; row += tiles_.sub_rows) {
        find_highest(row, score(row));
      }
    }
    for (int64_t key_tile = 0; key_tile < tiles_.key_tiles; ++key_tile) {
      load_keys(b, h, key_tile);
      pack(value.row(first_key_), value.row_stride, value.dim_stride, keys_, args_.value_dim,
           static_cast<A*>(value_));
      for (int64_t row = 0; row < count_; row += tiles_.sub_rows) {
        const int64_t rows = score(row);
        if (tiles_.key_tiles == 1) {
          find_highest(row, rows);
        }
        for (int64_t r = 0; r < rows; ++r) {
          softmax(scores_ + r * width_, row + r);
        }
        gemm<A>(scores_, width_, 1, value_, round_up(rows, kRows<A>), value_width_, keys_,
                out_ + row * value_width_, value_width_, key_tile > 0);
      }
    }
    write(b, h, static_cast<A*>(to_.rows.lse) + place);
  }

 private:
  void load_keys(int64_t b, int64_t h, int64_t key_tile) {
    first_key_ = key_tile * tiles_.keys;
    keys_ = std::min(tiles_.keys, args_.keys - first_key_);
    width_ = round_up(keys_, lanes);
    const Matrix<T> key = matrix<T>(args_.key, b, h);
    pack_transposed(key.row(first_key_), key.row_stride, key.dim_stride, keys_, args_.dim,
                    static_cast<A*>(key_));
    band_.load_keys(first_key_, keys_);
  }

  // q kᵀ of the rows from `row` on, as many as are held at once; returns how many.
  int64_t score(int64_t row) {
    const int64_t rows = std::min(tiles_.sub_rows, count_ - row);
    gemm<A>(query_ + row * args_.dim, args_.dim, 1, key_, round_up(rows, kRows<A>), width_,
            args_.dim, scores_, width_, false);
    return rows;
  }

  // m and the first key that has it.
  void find_highest(int64_t row, int64_t rows) {
    const A scale = static_cast<A>(args_.scale);
    for (int64_t r = 0; r < rows; ++r) {
      const A* scores = scores_ + r * width_;
      Vec<A> most = splat(kNone);
      for (int64_t j = 0; j < width_; j += lanes) {
        most = vmax(load(scores + j) * scale + load(band_.outside() + j), most);
      }
      const A found = horizontal_max<A>(most);
      if (found > highest_[row + r]) {
        highest_[row + r] = found;
        const A* at = std::find_if(scores, scores + keys_, [&](A s) { return s * scale == found; });
        place_[row + r] = static_cast<int32_t>(first_key_ + (at - scores));
      }
    }
  }

  // q kᵀ of a row becomes unnormalised probabilities, in place.
  void softmax(A* scores, int64_t row) {
    const Vec<A> scale = splat(static_cast<A>(args_.scale)), highest = splat(highest_[row]);
    const A *band = band_.of(args_.query_frames[first_ + row]), *outside = band_.outside();
    Vec<A> most = splat(kNone);
    for (int64_t j = 0; j < width_; j += lanes) {
      const Vec<A> s = load(scores + j) * scale + (highest * load(band + j) + load(outside + j));
      store(scores + j, s);
      most = vmax(s, most);
    }
    const A before = most_[row], now = std::max(before, horizontal_max<A>(most));
    const A base = now == kNone ? A{0} : now;  // a row that is not a number, which it then says
    Vec<A> sum{};
    for (int64_t j = 0; j < width_; j += lanes) {
      const Vec<A> p = vexp(load(scores + j) - base);
      store(scores + j, p);
      sum += p;
    }
    const A fade = std::exp(before - base);
    most_[row] = now;
    total_[row] = total_[row] * fade + horizontal_sum<A>(sum);
    if (first_key_ > 0 && fade != 1) {
      A* out = out_ + row * value_width_;
      for (int64_t d = 0; d < value_width_; d += lanes) {
        store(out + d, load(out + d) * fade);
      }
    }
  }

  void write(int64_t b, int64_t h, A* lse) {
    for (int64_t r = 0; r < count_; ++r) {
      lse[r] = most_[r] + std::log(total_[r]);
      const Vec<A> share = splat(1 / total_[r]);
      A* out = out_ + r * value_width_;
      for (int64_t d = 0; d < value_width_; d += lanes) {
        store(out + d, load(out + d) * share);
      }
    }
    const int64_t* stride = to_.out.stride;
    T* to = static_cast<T*>(to_.out.data) + b * stride[0] + h * stride[1] + first_ * stride[2];
    write_rows(Rows<A>{out_, value_width_}, to, stride[2], stride[3], count_, args_.value_dim);
  }

  const FrameBandArgs& args_;
  const FrameBandForwardOut& to_;
  const Tiles& tiles_;
  const int64_t value_width_;
  FrameBand<A> band_;
  Scratch<A> query_, key_, value_, scores_, out_;
  Scratch<A> most_, total_;  // running maximum of S', and l
  A* highest_ = nullptr;     // m
  int32_t* place_ = nullptr;
  int64_t first_ = 0, count_ = 0, first_key_ = 0, keys_ = 0, width_ = 0;
};

template <typename T>
void forward(const FrameBandArgs& args, const FrameBandForwardOut& to) {
  const int64_t entries = args.batch * args.heads;
  const Tiles tiles = plan_tiles<Wide<T>>(args, entries);
#pragma omp parallel num_threads(args.threads)
  {
    Forward<T> worker(args, to, tiles);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < entries * tiles.row_tiles; ++task) {
      worker.task(task / tiles.row_tiles, task % tiles.row_tiles);
    }
  }
}

}  // namespace

void frame_band_forward(const FrameBandArgs& args, const FrameBandForwardOut& to) {
  by_type(args.dtype, [&](auto zero) { forward<decltype(zero)>(args, to); });
}

}  // namespace cvg::CVG_LEVEL
