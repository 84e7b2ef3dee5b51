// Dice. A piece is visited channel by channel, since the hardware fetches ahead along one stream; what all channels share, a class map or
// a mask, is widened for the first of them and then lies in the L2 cache.

template <class A>
struct Shared {  // one block, or every block of the piece where the channels share them
  static constexpr int64_t room = BLOCK + vector<A>::lanes;
  alignas(64) A at[TASK / BLOCK * room];
  const A* blocks[TASK / BLOCK];

  const A* read(const Dice& a, const Operand& o, int64_t image, int64_t c, int64_t block, int64_t first, int64_t n, A rest) {
    if (c == 0 || o.channel)
      blocks[block] = read_block(a.walk, o, image * o.image + c * o.channel, first, n, at + (o.channel ? 0 : block * room), rest);
    return blocks[block];
  }
};

template <class A>
struct DiceBlock {
  Buffer<A> x, grad;
  Shared<A> t, mask;
};

template <class A, class F>
INLINE void each_dice_block(const Dice& a, int64_t piece, DiceBlock<A>& b, F f) {
  int64_t pieces = a.pieces_of_an_image(), image = piece / pieces, start = piece % pieces * TASK;
  int64_t end = start + TASK < a.walk.elements ? start + TASK : a.walk.elements;
  const A rest = a.class_map ? A(0.5) : A(0);                               // of a map: in range, and no class
  const int64_t stretch = a.x.stride[a.walk.dims - 1] == 1 ? TASK : BLOCK;  // channels last: all of them from the L2 cache
  for (int64_t from = start; from < end; from += stretch)
    for (int64_t c = 0; c < a.C; c++)
      for (int64_t first = from; first < end && first < from + stretch; first += BLOCK) {
        int64_t n = end - first < BLOCK ? end - first : BLOCK, block = (first - start) / BLOCK;
        const A* t = b.t.read(a, a.t, image, c, block, first, n, rest);
        const A* mask = a.mask.data ? b.mask.read(a, a.mask, image, c, block, first, n, A(0)) : nullptr;
        const A* x = read_block(a.walk, a.x, image * a.x.image + c * a.x.channel, first, n, b.x.at, padding<A>);
        f(image, c, first, n, x, t, mask);
      }
}

// Of a class map: 1 where it names the channel.
template <class A>
INLINE vec<A> dice_target(const Dice& a, const A* t, int64_t i, vec<A> channel) {
  vec<A> v = load(t + i);
  return a.class_map ? (v == channel ? splat(A(1)) : vec<A>{}) : v;
}

template <class A, bool MASK, bool POS_WEIGHT>
static void dice_sums_of(const Dice& a, int64_t piece, char* scratch) {
  constexpr int L = vector<A>::lanes;
  DiceBlock<A>& b = *(DiceBlock<A>*)scratch;
  bool bad = false;
  double* sums = a.sums + piece * a.C * DICE_SUMS;
  for (int64_t i = 0; i < a.C * DICE_SUMS; i++) sums[i] = 0;
  each_dice_block<A>(a, piece, b, [&](int64_t, int64_t c, int64_t, int64_t n, const A* x, const A* t, const A* mask) {
    const vec<A> channel = splat(A(c)), pos_weight = splat(A(POS_WEIGHT ? a.pos_weight[c] : 1));
    if (a.t.is_integer() && (c == 0 || a.t.channel || a.mask.channel)) bad = bad || out_of_range(t, mask, n, A(a.class_map ? a.C : 2));
    Sum<A> bces, both, sizes, counted;
    LogSum<A> logs;
    for (int64_t i = 0; i < n;) {
      for (int64_t stop = i + PART * L; i < stop && i < n; i += L) {
        vec<A> tv = dice_target(a, t, i, channel), loss, of_log, d;
        Sigmoid<A> s = sigmoid<A>(load(x + i));
        bce<A, POS_WEIGHT>(s, tv, pos_weight, loss, of_log, d);
        vec<A> p = s.p;
        if (POS_WEIGHT) loss += of_log * log1p(s.e);
        if (MASK) {
          vec<lane_t<A>> keep = counts(mask, i);
          loss = keep ? loss : vec<A>{}, p = keep ? p : vec<A>{}, tv = keep ? tv : vec<A>{}, s.e = keep ? s.e : vec<A>{};
          counted.add(keep ? splat(A(1)) : vec<A>{});
        }
        if (!POS_WEIGHT) logs.add(s.e);
        bces.add(loss), both.add(p * tv), sizes.add(a.squared ? p * p + tv * tv : p + tv);
      }
      bces.next_part(), both.next_part(), sizes.next_part(), counted.next_part();
      if (!POS_WEIGHT) logs.next_part();
    }
    double* to = sums + c * DICE_SUMS;
    to[0] += bces.total() + logs.total(), to[1] += both.total(), to[2] += sizes.total(), to[3] += MASK ? counted.total() : double(n);
  });
  a.bad[piece] = bad;
}

template <class A>
static void dice_sums(const Dice& a, int64_t piece, char* scratch) {
  if (a.mask.data)
    (a.pos_weight ? dice_sums_of<A, true, true> : dice_sums_of<A, true, false>)(a, piece, scratch);
  else
    (a.pos_weight ? dice_sums_of<A, false, true> : dice_sums_of<A, false, false>)(a, piece, scratch);
}

template <class A, bool MASK, bool POS_WEIGHT>
static void dice_grad_of(const Dice& a, int64_t piece, char* scratch) {
  constexpr int L = vector<A>::lanes;
  DiceBlock<A>& b = *(DiceBlock<A>*)scratch;
  each_dice_block<A>(a, piece, b, [&](int64_t image, int64_t c, int64_t first, int64_t n, const A* x, const A* t, const A* mask) {
    const vec<A> channel = splat(A(c)), pos_weight = splat(A(POS_WEIGHT ? a.pos_weight[c] : 1));
    const A* factors = (const A*)a.factors + image * a.factors_image + c * FACTORS;
    const vec<A> of_bce = splat(factors[0]), of_target = splat(factors[1]), of_p = splat(factors[2]);
    int64_t base = image * a.grad.image + c * a.grad.channel;
    A* out = in_place<A>(a.walk, a.grad, base, first, n);
    A* grads = out ? out : b.grad.at;
    for (int64_t i = 0; i < n; i += L) {
      vec<A> tv = dice_target(a, t, i, channel), linear, of_log, d;
      Sigmoid<A> s = sigmoid<A>(load(x + i));
      bce<A, POS_WEIGHT>(s, tv, pos_weight, linear, of_log, d);
      vec<A> rest = a.squared ? s.p * of_p : of_p;
      d = d * of_bce + s.p * s.q * (tv * of_target + rest);
      if (MASK) d = counts(mask, i) ? d : vec<A>{};
      store(grads + i, d);
    }
    if (!out) write_block(a.walk, a.grad, base, first, n, grads);
  });
}

template <class A>
static void dice_grad(const Dice& a, int64_t piece, char* scratch) {
  if (a.mask.data)
    (a.pos_weight ? dice_grad_of<A, true, true> : dice_grad_of<A, true, false>)(a, piece, scratch);
  else
    (a.pos_weight ? dice_grad_of<A, false, true> : dice_grad_of<A, false, false>)(a, piece, scratch);
}
