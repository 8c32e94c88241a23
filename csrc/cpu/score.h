// The two score policies of attention: what is added to scale · q kᵀ.
//
//   KeyBias     key_bias_j, and a bias of its own for every query on the chosen tokens
//   FrameBand   m_i · strength · exp(−(f_i − f_j)² / 2σ²),   m_i = max_j scale · q_i k_j
//
// Each knows it for a tile of keys, row by row (`row`), and for the chosen tokens of some queries
// (`chosen`, then `added`).
#pragma once

#include "cpu/tiles.h"

namespace cvg::CVG_LEVEL {

// The chosen tokens among the keys of a tile.
class TokensOfTile {
 public:
  struct Place {
    int64_t token, column;
  };

  explicit TokensOfTile(const AttentionArgs& args) : args_(args), places_(args.tokens) {}

  void load_keys(int64_t b, int64_t first, int64_t keys) {
    const int64_t* ids = args_.token_ids + b * args_.tokens;
    count_ = 0;
    for (int64_t k = 0; k < args_.tokens; ++k) {
      if (ids[k] >= first && ids[k] < first + keys) {
        places_[count_++] = {k, ids[k] - first};
      }
    }
  }
  const Place* begin() const { return places_; }
  const Place* end() const { return places_ + count_; }

 private:
  const AttentionArgs& args_;
  Scratch<Place> places_;
  int64_t count_ = 0;
};

template <typename A>
class KeyBias {
  static constexpr int64_t lanes = kLanes<A>;

 public:
  static constexpr bool kRowMax = false;  // whether scores depend on m

  KeyBias(const AttentionArgs& args, int64_t lanes_keys) : args_(args), added_(lanes_keys) {}

  // -inf where a vector reaches beyond the keys.
  void load_keys(int64_t b, int64_t first, int64_t keys) {
    b_ = b;
    first_ = first;
    for (int64_t j = 0; j < round_up(keys, lanes); ++j) {
      added_[j] = j < keys ? of_key(b, first + j) : -std::numeric_limits<A>::infinity();
    }
  }

  struct Row {
    const A* added;
    Vec<A> operator()(int64_t j) const { return load(added + j); }
  };

  // What query i of the batch entry has added.
  Row row(int64_t i, const TokensOfTile& tokens, A) {
    if (args_.token_bias.data) {
      for (const auto [token, column] : tokens) {
        added_[column] = of_key(b_, first_ + column) + of_token(b_, token, i);
      }
    }
    return {added_};
  }

  // What the chosen tokens have added in `rows` queries from `first` on, [K, width].
  void chosen(int64_t b, int64_t first, int64_t rows, int64_t width, A* to) {
    const int64_t* ids = args_.token_ids + b * args_.tokens;
    for (int64_t k = 0; k < args_.tokens; ++k, to += width) {
      std::fill_n(to, width, of_key(b, ids[k]));
      for (int64_t r = 0; r < rows && args_.token_bias.data; ++r) {
        to[r] += of_token(b, k, first + r);
      }
    }
  }
  static Vec<A> added(Vec<A> chosen, Vec<A>) { return chosen; }

 private:
  A of_key(int64_t b, int64_t key) const {
    const A* bias = static_cast<const A*>(args_.key_bias);
    return bias ? bias[b * args_.keys + key] : A{0};
  }
  A of_token(int64_t b, int64_t token, int64_t query) const {
    const int64_t* stride = args_.token_bias.stride;
    return static_cast<const A*>(
        args_.token_bias.data)[b * stride[0] + token * stride[1] + query * stride[2]];
  }

  const AttentionArgs& args_;
  Scratch<A> added_;
  int64_t b_ = 0, first_ = 0;
};

template <typename A>
class FrameBand {
  static constexpr int64_t lanes = kLanes<A>;

 public:
  static constexpr bool kRowMax = true;

  FrameBand(const AttentionArgs& args, int64_t lanes_keys)
      : args_(args),
        falloff_(static_cast<A>(-0.5 / (args.band.sigma * args.band.sigma))),
        strength_(static_cast<A>(args.band.strength)),
        frames_(lanes_keys),
        outside_(lanes_keys),
        band_(lanes_keys) {}

  void load_keys(int64_t, int64_t first, int64_t keys) {
    width_ = round_up(keys, lanes);
    for (int64_t j = 0; j < width_; ++j) {
      frames_[j] = j < keys ? static_cast<A>(args_.band.key_frames[first + j]) : A{-1};
      outside_[j] = j < keys ? A{0} : -std::numeric_limits<A>::infinity();
    }
    frame_ = kNoRow;
  }

  struct Row {
    const A *band, *outside;
    Vec<A> row_max;
    Vec<A> operator()(int64_t j) const { return row_max * load(band + j) + load(outside + j); }
    Vec<A> factor(int64_t j) const { return load(band + j); }  // of m
  };

  // The band is made anew only where the frame changes: tokens that lie frame by frame get it for
  // nothing.
  Row row(int64_t i, const TokensOfTile&, A row_max) {
    const int32_t frame = args_.band.query_frames[i];
    if (frame != frame_) {
      frame_ = frame;
      for (int64_t j = 0; j < width_; j += lanes) {
        store(band_ + j, weight(splat(static_cast<A>(frame)), load(frames_ + j)));
      }
    }
    return {band_, outside_, splat(row_max)};
  }

  // 0, and -inf where a vector reaches beyond the keys.
  const A* outside() const { return outside_; }

  void chosen(int64_t b, int64_t first, int64_t rows, int64_t width, A* to) {
    const int64_t* ids = args_.token_ids + b * args_.tokens;
    for (int64_t k = 0; k < args_.tokens; ++k, to += width) {
      const Vec<A> of_key = splat(static_cast<A>(args_.band.key_frames[ids[k]]));
      for (int64_t r = 0; r < width; r += lanes) {
        Vec<A> frames = splat(A{-1});
        for (int64_t i = 0; i < std::min(lanes, rows - r); ++i) {
          frames[i] = static_cast<A>(args_.band.query_frames[first + r + i]);
        }
        store(to + r, weight(frames, of_key));
      }
    }
  }
  static Vec<A> added(Vec<A> chosen, Vec<A> row_max) { return row_max * chosen; }

 private:
  static constexpr int32_t kNoRow = -2;

  // strength · exp(−(f − f')² / 2σ²), 0 where either token is of no frame.
  Vec<A> weight(Vec<A> query_frame, Vec<A> key_frame) const {
    const Vec<A> distance = key_frame - query_frame;
    const Vec<A> band = vexp(distance * distance * falloff_) * strength_;
    return query_frame >= 0 ? (key_frame >= 0 ? band : Vec<A>{}) : Vec<A>{};
  }

  const AttentionArgs& args_;
  const A falloff_, strength_;
  Scratch<A> frames_, outside_, band_;
  int64_t width_ = 0;
  int32_t frame_ = kNoRow;
};

// Calls with the element type's number and the score policy of the arguments, for the sake of their
// types:  by_policy(args, [&](auto zero, auto policy) { … });
template <template <typename> class Score>
struct Policy {
  template <typename A>
  using Of = Score<A>;
};
template <typename Call>
void by_policy(const AttentionArgs& args, Call call) {
  by_type(args.dtype, [&](auto zero) {
    args.band.key_frames ? call(zero, Policy<FrameBand>{}) : call(zero, Policy<KeyBias>{});
  });
}

}  // namespace cvg::CVG_LEVEL
