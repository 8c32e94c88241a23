// A tile of keys in the backward pass of attention, and the products of some queries with it: what
// the passes over long sequences share.
#pragma once

#include "cpu/tiles.h"

namespace cvg::CVG_LEVEL {

// Args and In are an operation's: key, value, dim and value_dim of the one, grad_out of the other.
template <typename T, typename Args, typename In>
class BackwardTile {
 protected:
  using A = Wide<T>;
  static constexpr int64_t lanes = kLanes<A>;

  BackwardTile(const Args& args, const In& in, const Tiles& tiles)
      : args_(args),
        in_(in),
        tiles_(tiles),
        has_out_(in.grad_out.data != nullptr),
        key_(tiles.lanes_keys * args.dim),
        value_(has_out_ ? tiles.lanes_keys * args.value_dim : 0),
        weights_(round_up(tiles.sub_rows, kRows<A>) * tiles.lanes_keys),
        grads_(round_up(tiles.sub_rows, kRows<A>) * tiles.lanes_keys) {}

  void load_keys(int64_t b, int64_t h, int64_t key_tile) {
    first_key_ = key_tile * tiles_.keys;
    keys_ = std::min(tiles_.keys, args_.keys - first_key_);
    width_ = round_up(keys_, lanes);
    const Matrix<T> key = matrix<T>(args_.key, b, h);
    pack_transposed(key.row(first_key_), key.row_stride, key.dim_stride, keys_, args_.dim,
                    static_cast<A*>(key_));
    if (has_out_) {
      const Matrix<T> value = matrix<T>(args_.value, b, h);
      pack_transposed(value.row(first_key_), value.row_stride, value.dim_stride, keys_,
                      args_.value_dim, static_cast<A*>(value_));
    }
  }

  void load_rows(const Tensor4& from, int64_t b, int64_t h, int64_t first, int64_t rows,
                 int64_t dim, A* to) {
    const Matrix<T> m = matrix<T>(from, b, h);
    copy_rows(m.row(first), m.row_stride, m.dim_stride, rows, round_up(rows, kRows<A>), dim, to);
  }

  // q kᵀ and dO vᵀ (0 without dO) of `rows` queries, whose q and dO lie row-major.
  void products(const A* query, const A* grad_out, int64_t rows) {
    const int64_t padded = round_up(rows, kRows<A>);
    gemm<A>(query, args_.dim, 1, key_, padded, width_, args_.dim, weights_, width_, false);
    if (has_out_) {
      gemm<A>(grad_out, args_.value_dim, 1, value_, padded, width_, args_.value_dim, grads_, width_,
              false);
    } else {
      std::fill_n(static_cast<A*>(grads_), padded * width_, A{0});
    }
  }

  const Args& args_;
  const In& in_;
  const Tiles& tiles_;
  const bool has_out_;
  Scratch<A> key_, value_;
  Scratch<A> weights_;  // q kᵀ, then P
  Scratch<A> grads_;    // dP, then dS
  int64_t first_key_ = 0, keys_ = 0, width_ = 0;
};

}  // namespace cvg::CVG_LEVEL
