// BCE and focal loss.

template <class A>
static int64_t count_task(const Pointwise& a, int64_t task) {
  Buffer<A> buffer;
  int64_t found = 0, end = (task + 1) * TASK < a.walk.elements ? (task + 1) * TASK : a.walk.elements;
  for (int64_t first = task * TASK; first < end; first += BLOCK) {
    int64_t n = end - first < BLOCK ? end - first : BLOCK;
    const A* mask = read_block(a.walk, a.mask, 0, first, n, buffer.at, A(0));
    vec<A> sum = {};
    for (int64_t i = 0; i < n; i += vector<A>::lanes) sum += load(mask + i);
    found += int64_t(lanes_sum(sum));
  }
  return found;
}

// GAMMA 3 is any other.
template <class A, int GAMMA>
static void pointwise_task(const Pointwise& a, int64_t task) {
  constexpr int L = vector<A>::lanes;
  Buffer<A> x_buffer, t_buffer, weight_buffer, pos_weight_buffer, mask_buffer, dloss_buffer, loss_buffer, grad_buffer;
  const bool focal = a.alpha >= 0, only_sum = !GAMMA && !focal && !a.loss.data && !a.weight.data && !a.pos_weight.data;
  const vec<A> one = splat(A(1)), gamma = splat(A(a.gamma)), factor = splat(A(a.factor));
  const vec<A> alpha = splat(A(a.alpha)), beta = splat(A(1 - a.alpha));
  double sum = 0;
  bool bad = false;
  int64_t end = (task + 1) * TASK < a.walk.elements ? (task + 1) * TASK : a.walk.elements;
  for (int64_t first = task * TASK; first < end; first += BLOCK) {
    int64_t n = end - first < BLOCK ? end - first : BLOCK;
    const auto read = [&](const Operand& o, Buffer<A>& buffer, A rest) {
      return o.data ? read_block(a.walk, o, 0, first, n, buffer.at, rest) : nullptr;
    };
    const A *x = read(a.x, x_buffer, padding<A>), *t = read(a.t, t_buffer, A(0)), *weight = read(a.weight, weight_buffer, A(0));
    const A *pos_weight = read(a.pos_weight, pos_weight_buffer, A(0)), *mask = read(a.mask, mask_buffer, A(0));
    const A* dloss = read(a.dloss, dloss_buffer, A(0));
    if (a.bad && a.t.is_integer()) bad = bad || out_of_range(t, mask, n, A(2));
    A* loss_out = a.loss.data ? in_place<A>(a.walk, a.loss, 0, first, n) : nullptr;
    A* grad_out = a.grad.data ? in_place<A>(a.walk, a.grad, 0, first, n) : nullptr;
    A* losses = loss_out ? loss_out : a.loss.data ? loss_buffer.at : nullptr;
    A* grads = grad_out ? grad_out : a.grad.data ? grad_buffer.at : nullptr;
    Sum<A> total;
    LogSum<A> logs;
    for (int64_t i = 0; i < n;) {
      for (int64_t stop = i + PART * L; i < stop && i < n; i += L) {
        vec<A> tv = load(t + i), loss, of_log, d;
        Sigmoid<A> s = sigmoid<A>(load(x + i));
        if (pos_weight)
          bce<A, true>(s, tv, load(pos_weight + i), loss, of_log, d);
        else
          bce<A, false>(s, tv, tv, loss, of_log, d);
        if (only_sum)
          logs.add(counts(mask, i) ? s.e : vec<A>{});
        else
          loss += of_log * log1p(s.e);
        if (GAMMA) {
          // 1 - p_t = p (1 - t) + (1 - p) t, where p_t itself would round to 1
          vec<A> u = one - tv, miss = s.p * u + s.q * tv, slope = s.p * s.q * (u - tv);
          if (GAMMA == 1)
            d = slope * loss + miss * d, loss = miss * loss;
          else if (GAMMA == 2)
            d = miss * (slope * loss * splat(A(2)) + miss * d), loss = miss * miss * loss;
          else {
            vec<A> by = power<A>(miss, A(a.gamma));
            d = by * (gamma * (miss > vec<A>{} ? slope / miss : vec<A>{}) * loss + d), loss = by * loss;
          }
        }
        if (focal) {
          vec<A> balance = alpha * tv + beta * (one - tv);
          loss *= balance, d *= balance;
        }
        if (weight) {
          vec<A> w = load(weight + i);
          loss *= w, d *= w;
        }
        if (grads) d = d * (dloss ? load(dloss + i) * factor : factor);
        if (mask) {
          vec<lane_t<A>> keep = counts(mask, i);
          loss = keep ? loss : vec<A>{}, d = keep ? d : vec<A>{};
        }
        total.add(loss);
        if (losses) store(losses + i, loss);
        if (grads) store(grads + i, d);
      }
      total.next_part();
      if (only_sum) logs.next_part();
    }
    sum += total.total() + logs.total();
    if (losses && !loss_out) write_block(a.walk, a.loss, 0, first, n, losses);
    if (grads && !grad_out) write_block(a.walk, a.grad, 0, first, n, grads);
  }
  if (a.sums) a.sums[task] = sum;
  if (a.bad) a.bad[task] = bad;
}
