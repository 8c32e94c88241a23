// Temporal attention: many short sequences, of F frames each.
//
// A task is a run of positions; a thread takes a position through its heads one after the other, so
// that head-mean maps are summed in one order. All F×F numbers of a head stay in cache, transposed:
// row j holds key j, the lanes of a vector hold queries. So every reduction over the keys (m, the
// softmax, Σ P dP) runs down the rows and never across a vector:
//   Sᵀ = k (scale · q)ᵀ;   S'ᵀ = Sᵀ + m ∘ addedᵀ;   P;   out = P v
// and backward, with P recomputed:
//   dPᵀ = v dOᵀ + dCᵀ / H;   dS' = P ∘ (dP − Σ P dP);   dS = dS' + [j = argmax S] Σ added ∘ dS'
//   dq = scale · dS k;   dk = scale · dSᵀ q;   dv = Pᵀ dO;   dadded = Σ m ∘ dS'
#include "cvg/temporal_attention.h"

#include "cpu/sequences.h"

namespace cvg::CVG_LEVEL {

namespace {

// Tasks of a call. The gradient of `added` is summed per task and then over the tasks in order, so
// that it does not depend on the number of threads; fewer tasks need less memory for that.
constexpr int64_t kTasks = 512, kSummingTasks = 64;

// What both passes share: the probabilities of one position and head.
template <typename T>
class Temporal : protected Sequences<T> {
 protected:
  using Base = Sequences<T>;
  using Base::lanes, Base::frames_, Base::width_, Base::weights_;
  using typename Base::A;
  static constexpr A kNone = -std::numeric_limits<A>::infinity();

  // m of a vector of queries and its place, the first key that reaches it.
  struct Peak {
    Vec<A> row_max, row_argmax;
  };

  // `added` is transposed: [F, width_].
  Temporal(const TemporalArgs& args, const A* added)
      : Base(args.frames, args.dim),
        args_(args),
        value_width_(std::max(args.value_dim, lanes)),
        added_(added),
        value_(frames_ * value_width_) {}

  // Scores of one vector of queries, a column of weights_, become probabilities in place.
  Peak softmax(int64_t column) {
    A* s = weights_ + column;
    Peak peak{splat(A{1}), {}};
    if (args_.scale_bias_by_row_max) {
      peak.row_max = load(s);
      for (int64_t j = 1; j < frames_; ++j) {
        const Vec<A> x = load(s + j * width_);
        const auto higher = x > peak.row_max;
        peak.row_max = higher ? x : peak.row_max;
        peak.row_argmax = higher ? splat(static_cast<A>(j)) : peak.row_argmax;
      }
    }
    Vec<A> most = splat(kNone);
    for (int64_t j = 0; j < frames_; ++j) {
      Vec<A> x = load(s + j * width_);
      if (added_) {
        x += peak.row_max * load(added_ + j * width_ + column);
        store(s + j * width_, x);
      }
      most = vmax(most, x);
    }
    normalise<A>(s, frames_, width_, most);
    return peak;
  }

  const TemporalArgs& args_;
  const int64_t value_width_;
  const A* added_;
  Scratch<A> value_;
};

template <typename T>
class Forward : Temporal<T> {
  using Base = Temporal<T>;
  using Base::lanes, Base::args_, Base::frames_, Base::width_, Base::weights_;
  using typename Base::A;

 public:
  Forward(const TemporalArgs& args, const TemporalForwardOut& to, const A* added)
      : Base(args, added),
        to_(to),
        out_(frames_ * this->value_width_),
        maps_(to.maps ? frames_ * width_ : 0),
        map_rows_(to.maps ? width_ * width_ : 0) {}

  void position(int64_t b, int64_t p) {
    for (int64_t h = 0; h < args_.heads; ++h) {
      this->scores(this->rows(args_.query, b, p, h, args_.dim, this->query_),
                   this->rows(args_.key, b, p, h, args_.dim, this->key_), args_.dim, args_.scale);
      for (int64_t column = 0; column < width_; column += lanes) {
        this->softmax(column);
      }
      if (to_.maps) {
        add_maps(h);
      }
      this->write_product(weights_, 1, width_,
                          this->rows(args_.value, b, p, h, args_.value_dim, this->value_),
                          args_.value_dim, to_.out, b, p, h, out_);
    }
    if (to_.maps) {
      write_maps(static_cast<A*>(to_.maps) + (b * args_.positions + p) * frames_ * frames_);
    }
  }

 private:
  void add_maps(int64_t h) {
    const A head_weight = A{1} / static_cast<A>(args_.heads);
    for (int64_t at = 0; at < frames_ * width_; at += lanes) {
      const Vec<A> p = load(weights_ + at) * head_weight;
      store(maps_ + at, h ? load(maps_ + at) + p : p);
    }
  }

  void write_maps(A* to) {
    transpose<A>({maps_, width_}, frames_, frames_, A{1}, {map_rows_, width_});
    for (int64_t i = 0; i < frames_; ++i) {
      std::copy_n(map_rows_ + i * width_, frames_, to + i * frames_);
    }
  }

  const TemporalForwardOut& to_;
  Scratch<A> out_;
  Scratch<A> maps_, map_rows_;  // the sum over the heads, transposed and as it is written
};

template <typename T>
class Backward : Temporal<T> {
  using Base = Temporal<T>;
  using Base::lanes, Base::args_, Base::frames_, Base::width_, Base::weights_, Base::added_;
  using typename Base::A, typename Base::Peak;

 public:
  Backward(const TemporalArgs& args, const TemporalBackwardIn& in, const TemporalBackwardOut& to,
           const A* added)
      : Base(args, added),
        in_(in),
        to_(to),
        grad_out_(in.grad_out.data ? frames_ * this->value_width_ : 0),
        grad_columns_(in.grad_out.data ? this->value_width_ * width_ : 0),
        map_grads_(in.grad_maps ? frames_ * width_ : 0),
        grads_(frames_ * width_),
        result_(frames_ * std::max(this->dim_width_, this->value_width_)) {}

  // Gradients of one position; that of `added`, transposed, is added to `sums` [F, width].
  void position(int64_t b, int64_t p, double* sums) {
    if (in_.grad_maps) {
      const A* grads = static_cast<const A*>(in_.grad_maps);
      transpose<A>({grads + (b * args_.positions + p) * frames_ * frames_, frames_}, frames_,
                   frames_, A{1} / static_cast<A>(args_.heads), {map_grads_, width_});
    }
    for (int64_t h = 0; h < args_.heads; ++h) {
      head(b, p, h, sums);
    }
  }

 private:
  void head(int64_t b, int64_t p, int64_t h, double* sums) {
    const Rows<const A> query = this->rows(args_.query, b, p, h, args_.dim, this->query_);
    const Rows<const A> key = this->rows(args_.key, b, p, h, args_.dim, this->key_);
    Rows<const A> grad_out{};
    this->scores(query, key, args_.dim, args_.scale);
    if (in_.grad_out.data) {
      const Rows<const A> value = this->rows(args_.value, b, p, h, args_.value_dim, this->value_);
      grad_out = this->rows(in_.grad_out, b, p, h, args_.value_dim, grad_out_);
      transpose<A>(grad_out, frames_, args_.value_dim, A{1}, {grad_columns_, width_});
      multiply<A>(value.data, value.stride, 1, {grad_columns_, width_}, frames_, width_,
                  args_.value_dim, {grads_, width_});
    }
    for (int64_t column = 0; column < width_; column += lanes) {
      score_grads(column, this->softmax(column), sums);
    }
    if (to_.value.data) {
      this->write_product(weights_, width_, 1, grad_out, args_.value_dim, to_.value, b, p, h,
                          result_);
    }
    if (to_.query.data) {
      this->write_product(grads_, 1, width_, key, args_.dim, to_.query, b, p, h, result_);
    }
    if (to_.key.data) {
      this->write_product(grads_, width_, 1, query, args_.dim, to_.key, b, p, h, result_);
    }
  }

  // dP of one vector of queries becomes scale · dS, in place.
  void score_grads(int64_t column, const Peak& peak, double* sums) {
    const A* weights = weights_ + column;
    A* grads = grads_ + column;
    Vec<A> delta{};
    for (int64_t j = 0; j < frames_; ++j) {
      Vec<A> dp = in_.grad_out.data ? load(grads + j * width_) : Vec<A>{};
      if (in_.grad_maps) {
        dp += load(map_grads_ + j * width_ + column);
      }
      store(grads + j * width_, dp);
      delta += load(weights + j * width_) * dp;
    }
    const A scale = static_cast<A>(args_.scale);
    Vec<A> through_max{};
    for (int64_t j = 0; j < frames_; ++j) {
      const Vec<A> ds = load(weights + j * width_) * (load(grads + j * width_) - delta);
      if (args_.scale_bias_by_row_max) {
        through_max += load(added_ + j * width_ + column) * ds;
      }
      if (to_.added) {
        const Vec<A> term = peak.row_max * ds;
        double* sum = sums + j * width_ + column;
        for (int64_t i = 0; i < lanes; ++i) {
          sum[i] += term[i];
        }
      }
      store(grads + j * width_, ds * scale);
    }
    if (args_.scale_bias_by_row_max && in_.row_max_grad) {
      for (int64_t i = 0; i < lanes; ++i) {
        grads[static_cast<int64_t>(peak.row_argmax[i]) * width_ + i] += through_max[i] * scale;
      }
    }
  }

  const TemporalBackwardIn& in_;
  const TemporalBackwardOut& to_;
  Scratch<A> grad_out_, grad_columns_;  // dO, where it has to be copied, and dOᵀ [Dv, width]
  Scratch<A> map_grads_;                // dCᵀ / H [F, width]
  Scratch<A> grads_;                    // dPᵀ, then scale · dSᵀ [F, width]
  Scratch<A> result_;
};

// `added` as the passes read it; empty without it.
template <typename A>
Scratch<A> added_columns(const TemporalArgs& args) {
  const int64_t width = round_up(args.frames, kLanes<A>);
  Scratch<A> columns(args.added ? args.frames * width : 0);
  if (args.added) {
    const A* added = static_cast<const A*>(args.added);
    transpose<A>({added, args.frames}, args.frames, args.frames, A{1}, {columns, width});
  }
  return columns;
}

template <typename T>
void forward(const TemporalArgs& args, const TemporalForwardOut& to) {
  using A = Wide<T>;
  const Scratch<A> columns = added_columns<A>(args);
  const A* added = args.added ? static_cast<const A*>(columns) : nullptr;
  const int64_t total = args.batch * args.positions;
#pragma omp parallel num_threads(args.threads)
  {
    Forward<T> pass(args, to, added);
    each_task(total, std::min(total, kTasks), [&](int64_t, int64_t first, int64_t end) {
      for (int64_t at = first; at < end; ++at) {
        pass.position(at / args.positions, at % args.positions);
      }
    });
  }
}

template <typename T>
void backward(const TemporalArgs& args, const TemporalBackwardIn& in,
              const TemporalBackwardOut& to) {
  using A = Wide<T>;
  const Scratch<A> columns = added_columns<A>(args);
  const A* added = args.added ? static_cast<const A*>(columns) : nullptr;
  const int64_t total = args.batch * args.positions;
  const int64_t tasks = std::min(total, to.added ? kSummingTasks : kTasks);
  const int64_t frames = args.frames, width = round_up(frames, kLanes<A>);
  const int64_t count = to.added ? frames * width : 0;  // numbers in a task's sum
  Scratch<double> sums(tasks * count);
#pragma omp parallel num_threads(args.threads)
  {
    Backward<T> pass(args, in, to, added);
    each_task(total, tasks, [&](int64_t task, int64_t first, int64_t end) {
      std::fill_n(sums + task * count, count, 0.0);
      for (int64_t at = first; at < end; ++at) {
        pass.position(at / args.positions, at % args.positions, sums + task * count);
      }
    });
  }
  for (int64_t at = 0; to.added && at < frames * frames; ++at) {
    double sum = 0;
    for (int64_t task = 0; task < tasks; ++task) {
      sum += sums[task * count + at % frames * width + at / frames];
    }
    static_cast<A*>(to.added)[at] = static_cast<A>(sum);
  }
}

}  // namespace

void temporal_forward(const TemporalArgs& args, const TemporalForwardOut& to) {
  by_type(args.dtype, [&](auto zero) { forward<decltype(zero)>(args, to); });
}

void temporal_backward(const TemporalArgs& args, const TemporalBackwardIn& in,
                       const TemporalBackwardOut& to) {
  by_type(args.dtype, [&](auto zero) { backward<decltype(zero)>(args, in, to); });
}

}  // namespace cvg::CVG_LEVEL

const cvg::TemporalKernels& cvg::CVG_OF_LEVEL(temporal_kernels)() {
  static const TemporalKernels kernels{CVG_LEVEL::temporal_forward, CVG_LEVEL::temporal_backward};
  return kernels;
}
