// A small team of threads that computes one operation (or a whole forward pass) together.
// Every function below the API is run by all members at once: `me` tells who is asking, `claim`
// deals out pieces of work, `meet` waits for everybody. Waiting spins for a while, then sleeps.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>

class Team {
 public:
  static Team& the();
  // Threads in all, the caller's included; cpus[i] >= 0 pins member i (member 0 is the caller and
  // is never pinned). Returns the number that could be started.
  int resize(int threads, const int* cpus, int spin_us);
  int size() const { return threads_; }

  // Runs work(context, me) on all members; returns when all are done. One caller at a time.
  void run(void (*work)(void*, int), void* context);
  template <class F> void run(F&& work) {
    run([](void* f, int me) { (*static_cast<F*>(f))(me); }, &work);
  }

  // The next piece of work since the last `meet`: 0, 1, 2, ...
  int claim() { return next_.fetch_add(1, std::memory_order_relaxed); }
  void meet();

  // Memory of at least `bytes`, aligned to 64, kept between calls: one area of each member, and
  // areas that all share. Shared areas grow only outside of `run`.
  void* own(int me, int area, size_t bytes);
  void* shared(int area, size_t bytes);

 private:
  struct Area { void* memory = nullptr; size_t bytes = 0; };
  static constexpr int MAX = 256, AREAS = 8;
  void serve(int me, int cpu, uint32_t seen);
  void wait_for_change(std::atomic<uint32_t>& word, uint32_t old);
  void wake(std::atomic<uint32_t>& word);
  static void* grow(Area& area, size_t bytes);

  int threads_ = 1;
  long spins_ = 2000;
  void (*work_)(void*, int) = nullptr;
  void* context_ = nullptr;
  bool stop_ = false;
  alignas(64) std::atomic<uint32_t> job_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  alignas(64) std::atomic<int> next_{0};
  Area own_[MAX][AREAS], shared_[AREAS];
};
