// The band by frame distance of one key tile.
#pragma once

#include "cpu/rows.h"
#include "cpu/tiles.h"
#include "cvg/frame_band_attention.h"

namespace cvg::CVG_LEVEL {

// strength · exp(−(f − f_j)² / 2σ²) against the keys of a tile, for one frame f after the other: it
// is made anew only where the frame changes, so tokens that lie frame by frame get it for nothing.
template <typename A>
class FrameBand {
  static constexpr int64_t lanes = kLanes<A>;

 public:
  FrameBand(const FrameBandArgs& args, int64_t lanes_keys)
      : args_(args), frames_(lanes_keys), outside_(lanes_keys), band_(lanes_keys) {}

  void load_keys(int64_t first, int64_t keys) {
    width_ = round_up(keys, lanes);
    for (int64_t j = 0; j < width_; ++j) {
      frames_[j] = j < keys ? static_cast<A>(args_.key_frames[first + j]) : A{-1};
      outside_[j] = j < keys ? A{0} : -std::numeric_limits<A>::infinity();
    }
    frame_ = kNoRow;
  }

  // The band of a query's frame; all 0 for a token of no frame, and so are its keys of no frame.
  const A* of(int32_t frame) {
    if (frame == frame_) {
      return band_;
    }
    frame_ = frame;
    const Vec<A> falloff = splat(static_cast<A>(-0.5 / (args_.sigma * args_.sigma)));
    for (int64_t j = 0; j < width_; j += lanes) {
      const Vec<A> of_key = load(frames_ + j), distance = of_key - static_cast<A>(frame);
      const Vec<A> band = vexp(distance * distance * falloff) * static_cast<A>(args_.strength);
      store(band_ + j, frame >= 0 ? (of_key >= 0 ? band : Vec<A>{}) : Vec<A>{});
    }
    return band_;
  }

  // 0, and -inf where a vector reaches beyond the keys.
  const A* outside() const { return outside_; }

 private:
  static constexpr int32_t kNoRow = -2;

  const FrameBandArgs& args_;
  Scratch<A> frames_, outside_, band_;
  int64_t width_ = 0;
  int32_t frame_ = kNoRow;
};

}  // namespace cvg::CVG_LEVEL
