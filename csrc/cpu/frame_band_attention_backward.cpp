// Backward pass of attention with a band by frame distance.
//
//   P = exp(S' − lse),   S' = scale · q kᵀ + m · band,   dP = dO vᵀ,   δ = Σ_d dO·O − dlse,
//   dS' = scale · P ∘ (dP − δ),   t = Σ_j band · dS',   dS = dS' + t at the place of m,
//   dq = dS k,   dk = dSᵀ q,   dv = Pᵀ dO.
//
// A pass over query tiles gives δ, t and dq; a second one over key tiles gives dk and dv, summed
// over the queries in one order: no atomics. P is recomputed in both.
#include "cpu/backward_tile.h"
#include "cpu/frame_band.h"

namespace cvg::CVG_LEVEL {

namespace {

// What both passes share: the scores of some rows and keys turned into P and dS'.
template <typename T>
class Backward : protected BackwardTile<T, FrameBandArgs, FrameBandBackwardIn> {
  using Base = BackwardTile<T, FrameBandArgs, FrameBandBackwardIn>;

 protected:
  using Base::args_, Base::in_, Base::lanes, Base::weights_, Base::grads_, Base::first_key_,
      Base::keys_, Base::width_;
  using typename Base::A;

  Backward(const FrameBandArgs& args, const FrameBandBackwardIn& in, const Tiles& tiles)
      : Base(args, in, tiles), band_(args, tiles.lanes_keys) {}

  void load_keys(int64_t b, int64_t h, int64_t key_tile) {
    Base::load_keys(b, h, key_tile);
    band_.load_keys(first_key_, keys_);
  }

  // P and dS' of `rows` queries from `row` on, whose q and dO lie row-major in `query` and
  // `grad_out`; t of each row, of these keys, is added to `through_max`.
  void weights_and_grads(const A* query, const A* grad_out, int64_t entry, int64_t row,
                         int64_t rows, const A* centre, A* through_max) {
    const int64_t place = entry * args_.queries + row;
    this->products(query, grad_out, rows);
    const A* lse = static_cast<const A*>(in_.rows.lse) + place;
    const A* highest = static_cast<const A*>(in_.rows.highest) + place;
    const Vec<A> scale = splat(static_cast<A>(args_.scale));
    const A* outside = band_.outside();
    for (int64_t r = 0; r < rows; ++r) {
      A *weights = weights_ + r * width_, *grads = grads_ + r * width_;
      const A* band = band_.of(args_.query_frames[row + r]);
      Vec<A> sum{};
      for (int64_t j = 0; j < width_; j += lanes) {
        const Vec<A> near = load(band + j);
        const Vec<A> s =
            load(weights + j) * scale + (highest[r] * near + load(outside + j)) - lse[r];
        // A rounding error may leave the difference a hair above 0.
        const Vec<A> p = vexp(s > 0 ? Vec<A>{} : s);
        const Vec<A> ds = p * (load(grads + j) - centre[r]) * scale;
        store(weights + j, p);
        store(grads + j, ds);
        sum += near * ds;
      }
      if (through_max) {
        through_max[r] += horizontal_sum<A>(sum);
      }
    }
  }

  void write(const A* sum, int64_t width, const Target4& to, int64_t entry, int64_t first,
             int64_t rows, int64_t dim) {
    T* at = static_cast<T*>(to.data) + entry / args_.heads * to.stride[0] +
            entry % args_.heads * to.stride[1] + first * to.stride[2];
    write_rows(Rows<const A>{sum, width}, at, to.stride[2], to.stride[3], rows, dim);
  }

  FrameBand<A> band_;
};

// dq, and δ and t of every row. A task is a tile of queries of one batch entry and head.
template <typename T>
class QueryPass : Backward<T> {
  using Base = Backward<T>;
  using Base::args_, Base::in_, Base::tiles_, Base::has_out_, Base::lanes, Base::grads_,
      Base::first_key_, Base::keys_, Base::width_;
  using typename Base::A;

 public:
  QueryPass(const FrameBandArgs& args, const FrameBandBackwardIn& in, const Tiles& tiles,
            const Target4& grad_query, A* centre, A* through_max)
      : Base(args, in, tiles),
        grad_query_(grad_query),
        centre_(centre),
        through_max_(through_max),
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
    A* through_max = through_max_ + entry * args_.queries + first;
    find_centre(b, h, first, count, centre);
    std::fill_n(through_max, count, A{0});
    if (!grad_query_.data && !in_.row_max_grad) {
      return;
    }
    const Matrix<T> key = matrix<T>(args_.key, b, h);
    for (int64_t key_tile = 0; key_tile < tiles_.key_tiles; ++key_tile) {
      this->load_keys(b, h, key_tile);
      pack(key.row(first_key_), key.row_stride, key.dim_stride, keys_, args_.dim,
           static_cast<A*>(key_rows_));
      for (int64_t row = 0; row < count; row += tiles_.sub_rows) {
        const int64_t rows = std::min(tiles_.sub_rows, count - row);
        this->weights_and_grads(query_ + row * args_.dim, grad_out_ + row * args_.value_dim, entry,
                                first + row, rows, centre + row, through_max + row);
        if (grad_query_.data) {
          gemm<A>(grads_, width_, 1, key_rows_, round_up(rows, kRows<A>), dim_width_, keys_,
                  sum_ + row * dim_width_, dim_width_, key_tile > 0);
        }
      }
    }
    if (grad_query_.data) {
      const int32_t* place = in_.rows.place + entry * args_.queries + first;
      for (int64_t r = 0; r < count && in_.row_max_grad; ++r) {
        const T* k = key.row(place[r]);
        for (int64_t d = 0; d < args_.dim; ++d) {
          sum_[r * dim_width_ + d] += through_max[r] * widen(k[d * key.dim_stride]);
        }
      }
      this->write(sum_, dim_width_, grad_query_, entry, first, count, args_.dim);
    }
  }

 private:
  // δ = Σ_d dO·O − dlse.
  void find_centre(int64_t b, int64_t h, int64_t first, int64_t count, A* centre) {
    const A* grad_lse = static_cast<const A*>(in_.grad_lse);
    const Matrix<T> out = matrix<T>(in_.out, b, h);
    for (int64_t r = 0; r < count; ++r) {
      A sum = grad_lse ? -grad_lse[(b * args_.heads + h) * args_.queries + first + r] : A{0};
      const T* o = out.row(first + r);
      for (int64_t d = 0; d < args_.value_dim && has_out_; ++d) {
        sum += grad_out_[r * args_.value_dim + d] * widen(o[d * out.dim_stride]);
      }
      centre[r] = sum;
    }
  }

  const Target4& grad_query_;
  A *centre_, *through_max_;  // δ and t [B, H, N]
  const int64_t dim_width_;
  Scratch<A> query_, grad_out_, key_rows_, sum_;
};

// dk and dv. A task is a tile of keys of one batch entry and head; δ and t are known.
template <typename T>
class KeyPass : Backward<T> {
  using Base = Backward<T>;
  using Base::args_, Base::in_, Base::tiles_, Base::has_out_, Base::lanes, Base::weights_,
      Base::grads_, Base::first_key_, Base::keys_, Base::width_;
  using typename Base::A;

 public:
  KeyPass(const FrameBandArgs& args, const FrameBandBackwardIn& in, const Tiles& tiles,
          const FrameBandBackwardOut& to, const A* centre, const A* through_max)
      : Base(args, in, tiles),
        to_(to),
        centre_(centre),
        through_max_(through_max),
        dim_width_(round_up(args.dim, lanes)),
        value_width_(round_up(args.value_dim, lanes)),
        query_(tiles.sub_rows * args.dim),
        query_panels_(tiles.sub_rows * dim_width_),
        grad_out_(has_out_ ? tiles.sub_rows * args.value_dim : 0),
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
      if (has_out_) {
        this->load_rows(in_.grad_out, b, h, row, rows, args_.value_dim, grad_out_);
      }
      this->weights_and_grads(query_, grad_out_, entry, row, rows, centre_ + place, nullptr);
      // The products run over the queries: row j of the left side is column j of P and dS.
      if (to_.value.data) {
        pack(grad.row(row), grad.row_stride, grad.dim_stride, rows, args_.value_dim,
             static_cast<A*>(grad_out_panels_));
        gemm<A>(weights_, 1, width_, grad_out_panels_, width_, value_width_, rows, value_sum_,
                value_width_, row > 0);
      }
      if (to_.key.data) {
        for (int64_t r = 0; r < rows && in_.row_max_grad; ++r) {
          const int64_t j = in_.rows.place[place + r] - first_key_;
          if (j >= 0 && j < keys_) {
            grads_[r * width_ + j] += through_max_[place + r];
          }
        }
        pack(query.row(row), query.row_stride, query.dim_stride, rows, args_.dim,
             static_cast<A*>(query_panels_));
        gemm<A>(grads_, 1, width_, query_panels_, width_, dim_width_, rows, key_sum_, dim_width_,
                row > 0);
      }
    }
    finish(key_sum_, dim_width_, to_.key, entry, args_.dim);
    finish(value_sum_, value_width_, to_.value, entry, args_.value_dim);
  }

 private:
  void finish(A* sum, int64_t width, const Target4& to, int64_t entry, int64_t dim) {
    if (!to.data) {
      return;
    }
    if (args_.queries == 0) {
      std::fill_n(sum, keys_ * width, A{0});
    }
    this->write(sum, width, to, entry, first_key_, keys_, dim);
  }

  const FrameBandBackwardOut& to_;
  const A *centre_, *through_max_;
  const int64_t dim_width_, value_width_;
  Scratch<A> query_, query_panels_, grad_out_, grad_out_panels_, key_sum_, value_sum_;
};

template <typename T>
void backward(const FrameBandArgs& args, const FrameBandBackwardIn& in,
              const FrameBandBackwardOut& to) {
  const int64_t entries = args.batch * args.heads;
  const Tiles tiles = plan_tiles<Wide<T>>(args, entries);
  Scratch<Wide<T>> centre(entries * args.queries), through_max(entries * args.queries);
#pragma omp parallel num_threads(args.threads)
  {
    {  // dv needs δ as well: dS' is made on the way
      QueryPass<T> worker(args, in, tiles, to.query, centre, through_max);
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < entries * tiles.row_tiles; ++task) {
        worker.task(task / tiles.row_tiles, task % tiles.row_tiles);
      }
    }
    if (to.key.data || to.value.data) {
      KeyPass<T> worker(args, in, tiles, to, centre, through_max);
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < entries * tiles.key_tiles; ++task) {
        worker.task(task / tiles.key_tiles, task % tiles.key_tiles);
      }
    }
  }
}

}  // namespace

void frame_band_backward(const FrameBandArgs& args, const FrameBandBackwardIn& in,
                         const FrameBandBackwardOut& to) {
  by_type(args.dtype, [&](auto zero) { backward<decltype(zero)>(args, in, to); });
}

void frame_band_forward(const FrameBandArgs& args, const FrameBandForwardOut& to);

}  // namespace cvg::CVG_LEVEL

const cvg::FrameBandKernels& cvg::CVG_OF_LEVEL(frame_band_kernels)() {
  static const FrameBandKernels kernels{CVG_LEVEL::frame_band_forward,
                                        CVG_LEVEL::frame_band_backward};
  return kernels;
}
