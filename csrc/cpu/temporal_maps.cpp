// Maps between the frames of a video, out of attention over all of it: at every place of a frame
// one short sequence, that place in each frame.
//
// A task is a run of places; a thread takes a place through its heads one after the other, so that
// head-mean maps are summed in one order and rows that lie side by side are read in turn. In cache
// and transposed (see sequences.h):
//   Sᵀ = k (scale · q)ᵀ + bias;   Pᵀ = exp(Sᵀ − lse), or a softmax down the rows
// and backward, with P recomputed, dPᵀ = dmapsᵀ (/ H):
//   dS = P ∘ dP, dlse = −Σ dS,   or dS = P ∘ (dP − Σ P dP);   dq = scale · dS k;   dk = scale · dSᵀ
//   q
#include "cvg/temporal_maps.h"

#include "cpu/sequences.h"

namespace cvg::CVG_LEVEL {

namespace {

constexpr int64_t kTasks = 512;

template <typename T>
class Maps : protected Sequences<T> {
 protected:
  using Base = Sequences<T>;
  using Base::lanes, Base::frames_, Base::width_, Base::weights_;
  using typename Base::A;
  static constexpr A kNone = -std::numeric_limits<A>::infinity();
  // The largest number that vexp takes; no probability has such a logarithm.
  static constexpr A kMost = sizeof(A) == 4 ? 87 : 709;

  explicit Maps(const TemporalMapsArgs& args)
      : Base(args.frames, args.dim), args_(args), lse_(width_), square_(width_ * width_) {}

  // Where the maps of a head lie; with head_mean those of all heads.
  int64_t maps_at(int64_t b, int64_t p, int64_t h) const {
    const int64_t place =
        args_.head_mean ? b * args_.places + p : (b * args_.heads + h) * args_.places + p;
    return place * frames_ * frames_;
  }

  Rows<const A> query_rows(int64_t b, int64_t p, int64_t h) {
    return this->rows(args_.query, b, p, h, args_.dim, this->query_);
  }
  Rows<const A> key_rows(int64_t b, int64_t p, int64_t h) {
    return this->rows(args_.key, b, p, h, args_.dim, this->key_);
  }

  // Pᵀ of one place and head into weights_.
  void probabilities(Rows<const A> query, Rows<const A> key, int64_t b, int64_t p, int64_t h) {
    this->scores(query, key, args_.dim, args_.scale);
    if (args_.key_bias.data) {
      add_bias(b, p);
    }
    if (!args_.lse.data) {
      for (int64_t column = 0; column < width_; column += lanes) {
        Vec<A> most = splat(kNone);
        for (int64_t j = 0; j < frames_; ++j) {
          most = vmax(most, load(weights_ + j * width_ + column));
        }
        normalise<A>(weights_ + column, frames_, width_, most);
      }
      return;
    }
    load_lse(b, p, h);
    for (int64_t column = 0; column < width_; column += lanes) {
      const Vec<A> total = load(lse_ + column);
      const auto unseen = total == splat(kNone);
      for (int64_t j = 0; j < frames_; ++j) {
        A* at = weights_ + j * width_ + column;
        const Vec<A> x = vexp(vmin(splat(kMost), load(at) - total));
        store(at, unseen ? Vec<A>{} : x);
      }
    }
  }

  const TemporalMapsArgs& args_;

 private:
  void add_bias(int64_t b, int64_t p) {
    const Tensor4& bias = args_.key_bias;
    const A* from = static_cast<const A*>(bias.data) + b * bias.stride[0] + p * bias.stride[1];
    for (int64_t j = 0; j < frames_; ++j) {
      const Vec<A> added = splat(from[j * bias.stride[2]]);
      for (int64_t column = 0; column < width_; column += lanes) {
        A* at = weights_ + j * width_ + column;
        store(at, load(at) + added);
      }
    }
  }

  void load_lse(int64_t b, int64_t p, int64_t h) {
    const Tensor4& lse = args_.lse;
    const A* from =
        static_cast<const A*>(lse.data) + b * lse.stride[0] + p * lse.stride[1] + h * lse.stride[2];
    for (int64_t i = 0; i < width_; ++i) {
      lse_[i] = i < frames_ ? from[i * lse.stride[3]] : A{0};
    }
  }

 protected:
  Scratch<A> lse_;     // of a head's queries
  Scratch<A> square_;  // [width, width], room for a transpose
};

template <typename T>
class MapsForward : Maps<T> {
  using Base = Maps<T>;
  using Base::lanes, Base::args_, Base::frames_, Base::width_, Base::weights_;
  using typename Base::A;

 public:
  MapsForward(const TemporalMapsArgs& args, A* maps)
      : Base(args), maps_(maps), sum_(args.head_mean ? frames_ * width_ : 0) {}

  void place(int64_t b, int64_t p) {
    for (int64_t h = 0; h < args_.heads; ++h) {
      this->probabilities(this->query_rows(b, p, h), this->key_rows(b, p, h), b, p, h);
      if (args_.head_mean) {
        add(h);
      } else {
        write(weights_, maps_ + this->maps_at(b, p, h));
      }
    }
    if (args_.head_mean) {
      write(sum_, maps_ + this->maps_at(b, p, 0));
    }
  }

 private:
  void add(int64_t h) {
    const A head_weight = A{1} / static_cast<A>(args_.heads);
    for (int64_t at = 0; at < frames_ * width_; at += lanes) {
      const Vec<A> p = load(weights_ + at) * head_weight;
      store(sum_ + at, h ? load(sum_ + at) + p : p);
    }
  }

  void write(const A* from, A* to) {
    transpose<A>({from, width_}, frames_, frames_, A{1}, {this->square_, width_});
    for (int64_t i = 0; i < frames_; ++i) {
      std::copy_n(this->square_ + i * width_, frames_, to + i * frames_);
    }
  }

  A* maps_;
  Scratch<A> sum_;  // over the heads, transposed
};

template <typename T>
class MapsBackward : Maps<T> {
  using Base = Maps<T>;
  using Base::lanes, Base::args_, Base::frames_, Base::width_, Base::weights_;
  using typename Base::A;

 public:
  MapsBackward(const TemporalMapsArgs& args, const A* grad_maps, const TemporalMapsGradients& to)
      : Base(args),
        grad_maps_(grad_maps),
        to_(to),
        map_grads_(frames_ * width_),
        grads_(frames_ * width_),
        result_(frames_ * this->dim_width_) {}

  void place(int64_t b, int64_t p) {
    for (int64_t h = 0; h < args_.heads; ++h) {
      if (h == 0 || !args_.head_mean) {
        const A head_weight = args_.head_mean ? A{1} / static_cast<A>(args_.heads) : A{1};
        transpose<A>({grad_maps_ + this->maps_at(b, p, h), frames_}, frames_, frames_, head_weight,
                     {map_grads_, width_});
      }
      const Rows<const A> query = this->query_rows(b, p, h), key = this->key_rows(b, p, h);
      this->probabilities(query, key, b, p, h);
      for (int64_t column = 0; column < width_; column += lanes) {
        score_grads(column);
      }
      if (to_.query.data) {
        this->write_product(grads_, 1, width_, key, args_.dim, to_.query, b, p, h, result_);
      }
      if (to_.key.data) {
        this->write_product(grads_, width_, 1, query, args_.dim, to_.key, b, p, h, result_);
      }
      if (to_.lse.data) {
        A* lse = static_cast<A*>(to_.lse.data) + b * to_.lse.stride[0] + p * to_.lse.stride[1] +
                 h * to_.lse.stride[2];
        for (int64_t i = 0; i < frames_; ++i) {
          lse[i * to_.lse.stride[3]] = -this->lse_[i];
        }
      }
    }
  }

 private:
  // scale · dS of one vector of queries; Σ dS takes the place of their log-sum-exp.
  void score_grads(int64_t column) {
    const A* weights = weights_ + column;
    Vec<A> total{};
    for (int64_t j = 0; j < frames_; ++j) {
      total += load(weights + j * width_) * load(map_grads_ + j * width_ + column);
    }
    const Vec<A> delta = args_.lse.data ? Vec<A>{} : total;
    const A scale = static_cast<A>(args_.scale);
    for (int64_t j = 0; j < frames_; ++j) {
      const Vec<A> dp = load(map_grads_ + j * width_ + column) - delta;
      store(grads_ + j * width_ + column, load(weights + j * width_) * dp * scale);
    }
    store(this->lse_ + column, total);
  }

  const A* grad_maps_;
  const TemporalMapsGradients& to_;
  Scratch<A> map_grads_;  // dPᵀ [F, width]
  Scratch<A> grads_;      // scale · dSᵀ [F, width]
  Scratch<A> result_;
};

// Each thread makes a pass with `make()` and takes places through it.
template <typename Make>
void each_place(const TemporalMapsArgs& args, Make make) {
  const int64_t total = args.batch * args.places;
#pragma omp parallel num_threads(args.threads)
  {
    auto pass = make();
    each_task(total, std::min(total, kTasks), [&](int64_t, int64_t first, int64_t end) {
      for (int64_t at = first; at < end; ++at) {
        pass.place(at / args.places, at % args.places);
      }
    });
  }
}

}  // namespace

void temporal_maps_forward(const TemporalMapsArgs& args, void* maps) {
  by_type(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    each_place(args, [&] { return MapsForward<T>(args, static_cast<Wide<T>*>(maps)); });
  });
}

void temporal_maps_backward(const TemporalMapsArgs& args, const void* grad_maps,
                            const TemporalMapsGradients& to) {
  by_type(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto* grads = static_cast<const Wide<T>*>(grad_maps);
    each_place(args, [&] { return MapsBackward<T>(args, grads, to); });
  });
}

}  // namespace cvg::CVG_LEVEL

const cvg::TemporalMapsKernels& cvg::CVG_OF_LEVEL(temporal_maps_kernels)() {
  static const TemporalMapsKernels kernels{CVG_LEVEL::temporal_maps_forward,
                                           CVG_LEVEL::temporal_maps_backward};
  return kernels;
}
