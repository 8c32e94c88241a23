// Exact maximum flow of each token through all positions of a video: one sparse graph a token, all
// of one shape, one task each.
#include "cvg/coupled_max_flow.h"

#include <algorithm>
#include <cmath>

#include "cpu/sparse_max_flow.h"

namespace cvg {

namespace {

constexpr int32_t kSource = 0, kSink = 1, kFirst = 2;

// Node (layer, frame, position); the token is the source. Edges lie in the order of the tensors
// that their capacities come from: cross, spatial, the temporal hops, the outputs.
std::vector<Edge> edges_of(const CoupledMaxFlowArgs& args, int64_t layers) {
  const int64_t frames = args.frames, positions = args.positions;
  const auto node = [&](int64_t layer, int64_t frame, int64_t position) {
    return static_cast<int32_t>(kFirst + (layer * frames + frame) * positions + position);
  };
  std::vector<Edge> edges;
  for (int64_t f = 0; f < frames; ++f) {
    for (int64_t l = 0; l < positions; ++l) {
      edges.push_back({kSource, node(0, f, l)});
    }
  }
  int64_t layer = 0;
  if (args.spatial) {
    for (int64_t f = 0; f < frames; ++f) {
      for (int64_t i = 0; i < positions; ++i) {
        for (int64_t j = 0; j < positions; ++j) {
          edges.push_back({node(0, f, j), node(1, f, i)});
        }
      }
    }
    ++layer;
  }
  for (; layer + 1 < layers; ++layer) {
    for (int64_t l = 0; l < positions; ++l) {
      for (int64_t i = 0; i < frames; ++i) {
        for (int64_t j = 0; j < frames; ++j) {
          edges.push_back({node(layer, j, l), node(layer + 1, i, l)});
        }
      }
    }
  }
  for (int64_t f = 0; f < frames; ++f) {
    for (int64_t l = 0; l < positions; ++l) {
      edges.push_back({node(layers - 1, f, l), kSink});
    }
  }
  return edges;
}

bool all_capacities(const double* values, int64_t count) {
  return std::all_of(values, values + count, [](double x) { return x >= 0 && std::isfinite(x); });
}

// Capacities of sample b's edges but for the outputs', which are 1; token k's graph.
std::vector<double> capacities(const CoupledMaxFlowArgs& args, int64_t b, int64_t k, size_t edges) {
  const int64_t inputs = args.frames * args.positions;
  const int64_t inside = inputs * args.positions, across = inputs * args.frames;
  std::vector<double> all;
  all.reserve(edges);
  const auto append = [&](const double* from, int64_t count) {
    all.insert(all.end(), from, from + count);
  };
  append(args.cross + (b * args.tokens + k) * inputs, inputs);
  if (args.spatial) {
    append(args.spatial + b * inside, inside);
  }
  for (const double* hop : args.temporal) {
    append(hop + b * across, across);
  }
  all.resize(edges, 1.0);
  return all;
}

}  // namespace

bool coupled_max_flow(const CoupledMaxFlowArgs& args, double* flow, uint8_t* side) {
  const int64_t inputs = args.frames * args.positions;
  bool good = all_capacities(args.cross, args.batch * args.tokens * inputs) &&
              (!args.spatial || all_capacities(args.spatial, args.batch * inputs * args.positions));
  for (const double* hop : args.temporal) {
    good = good && all_capacities(hop, args.batch * inputs * args.frames);
  }
  if (!good) {
    return false;
  }
  const int64_t layers = 1 + (args.spatial ? 1 : 0) + static_cast<int64_t>(args.temporal.size());
  const std::vector<Edge> edges = edges_of(args, layers);
  const SparseGraph graph(static_cast<int32_t>(kFirst + layers * inputs), edges);
#pragma omp parallel num_threads(args.threads)
  {
    SparseMaxFlow solver(graph);
    std::vector<double> room(2 * edges.size());
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < args.batch * args.tokens; ++n) {
      const std::vector<double> capacity =
          capacities(args, n / args.tokens, n % args.tokens, edges.size());
      for (size_t e = 0; e < edges.size(); ++e) {
        room[2 * e] = capacity[e];
        room[2 * e + 1] = 0;
      }
      solver.solve(room, kSource, kSink);
      double total = 0;  // the capacity of the minimum cut
      for (size_t e = 0; e < edges.size(); ++e) {
        if (solver.reached(edges[e].tail) && !solver.reached(edges[e].head)) {
          total += capacity[e];
        }
      }
      flow[n] = total;
      for (int64_t node = 0; node < layers * inputs; ++node) {
        side[n * layers * inputs + node] = solver.reached(static_cast<int32_t>(kFirst + node));
      }
    }
  }
  return true;
}

}  // namespace cvg
