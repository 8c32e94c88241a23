// The part of GNU's OpenMP runtime that the CPU kernels call, made of plain threads.
//
// ThreadSanitizer sees threads that are made and joined, mutexes and condition variables. GNU's own
// runtime waits in system calls that it does not see, so every region would look like a race with
// the code behind it. Compiled with -fsanitize=thread and linked into the module, which then takes
// these functions and not those of libgomp; as slow as it looks.
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace {

// The threads of one parallel region.
class Team {
 public:
  explicit Team(int size) : size_(size) {}

  int size() const { return size_; }

  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const long round = round_;
    if (++waiting_ == size_) {
      waiting_ = 0;
      ++round_;
      loop_open_ = false;
      all_here_.notify_all();
      return;
    }
    all_here_.wait(lock, [&] { return round_ != round; });
  }

  // The first thread to come to a loop sets it up.
  void open(long start, long end, long step, long chunk) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!loop_open_) {
      loop_open_ = true;
      next_ = start;
      end_ = end;
      step_ = step;
      chunk_ = chunk;
    }
  }

  bool take(long* first, long* last) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const long left = (end_ - next_ + step_ - 1) / step_;
    if (left <= 0) {
      return false;
    }
    *first = next_;
    *last = left <= chunk_ ? end_ : next_ + chunk_ * step_;
    next_ = *last;
    return true;
  }

 private:
  const int size_;
  std::mutex mutex_;
  std::condition_variable all_here_;
  int waiting_ = 0;
  long round_ = 0;
  bool loop_open_ = false;
  long next_ = 0, end_ = 0, step_ = 1, chunk_ = 1;
};

thread_local Team* team = nullptr;
thread_local int number = 0;

}  // namespace

extern "C" {

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  Team here(threads == 0 ? 1 : static_cast<int>(threads));
  Team* const outer = team;
  const int outer_number = number;
  std::vector<std::thread> others;
  for (int n = 1; n < here.size(); ++n) {
    others.emplace_back([&here, body, data, n] {
      team = &here;
      number = n;
      body(data);
    });
  }
  team = &here;
  number = 0;
  body(data);
  for (std::thread& other : others) {
    other.join();
  }
  team = outer;
  number = outer_number;
}

void GOMP_barrier() {
  if (team != nullptr) {
    team->wait();
  }
}

void GOMP_loop_end() {
  GOMP_barrier();
}

bool GOMP_loop_nonmonotonic_dynamic_next(long* first, long* last) {
  return team->take(first, last);
}

bool GOMP_loop_nonmonotonic_dynamic_start(long start, long end, long step, long chunk, long* first,
                                          long* last) {
  team->open(start, end, step, chunk);
  return team->take(first, last);
}

int omp_get_num_threads() {
  return team == nullptr ? 1 : team->size();
}

int omp_get_thread_num() {
  return number;
}

}  // extern "C"
