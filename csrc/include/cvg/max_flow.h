// Maximum flow through small dense graphs: Dinic's algorithm on 64-bit words. Written once, for CPU
// and GPU: no allocation, no recursion, no library.
//
// A graph has layers of `width` ≤ 64 nodes, a source that feeds nodes of the first layer, a sink
// that nodes of the last one feed, and arcs from each layer to the next. With step = 0 there is one
// layer, whose arcs run within it: that is any graph at all. Per node a word of bits says which
// arcs still have room, and another which arcs carry flow, so a breadth-first search ORs words and
// a step of the depth-first search is an AND and a count of zeros.
//
// Why it ends, whatever the rounding. Within a phase flow runs from level to level, so the arcs
// that open run back and are of no use before the next one. A visit of the depth-first search ends
// in one of three ways. The node has no way on: it is struck off its level. It passed on exactly
// what it received, and that was all the room of the arc that led to it: the arc is set to full (or
// to no flow at all, where it is walked backwards), not merely diminished. Or that was all that the
// stop before it had: this one is done, too, in one of the three ways. A node is struck once in a
// phase at most, an arc closed once, a source emptied once; each ends a path's worth of visits.
// Then no path of that length is left, and arcs that opened are on longer ones only: each phase
// searches deeper than the one before, and there are no more depths than nodes. A bit of `open` or
// `carries` always means that what is left, as computed, is > 0, so even flushed denormals cannot
// stall it.
//
// The result is exact up to the rounding of float64; for float32 input most often altogether, since
// sums of floats of like size fit in 53 bits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cvg/host_device.h"

namespace cvg {

constexpr int kMaxNodes = 64;  // of a layer: the bits of a word

CVG_HD int lowest_bit(uint64_t word) {
#ifdef __CUDA_ARCH__
  return __ffsll(static_cast<long long>(word)) - 1;
#else
  return __builtin_ctzll(word);
#endif
}

CVG_HD uint64_t bit(int at) {
  return uint64_t{1} << at;
}

// What graphs with the same arcs share.
struct Network {
  int width, layers, hops, step;  // hops: layers − 1, or 1 with step = 0
  int favourite;                  // node of the last layer to try first; −1: the one straight ahead
  const double* capacity;         // [hops, tail, head], ≥ 0
  const uint64_t* open;           // [hops, tail]: heads to which the capacity is positive
};

// A node on the path of the depth-first search, and the arc that leads to it.
struct Stop {
  double received;  // the smallest room on the way to here
  double room;      // what of it is left
  double given;     // what went on
  int16_t layer, node;
  bool forward;  // else the arc is walked backwards: flow on it is taken back

  // Exactly what was received where nothing is left, else what went on, within rounding no more.
  CVG_HD double sent() const { return room > 0 && given < received ? given : received; }
};

// Working memory of one graph. supply and demand come filled; the rest as it may be. Two parts: one
// small and in use all the time, the other as large as the worst case, of which little is touched.
// On a GPU the first is in shared memory, the second there or behind a cache.
struct Workspace {
  double* supply;     // [node]: room from the source to the first layer
  double* demand;     // [node]: room from the last layer to the sink
  uint64_t* open;     // [hops, tail]: heads of arcs with room
  uint64_t* carries;  // [hops, head]: tails of arcs with flow
  uint64_t* reached;  // [layer]: nodes that the last search came to
  uint64_t* ends;     // nodes of the first layer with supply, nodes of the last with demand
  // The large part:
  double* flow;      // [hops, tail, head]; of arcs that carry none, as it may be
  Stop* path;        // [nodes]
  uint64_t* levels;  // [nodes + 1, layer]: nodes by their distance from the source

  CVG_HD static size_t near_bytes(size_t width, size_t layers, size_t hops) {
    return 8 * (2 * width + 2 * hops * width + layers + 2);
  }
  CVG_HD static size_t far_bytes(size_t width, size_t layers, size_t hops) {
    return 8 * (hops * width * width + (width * layers + 1) * layers) +
           sizeof(Stop) * width * layers;
  }

  CVG_HD Workspace(void* near, void* far, const Network& net) {
    const size_t width = net.width, layers = net.layers, arcs = net.hops * width;
    supply = static_cast<double*>(near);
    demand = supply + width;
    open = reinterpret_cast<uint64_t*>(demand + width);
    carries = open + arcs;
    reached = carries + arcs;
    ends = reached + layers;
    flow = static_cast<double*>(far);
    path = reinterpret_cast<Stop*>(flow + arcs * width);
    levels = reinterpret_cast<uint64_t*>(path + width * layers);
  }
};

// One thread on its own; a warp offers the same functions for its lanes (csrc/cuda/max_flow.cu).
struct Alone {
  CVG_HD int lane() const { return 0; }
  CVG_HD int size() const { return 1; }
  CVG_HD void sync() const {}
  // OR over the lanes; it orders nothing that they do to memory.
  CVG_HD uint64_t any(uint64_t word) const { return word; }
  // OR of the words of `nodes`; may stop when it holds all that is `wanted`.
  CVG_HD uint64_t gather(uint64_t nodes, const uint64_t* words, int, uint64_t wanted) const {
    uint64_t found = 0;
    for (; nodes && (wanted & ~found); nodes &= nodes - 1) {
      found |= words[lowest_bit(nodes)];
    }
    return found;
  }
};

template <class Team>
class MaxFlow {
 public:
  CVG_HD MaxFlow(const Network& net, const Workspace& work, Team team)
      : net_(net), work_(work), team_(team) {}

  // The maximum flow, on lane 0. work.reached is then the source's side of the minimum cut: the
  // smallest there is, what can still be reached from the source.
  CVG_HD double solve() {
    begin();
    double total = 0;
    for (int depth = search(); depth >= 0; depth = search()) {
      if (team_.lane() == 0) {
        total += block(depth);
      }
    }
    return total;
  }

 private:
  CVG_HD void begin() {
    for (int at = team_.lane(); at < net_.hops * net_.width; at += team_.size()) {
      work_.open[at] = net_.open[at];
      work_.carries[at] = 0;
    }
    uint64_t sources = 0, sinks = 0;
    for (int node = team_.lane(); node < net_.width; node += team_.size()) {
      sources |= static_cast<uint64_t>(work_.supply[node] > 0) << node;
      sinks |= static_cast<uint64_t>(work_.demand[node] > 0) << node;
    }
    sources = team_.any(sources);
    sinks = team_.any(sinks);
    if (team_.lane() == 0) {
      work_.ends[0] = sources;
      work_.ends[1] = sinks;
    }
  }

  // Finds the level of every node up to the nearest with demand, and of the last layer keeps only
  // those with demand there; no other layer of that level is looked at. Returns that level, or −1
  // if flow can reach none.
  CVG_HD int search() {
    const int layers = net_.layers, last = layers - 1;
    const bool lead = team_.lane() == 0;
    uint64_t* level = work_.levels;
    if (lead) {
      for (int b = 0; b < layers; ++b) {
        level[b] = work_.reached[b] = b == 0 ? work_.ends[0] : 0;
      }
    }
    team_.sync();
    for (int depth = 0;; ++depth, level += layers) {
      const uint64_t arrived = level[last] & work_.ends[1];
      if (arrived) {
        team_.sync();
        if (lead) {
          level[last] = arrived;
        }
        return depth;
      }
      uint64_t news = 0;
      for (int b = 0; b < layers; ++b) {
        const uint64_t found = neighbours(level, b);
        team_.sync();
        if (lead) {
          level[layers + b] = found;
          work_.reached[b] |= found;
        }
        news |= found;
      }
      team_.sync();
      if (!news) {
        return -1;
      }
    }
  }

  // Nodes of layer b next to those of a level and not reached before.
  CVG_HD uint64_t neighbours(const uint64_t* level, int b) const {
    const int width = net_.width, before = b - net_.step;
    const uint64_t wanted = ~uint64_t{0} >> (kMaxNodes - width) & ~work_.reached[b];
    uint64_t found = 0;
    if (before >= 0 && before < net_.hops) {
      found = team_.gather(level[before], work_.open + before * width, width, wanted);
    }
    if (b < net_.hops) {
      found |=
          team_.gather(level[b + net_.step], work_.carries + b * width, width, wanted & ~found);
    }
    return found & wanted;
  }

  // Blocks every shortest path: depth-first along the levels. A stop hands on what it received, to
  // one node after the other, and the arc that led to it is charged once, when it is done: it has
  // nothing left, or no way on, and then it is struck off its level. Returns what was pushed. One
  // thread does it.
  CVG_HD double block(int depth) {
    if (depth == 0) {
      return straight_through();
    }
    const int layers = net_.layers;
    double pushed = 0;
    while (work_.levels[0]) {
      const int source = lowest_bit(work_.levels[0]);
      Stop* path = work_.path;
      path[0] = stop_at(0, source, true, work_.supply[source]);
      for (int at = 0; at >= 0;) {
        Stop& stop = path[at];
        uint64_t* level = work_.levels + at * layers;
        if (at == depth - 1) {
          deliver(stop, &level[2 * layers - 1]);
        } else if (stop.room > 0 && step_on(stop, level + layers, &path[at + 1])) {
          ++at;
          continue;
        }
        if (stop.room > 0) {
          level[stop.layer] &= ~bit(stop.node);
        }
        if (at > 0) {
          charge(path[at - 1], stop);
        }
        --at;
      }
      pushed += path[0].sent();
      work_.supply[source] = path[0].room;
      work_.levels[0] &= ~bit(source);
      work_.ends[0] &= ~(static_cast<uint64_t>(!(path[0].room > 0)) << source);
    }
    return pushed;
  }

  // Nodes of the first layer that have demand themselves.
  CVG_HD double straight_through() {
    double pushed = 0;
    for (uint64_t nodes = work_.levels[0]; nodes; nodes &= nodes - 1) {
      const int node = lowest_bit(nodes);
      double &supply = work_.supply[node], &demand = work_.demand[node];
      const double amount = demand < supply ? demand : supply;
      pushed += amount;
      work_.ends[0] &= ~(static_cast<uint64_t>(!((supply -= amount) > 0)) << node);
      work_.ends[1] &= ~(static_cast<uint64_t>(!((demand -= amount) > 0)) << node);
    }
    return pushed;
  }

  // Hands from a stop to the nodes of the last level, which have demand. This is where the time
  // goes: what the loop needs is at hand, and its only branch is its end.
  CVG_HD void deliver(Stop& stop, uint64_t* level) {
    const int width = net_.width, node = stop.node, row = stop.layer * width + node;
    uint64_t met = 0;
    if (stop.layer < net_.hops && stop.layer + net_.step == net_.layers - 1) {
      const double* capacity = net_.capacity + row * width;
      double *flow = work_.flow + row * width, *demand = work_.demand;
      uint64_t* carries = work_.carries + stop.layer * width;
      double room = stop.room, given = 0;
      const int start = net_.favourite < 0 ? node : net_.favourite;
      uint64_t full = 0, ways = turned(work_.open[row] & *level, start);
      for (; ways && room > 0; ways &= ways - 1) {
        const int head = (start + lowest_bit(ways)) % kMaxNodes;
        const uint64_t others = carries[head];
        const double has = others & bit(node) ? flow[head] : 0;
        const double most = capacity[head], left = most - has;
        const double wants = demand[head], takes = wants < left ? wants : left;
        const double amount = takes < room ? takes : room, now = has + amount;
        const bool fills = !(amount < left) | !(most - now > 0);
        room -= amount;
        given += amount;
        flow[head] = fills ? most : now;
        demand[head] = wants - amount;
        carries[head] = others | bit(node);
        full |= static_cast<uint64_t>(fills) << head;
        met |= static_cast<uint64_t>(!(wants - amount > 0)) << head;
      }
      work_.open[row] &= ~full;
      stop.room = room;
      stop.given = given;
    }
    if (net_.step == 0) {  // arcs run within the layer: flow to this node may be taken back, too
      uint64_t ways = work_.carries[node] & *level & ~met;
      for (; ways && stop.room > 0; ways &= ways - 1) {
        const int tail = lowest_bit(ways);
        double& demand = work_.demand[tail];
        const double flow = work_.flow[arc(0, tail, node)], takes = demand < flow ? demand : flow;
        const double amount = takes < stop.room ? takes : stop.room;
        demand -= amount;
        met |= static_cast<uint64_t>(!(demand > 0)) << tail;
        stop.room -= amount;
        stop.given += amount;
        take_back(0, tail, node, amount);
      }
    }
    work_.ends[1] &= ~met;
    *level &= ~met;
  }

  // From one stop to a node of the next level, if an arc leads there.
  CVG_HD bool step_on(const Stop& from, const uint64_t* level, Stop* to) const {
    const int width = net_.width, node = from.node;
    const int next = from.layer + net_.step, before = from.layer - net_.step;
    uint64_t ways = 0;
    if (from.layer < net_.hops) {
      ways = work_.open[from.layer * width + node] & level[next];
    }
    if (ways) {
      const int head = (node + lowest_bit(turned(ways, node))) % kMaxNodes;
      const double room = left(from.layer, node, head);
      *to = stop_at(next, head, true, room < from.room ? room : from.room);
      return true;
    }
    if (before >= 0 && before < net_.hops) {
      ways = work_.carries[before * width + node] & level[before];
    }
    if (ways) {
      const int tail = lowest_bit(ways);
      const double room = work_.flow[arc(before, tail, node)];
      *to = stop_at(before, tail, false, room < from.room ? room : from.room);
      return true;
    }
    return false;
  }

  // Bits in the order in which they are tried: from one node on and around.
  CVG_HD static uint64_t turned(uint64_t ways, int start) {
    return ways >> start | ways << (kMaxNodes - start) % kMaxNodes;
  }

  CVG_HD static Stop stop_at(int layer, int node, bool forward, double room) {
    return {room, room, 0, static_cast<int16_t>(layer), static_cast<int16_t>(node), forward};
  }

  // Charges the arc between two stops with what the second sent on.
  CVG_HD void charge(Stop& from, const Stop& to) {
    const double amount = to.sent();
    if (amount > 0) {
      from.room -= amount;
      from.given += amount;
      if (to.forward) {
        push(from.layer, from.node, to.node, amount);
      } else {
        take_back(to.layer, to.node, from.node, amount);
      }
    }
  }

  CVG_HD int arc(int hop, int tail, int head) const {
    return (hop * net_.width + tail) * net_.width + head;
  }

  CVG_HD double flow_on(int hop, int tail, int head) const {
    const bool some = work_.carries[hop * net_.width + head] & bit(tail);
    return some ? work_.flow[arc(hop, tail, head)] : 0;
  }

  CVG_HD double left(int hop, int tail, int head) const {
    return net_.capacity[arc(hop, tail, head)] - flow_on(hop, tail, head);
  }

  CVG_HD void push(int hop, int tail, int head, double amount) {
    const double capacity = net_.capacity[arc(hop, tail, head)];
    const double flow = flow_on(hop, tail, head), more = flow + amount;
    const bool full = !(amount < capacity - flow) | !(capacity - more > 0);
    work_.flow[arc(hop, tail, head)] = full ? capacity : more;
    work_.carries[hop * net_.width + head] |= bit(tail);
    work_.open[hop * net_.width + tail] &= ~(static_cast<uint64_t>(full) << head);
  }

  CVG_HD void take_back(int hop, int tail, int head, double amount) {
    double& flow = work_.flow[arc(hop, tail, head)];
    flow -= amount;
    work_.carries[hop * net_.width + head] &= ~(static_cast<uint64_t>(!(flow > 0)) << tail);
    work_.open[hop * net_.width + tail] |= bit(head);
  }

  const Network& net_;
  const Workspace& work_;
  Team team_;
};

}  // namespace cvg
