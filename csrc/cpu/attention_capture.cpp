// Maps of the chosen tokens from a known log-sum-exp:  maps = exp(scale · k_token qᵀ + bias − lse).
//
// A task is a tile of queries of one batch entry; it goes through the heads one after the other, so
// that a mean over them is summed by one thread, in one order, straight into the output.
#include "cpu/chosen.h"

namespace cvg::CVG_LEVEL {

namespace {

template <typename T>
void capture(const AttentionArgs& args, const void* lse, void* maps) {
  using A = Wide<T>;
  constexpr int64_t kMostRows = 256;
  const int64_t rows = std::min(kMostRows, round_up(args.queries, kLanes<A>));
  const int64_t row_tiles = args.queries ? (args.queries + rows - 1) / rows : 0;
  const A head_weight = args.head_mean ? A{1} / static_cast<A>(args.heads) : A{1};
#pragma omp parallel num_threads(args.threads)
  {
    Chosen<T, KeyBias> chosen(args, {const_cast<void*>(lse), nullptr, nullptr}, rows);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < args.batch * row_tiles; ++task) {
      const int64_t b = task / row_tiles, first = task % row_tiles * rows;
      const int64_t count = std::min(rows, args.queries - first);
      chosen.load_rows(b, first, count);
      for (int64_t h = 0; h < args.heads; ++h) {
        const A* p = chosen.probabilities(h);
        const int64_t entry = args.head_mean ? b : b * args.heads + h;
        const bool add = args.head_mean && h > 0;
        for (int64_t k = 0; k < args.tokens; ++k, p += chosen.width()) {
          A* to = static_cast<A*>(maps) + (entry * args.tokens + k) * args.queries + first;
          for (int64_t r = 0; r < count; ++r) {
            to[r] = add ? to[r] + p[r] * head_weight : p[r] * head_weight;
          }
        }
      }
    }
  }
}

}  // namespace

void attention_capture(const AttentionArgs& args, const void* lse, void* maps) {
  by_type(args.dtype, [&](auto zero) { capture<decltype(zero)>(args, lse, maps); });
}

}  // namespace cvg::CVG_LEVEL
