#include "runtime.h"

#include <array>
#include <cstring>
#include <iterator>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <unistd.h>
#if defined(__linux__)
#include <malloc.h>
#include <sys/mman.h>
#endif

namespace minkernels {

static const char* const level_names[] = {"plain", "avx2", "avx512", "avx512_bf16"};  // in the order of LEVELS

static int best_level() {
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return 0;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") ||
      !__builtin_cpu_supports("avx512vl"))
    return 1;
  return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
#else
  return 0;
#endif
}

int level() {
  static const int best = best_level();
  const char* name = std::getenv("MINKERNELS_CPU_LEVEL");  // read at each call, so that tests can lower it
  if (!name || !*name) return best;
  for (int i = 0; i < int(std::size(level_names)); i++)
    if (!std::strcmp(name, level_names[i])) return std::min(i, best);
  throw std::runtime_error("MINKERNELS_CPU_LEVEL must be plain, avx2, avx512 or avx512_bf16, got " + std::string(name));
}

Dtype dtype_of(const Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Half: return Dtype::f16;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::Double: return Dtype::f64;
    default: throw std::runtime_error("minkernels: a float dtype was expected");
  }
}

torch::headeronly::ScalarType wide_dtype(const Tensor& t) {
  using torch::headeronly::ScalarType;
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Reduction take_reduction(StringHandle name) {
  const char* text = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(name, &text));
  const Reduction found = !std::strcmp(text, "none") ? Reduction::none : !std::strcmp(text, "sum") ? Reduction::sum : Reduction::mean;
  TORCH_ERROR_CODE_CHECK(torch_delete_string(name));
  return found;
}

constexpr size_t huge_page = 2 << 20, worth_it = 4 << 20;

void advise_huge_pages([[maybe_unused]] void* p, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  if (bytes < worth_it) return;
  uintptr_t begin = (uintptr_t(p) + huge_page - 1) / huge_page * huge_page, end = (uintptr_t(p) + bytes) / huge_page * huge_page;
  if (begin < end) madvise((void*)begin, end - begin, MADV_HUGEPAGE);  // advice: where it is not taken, only time is lost
#endif
}

// Leaves the pages where they are until the system is short of memory: then it takes those that have not been written since.
static void lend([[maybe_unused]] void* p, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  madvise(p, bytes / huge_page * huge_page, MADV_FREE);
#endif
}

bool resident([[maybe_unused]] const void* p, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  constexpr int places = 8;
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  for (int i = 0; i < places; i++) {
    unsigned char there = 0;
    const uintptr_t at = (uintptr_t(p) + bytes / places * i + bytes / (2 * places)) / page * page;
    if (mincore((void*)at, 1, &there) || !(there & 1)) return false;
  }
  return true;
#else
  return false;
#endif
}

Memory allocate(size_t bytes) {
  size_t align = bytes < worth_it ? 64 : huge_page;
  char* p = (char*)std::aligned_alloc(align, (bytes + align) / align * align);
  if (!p) throw std::bad_alloc();
  advise_huge_pages(p, bytes);
  return Memory(p);
}

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

static Tensor strided(Sizes sizes, Sizes strides, torch::headeronly::ScalarType dtype) {
  using torch::stable::detail::from, torch::stable::detail::to;
  AtenTensorHandle tensor;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), to<int32_t>(from(dtype)),
                                                  aoti_torch_device_type_cpu(), 0, &tensor));
  return Tensor(tensor);
}

Tensor fresh(Sizes sizes, torch::headeronly::ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) strides[i] = stride;
  return strided(sizes, strides, dtype);
}

// Whether there are elements and they lie one after the other, the dimensions in any order.
static bool dense(Sizes sizes, Sizes strides) {
  std::array<std::pair<int64_t, int64_t>, 8> dims;
  if (sizes.size() > dims.size()) return false;
  auto end = dims.begin();
  for (size_t i = 0; i < sizes.size(); i++)
    if (sizes[i] != 1) *end++ = {strides[i], sizes[i]};
  std::sort(dims.begin(), end);
  int64_t stride = 1;
  for (auto dim = dims.begin(); dim != end; stride *= dim++->second)
    if (dim->first != stride) return false;
  return stride > 0;
}

Tensor fresh_like(const Tensor& x, torch::headeronly::ScalarType dtype) {
  if (dense(x.sizes(), x.strides())) return strided(x.sizes(), x.strides(), dtype);
  using torch::stable::detail::from;
  StableIValue stack[] = {from(x),           from(std::optional(dtype)), from(std::nullopt), from(std::nullopt), from(std::nullopt),
                          from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// The memory of large tensors that are gone: up to MINKERNELS_KEEP_MB of it, which the oldest leave first. All but the newest 512 MB is
// lent to the system, which costs 0.3 ms for 800 MB. Never destroyed, since tensors may outlive it. A lock that is held, by another thread
// or since before a fork, is not waited for: memory is then as malloc gives it.
class Kept {
 public:
  struct Block {
    Memory memory;
    size_t bytes;
    bool lent = false;
  };
  Block take(size_t bytes) {
    {
      const std::unique_lock lock(mutex_, std::try_to_lock);
      for (size_t i = blocks_.size(); lock && i-- > 0;)
        if (blocks_[i].bytes >= bytes && blocks_[i].bytes - bytes <= bytes / 4) return leave(i);
    }
    return {allocate(bytes), bytes};
  }
  void give(Block block) noexcept {  // what is not kept is freed at the end, without the lock
    std::vector<Block> old;
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock || block.bytes > most_) return;
    try {
      while (total_ + block.bytes > most_) old.push_back(leave(0));
      blocks_.push_back(std::move(block));
      total_ += blocks_.back().bytes;
      size_t newest = 0;
      for (auto it = blocks_.rbegin(); it != blocks_.rend(); it++)
        if ((newest += it->bytes) > ours_ && !std::exchange(it->lent, true)) lend(it->memory.get(), it->bytes);
    } catch (const std::bad_alloc&) {
    }
  }
  void clear() {
    std::vector<Block> old;
    for (int tries = 0; tries < 1000; tries++, std::this_thread::yield())
      if (const std::unique_lock lock(mutex_, std::try_to_lock); lock) {
        old.swap(blocks_), total_ = 0;
        break;
      }
    old.clear();
#if defined(__GLIBC__)
    malloc_trim(0);  // it holds back what is under its threshold for mmap, of up to 32 MB
#endif
  }

 private:
  Block leave(size_t i) {
    Block block = std::move(blocks_[i]);
    total_ -= block.bytes, blocks_.erase(blocks_.begin() + int64_t(i));
    return block;
  }
  static size_t most() {
    const char* text = std::getenv("MINKERNELS_KEEP_MB");
    if (!text || !*text) return std::max(ours_, size_t(sysconf(_SC_PHYS_PAGES)) * size_t(sysconf(_SC_PAGESIZE)) / 8);
    char* end = nullptr;
    const unsigned long long mb = std::strtoull(text, &end, 10);
    if (*end || *text < '0' || *text > '9')
      throw std::runtime_error(std::string("MINKERNELS_KEEP_MB must be a number of megabytes, got ") + text);
    return size_t(std::min<unsigned long long>(mb, SIZE_MAX >> 20)) << 20;
  }

  static constexpr size_t ours_ = size_t(512) << 20;
  std::mutex mutex_;
  std::vector<Block> blocks_;  // the oldest first
  size_t total_ = 0;
  const size_t most_ = most();
};

static Kept& kept() {
  static Kept& all = *new Kept;
  return all;
}
static thread_local Memory spare;
static thread_local size_t spare_size = 0;

void empty_cache() { kept().clear(), spare.reset(), spare_size = 0; }

Tensor empty_like(const Tensor& x) {
  Tensor like = fresh_like(x, x.scalar_type());  // for its strides: nothing touches its pages
  const size_t bytes = size_t(like.numel() * like.element_size());
  if (bytes < 16 << 20) return like;
  Kept::Block block;
  try {
    block = kept().take(bytes);
  } catch (const std::bad_alloc&) {  // there is no room for both
    empty_cache();
    return like;
  }
  const auto give = [held = block.bytes](void* p) { kept().give({Memory((char*)p), held}); };
  Tensor result = torch::stable::from_blob(block.memory.get(), like.sizes(), like.strides(), like.device(), like.scalar_type(), give);
  block.memory.release();
  return result;
}

Workspace::Workspace(size_t bytes) {
  if (spare_size < bytes) {
    spare.reset();
    spare_size = 0;
    memory_ = allocate(size_ = bytes);
  } else {
    memory_ = std::move(spare);
    size_ = std::exchange(spare_size, 0);
  }
}
Workspace::~Workspace() {
  if (size_ <= most_kept) spare = std::move(memory_), spare_size = size_;
}

static std::string cpu_features() {
  std::string found;
#if defined(__x86_64__) && defined(__GNUC__)
#define ADD_FEATURE(name) found += __builtin_cpu_supports(name) ? " " name : ""
  ADD_FEATURE("avx2");
  ADD_FEATURE("fma");
  ADD_FEATURE("avx512f");
  ADD_FEATURE("avx512bw");
  ADD_FEATURE("avx512dq");
  ADD_FEATURE("avx512vl");
  ADD_FEATURE("avx512bf16");
#undef ADD_FEATURE
#endif
  return found.empty() ? "none that the kernels use" : found.substr(1);
}
static std::string cpu_level() { return level_names[level()]; }
#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)
static std::string build_info() { return "compiler " __VERSION__ ", stable ABI " TEXT(TORCH_TARGET_VERSION); }

}  // namespace minkernels

// The library's private operators; those of the ops themselves are registered beside their code.
STABLE_TORCH_LIBRARY_FRAGMENT(minkernels, m) {
  m.def("_cpu_features() -> str");
  m.def("_cpu_level() -> str");
  m.def("_build_info() -> str");
  m.def("_empty_like(Tensor x) -> Tensor");
  m.def("_empty_cache() -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(minkernels, CompositeExplicitAutograd, m) {
  m.impl("_cpu_features", TORCH_BOX(&minkernels::cpu_features));
  m.impl("_cpu_level", TORCH_BOX(&minkernels::cpu_level));
  m.impl("_build_info", TORCH_BOX(&minkernels::build_info));
  m.impl("_empty_cache", TORCH_BOX(&minkernels::empty_cache));
}
STABLE_TORCH_LIBRARY_IMPL(minkernels, CPU, m) { m.impl("_empty_like", TORCH_BOX(&minkernels::empty_like)); }
