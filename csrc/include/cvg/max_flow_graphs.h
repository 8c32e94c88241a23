// The graphs of subgraph_max_flow and max_flow: from tensors to networks and back. The formulas
// stand in python_ref/max_flow.py.
#pragma once

#include "cvg/max_flow.h"
#include "cvg/max_flow_args.h"

namespace cvg {

CVG_HD bool is_capacity(double value) {
  return value >= 0 && value <= 1.7976931348623157e308;
}

// A tensor whose first two indices name a graph or a position.
template <typename T>
struct View {
  CVG_HD explicit View(const Tensor4& tensor)
      : data(static_cast<const T*>(tensor.data)), stride(tensor.stride) {}
  CVG_HD const T* at(int64_t a, int64_t b) const { return data + a * stride[0] + b * stride[1]; }

  const T* data;
  const int64_t* stride;
};

// Reads the arcs of one hop; capacity_of(tail, head) is in float64. Returns whether all were
// capacities (on every lane), and leaves out the heads that are not in `heads`.
template <class Team, class Capacity>
CVG_HD bool read_hop(int width, uint64_t heads, Team team, Capacity capacity_of, double* capacity,
                     uint64_t* open) {
  uint64_t bad = 0;
  for (int tail = team.lane(); tail < width; tail += team.size()) {
    uint64_t positive = 0;
    for (int head = 0; head < width; ++head) {
      const double value = capacity_of(tail, head);
      bad |= !is_capacity(value);
      capacity[tail * width + head] = value;
      positive |= static_cast<uint64_t>(value > 0) << head;
    }
    open[tail] = positive & heads;
  }
  return !team.any(bad);
}

// --- subgraph_max_flow ---

// Where the arcs of one position are kept: those of every hop, skip connections mixed in.
struct Position {
  double* capacity;  // [hops, tail, head]
  uint64_t* open;    // [hops, tail]

  CVG_HD static size_t bytes(size_t width, size_t hops) { return 8 * hops * width * (width + 1); }

  CVG_HD Position(void* memory, int width, int hops)
      : capacity(static_cast<double*>(memory)),
        open(reinterpret_cast<uint64_t*>(capacity + size_t(hops) * width * width)) {}
  CVG_HD Position(double* capacities, uint64_t* rooms) : capacity(capacities), open(rooms) {}
};

// The layers that the solver sees. An output frame that is the sink is not one of them.
CVG_HD int inner_layers(const SubgraphArgs& args) {
  const int layers = args.hops + 1;
  return args.every_frame && layers > 1 ? layers - 1 : layers;
}

template <typename T, class Team>
CVG_HD bool read_position(const SubgraphArgs& args, int64_t b, int64_t l, Team team,
                          const Position& to) {
  const int width = args.frames;
  bool good = true;
  for (int hop = 0; hop < args.hops; ++hop) {
    const View<T> view(args.temporal[hop]);
    const T* from = view.at(b, l);
    const auto capacity_of = [&](int tail, int head) {
      const double value = from[head * view.stride[2] + tail * view.stride[3]];
      return is_capacity(value) ? args.scale * (value + (tail == head ? args.skip : 0.0)) : -1.0;
    };
    good &= read_hop(width, ~uint64_t{0}, team, capacity_of, to.capacity + hop * width * width,
                     to.open + hop * width);
  }
  return good;
}

// Solves one graph and writes its flow and cut; `frame` is the sink, or −1 for the whole video.
// Returns whether all of cross were capacities.
template <typename T, class Team>
CVG_HD bool solve_subgraph(const SubgraphArgs& args, int64_t b, int64_t k, int64_t l, int frame,
                           const Position& position, void* near, void* far, Team team) {
  const int width = args.frames, layers = inner_layers(args), hops = layers - 1;
  // Its own skip connection gives the frame that is the sink the most demand; on the way to the
  // whole video the skip connections lead straight ahead.
  const Network net{width, layers, hops, 1, frame, position.capacity, position.open};
  const Workspace work(near, far, net);
  const View<T> cross(args.cross);
  const T* supply = cross.at(b, k) + l * cross.stride[3];
  const double* last = position.capacity + size_t(hops) * width * width;
  uint64_t bad = 0;
  for (int node = team.lane(); node < width; node += team.size()) {
    const double given = supply[node * cross.stride[2]];
    bad |= !is_capacity(given);
    work.supply[node] = given;
    if (frame < 0) {
      work.demand[node] = 1;
    } else if (args.hops > 0) {
      work.demand[node] = last[node * width + frame];
    } else {
      work.demand[node] = node == frame ? given : 0;
    }
  }
  if (team.any(bad)) {
    return false;
  }
  const double flow = MaxFlow<Team>(net, work, team).solve();
  const int64_t graph = frame < 0 ? (b * args.tokens + k) * args.positions + l
                                  : ((b * args.tokens + k) * width + frame) * args.positions + l;
  if (team.lane() == 0) {
    static_cast<T*>(args.flow)[graph] = static_cast<T>(flow);
  }
  const int64_t place =
      frame < 0 ? graph : ((b * args.tokens + k) * args.positions + l) * width + frame;
  uint8_t* cut = args.cut + place * (args.hops + 1) * width;
  for (int layer = 0; layer <= args.hops; ++layer, cut += width) {
    const uint64_t side = frame >= 0 && layer == args.hops ? ~bit(frame) : work.reached[layer];
    for (int node = team.lane(); node < width; node += team.size()) {
      cut[node] = side >> node & 1;
    }
  }
  team.sync();
  return true;
}

// --- max_flow ---

// Memory of one graph: its arcs, then the solver's; in two parts as there.
CVG_HD size_t graph_near_bytes(size_t nodes) {
  return 8 * nodes + Workspace::near_bytes(nodes, 1, 1);
}
CVG_HD size_t graph_far_bytes(size_t nodes) {
  return 8 * nodes * nodes + Workspace::far_bytes(nodes, 1, 1);
}

template <typename T, class Team>
CVG_HD bool solve_graph(const GraphArgs& args, int64_t graph, void* near, void* far, Team team) {
  const int width = args.nodes, source = args.source, sink = args.sink;
  const Position arcs(static_cast<double*>(far), static_cast<uint64_t*>(near));
  const Network net{width, 1, 1, 0, -1, arcs.capacity, arcs.open};
  const Workspace work(arcs.open + width, arcs.capacity + width * width, net);
  const T* from = static_cast<const T*>(args.capacity) + graph * args.stride[0];
  const auto capacity_of = [&](int tail, int head) -> double {
    return from[tail * args.stride[1] + head * args.stride[2]];
  };
  const uint64_t inner = ~(bit(source) | bit(sink));
  if (!read_hop(width, inner, team, capacity_of, arcs.capacity, arcs.open)) {
    return false;
  }
  for (int node = team.lane(); node < width; node += team.size()) {
    const bool is_end = node == source || node == sink;
    work.supply[node] = is_end ? 0 : capacity_of(source, node);
    work.demand[node] = is_end ? 0 : capacity_of(node, sink);
  }
  const double flow = MaxFlow<Team>(net, work, team).solve() + capacity_of(source, sink);
  if (team.lane() == 0) {
    static_cast<T*>(args.flow)[graph] = static_cast<T>(flow);
  }
  for (int node = team.lane(); node < width; node += team.size()) {
    args.source_side[graph * width + node] = node == source || (work.reached[0] >> node & 1);
  }
  team.sync();
  return true;
}

}  // namespace cvg
