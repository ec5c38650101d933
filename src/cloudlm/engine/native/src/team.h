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

  // Memory aligned to 64 and kept between calls: areas that each member has for itself, and areas
  // that all share. They are made large enough before `run`; false if the system has no more.
  bool reserve_own(int area, size_t bytes);
  bool reserve_shared(int area, size_t bytes) { return grow(shared_[area], bytes); }
  void* own(int me, int area) { return own_[me][area].memory; }
  void* shared(int area) { return shared_[area].memory; }

 private:
  struct Area { void* memory = nullptr; size_t bytes = 0; };
  static constexpr int MAX = 256, AREAS = 8;
  void serve(int me, int cpu, uint32_t seen);
  void wait_for_change(std::atomic<uint32_t>& word, uint32_t old);
  void wake(std::atomic<uint32_t>& word);
  static bool grow(Area& area, size_t bytes);

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
