// Exact maximum flow on the CPU: the shared solver (cvg/max_flow.h), one thread a graph. Compiled
// once: its words of bits gain nothing from wider vectors.
#include <algorithm>
#include <memory>
#include <vector>

#include "cvg/max_flow_graphs.h"

namespace cvg {

namespace {

constexpr int64_t kTasksPerThread = 16;
constexpr int64_t kArcsPerThread = 1 << 14;  // fewer are done before another thread is awake

int threads_for(int64_t arcs, int threads) {
  return static_cast<int>(std::clamp<int64_t>(arcs / kArcsPerThread, 1, threads));
}

// Words for what would be bytes: aligned for all that is kept there.
std::vector<uint64_t> memory_of(size_t bytes) {
  return std::vector<uint64_t>((bytes + 7) / 8);
}

void report(int* bad) {
#pragma omp atomic write
  *bad = 1;
}

// A task is a position and some of its tokens: all of them, unless there are too few positions.
template <typename T>
void subgraphs(const SubgraphArgs& args) {
  const int64_t positions = args.batch * args.positions;
  if (positions == 0 || args.tokens == 0) {
    return;
  }
  const int64_t sinks = args.every_frame ? args.frames : 1;
  const int64_t arcs = int64_t{args.frames} * args.frames * std::max(args.hops, 1);
  const int threads = threads_for(positions * args.tokens * sinks * arcs, args.threads);
  const int64_t wanted = (kTasksPerThread * threads + positions - 1) / positions;
  const int64_t parts = std::clamp<int64_t>(wanted, 1, args.tokens);
  const int layers = inner_layers(args);
#pragma omp parallel num_threads(threads)
  {
    auto hops = memory_of(Position::bytes(args.frames, args.hops));
    auto near = memory_of(Workspace::near_bytes(args.frames, layers, layers - 1));
    auto far = memory_of(Workspace::far_bytes(args.frames, layers, layers - 1));
    const Position position(hops.data(), args.frames, args.hops);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < positions * parts; ++task) {
      const int64_t part = task % parts, b = task / parts / args.positions;
      const int64_t l = task / parts % args.positions;
      if (!read_position<T>(args, b, l, Alone{}, position)) {
        report(args.bad);
        continue;
      }
      for (int64_t k = part * args.tokens / parts; k < (part + 1) * args.tokens / parts; ++k) {
        for (int frame = args.every_frame ? 0 : -1; frame < (args.every_frame ? args.frames : 0);
             ++frame) {
          if (!solve_subgraph<T>(args, b, k, l, frame, position, near.data(), far.data(),
                                 Alone{})) {
            report(args.bad);
            break;
          }
        }
      }
    }
  }
}

// Adds the graphs of one position to the gradients. sums: [hops, head, tail]; weights: [F].
template <typename T>
void gradient_of_position(const SubgraphGradArgs& args, int64_t b, int64_t l, double* sums,
                          double* weights) {
  const int64_t width = args.frames, layers = args.hops + 1;
  const int64_t sinks = args.every_frame ? width : 1;
  std::fill_n(sums, args.hops * width * width, 0.0);
  for (int64_t k = 0; k < args.tokens; ++k) {
    const int64_t token = b * args.tokens + k;
    for (int64_t s = 0; s < sinks; ++s) {
      const double grad =
          static_cast<const T*>(args.grad)[(token * sinks + s) * args.positions + l];
      if (grad == 0) {
        continue;
      }
      const uint8_t* side = args.cut + ((token * args.positions + l) * sinks + s) * layers * width;
      for (int64_t hop = 0; hop < args.hops; ++hop, side += width) {
        for (int64_t tail = 0; tail < width; ++tail) {
          weights[tail] = side[tail] ? grad : 0;
        }
        for (int64_t head = 0; head < width; ++head) {
          double* row = sums + (hop * width + head) * width;
          for (int64_t tail = 0; tail < width && !side[width + head]; ++tail) {
            row[tail] += weights[tail];
          }
        }
      }
    }
  }
  for (int64_t hop = 0; hop < args.hops; ++hop) {
    T* to = static_cast<T*>(args.temporal[hop]);
    for (int64_t at = 0; to && at < width * width; ++at) {
      to[(b * args.positions + l) * width * width + at] =
          static_cast<T>(args.scale * sums[hop * width * width + at]);
    }
  }
}

// The arcs from one token to the nodes of the first layer on the sink's side.
template <typename T>
void gradient_of_token(const SubgraphGradArgs& args, int64_t token, int64_t l, double* sums) {
  const int64_t width = args.frames, layers = args.hops + 1;
  const int64_t sinks = args.every_frame ? width : 1;
  std::fill_n(sums, width, 0.0);
  for (int64_t s = 0; s < sinks; ++s) {
    const double grad = static_cast<const T*>(args.grad)[(token * sinks + s) * args.positions + l];
    const uint8_t* side = args.cut + ((token * args.positions + l) * sinks + s) * layers * width;
    for (int64_t node = 0; node < width; ++node) {
      sums[node] += side[node] ? 0 : grad;
    }
  }
  for (int64_t node = 0; node < width; ++node) {
    static_cast<T*>(args.cross)[(token * width + node) * args.positions + l] =
        static_cast<T>(sums[node]);
  }
}

template <typename T>
void gradients(const SubgraphGradArgs& args) {
  const bool any_hop =
      std::any_of(args.temporal, args.temporal + args.hops, [](auto* p) { return p; });
  const int64_t sinks = args.every_frame ? args.frames : 1, places = args.batch * args.positions;
  const int64_t arcs = places * args.tokens * sinks * args.frames * args.frames;
  const int threads = threads_for(arcs, args.threads);
#pragma omp parallel num_threads(threads)
  {
    std::vector<double> sums(std::max(args.hops, 1) * args.frames * args.frames);
    std::vector<double> weights(args.frames);
    if (any_hop) {
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < places; ++task) {
        gradient_of_position<T>(args, task / args.positions, task % args.positions, sums.data(),
                                weights.data());
      }
    }
    if (args.cross) {
#pragma omp for
      for (int64_t at = 0; at < places * args.tokens; ++at) {
        gradient_of_token<T>(args, at / args.positions, at % args.positions, sums.data());
      }
    }
  }
}

template <typename T>
void graphs(const GraphArgs& args) {
  const int threads = threads_for(args.graphs * args.nodes * args.nodes, args.threads);
#pragma omp parallel num_threads(threads)
  {
    auto near = memory_of(graph_near_bytes(args.nodes));
    auto far = memory_of(graph_far_bytes(args.nodes));
#pragma omp for schedule(dynamic, 4)
    for (int64_t graph = 0; graph < args.graphs; ++graph) {
      if (!solve_graph<T>(args, graph, near.data(), far.data(), Alone{})) {
        report(args.bad);
      }
    }
  }
}

}  // namespace

void solve_subgraphs(const SubgraphArgs& args) {
  args.is_double ? subgraphs<double>(args) : subgraphs<float>(args);
}

void subgraph_gradients(const SubgraphGradArgs& args) {
  args.is_double ? gradients<double>(args) : gradients<float>(args);
}

void solve_graphs(const GraphArgs& args) {
  args.is_double ? graphs<double>(args) : graphs<float>(args);
}

}  // namespace cvg
