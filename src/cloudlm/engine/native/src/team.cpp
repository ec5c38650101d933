#include "team.h"

#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <mutex>
#include <thread>
#include <vector>

namespace {
std::mutex one_caller;
std::vector<std::thread>& members = *new std::vector<std::thread>;  // outlives exit
}  // namespace

Team& Team::the() {
  static Team* team = new Team;  // never destroyed: members may still sleep in it at exit
  return *team;
}

int Team::resize(int threads, const int* cpus, int spin_us) {
  std::lock_guard<std::mutex> lock(one_caller);
  stop_ = true;
  job_.fetch_add(1);
  wake(job_);
  for (auto& member : members) member.join();
  members.clear();
  stop_ = false;
  threads_ = 1;
  spins_ = long(spin_us) * 25;  // a pause takes some 40 ns
  threads = threads < 1 ? 1 : threads > MAX ? MAX : threads;
  const uint32_t seen = job_.load();
  try {
    for (int me = 1; me < threads; me++) {
      members.emplace_back([=] { serve(me, cpus ? cpus[me] : -1, seen); });
      threads_ = me + 1;
    }
  } catch (...) {
  }  // fewer threads then
  return threads_;
}

void Team::run(void (*work)(void*, int), void* context) {
  std::lock_guard<std::mutex> lock(one_caller);
  work_ = work;
  context_ = context;
  next_.store(0, std::memory_order_relaxed);
  if (threads_ > 1) {
    job_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst)) wake(job_);
  }
  work(context, 0);
  meet();
}

void Team::serve(int me, int cpu, uint32_t seen) {
  if (cpu >= 0) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    pthread_setaffinity_np(pthread_self(), sizeof set, &set);
  }
  for (;;) {
    wait_for_change(job_, seen);
    seen++;
    if (stop_) return;
    work_(context_, me);
    meet();
  }
}

void Team::meet() {
  if (threads_ == 1) {
    next_.store(0, std::memory_order_relaxed);
    return;
  }
  const uint32_t phase = phase_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
    arrived_.store(0, std::memory_order_relaxed);
    next_.store(0, std::memory_order_relaxed);
    phase_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst)) wake(phase_);
  } else {
    wait_for_change(phase_, phase);
  }
}

void Team::wait_for_change(std::atomic<uint32_t>& word, uint32_t old) {
  for (long i = 0; i < spins_; i++) {
    if (word.load(std::memory_order_acquire) != old) return;
    _mm_pause();
  }
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  while (word.load(std::memory_order_seq_cst) == old)
    syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0);
  sleepers_.fetch_sub(1, std::memory_order_seq_cst);
}

void Team::wake(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, MAX, nullptr, nullptr, 0);
}

bool Team::grow(Area& area, size_t bytes) {
  if (bytes <= area.bytes) return true;
  free(area.memory);
  area = Area();
  const size_t size = (bytes + bytes / 4 + 4095) & ~size_t(4095);
  area.memory = aligned_alloc(4096, size);
  if (!area.memory) return false;
  area.bytes = size;
  if (size >= (4u << 20)) madvise(area.memory, size, MADV_HUGEPAGE);
  return true;
}

bool Team::reserve_own(int area, size_t bytes) {
  for (int me = 0; me < threads_; me++)
    if (!grow(own_[me][area], bytes)) return false;
  return true;
}
