// How attention is cut into tiles.
#pragma once

#include <algorithm>

#include "cpu/pack.h"
#include "cpu/scratch.h"
#include "cvg/attention.h"

namespace cvg::CVG_LEVEL {

// Keys that fit one tile are handled in one pass: a row's scores are all on chip at once.
constexpr int64_t kOneTile = 512;
constexpr int64_t kLongTile = 256;
constexpr int64_t kScores = 32768;  // numbers in a score tile: 128 KiB of float, within a core's L2

struct Tiles {
  int64_t keys;        // keys in a tile
  int64_t key_tiles;   // how many
  int64_t sub_rows;    // query rows whose scores are held at once
  int64_t rows;        // query rows of a task: packed keys are used for all of them
  int64_t row_tiles;   // tasks along the queries
  int64_t lanes_keys;  // keys of a tile, padded to whole vectors
};

// `others` is the number of tasks that come from batch (and heads); small problems get smaller
// tasks.
template <typename A>
Tiles plan_tiles(const AttentionArgs& args, int64_t others) {
  Tiles tiles;
  tiles.keys = args.keys <= kOneTile ? args.keys : kLongTile;
  tiles.key_tiles = (args.keys + tiles.keys - 1) / tiles.keys;
  tiles.lanes_keys = round_up(tiles.keys, kLanes<A>);
  tiles.sub_rows = std::clamp<int64_t>(kScores / tiles.lanes_keys / kRows<A> * kRows<A>, 32, 128);
  tiles.rows = 4 * tiles.sub_rows;
  while (tiles.rows > 32 &&
         others * ((args.queries + tiles.rows - 1) / tiles.rows) < 4 * args.threads) {
    tiles.rows /= 2;
  }
  tiles.rows = std::min(round_up(tiles.rows, kRows<A>), round_up(args.queries, kRows<A>));
  tiles.sub_rows = std::min(tiles.sub_rows, tiles.rows);
  tiles.row_tiles = (args.queries + tiles.rows - 1) / std::max<int64_t>(1, tiles.rows);
  return tiles;
}

// The [length, dim] matrix of one batch entry and head.
template <typename T>
struct Matrix {
  const T* data;
  int64_t row_stride, dim_stride;
  const T* row(int64_t r) const { return data + r * row_stride; }
};
template <typename T>
Matrix<T> matrix(const Tensor4& t, int64_t b, int64_t h) {
  return {static_cast<const T*>(t.data) + b * t.stride[0] + h * t.stride[1], t.stride[2],
          t.stride[3]};
}

}  // namespace cvg::CVG_LEVEL
