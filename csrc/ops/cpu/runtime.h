// What the operators share: tensors as pointers, the level, memory, and threads.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>

#include "vec_includes.h"

namespace minkernels {

using torch::stable::Tensor;

int level();  // an index into LEVELS: the best that this machine has, or what MINKERNELS_CPU_LEVEL names if that is lower

Dtype dtype_of(const Tensor& t);
torch::headeronly::ScalarType wide_dtype(const Tensor& t);  // of results no narrower than the arithmetic: float, or double

enum class Reduction { none, mean, sum };
Reduction take_reduction(StringHandle name);  // an argument, which ends here: std::string as an argument is never freed by PyTorch 2.13

// Fresh memory of 4 MB and more costs more in page faults than the kernels take to fill it: ask for huge pages.
void advise_huge_pages(void* p, size_t bytes);

// Whether it has its pages already, as a sample of it says; the system zeroes fresh ones when they are first touched.
bool resident(const void* p, size_t bytes);

struct Free {
  void operator()(char* p) const { std::free(p); }
};
using Memory = std::unique_ptr<char, Free>;
Memory allocate(size_t bytes);  // on a cache line; on a huge page where that pays; throws std::bad_alloc

// Fresh tensors on the CPU, uninitialised: dense, or like x. Those of torch::stable go through the dispatcher by name.
Tensor fresh(torch::headeronly::IntHeaderOnlyArrayRef sizes, torch::headeronly::ScalarType dtype);
Tensor fresh_like(const Tensor& x, torch::headeronly::ScalarType dtype);

// Like x, uninitialised, where an earlier such tensor lay, if one as large, or larger by up to a quarter, is gone: the system zeroes fresh
// pages, which takes longer than most kernels take to fill them. Of less than 16 MB a fresh one: those malloc keeps itself.
Tensor empty_like(const Tensor& x);
void empty_cache();  // gives that memory back to the system, and what this thread's Workspace keeps

constexpr size_t most_kept = 128 << 20;  // bytes that a thread keeps for its next call

// Memory for one call: what the thread's last call took, if that is enough, since fresh pages cost short calls more than the arithmetic.
class Workspace {
 public:
  explicit Workspace(size_t bytes);
  ~Workspace();  // keeps up to most_kept for the next call
  char* get() const { return memory_.get(); }

 private:
  size_t size_;
  Memory memory_;
};

// f(task, scratch) for every task, started in ascending order: each thread takes the next one when it is done with its last.
template <class F>
void run_tasks(int64_t tasks, size_t scratch_bytes, const F& f, int64_t most_threads = INT64_MAX) {
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    thread_local Memory scratch;
    thread_local size_t size = 0;
    if (size < scratch_bytes) scratch = allocate(scratch_bytes), size = scratch_bytes;
    for (int64_t task; (task = next++) < tasks;) f(task, scratch.get());
    if (size > most_kept) scratch.reset(), size = 0;
  };
  int64_t threads = std::min({int64_t(torch::stable::get_num_threads()), tasks, most_threads});
  if (threads <= 1) return work(0, 1);
  std::exception_ptr error;  // the first; parallel_for() would say that a call failed, and not why
  std::mutex one_at_a_time;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    try {
      work(begin, end);
    } catch (...) {
      const std::lock_guard lock(one_at_a_time);
      if (!error) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace minkernels
