// Maximum flow on a sparse graph with float capacities, by Dinic's algorithm.
//
// It ends whatever the floats are. An augmentation takes the room of its narrowest arc from that
// arc, which leaves exactly 0 (x − x), and an arc at 0 is not used again in its phase; so a phase
// has at most as many augmentations as arcs. Room given back lies on arcs that lead to a lower
// level, which no phase uses before the levels are made anew; so the distance from source to sink
// grows from phase to phase, and there are at most as many phases as nodes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace cvg {

struct Edge {
  int32_t tail, head;
};

// A graph without capacities: for each node the arcs that leave it. Arc 2e is edge e, arc 2e + 1
// its way back.
class SparseGraph {
 public:
  SparseGraph(int32_t nodes, const std::vector<Edge>& edges)
      : first_(nodes + 1, 0), arcs_(2 * edges.size()), head_(2 * edges.size()) {
    for (const Edge& edge : edges) {
      ++first_[edge.tail + 1];
      ++first_[edge.head + 1];
    }
    for (int32_t node = 0; node < nodes; ++node) {
      first_[node + 1] += first_[node];
    }
    std::vector<int32_t> next(first_.begin(), first_.end() - 1);
    for (size_t e = 0; e < edges.size(); ++e) {
      head_[2 * e] = edges[e].head;
      head_[2 * e + 1] = edges[e].tail;
      arcs_[next[edges[e].tail]++] = static_cast<int32_t>(2 * e);
      arcs_[next[edges[e].head]++] = static_cast<int32_t>(2 * e + 1);
    }
  }

  int32_t nodes() const { return static_cast<int32_t>(first_.size()) - 1; }
  int32_t begin(int32_t node) const { return first_[node]; }
  int32_t end(int32_t node) const { return first_[node + 1]; }
  int32_t arc(int32_t at) const { return arcs_[at]; }
  int32_t head(int32_t arc) const { return head_[arc]; }

 private:
  std::vector<int32_t> first_, arcs_, head_;
};

class SparseMaxFlow {
 public:
  explicit SparseMaxFlow(const SparseGraph& graph)
      : graph_(graph), level_(graph.nodes()), next_(graph.nodes()) {}

  // Solves; afterwards `reached(node)` tells the source's side of the minimum cut that has the
  // fewest nodes there. `room[2e]` holds the capacity of edge e on entry, `room[2e + 1]` 0.
  void solve(std::vector<double>& room, int32_t source, int32_t sink) {
    while (find_levels(room, source, sink)) {
      for (int32_t node = 0; node < graph_.nodes(); ++node) {
        next_[node] = graph_.begin(node);
      }
      block(room, source, sink);
    }
  }
  bool reached(int32_t node) const { return level_[node] >= 0; }

 private:
  // Distances from the source over arcs with room; −1: not reached.
  bool find_levels(const std::vector<double>& room, int32_t source, int32_t sink) {
    std::fill(level_.begin(), level_.end(), -1);
    level_[source] = 0;
    queue_.assign(1, source);
    for (size_t at = 0; at < queue_.size(); ++at) {
      const int32_t node = queue_[at];
      for (int32_t n = graph_.begin(node); n < graph_.end(node); ++n) {
        const int32_t arc = graph_.arc(n), head = graph_.head(arc);
        if (level_[head] < 0 && room[arc] > 0) {
          level_[head] = level_[node] + 1;
          queue_.push_back(head);
        }
      }
    }
    return level_[sink] >= 0;
  }

  // Augments along shortest paths until each has an arc without room.
  void block(std::vector<double>& room, int32_t source, int32_t sink) {
    path_.clear();
    int32_t node = source;
    while (true) {
      if (node == sink) {
        double amount = room[path_[0]];
        for (const int32_t arc : path_) {
          amount = std::min(amount, room[arc]);
        }
        for (const int32_t arc : path_) {
          room[arc] -= amount;
          room[arc ^ 1] += amount;
        }
        // Back to the tail of the first arc that is full now.
        const auto full =
            std::find_if(path_.begin(), path_.end(), [&](int32_t arc) { return !(room[arc] > 0); });
        node = graph_.head(*full ^ 1);
        path_.erase(full, path_.end());
        continue;
      }
      int32_t& at = next_[node];
      while (at < graph_.end(node) && !leads_on(room, node, graph_.arc(at))) {
        ++at;
      }
      if (at < graph_.end(node)) {
        path_.push_back(graph_.arc(at));
        node = graph_.head(path_.back());
      } else if (path_.empty()) {
        return;
      } else {  // a dead end: the arc that led here is done with
        node = graph_.head(path_.back() ^ 1);
        path_.pop_back();
        ++next_[node];
      }
    }
  }

  bool leads_on(const std::vector<double>& room, int32_t node, int32_t arc) const {
    return room[arc] > 0 && level_[graph_.head(arc)] == level_[node] + 1;
  }

  const SparseGraph& graph_;
  std::vector<int32_t> level_, next_, queue_, path_;
};

}  // namespace cvg
