// Min-max path flow: T_n ⊙ … ⊙ T_1 ⊙ X at every position, forward and backward.
//
// A task is a tile of positions, as many as a vector has lanes, so that X and the flow are read and
// written as they lie. The hops of the tile are packed once, [F, F] vectors each; the tokens pass
// by in chunks small enough that a chunk's [F, chunk] vectors stay in the first-level cache from
// the first hop to the last. Nothing between the hops is ever written out.
#include "cvg/path_flow.h"

#include "cpu/algebra.h"
#include "cpu/scratch.h"

namespace cvg::CVG_LEVEL {

namespace {

constexpr int64_t kChunk = 16;  // tokens

template <typename A>
class FlowTile {
  static constexpr int64_t lanes = kLanes<A>;

 public:
  explicit FlowTile(const PathFlowArgs& args)
      : args_(args),
        hops_(static_cast<int64_t>(args.temporal.size())),
        hop_size_(args.frames * args.frames * lanes),
        chunk_size_(args.frames * kChunk * lanes),
        algebra_(args.temperature),
        hop_(hops_ * hop_size_),
        flow_((hops_ + 1) * chunk_size_) {}

  void forward(int64_t b, int64_t tile, A* to) {
    begin(b, tile);
    for (int64_t k = 0; k < args_.tokens; k += kChunk) {
      const int64_t count = std::min(kChunk, args_.tokens - k);
      for (int64_t n = 0; n < count; ++n) {
        tokens_[n] = k + n;
      }
      flow_of(count);
      A* result = flow_ + hops_ * chunk_size_;
      algebra_.leave(result, args_.frames * count);
      unpack(result, count, to);
    }
  }

 protected:
  void begin(int64_t b, int64_t tile) {
    b_ = b;
    first_ = tile * lanes;
    width_ = std::min(lanes, args_.positions - first_);
    Range<A> range;
    pack_hops();
    range.cover(hop_, hops_ * hop_size_ / lanes);
    algebra_.choose(range);
    algebra_.enter(hop_, hops_ * hop_size_ / lanes);
  }

  // flow_[h] for h = 0 … hops, of the chunk `tokens_`.
  void flow_of(int64_t count) {
    const int64_t frames = args_.frames;
    pack_chunk(args_.cross, count, flow_);
    Range<A> range;
    range.cover(flow_, frames * count);
    if (!algebra_.admit(range)) {
      pack_hops();
      algebra_.enter(hop_, hops_ * hop_size_ / lanes);
    }
    algebra_.enter(flow_, frames * count);
    for (int64_t h = 0; h < hops_; ++h) {
      algebra_.template multiply<false>(hop_ + h * hop_size_, flow_ + h * chunk_size_, frames,
                                        frames, count, flow_ + (h + 1) * chunk_size_);
    }
  }

  // hop_[h][i][j][lane] = hop_weight · T_h[lane, i, j] + skip_weight · [i = j]; lanes beyond the
  // last position repeat it.
  void pack_hops() {
    const int64_t frames = args_.frames;
    const A hop_weight = static_cast<A>(args_.hop_weight),
            skip_weight = static_cast<A>(args_.skip_weight);
    for (int64_t h = 0; h < hops_; ++h) {
      const Tensor4& from = args_.temporal[h];
      const A* base = static_cast<const A*>(from.data) + b_ * from.stride[0];
      for (int64_t i = 0; i < frames; ++i) {
        A* row = hop_ + h * hop_size_ + i * frames * lanes;
        for (int64_t lane = 0; lane < lanes; ++lane) {
          const A* source = base + position(lane) * from.stride[1] + i * from.stride[2];
          for (int64_t j = 0; j < frames; ++j) {
            row[j * lanes + lane] = hop_weight * source[j * from.stride[3]];
          }
          row[i * lanes + lane] += skip_weight;
        }
      }
    }
  }

  // to[f][n][lane] = from[b, tokens_[n], f, lane].
  void pack_chunk(const Tensor4& from, int64_t count, A* to) const {
    const A* base = static_cast<const A*>(from.data) + b_ * from.stride[0];
    for (int64_t f = 0; f < args_.frames; ++f) {
      for (int64_t n = 0; n < count; ++n) {
        const A* source = base + tokens_[n] * from.stride[1] + f * from.stride[2];
        A* vector = to + (f * count + n) * lanes;
        if (width_ == lanes && from.stride[3] == 1) {
          store(vector, load(source + first_));
          continue;
        }
        for (int64_t lane = 0; lane < lanes; ++lane) {
          vector[lane] = source[position(lane) * from.stride[3]];
        }
      }
    }
  }

  // The way back, into a contiguous [B, K, F, L].
  void unpack(const A* from, int64_t count, A* to) const {
    for (int64_t f = 0; f < args_.frames; ++f) {
      for (int64_t n = 0; n < count; ++n) {
        const int64_t row = (b_ * args_.tokens + tokens_[n]) * args_.frames + f;
        std::copy_n(from + (f * count + n) * lanes, width_, to + row * args_.positions + first_);
      }
    }
  }

  int64_t position(int64_t lane) const { return first_ + std::min(lane, width_ - 1); }

  const PathFlowArgs& args_;
  const int64_t hops_, hop_size_, chunk_size_;
  Algebra<A> algebra_;
  Scratch<A> hop_;   // [hops][F][F] vectors
  Scratch<A> flow_;  // [hops + 1][F][chunk] vectors: X, T_1 ⊙ X, T_2 ⊙ T_1 ⊙ X, …
  int64_t tokens_[kChunk];
  int64_t b_ = 0, first_ = 0, width_ = 0;
};

// The flow is computed once more, for the tokens that have a gradient: after a maximum over all
// positions that is next to none of them.
template <typename A>
class FlowTileBackward : FlowTile<A> {
  using Base = FlowTile<A>;
  using Base::args_, Base::hops_, Base::hop_size_, Base::chunk_size_, Base::algebra_, Base::hop_,
      Base::flow_, Base::tokens_, Base::b_, Base::first_, Base::width_;
  static constexpr int64_t lanes = kLanes<A>;

 public:
  explicit FlowTileBackward(const PathFlowArgs& args)
      : Base(args), grad_hop_(hops_ * hop_size_), grad_flow_(2 * chunk_size_) {}

  void backward(int64_t b, int64_t tile, const Tensor4& grad, const PathFlowGradients& to) {
    this->begin(b, tile);
    std::fill_n(static_cast<A*>(grad_hop_), hops_ * hop_size_, A{0});
    int64_t count = 0;
    for (int64_t k = 0; k < args_.tokens; ++k) {
      if (arrives(grad, k)) {
        tokens_[count++] = k;
      } else {
        clear(k, static_cast<A*>(to.cross));
      }
      if (count == kChunk || (count > 0 && k + 1 == args_.tokens)) {
        chunk(grad, count, to);
        count = 0;
      }
    }
    for (int64_t h = 0; h < hops_; ++h) {
      if (to.temporal[h]) {
        unpack_hop(grad_hop_ + h * hop_size_, static_cast<A*>(to.temporal[h]));
      }
    }
  }

 private:
  bool arrives(const Tensor4& grad, int64_t token) const {
    const A* base = static_cast<const A*>(grad.data) + b_ * grad.stride[0] + token * grad.stride[1];
    for (int64_t f = 0; f < args_.frames; ++f) {
      for (int64_t l = first_; l < first_ + width_; ++l) {
        if (base[f * grad.stride[2] + l * grad.stride[3]] != 0) {
          return true;
        }
      }
    }
    return false;
  }

  void clear(int64_t token, A* to) const {
    for (int64_t f = 0; f < args_.frames; ++f) {
      const int64_t row = (b_ * args_.tokens + token) * args_.frames + f;
      std::fill_n(to + row * args_.positions + first_, width_, A{0});
    }
  }

  void chunk(const Tensor4& grad, int64_t count, const PathFlowGradients& to) {
    this->flow_of(count);
    A *into = grad_flow_, *next = grad_flow_ + chunk_size_;
    this->pack_chunk(grad, count, into);
    for (int64_t h = hops_ - 1; h >= 0; --h) {
      algebra_.template gradient<false>(hop_ + h * hop_size_, flow_ + h * chunk_size_,
                                        flow_ + (h + 1) * chunk_size_, into, args_.frames,
                                        args_.frames, count, grad_hop_ + h * hop_size_, next);
      std::swap(into, next);
    }
    this->unpack(into, count, static_cast<A*>(to.cross));
  }

  void unpack_hop(const A* from, A* to) const {
    const int64_t frames = args_.frames;
    const A hop_weight = static_cast<A>(args_.hop_weight);
    for (int64_t i = 0; i < frames; ++i) {
      for (int64_t lane = 0; lane < width_; ++lane) {
        A* row = to + ((b_ * args_.positions + first_ + lane) * frames + i) * frames;
        for (int64_t j = 0; j < frames; ++j) {
          row[j] = hop_weight * from[(i * frames + j) * lanes + lane];
        }
      }
    }
  }

  Scratch<A> grad_hop_;   // [hops][F][F] vectors
  Scratch<A> grad_flow_;  // two of [F][chunk] vectors
};

// Runs `task(worker, b, tile)` for every tile of positions, a worker for each thread.
template <typename A, typename Worker, typename Task>
void for_tiles(const PathFlowArgs& args, Task task) {
  const int64_t tiles = (args.positions + kLanes<A> - 1) / kLanes<A>;
#pragma omp parallel num_threads(args.threads)
  {
    Worker worker(args);
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < args.batch * tiles; ++n) {
      task(worker, n / tiles, n % tiles);
    }
  }
}

template <typename A>
void forward(const PathFlowArgs& args, void* flow) {
  for_tiles<A, FlowTile<A>>(args, [flow](FlowTile<A>& worker, int64_t b, int64_t tile) {
    worker.forward(b, tile, static_cast<A*>(flow));
  });
}

template <typename A>
void backward(const PathFlowArgs& args, const Tensor4& grad, const PathFlowGradients& to) {
  for_tiles<A, FlowTileBackward<A>>(args,
                                    [&](FlowTileBackward<A>& worker, int64_t b, int64_t tile) {
                                      worker.backward(b, tile, grad, to);
                                    });
}

}  // namespace

void path_flow(const PathFlowArgs& args, void* flow) {
  by_wide_type(args.dtype, [&](auto zero) { forward<decltype(zero)>(args, flow); });
}

void path_flow_backward(const PathFlowArgs& args, const Tensor4& grad,
                        const PathFlowGradients& to) {
  by_wide_type(args.dtype, [&](auto zero) { backward<decltype(zero)>(args, grad, to); });
}

}  // namespace cvg::CVG_LEVEL

const cvg::PathFlowKernels& cvg::CVG_OF_LEVEL(path_flow_kernels)() {
  static const PathFlowKernels kernels{CVG_LEVEL::path_flow, CVG_LEVEL::path_flow_backward};
  return kernels;
}
