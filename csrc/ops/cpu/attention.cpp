// The attention operators on CPU tensors: which keys count, the list of work, threads. The arithmetic is in attention_kernel.h.
#include "attention.h"

#include <cmath>
#include <cstring>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "runtime.h"

#define KERNEL "attention_kernel.h"
#include "levels.h"

namespace minkernels {

static const AttentionRoads& roads_for(Dtype dtype) {
  static constexpr const AttentionRoads& (*f32[])() = WIDE_LEVELS(attention_roads<float>);
  static constexpr const AttentionRoads& (*f64[])() = WIDE_LEVELS(attention_roads<double>);
  return dtype == Dtype::f32 ? f32[level()]() : dtype == Dtype::f64 ? f64[level()]() : attention_16bit(level(), dtype);
}

using Maybe = std::optional<Tensor>;

static View view(const Tensor& t) { return {(char*)t.data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }
static View broadcast(const Maybe& t) {
  if (!t) return {};
  auto stride = [&](int64_t dim) { return t->size(dim) == 1 ? 0 : t->stride(dim); };
  return {(char*)t->data_ptr(), stride(0), stride(1), stride(2), stride(3)};
}

// The options of every operator, in the order of their schemas (attention/_options.py).
struct Options {
  Maybe bias, sinks, key_mask, kv_lens, mask, cu_seqlens_q, cu_seqlens_k, seed;
  std::optional<int64_t> left, right;
  bool top_left;
  double scale, softcap, dropout_p;
  int64_t max_seqlen_q, max_seqlen_k;
};

// Everything that a call builds before it knows how much workspace it needs.
struct Lists {
  std::vector<Sequence> sequences;
  std::vector<int32_t> keys;  // keys and counts of each sequence
};

// Keys hidden at the end are as good as absent; other hidden ones need a list.
static void hide_keys(Sequence& s, const Tensor& key_mask, int32_t* list) {
  int64_t stride = key_mask.stride(1);
  const char* seen = (const char*)key_mask.data_ptr() + s.b * key_mask.stride(0);
  while (s.N && !seen[(s.N - 1) * stride]) s.N--;
  int32_t *count = list + s.N, n = 0;
  for (int64_t j = 0; j < s.N; j++) {
    count[j] = n, list[n] = int32_t(j);  // overwritten by the next key if this one is hidden
    n += seen[j * stride] != 0;
  }
  count[s.N] = n;
  if (n < s.N) s.keys = list, s.count = count;
}

static int64_t at(const Maybe& t, int64_t i) { return ((const int32_t*)t->data_ptr())[i * t->stride(0)]; }

// As check_lengths() of attention/_options.py; of std::invalid_argument PyTorch makes a ValueError.
static void check_packed(const std::string& name, const Maybe& cu, int64_t length, int64_t most) {
  const int64_t last = cu->size(0) - 1;
  bool rises = at(cu, 0) == 0 && at(cu, last) == length;
  int64_t longest = 0;
  for (int64_t b = 0; b < last; b++) {
    const int64_t n = at(cu, b + 1) - at(cu, b);
    rises = rises && n >= 0, longest = std::max(longest, n);
  }
  if (!rises) {
    std::string all = std::to_string(at(cu, 0));
    for (int64_t b = 1; b <= last; b++) all += ", " + std::to_string(at(cu, b));
    throw std::invalid_argument("cu_seqlens_" + name + " must rise from 0 to " + std::to_string(length) + ", the length of " + name +
                                ", got [" + all + "]");
  }
  if (longest > most)
    throw std::invalid_argument("max_seqlen_" + name + " is " + std::to_string(most) + ", but cu_seqlens_" + name +
                                " holds a sequence of " + std::to_string(longest));
}
static void check_lens(const Maybe& kv_lens, int64_t N) {
  for (int64_t b = 0; b < kv_lens->size(0); b++)
    if (at(kv_lens, b) < 0 || at(kv_lens, b) > N)
      throw std::invalid_argument("kv_lens must be 0 to N=" + std::to_string(N) + ", got " + std::to_string(at(kv_lens, b)));
}

static void list_sequences(Attention& a, Lists& lists, const Options& x) {
  if (x.kv_lens) check_lens(x.kv_lens, a.N);
  if (x.cu_seqlens_q) check_packed("q", x.cu_seqlens_q, a.M, x.max_seqlen_q), check_packed("k", x.cu_seqlens_k, a.N, x.max_seqlen_k);
  int64_t count = x.cu_seqlens_q ? x.cu_seqlens_q->size(0) - 1 : a.B;
  lists.sequences.resize(count);
  if (x.key_mask) lists.keys.resize(a.B * (2 * a.N + 1));
  for (int64_t b = 0; b < count; b++) {
    Sequence& s = lists.sequences[b];
    if (x.cu_seqlens_q) {
      const int64_t q0 = at(x.cu_seqlens_q, b), k0 = at(x.cu_seqlens_k, b), N = at(x.cu_seqlens_k, b + 1) - k0;
      s = {0, q0, k0, at(x.cu_seqlens_q, b + 1) - q0, N, N};
    } else {
      s = {b, 0, 0, a.M, x.kv_lens ? at(x.kv_lens, b) : a.N, a.N};
    }
    s.off = x.top_left ? 0 : s.N - s.M;
    if (x.key_mask) hide_keys(s, *x.key_mask, lists.keys.data() + b * (2 * a.N + 1));
  }
  a.sequences = lists.sequences.data(), a.count = count;
}

static Attention arguments(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o, const Tensor& lse, const Options& x) {
  Attention a;
  a.q = view(q), a.k = view(k), a.v = view(v), a.o = view(o), a.lse = (char*)lse.data_ptr();
  a.B = q.size(0), a.H = q.size(1), a.M = q.size(2), a.D = q.size(3);
  a.Hkv = k.size(1), a.N = k.size(2), a.Dv = v.size(3), a.group = a.Hkv ? a.H / a.Hkv : 1;
  a.dtype = dtype_of(q);
  a.bias = broadcast(x.bias), a.mask = broadcast(x.mask);
  if (x.bias) a.bias_dtype = dtype_of(*x.bias);
  if (x.sinks) a.sinks = (const char*)x.sinks->data_ptr();
  if (x.seed) a.seed = *(const uint64_t*)x.seed->data_ptr();
  constexpr int64_t unbounded = int64_t(1) << 60;
  a.left = x.left.value_or(unbounded), a.right = x.right.value_or(unbounded);
  a.scale = x.scale, a.softcap = x.softcap, a.dropout_p = x.dropout_p;
  a.yield = std::this_thread::yield;
  return a;
}

static int64_t blocks_of(int64_t n, int64_t block) { return (n + block - 1) / block; }
// Below that, waking a thread takes longer than the work.
static int64_t most_threads(const Attention& a) { return a.flops < 1e6 ? 1 : INT64_MAX; }
static int64_t forward_blocks(const Attention& a, const Sequence& s, const AttentionKernels& kernels) {
  return blocks_of(s.M * (a.fold ? a.group : 1), kernels.queries);
}

constexpr double worth_a_task = 1e5;       // operations
constexpr int64_t most_local = 8 << 20;    // bytes: each thread keeps them
constexpr int64_t most_ahead = 768 << 10;  // bytes

// Where the packed operands of each of these sequences lie: beside each other, or, where a task has a workspace of its own, in the same
// place.
static void place(Attention& a, Lists& lists, const std::vector<int32_t>& order, const AttentionKernels& kernels, bool local) {
  a.local = local, a.slots = a.q_slots = a.all_turns = a.blocks = 0;
  for (int32_t i : order) {
    Sequence& s = lists.sequences[i];
    int64_t slots = blocks_of(s.N, PACKED_KEYS) * PACKED_KEYS, q_slots = blocks_of(s.M, PACKED_QUERIES) * PACKED_QUERIES;
    s.blocks = a.blocks, a.blocks += forward_blocks(a, s, kernels);
    if (local) {
      s.slots = s.q_slots = 0, a.slots = std::max(a.slots, slots), a.q_slots = std::max(a.q_slots, q_slots);
    } else {
      s.slots = a.slots, s.q_slots = a.q_slots, s.turns = a.all_turns;
      a.slots += slots, a.q_slots += q_slots;
      if (kernels.pack_queries) a.all_turns += a.H * blocks_of(s.M, kernels.queries);
    }
  }
  kernels.plan(a);
}

// Whether whole key heads are as well shared out among the threads as blocks are. They are faster: their operands stay in a core's cache.
static bool worth_local(const Attention& a, const std::vector<int32_t>& order) {
  if (a.every_b || a.every_h || a.stream || a.splits > 1 || a.work_bytes > most_local) return false;
  double largest = 1, all = 0, threads = double(torch::stable::get_num_threads());
  for (int32_t i : order) {
    double size = double(a.sequences[i].M) * double(a.sequences[i].N);
    largest = std::max(largest, size), all += size * double(a.Hkv);
  }
  double rounds = all / largest / threads;  // of tasks as large as the largest
  return rounds >= 4 && std::ceil(rounds) <= 1.1 * rounds;
}

// Lists of sequences that are run one after the other. Where they are packed, the short ones are by themselves: beside long ones, whose
// heads are not taken whole, the packed keys of each would be padded to a panel.
static std::vector<std::vector<int32_t>> parts_of(const Attention& a, bool in_turn, bool packed) {
  std::vector<std::vector<int32_t>> parts(in_turn ? a.count : 2);
  for (int32_t i = 0; i < a.count; i++) {
    const Sequence& s = a.sequences[i];
    parts[in_turn ? i : packed && s.M <= SHORT && s.N <= SHORT].push_back(i);
  }
  return parts;
}

// The rows that a key head is made from; none if they would push the operands of another one out of the cache.
static Ahead reads(const Attention& a, const Sequence& s, int64_t kv_head, bool backward) {
  const int64_t size = bytes_of(a.dtype);
  Ahead ahead;
  int64_t bytes = 0;
  const auto add = [&](const View& x, int64_t h, int64_t row0, int64_t rows, int64_t d) {
    if (x.d != 1 || rows == 0) return;
    ahead.parts[ahead.count++] = {x.data + (s.b * x.b + h * x.h + row0 * x.row) * size, x.row * size, d * size, rows};
    bytes += rows * d * size;
  };
  const int64_t h = kv_head * a.group;
  add(a.k, kv_head, s.k0, s.N, a.D), add(a.v, kv_head, s.k0, s.N, a.Dv), add(a.q, h, s.q0, s.M, a.D);
  if (backward) add(a.dout, h, s.q0, s.M, a.Dv), add(a.o, h, s.q0, s.M, a.Dv);
  if (bytes > most_ahead) ahead.count = 0;
  return ahead;
}

// Each step for one key head after the other, in workspace of the thread's own.
static void run_heads(const Attention& a, const std::vector<int32_t>& order, const AttentionKernels& kernels, bool backward) {
  const int32_t group = int32_t(a.group);
  const int64_t pairs = int64_t(order.size()) * a.Hkv, many = 1 + int64_t(worth_a_task * double(pairs) / (a.flops + 1));
  const int64_t scratch_bytes = blocks_of(a.scratch_bytes, 64) * 64,
                threads = std::min<int64_t>(torch::stable::get_num_threads(), most_threads(a));
  const auto run = [&](int64_t task, char* scratch) {
    Attention one = a;
    one.work = scratch + scratch_bytes;
    Ahead ahead;
    if (const int64_t next = task + threads; many == 1 && next < pairs)
      ahead = reads(a, a.sequences[order[next / a.Hkv]], next % a.Hkv, backward), one.ahead = &ahead;
    for (int64_t pair = task * many; pair < std::min((task + 1) * many, pairs); pair++) {
      const int32_t i = order[pair / a.Hkv], head = int32_t(pair % a.Hkv);
      const Sequence& s = a.sequences[i];
      const auto each = [&](AttentionStep step, int64_t blocks, int32_t heads) {
        for (int32_t h = head * heads; h < (head + 1) * heads; h++)
          for (int32_t block = 0; block < blocks; block++) step(one, {i, h, block}, scratch);
      };
      if (kernels.pack_keys) each(kernels.pack_keys, blocks_of(s.rows, PACKED_KEYS), 1);
      if (kernels.pack_queries) each(kernels.pack_queries, blocks_of(s.M, kernels.queries), group);
      if (backward)
        each(kernels.run, kernels.pack_keys ? blocks_of(s.N, kernels.keys) : 1, 1);
      else
        each(kernels.run, forward_blocks(a, s, kernels), a.fold ? 1 : group);
    }
  };
  run_tasks(blocks_of(pairs, many), scratch_bytes + a.work_bytes, run, most_threads(a));
}

// Each step for all heads before the next. A step's blocks go by as many heads as there are threads at a time, whose operands then stay in
// the cache; forward, blocks that take longest come first; backward, the blocks of a head in ascending order, as their turns need.
static void run_blocks(Attention& a, const std::vector<int32_t>& order, const AttentionKernels& kernels, bool backward) {
  const int64_t at_once = torch::stable::get_num_threads();
  const auto list = [&](int64_t heads, auto blocks) {
    std::vector<Item> items;
    const int64_t pairs = int64_t(order.size()) * heads;
    for (int64_t pair0 = 0; pair0 < pairs; pair0 += at_once) {
      const int64_t end = std::min(pair0 + at_once, pairs);
      int64_t most = 0;
      for (int64_t pair = pair0; pair < end; pair++) most = std::max(most, blocks(a.sequences[order[pair / heads]]));
      for (int64_t n = 0; n < most; n++)
        for (int64_t pair = pair0; pair < end; pair++) {
          const int32_t i = order[pair / heads];
          const int64_t many = blocks(a.sequences[i]), block = backward ? n : many - 1 - n;
          if (n < many) items.push_back({i, int32_t(pair % heads), int32_t(block)});
        }
    }
    return items;
  };
  Workspace work(a.work_bytes);
  a.work = work.get();
  std::memset(a.work + a.turn, 0, a.all_turns * sizeof(int64_t));
  const auto phase = [&](const std::vector<Item>& items, AttentionStep step) {
    const auto run = [&](int64_t task, char* scratch) { step(a, items[task], scratch); };
    if (!items.empty()) run_tasks(int64_t(items.size()), a.scratch_bytes, run, most_threads(a));
  };
  if (!a.stream) phase(list(a.Hkv, [](const Sequence& s) { return blocks_of(s.rows, PACKED_KEYS); }), kernels.pack_keys);
  if (backward) {
    phase(list(a.H, [&](const Sequence& s) { return blocks_of(s.M, kernels.queries); }), kernels.pack_queries);
    const auto blocks = [&](const Sequence& s) { return blocks_of(s.N, kernels.keys); };
    if (!a.every_b) return phase(list(a.every_h ? 1 : a.Hkv, blocks), kernels.run);
    std::vector<Item> items;
    for (int32_t n = 0; n < blocks_of(a.most_keys, kernels.keys); n++)
      for (int32_t h = 0; h < (a.every_h ? 1 : a.Hkv); h++) items.push_back({0, h, n});
    return phase(items, kernels.run);
  }
  const std::vector<Item> blocks = list(a.fold ? a.Hkv : a.H, [&](const Sequence& s) { return forward_blocks(a, s, kernels); });
  std::vector<Item> splits;
  for (Item item : blocks)
    for (item.split = 0; item.split < a.splits; item.split++) splits.push_back(item);
  phase(splits, kernels.run);
  if (a.splits > 1) phase(blocks, kernels.merge);
}

static void run_part(Attention& a, Lists& lists, std::vector<int32_t> order, bool backward) {
  double scores = 0;
  a.longest = a.most_keys = 0;
  for (int32_t i : order) {
    const Sequence& s = a.sequences[i];
    a.longest = std::max(a.longest, s.M), a.most_keys = std::max(a.most_keys, s.N), scores += double(s.M) * double(s.N);
  }
  a.flops = 2.0 * a.H * scores * (a.D + a.Dv) * (backward ? 2.5 : 1);
  const auto size = [&](int32_t i) { return a.sequences[i].M * a.sequences[i].N; };  // those that take longest first
  if (a.most_keys > SHORT) std::stable_sort(order.begin(), order.end(), [&](int32_t i, int32_t j) { return size(i) > size(j); });
  const AttentionRoads& roads = roads_for(a.dtype);
  const bool short_backward = backward && roads.takes_short(a);
  const AttentionKernels& kernels = !backward ? roads.forward : short_backward ? roads.short_backward : roads.backward;
  a.fold = !backward && a.H > a.Hkv && a.longest * a.group <= kernels.queries;
  const bool short_heads = a.most_keys <= SHORT && a.longest <= SHORT && (a.fold || a.group == 1) && !a.every_b && !a.every_h;
  place(a, lists, order, kernels, true);
  if (short_backward || (short_heads && !a.stream) || worth_local(a, order)) return run_heads(a, order, kernels, backward);
  place(a, lists, order, kernels, false);
  run_blocks(a, order, kernels, backward);
}

static void run(Attention& a, const Options& x, bool backward) {
  Lists lists;
  list_sequences(a, lists, x);
  // packed keys lie elsewhere in each entry of the batch, so its blocks are other columns of dbias
  const bool in_turn = a.every_b && std::any_of(lists.sequences.begin(), lists.sequences.end(), [](const Sequence& s) { return s.keys; });
  if (in_turn) a.every_b = false;
  for (const std::vector<int32_t>& part : parts_of(a, in_turn, bool(x.cu_seqlens_q)))
    if (!part.empty()) run_part(a, lists, part, backward);
}

// As like() and lse_like() of attention/_options.py.
static Tensor empty_like_q(const Tensor& q, int64_t Dv) {
  if (Dv == q.size(3)) return fresh_like(q, q.scalar_type());
  if (q.stride(1) < q.stride(2)) return torch::stable::transpose(fresh({q.size(0), q.size(2), q.size(1), Dv}, q.scalar_type()), 1, 2);
  return fresh({q.size(0), q.size(1), q.size(2), Dv}, q.scalar_type());
}
static Tensor empty_lse(const Tensor& q) {
  using torch::headeronly::ScalarType;
  return fresh({q.size(0), q.size(1), q.size(2)}, q.element_size() >= 4 ? ScalarType::Double : ScalarType::Float);
}

static std::tuple<Tensor, Tensor> attention_fwd(Tensor q, Tensor k, Tensor v, Maybe bias, Maybe sinks, Maybe key_mask, Maybe kv_lens,
                                                Maybe mask, Maybe cu_seqlens_q, Maybe cu_seqlens_k, Maybe seed, std::optional<int64_t> left,
                                                std::optional<int64_t> right, bool top_left, double scale, double softcap, double dropout_p,
                                                int64_t max_seqlen_q, int64_t max_seqlen_k) {
  Options x{bias, sinks, key_mask, kv_lens, mask,    cu_seqlens_q, cu_seqlens_k, seed,
            left, right, top_left, scale,   softcap, dropout_p,    max_seqlen_q, max_seqlen_k};
  Tensor o = empty_like_q(q, v.size(3)), lse = empty_lse(q);
  Attention a = arguments(q, k, v, o, lse, x);
  advise_huge_pages(a.o.data, o.numel() * o.element_size());
  run(a, x, false);
  return {o, lse};
}

// As grads_like() of attention/_options.py; what nobody wants has no elements.
static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_bwd(Tensor dout, Maybe dlse, Tensor q, Tensor k, Tensor v, Tensor o,
                                                                        Tensor lse, Maybe bias, Maybe sinks, Maybe key_mask, Maybe kv_lens,
                                                                        Maybe mask, Maybe cu_seqlens_q, Maybe cu_seqlens_k, Maybe seed,
                                                                        std::optional<int64_t> left, std::optional<int64_t> right,
                                                                        bool top_left, double scale, double softcap, double dropout_p,
                                                                        int64_t max_seqlen_q, int64_t max_seqlen_k, bool bias_grad) {
  Options x{bias, sinks, key_mask, kv_lens, mask,    cu_seqlens_q, cu_seqlens_k, seed,
            left, right, top_left, scale,   softcap, dropout_p,    max_seqlen_q, max_seqlen_k};
  if (!lse.is_contiguous()) lse = torch::stable::contiguous(lse);  // what autograd saved, a hook may have laid out anew
  Attention a = arguments(q, k, v, o, lse, x);
  const auto like = [](const Tensor& x) { return fresh_like(x, x.scalar_type()); };
  const auto nothing = [&] { return fresh({0}, q.scalar_type()); };
  Tensor dq = like(q), dk = like(k), dv = like(v), dsinks = sinks ? like(*sinks) : nothing();
  a.dout = view(dout), a.dq = view(dq), a.dk = view(dk), a.dv = view(dv);
  if (dlse) dlse = torch::stable::contiguous(*dlse), a.dlse = (const char*)dlse->data_ptr();
  Maybe sums;
  if (bias_grad) {  // where all keys share it, a sum for each query: the kernel's tasks are blocks of keys
    const bool a_query = bias->size(3) == 1;
    const auto size = [&](int64_t dim, int64_t all) { return a_query ? all : bias->size(dim); };
    const bool long_sums = !a_query && bias->size(2) == 1;
    sums = torch::stable::new_zeros(*bias, {size(0, a.B), size(1, a.H), size(2, a.M), bias->size(3)},
                                    long_sums ? torch::headeronly::ScalarType::Double : wide_dtype(q));
    a.dbias = broadcast(sums), a.every_b = sums->size(0) == 1 && a.B > 1, a.every_h = sums->size(1) == 1 && a.Hkv > 1;
  }
  for (const Tensor* t : {&dq, &dk, &dv}) advise_huge_pages(t->data_ptr(), t->numel() * t->element_size());
  run(a, x, true);
  Tensor dbias = nothing();
  if (bias_grad) {
    std::vector<int64_t> shared;
    for (int64_t dim = 0; dim < 4; dim++)
      if (bias->size(dim) != sums->size(dim)) shared.push_back(dim);
    dbias = fresh(bias->sizes(), bias->scalar_type());
    torch::stable::copy_(dbias, shared.empty() ? *sums : torch::stable::sum(*sums, shared, true));
  }
  if (sinks) {
    a.dsinks = (char*)dsinks.data_ptr();
    const AttentionStep step = roads_for(a.dtype).sinks_grad;
    run_tasks(a.H, 0, [&](int64_t h, char*) { step(a, {0, int32_t(h), 0}, nullptr); }, most_threads(a));
  }
  return {dq, dk, dv, dbias, dsinks};
}

}  // namespace minkernels

STABLE_TORCH_LIBRARY_IMPL(minkernels, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&minkernels::attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&minkernels::attention_bwd));
}
