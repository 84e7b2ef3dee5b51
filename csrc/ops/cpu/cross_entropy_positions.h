// Many rows at a time, positions in the lanes: for (B, V, D) logits whose positions lie side by side and whose classes do not, and for
// short rows, whose classes do, and which are turned on their way in and out. A tile of positions is read class by class; what a row has
// one of, each position has here.

template <class A>
struct Tile {
  static constexpr int L = vector<A>::lanes;
  int64_t stride, lanes;                                     // of a class in z, e and c; positions, up to whole registers
  A *z, *c, *m, *d, *T, *rel, *U, *before, *P, *H, *S, *on;  // z and c: a block of classes; the others a value a position; on: 0 if ignored
  int64_t* label;
  bool some_ignored = false;

  Tile(const Softmax& a, int64_t n, char* memory) : stride(a.tile + PAD), lanes((n + L - 1) / L * L) {
    label = (int64_t*)memory;
    A* next = (A*)(label + stride);
    for (A** x : {&m, &d, &T, &rel, &U, &before, &P, &H, &S, &on}) *x = next, next += stride;
    z = next, c = next + a.class_block * stride;
  }
};

// Short rows into lanes and back: classes of n rows.
template <class T, class A>
static void turn_in(const T* from, int64_t row, int64_t n, int64_t classes, A* to, int64_t stride) {
  constexpr int L = vector<A>::lanes;
  for (int64_t i = 0; i < n; i += L) {
    int64_t rows = min(L, n - i);
    if constexpr (sizeof(T) == sizeof(A)) {
      transpose((const A*)from + i * row, row, rows, classes, to + i, stride);
    } else {
      A wide[L * SHORT];
      for (int64_t u = 0; u < rows; u++) widen_row(wide + u * SHORT, from + (i + u) * row, 1, classes);
      transpose(wide, SHORT, rows, classes, to + i, stride);
    }
  }
}
template <class T, class A>
static void turn_out(const A* from, int64_t stride, int64_t n, int64_t classes, T* to, int64_t row) {
  constexpr int L = vector<A>::lanes;
  for (int64_t i = 0; i < n; i += L) {
    int64_t rows = min(L, n - i);
    if constexpr (sizeof(T) == sizeof(A)) {
      transpose(from + i, stride, classes, rows, (A*)to + i * row, row);
    } else {
      A wide[L * SHORT];
      transpose(from + i, stride, classes, rows, wide, SHORT);
      for (int64_t u = 0; u < rows; u++) narrow_row(to + (i + u) * row, 1, wide + u * SHORT, classes, A(1));
    }
  }
}

template <class T>
static void read_classes(const Softmax& a, const Tile<acc_t<T>>& x, const T* from, int64_t j, int64_t classes, int64_t n, acc_t<T>* z) {
  using A = acc_t<T>;
  if (a.turned) turn_in(from + j, a.logits.position, n, classes, z, x.stride);
  for (int64_t k = 0; k < classes; k++) {
    A* to = z + k * x.stride;
    if (!a.turned) widen_row(to, from + (j + k) * a.logits.column, a.logits.position, n);
    for (int64_t i = n; i < x.lanes; i++) to[i] = 0;
    transform(a, to, n);
    if (x.some_ignored)  // they may hold NaN
      for (int64_t i = 0; i < n; i++) to[i] = x.label[i] == a.ignore_index ? 0 : to[i];
  }
}

template <class A>
static void read_weights(const Softmax& a, const Tile<A>& x, int64_t b, int64_t first, int64_t j, int64_t classes, int64_t n) {
  const A* weight = (const A*)a.weight;
  for (int64_t k = 0; k < classes; k++) {
    A *to = x.c + k * x.stride, w = weight ? weight[j + k] : 1;
    if (a.probs.data) {
      read_probs(a, b * a.probs.batch + (j + k) * a.probs.column + first * a.probs.position, a.probs.position, n, to);
      for (int64_t i = 0; i < n; i++) to[i] *= w;
    } else {
      for (int64_t i = 0; i < x.lanes; i++) to[i] = w;
    }
  }
}

// Adds a block of classes to the statistics, and leaves exp(z - shift) in z. next: what is read after it, as far as one can tell.
template <class T>
static void add_classes(const Softmax& a, const Tile<acc_t<T>>& x, int64_t classes, const T* next) {
  using A = acc_t<T>;
  constexpr int L = Tile<A>::L;
  const vec<A> none = splat(A(-__builtin_inf()));
  const bool weighed = weighs_all(a);
  for (int64_t i = 0; i < x.lanes; i += L) {
    vec<A> m = load(x.m + i), top = m, sum = {};
    for (int64_t k = 0; k < classes; k++) top = max(load(x.z + k * x.stride + i), top);
    vec<A> shift = top > none ? top : vec<A>{};
    vec<A> total = load(x.T + i), U = load(x.U + i) + total * (shift - load(x.before + i));
    for (int64_t first = 0; first < classes; first += 16) {  // sums of sums: an error of 16 + 16 roundings for 256 classes
      int64_t end = min(first + 16, classes);
      vec<A> part = {}, total_part = {}, U_part = {};
      for (int64_t k = first; weighed && k < end; k++) {
        vec<A> c = load(x.c + k * x.stride + i);
        U_part += c * (shift - load(x.z + k * x.stride + i)), total_part += c;
      }
      for (int64_t k = first; k < end; k++) {
        vec<A> e = exp_of<A>(load(x.z + k * x.stride + i) - shift);
        if (i * sizeof(T) % 64 == 0) __builtin_prefetch(next + k * a.logits.column + i);
        store(x.z + k * x.stride + i, e), part += e;
      }
      sum += part, total += total_part, U += U_part;
    }
    store(x.T + i, total), store(x.U + i, U);
    store(x.d + i, load(x.d + i) * exp_of<A>(m - shift) + sum), store(x.m + i, top), store(x.before + i, shift);
  }
}

// The gradient of a block of classes from exp(z - m) in z; with a softcap the logits are read once more.
template <class T>
static void write_grad(const Softmax& a, const Tile<acc_t<T>>& x, const T* from, T* grad, int64_t j, int64_t classes, int64_t n) {
  using A = acc_t<T>;
  constexpr int L = Tile<A>::L;
  grad += j * a.grad.column;
  bool weighed = a.coefficients || weighs_all(a);
  A* to = x.z;
  int64_t stride = x.stride, lanes = x.lanes;
  if constexpr (sizeof(T) == sizeof(A))
    if (a.softcap <= 0 && a.grad.position == 1) to = (A*)grad, stride = a.grad.column, lanes = n / L * L;  // where it belongs at once
  for (int64_t k = 0; k < classes; k++) {
    const A *z = x.z + k * x.stride, *c = x.c + k * x.stride;
    A* row = to + k * stride;
    for (int64_t i = 0; i < lanes; i += L) {
      vec<A> g = load(z + i) * load(x.P + i);
      if (weighed) g -= load(x.S + i) * load(c + i);
      store(row + i, g * A(a.scale));
    }
    for (int64_t i = lanes; i < n; i++) row[i] = (z[i] * x.P[i] - (weighed ? x.S[i] * c[i] : 0)) * A(a.scale);
  }
  for (int64_t i = 0; i < n && a.target; i++)
    if (x.label[i] >= j && x.label[i] < j + classes) to[(x.label[i] - j) * stride + i] -= x.H[i] * A(a.scale);
  if (to != x.z) return;
  if (a.softcap > 0) {
    read_classes(a, x, from, j, classes, n, x.c);
    for (int64_t k = 0; k < classes; k++)
      for (int64_t i = k * x.stride; i < k * x.stride + x.lanes; i += L) store(x.z + i, load(x.z + i) * slope<A>(a, load(x.c + i)));
  }
  if (a.turned) return turn_out(x.z, x.stride, n, classes, grad, a.grad.position);
  for (int64_t k = 0; k < classes; k++) narrow_row(grad + k * a.grad.column, a.grad.position, x.z + k * x.stride, n, A(1));
}

// The loss of each position, and its coefficients, from the statistics.
template <class A>
static double finish_positions(const Softmax& a, Tile<A>& x, int64_t row, int64_t n) {
  constexpr int L = Tile<A>::L;
  double sum = 0;
  A smooth = A(a.smoothing / double(a.V)), sure = A(1 - a.smoothing);
  for (int64_t i = 0; i < x.lanes; i += L) {
    vec<A> on = load(x.on + i), w = on, log_d = log(load(x.d + i));
    for (int u = 0; u < L && a.weight && a.target; u++)
      if (i + u < n && on[u] > 0) w[u] = ((const A*)a.weight)[x.label[i + u]];
    vec<A> sure_w = a.probs.data ? vec<A>{} : w * sure, S = on * (a.probs.data ? A(1) : smooth), T = load(x.T + i);
    vec<A> loss = sure_w * (log_d + load(x.rel + i)), total = sure_w, lse = load(x.m + i) + log_d;
    if (weighs_all(a)) loss += S * (T * log_d + load(x.U + i)), total += S * T;
    if (a.z_loss != 0) loss += A(a.z_loss) * w * lse * lse, total += A(2 * a.z_loss) * w * lse;
    loss = on > 0 ? loss : vec<A>{};
    const auto of_those = [&](vec<A> v) { return on > 0 ? v * A(a.factor) : vec<A>{}; };  // it is inf where nothing counts
    store(x.P + i, of_those(total / load(x.d + i))), store(x.H + i, of_those(sure_w)), store(x.S + i, of_those(S));
    store(x.U + i, loss);
  }
  double parts[L] = {};
  for (int64_t i = n; i < x.lanes; i++) x.U[i] = 0;
  for (int64_t i = 0; i < x.lanes; i += L)
    for (int u = 0; u < L; u++) parts[u] += x.U[i + u];
  for (int u = 0; u < L; u++) sum += parts[u];
  for (int64_t i = 0; i < n && a.loss; i++) ((A*)a.loss)[row + i] = x.U[i];
  A* stats = (A*)a.stats + row * a.stats_columns;
  if (a.stats_columns == 2) {  // vector code
    for (int64_t i = 0; i < n; i++) stats[2 * i] = x.m[i], stats[2 * i + 1] = x.d[i];
    return sum;
  }
  for (int64_t i = 0; i < n; i++) stats[3 * i] = x.m[i], stats[3 * i + 1] = x.d[i], stats[3 * i + 2] = x.T[i];
  return sum;
}

template <class A>
static void read_labels(const Softmax& a, int64_t b, int64_t first, int64_t n, Tile<A>& x) {
  int64_t at = b * a.target_batch + first * a.target_position, step = a.target_position;
  const auto read = [&](const auto* labels) {
    if (step == 1)
      for (int64_t i = 0; i < n; i++) x.label[i] = labels[at + i];
    else
      for (int64_t i = 0; i < n; i++) x.label[i] = labels[at + i * step];
  };
  if (!a.target)
    for (int64_t i = 0; i < n; i++) x.label[i] = -1;
  else if (a.label_bytes == 8)
    read((const int64_t*)a.target);
  else if (a.label_bytes == 4)
    read((const int32_t*)a.target);
  else
    read((const uint8_t*)a.target);
  for (int64_t i = n; i < x.lanes; i++) x.label[i] = -1;
  int64_t ignored = 0;
  for (int64_t i = 0; i < x.lanes; i++) {
    bool off = a.target && x.label[i] == a.ignore_index;
    x.on[i] = off ? 0 : 1, ignored += off;
  }
  x.some_ignored = ignored > 0;
}

// K classes: z, and the largest so far.
template <int K, class T, class A>
INLINE void read_plain(const Tile<A>& x, const T* from, int64_t column, int64_t n, A* z) {
  constexpr int L = Tile<A>::L;
  const int64_t whole = n / L * L;
  for (int u = 0; u < K && n > whole; u++)
    for (int64_t i = whole; i < x.lanes; i++) z[u * x.stride + i] = i < n ? widen(from[u * column + i]) : A(0);
  for (int64_t i = 0; i < x.lanes; i += L) {
    vec<A> m = load(x.m + i);
#pragma GCC unroll 4
    for (int u = 0; u < K; u++) {
      A* to = z + u * x.stride + i;
      vec<A> v = i < whole ? load_wide(from + u * column + i) : load(to);
      store(to, v), m = max(v, m);
    }
    store(x.m + i, m);
  }
}

// exp(z - m) in the place of z, in K classes, added to d.
template <int K, class T, class A>
INLINE void exp_classes(const Tile<A>& x, A* z, const T* next, int64_t column) {
  for (int64_t i = 0; i < x.lanes; i += Tile<A>::L) {
    vec<A> m = load(x.m + i), sum = {};
#pragma GCC unroll 4
    for (int u = 0; u < K; u++) {
      vec<A> e = exp_of<A>(load(z + u * x.stride + i) - m);
      if (i * sizeof(T) % 64 == 0) __builtin_prefetch(next + u * column + i);
      store(z + u * x.stride + i, e), sum += e;
    }
    store(x.d + i, load(x.d + i) + sum);
  }
}

// The common case: labels, weights of classes at most, and few classes. Every pass runs along the positions of a class, as memory does.
template <class T>
static double plain_positions(const Softmax& a, int64_t b, int64_t first, int64_t n, Tile<acc_t<T>>& x, const T* logits, T* grad) {
  using A = acc_t<T>;
  constexpr int L = Tile<A>::L;
  const int64_t whole = n / L * L, from = a.logits.column, to = a.grad.column;
  const T* next = logits + a.tile;
  lane_t<A>* which = (lane_t<A>*)x.c;  // labels, -1 where there is none
  for (int64_t i = 0; i < x.lanes; i++) {
    x.m[i] = -__builtin_inf(), x.d[i] = 0;
    which[i] = lane_t<A>(x.on[i] > 0 ? x.label[i] : -1);
  }
  int64_t k = 0;
  for (; k + 4 <= a.V; k += 4) read_plain<4>(x, logits + k * from, from, n, x.z + k * x.stride);
  for (; k < a.V; k++) read_plain<1>(x, logits + k * from, from, n, x.z + k * x.stride);
  for (int64_t i = 0; i < n; i++) x.rel[i] = x.m[i] - x.z[(which[i] < 0 ? 0 : which[i]) * x.stride + i];
  for (int64_t i = 0; i < x.lanes; i += L) {
    vec<A> m = load(x.m + i);
    store(x.before + i, m), store(x.m + i, m > -__builtin_inf() ? m : vec<A>{});  // not inf - inf, as in row_stats
  }
  for (k = 0; k + 4 <= a.V; k += 4) exp_classes<4>(x, x.z + k * x.stride, next + k * from, from);
  for (; k < a.V; k++) exp_classes<1>(x, x.z + k * x.stride, next + k * from, from);
  for (int64_t i = 0; i < x.lanes; i += L) {
    vec<A> on = load(x.on + i);  // what is ignored may hold NaN
    store(x.m + i, on > 0 ? load(x.before + i) : vec<A>{}), store(x.d + i, on > 0 ? load(x.d + i) : splat(A(a.V)));
  }
  double sum = finish_positions(a, x, b * a.D + first, n);
  for (k = 0; k < a.V && grad; k++) {
    T* out = grad + k * to;
    const A* z = x.z + k * x.stride;
    const bool past = a.stream && uintptr_t(out) % 64 == 0;
    for (int64_t i = 0; i < x.lanes; i += L) {
      vec<lane_t<A>> label = load(which + i);
      vec<A> g = load(z + i) * load(x.P + i) - (label == lane_t<A>(k) ? load(x.H + i) : vec<A>{});
      if (x.some_ignored) g = label >= 0 ? g : vec<A>{};
      if (i < whole) {
        store_bits(out + i, narrowed(g, out), past);
      } else {
        T rest[L];
        store_bits(rest, narrowed(g, out), false);
        for (int64_t u = i; u < n; u++) out[u] = rest[u - i];
      }
    }
  }
#if LEVEL_BYTES >= 32
  if (a.stream) _mm_sfence();  // else other threads might not see yet what went around the cache
#endif
  return sum;
}

// All statistics of rows that are one block, the entropy and the largest class among them.
template <class T>
static void write_entropies(const Softmax& a, const Tile<acc_t<T>>& x, int64_t row, int64_t n) {
  using A = acc_t<T>;
  constexpr int L = Tile<A>::L;
  const vec<A> none = splat(A(-__builtin_inf())), cap = splat(A(2000));  // as in add_block
  for (int64_t i = 0; i < x.lanes; i += L) {
    vec<A> m = none, largest = {}, d = {}, E = {};
    for (int64_t k = 0; k < a.V; k++) {
      vec<A> z = load(x.z + k * x.stride + i);
      largest = z > m ? splat(A(k)) : largest, m = max(z, m);
    }
    vec<A> shift = m > none ? m : vec<A>{};
    for (int64_t first = 0; first < a.V; first += 16) {  // sums of sums, as in add_classes
      vec<A> part = {}, E_part = {};
      for (int64_t k = first; k < min(first + 16, a.V); k++) {
        vec<A> below = shift - load(x.z + k * x.stride + i), e = exp_of<A>(-below);
        part += e, E_part += e * (below > cap ? cap : below);
      }
      d += part, E += E_part;
    }
    store(x.m + i, m), store(x.d + i, d), store(x.U + i, E), store(x.T + i, largest);
  }
  for (int64_t i = 0; i < n; i++) {
    const int64_t label = x.label[i];
    Row<A> r;
    if (x.on[i] > 0) {
      r.m = x.m[i], r.d = x.d[i], r.E = x.U[i], r.argmax = int64_t(x.T[i]);
      if (label >= 0 && label < a.V) r.rel = r.m - x.z[label * x.stride + i];
    } else {
      r.m = 0, r.argmax = -1;
    }
    write_stats(a, row + i, r);
  }
}

template <class T>
static double all_positions(const Softmax& a, int64_t b, int64_t first, int64_t n, char* memory) {
  using A = acc_t<T>;
  Tile<A> x(a, n, memory);
  const T* logits = (const T*)a.logits.data + b * a.logits.batch + first * a.logits.position;
  T* grad = a.grad.data ? (T*)a.grad.data + b * a.grad.batch + first * a.grad.position : nullptr;
  int64_t row = b * a.D + first;
  read_labels(a, b, first, n, x);
  if (!a.turned && a.target && !a.coefficients && !weighs_all(a) && a.V <= 64 && a.softcap <= 0 && a.scale == 1 &&
      (!grad || a.grad.position == 1))
    return plain_positions(a, b, first, n, x, logits, grad);
  if (a.argmax) {
    read_classes(a, x, logits, 0, a.V, n, x.z);
    write_entropies<T>(a, x, row, n);
    return 0;
  }
  for (int64_t i = 0; i < x.lanes; i++) {
    x.m[i] = -__builtin_inf(), x.d[i] = x.T[i] = x.U[i] = x.rel[i] = x.before[i] = 0;
  }
  const auto label_z = [&](int64_t j, int64_t classes) {
    for (int64_t i = 0; i < n && a.target; i++)
      if (x.label[i] >= j && x.label[i] < j + classes) x.rel[i] = x.z[(x.label[i] - j) * x.stride + i];
  };
  double sum = 0;
  for (int64_t j = 0; j < a.V && !a.coefficients; j += a.class_block) {
    int64_t classes = min(a.class_block, a.V - j);
    read_classes(a, x, logits, j, classes, n, x.z);
    if (weighs_all(a)) read_weights(a, x, b, first, j, classes, n);
    label_z(j, classes);
    add_classes(a, x, classes, logits + (a.V > a.class_block ? (j + classes) * a.logits.column : a.tile * a.logits.position));
  }
  if (a.coefficients) {
    for (int64_t i = 0; i < n; i++) {
      const A* k = (const A*)a.coefficients + (row + i) * COEFFICIENTS;
      bool off = a.ignored(x.label[i]);
      x.m[i] = k[0], x.P[i] = 1, x.T[i] = off ? 0 : k[1], x.U[i] = off ? 0 : k[2], x.H[i] = off ? 0 : k[3], x.S[i] = off ? 0 : k[4];
    }
  } else {
    for (int64_t i = 0; i < n; i++) x.rel[i] = x.m[i] - x.rel[i];
    sum = finish_positions(a, x, row, n);
  }
  for (int64_t j = 0; j < a.V && grad; j += a.class_block) {
    int64_t classes = min(a.class_block, a.V - j);
    if (a.coefficients || a.V > a.class_block) {  // else the exponentials are still there
      read_classes(a, x, logits, j, classes, n, x.z);
      if (a.coefficients || weighs_all(a)) read_weights(a, x, b, first, j, classes, n);
      for (int64_t k = 0; k < classes; k++)
        for (int64_t i = 0; i < x.lanes; i += x.L) {
          vec<A> below = load(x.m + i) - load(x.z + k * x.stride + i), e = exp_of<A>(-below), cap = splat(A(2000));
          if (a.coefficients) e *= load(x.T + i) + load(x.U + i) * (below > cap ? cap : below);
          store(x.z + k * x.stride + i, e);
        }
    }
    write_grad(a, x, logits, grad, j, classes, n);
  }
  return sum;
}
