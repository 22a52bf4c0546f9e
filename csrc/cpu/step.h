// A step on the CPU, over a range of tiles: proposals, their sum, the shares.
//
// Two ways through the same arithmetic. A whole step goes through all copies together, element by element. But 17 streams
// through memory (AdamW, four copies) run at full speed and 25 do not (SGD, eight). So of more than four copies all but
// four propose before, row by row through a block of kBlock tiles, and leave their proposals in their rows, which the
// cache still holds when all are taken together. What must look at all copies before they propose, or is cut at the sum
// s, goes row by row to the end, while s and what else the copies share waits in the cache.
namespace hta::cpu::HTA_ISA {

// NaN if any of [begin, end) of a row, times scale, is not finite, else 0.
template <class T>
double poison_range(const T* x, int64_t begin, int64_t end, T scale = 1) {
  Sum<T> poison;
  const T* const row = x + begin;
  each<T>(end - begin, [&](auto lanes, int64_t i) __attribute__((always_inline)) {
    prefetch(i, row);
    const auto value = load<decltype(lanes)>(row + i) * scale;
    poison.add(value - value);
  });
  return poison.total();
}

// A group's numbers for its proposal; the gradients' scale joins their sign.
template <class P, class T> HTA_INLINE auto numbers_of(const Tile<T>& tile, T scale) {
  typename P::template Numbers<T> number;
  __builtin_memcpy(&number, tile.numbers, sizeof(number));
  number.sign *= scale;
  return number;
}

// What one copy proposes from, at a tile's elements.
template <class P, bool kStates, class T> struct Rows {
  static constexpr int kRows = kStates ? P::kStates : 0;  // of states
  using Numbers = typename P::template Numbers<T>;
  T* x;
  const T* g;
  T* state[2];

  Rows() = default;
  Rows(const StepArgs<T>& args, int64_t start, int32_t j) : x(args.copies[j] + start), g(args.grads[j] + start) {
    for (int k = 0; k < kRows; ++k) state[k] = args.states[k * args.m + j] + start;
  }

  HTA_INLINE void ahead(int64_t i) const {
    prefetch(i, x, g);
    HTA_UNROLL for (int k = 0; k < kRows; ++k) prefetch(i, state[k]);
  }
  template <class V> HTA_INLINE V gradient(int64_t i, const Numbers& number) const { return load<V>(g + i) * number.sign; }

  // The proposal; the states move.
  template <class V> HTA_INLINE V propose(V at, V gradient, int64_t i, const Numbers& number) const {
    V held[2]{};
    HTA_UNROLL for (int k = 0; k < kRows; ++k) held[k] = load<V>(state[k] + i);
    const V a = P::propose(at, gradient, held, number);
    HTA_UNROLL for (int k = 0; k < kRows; ++k) store(state[k] + i, held[k]);
    return a;
  }
};

// Where s, and a look for what is not finite, come later.
struct NoRules {};
struct NoSum {
  template <class V> HTA_INLINE void add(V) const {}
};

// One copy's proposals over a tile, left in its row, and its part in the sum. In explicit mode the quadratic terms'
// gradient comes first.
template <class P, bool kStates, bool kExplicit, class T, class Rules, class Poison>
HTA_INLINE void propose(const StepArgs<T>& args, Tile<T>& tile, const Rules& rules, T scale, int32_t j, Poison&& poison) {
  const Rows<P, kStates, T> rows(args, tile.start, j);
  const T* const first_ = args.copies[0] + tile.start;
  const auto number = numbers_of<P>(tile, scale);
  each<T>(tile.count, [&](auto lanes, int64_t i) __attribute__((always_inline)) {
    using V = decltype(lanes);
    rows.ahead(i);
    const V x = load<V>(rows.x + i);
    V g = rows.template gradient<V>(i, number);
    poison.add(g - g);
    if constexpr (kExplicit)
      g += quadratic_gradient(x, V(x - load<V>(first_ + i)), load<V>(tile.gaps + i), load<V>(tile.reads + i),
                              load<V>(tile.anchor + i), rules.at(Rules::template label<V>(tile.labels, i)));
    const V a = rows.propose(x, g, i, number);
    store(rows.x + i, a);
    if constexpr (!kExplicit && !std::is_same_v<Rules, NoRules>)
      store(tile.s + i, V(load<V>(tile.s + i) + rules.at(Rules::template label<V>(tile.labels, i)).read * a));
  });
}

// The sums that a gradient of the quadratic terms needs.
template <class Copies, class T, class Rules>
HTA_INLINE void sum_gaps(const Copies& copies, Tile<T>& tile, const Rules& rules, int32_t j) {
  const T *const x_ = copies[j] + tile.start, *const first_ = copies[0] + tile.start;
  each<T>(tile.count, [&](auto lanes, int64_t i) __attribute__((always_inline)) {
    using V = decltype(lanes);
    const auto& rule = rules.at(Rules::template label<V>(tile.labels, i));
    const V x = load<V>(x_ + i);
    store(tile.s + i, V(load<V>(tile.s + i) + rule.read * x));
    store(tile.gaps + i, V(load<V>(tile.gaps + i) + rule.read * (x - load<V>(first_ + i))));
    store(tile.reads + i, V(load<V>(tile.reads + i) + rule.read));
  });
}

// One copy's share in the sum, and its distance to copy 0; returns the square of that to the anchor.
template <bool kExplicit, class T, class Rules>
HTA_INLINE double share(const StepArgs<T>& args, Tile<T>& tile, const Rules& rules, int32_t j) {
  Sum<T> anchored;
  T *const x_ = args.copies[j] + tile.start, *const first_ = args.copies[0] + tile.start;
  each<T>(tile.count, [&](auto lanes, int64_t i) __attribute__((always_inline)) {
    using V = decltype(lanes);
    const auto& rule = rules.at(Rules::template label<V>(tile.labels, i));
    const V z = load<V>(tile.anchor + i);
    V x = load<V>(x_ + i);
    if (!kExplicit) {
      x = shared(x, load<V>(tile.s + i), z, rule);
      store(x_ + i, x);
    }
    anchored.add(rule.anchored * ((x - z) * (x - z)));
    if (j > 0) store(tile.gaps + i, V((j > 1 ? load<V>(tile.gaps + i) : V{}) + (x - load<V>(first_ + i))));
  });
  return anchored.total();
}

// sum_{i<j} (x_i - x_j)^2 = m sum_j (x_j - mean)^2, from the sum of distances to copy 0.
template <class T>
HTA_INLINE double pairs_of(T* const* copies, const Tile<T>& tile, int32_t m) {
  const T *const first_ = copies[0] + tile.start, part = T(1) / m;
  double sum = 0;
  for (int32_t j = m == 2 ? 1 : 0; j < m; ++j) {
    const T* const x_ = copies[j] + tile.start;
    Sum<T> pairs;
    each<T>(tile.count, [&](auto lanes, int64_t i) __attribute__((always_inline)) {
      using V = decltype(lanes);
      if (m == 2) return pairs.add(load<V>(tile.gaps + i) * load<V>(tile.gaps + i));
      const V gap = (load<V>(x_ + i) - load<V>(first_ + i)) - part * load<V>(tile.gaps + i);
      pairs.add(T(m) * (gap * gap));
    });
    sum += pairs.total();
  }
  return sum;
}

// keep centre + share s + pull anchor; the centre may be the anchor itself.
template <class T, class Rules>
HTA_INLINE void move_centre(const StepArgs<T>& args, Tile<T>& tile, const Rules& rules) {
  T* const z_ = args.centre + tile.start;
  each<T>(tile.count, [&](auto lanes, int64_t i) __attribute__((always_inline)) {
    using V = decltype(lanes);
    const auto& rule = rules.at(Rules::template label<V>(tile.labels, i));
    store(z_ + i, shared(load<V>(z_ + i), load<V>(tile.s + i), load<V>(tile.anchor + i), rule));
  });
}

// How many of m copies propose before the others.
constexpr int32_t first_to_propose(int32_t m) { return std::max(m - 4, 0); }

// The step over a tile, where the first copies have proposed. kCopies: how many there are, where that is known, so that
// they fit the registers and the loops over them are unrolled.
template <class P, bool kStates, int kCopies, class T, class Rules>
HTA_INLINE void step_together(const StepArgs<T>& args, const Tile<T>& tile, const Rules* rules, T scale, Sum<T>& anchored,
                              Sum<T>& pairs) {
  constexpr int kMost = kCopies ? kCopies : kMaxCopies, kProposing = kMost - first_to_propose(kMost);
  const int32_t m = kCopies ? kCopies : args.m, before = m - kProposing;
  const auto number = numbers_of<P>(tile, scale);
  T* x_[kMost];
  Rows<P, kStates, T> rows[kProposing];
  const T* const z_ = tile.anchor;
  T* const centre_ = args.centre ? args.centre + tile.start : nullptr;
  Labels labels = tile.labels;
  for (int j = 0; j < m; ++j) x_[j] = args.copies[j] + tile.start;
  for (int k = 0; k < kProposing; ++k) rows[k] = {args, tile.start, before + k};
  const auto propose_all = [&](auto lanes, int64_t i) __attribute__((always_inline)) {
    using V = decltype(lanes);
    struct {
      decltype(Rules::template label<V>(labels, i)) of_label;
      V a[kProposing];
    } proposed{Rules::template label<V>(labels, i), {}};
    prefetch(i, z_);
    HTA_UNROLL for (int k = 0; k < kProposing; ++k) {
      proposed.a[k] = load<V>(rows[k].x + i);
      rows[k].ahead(i);
    }
    HTA_UNROLL for (int k = 0; k < kProposing; ++k)
      proposed.a[k] = rows[k].propose(proposed.a[k], rows[k].template gradient<V>(i, number), i, number);
    return proposed;
  };
  const auto share_all = [&](auto lanes, int64_t i, const auto& proposed) __attribute__((always_inline)) {
    using V = decltype(lanes);
    const V z = load<V>(z_ + i);
    V x[kMost], s{};
    HTA_UNROLL for (int j = 0; j < m; ++j) {
      x[j] = j < before ? load<V>(x_[j] + i) : proposed.a[j - before];
      const auto& rule = rules[j].at(proposed.of_label);
      s = j ? s + rule.read * x[j] : rule.read * x[j];
    }
    V gaps{};
    HTA_UNROLL for (int j = 0; j < m; ++j) {
      const auto& rule = rules[j].at(proposed.of_label);
      x[j] = shared(x[j], s, z, rule);
      store(x_[j] + i, x[j]);
      anchored.add(rule.anchored * ((x[j] - z) * (x[j] - z)));
      if (j) gaps = j > 1 ? gaps + (x[j] - x[0]) : x[j] - x[0];
    }
    if (m == 2) pairs.add(gaps * gaps);
    const T part = T(1.0 / m);
    HTA_UNROLL for (int j = 0; kCopies != 1 && kCopies != 2 && j < m; ++j) {
      const V gap = (x[j] - x[0]) - part * gaps;
      pairs.add(T(m) * (gap * gap));
    }
    if (centre_) store(centre_ + i, shared(load<V>(centre_ + i), s, z, rules[m].at(proposed.of_label)));
  };
  each_in_halves<T>(tile.count, propose_all, share_all);
}

// How many elements are summed in T before their sum joins the range's, in double: kTile in each lane.
template <class T> constexpr int64_t kSummed = Lanes<T>::kCount * kTile;

// sums: the anchor's, the pairs', NaN for a gradient that is not finite.
template <class P, bool kStates, int kCopies, class T>
void step_range_together(const StepArgs<T>& args, int64_t begin, int64_t end, double sums[3]) {
  constexpr int kMost = kCopies ? kCopies : kMaxCopies;
  const int32_t m = kCopies ? kCopies : args.m, before = first_to_propose(m);
  const T scale = T(1.0 / args.grad_scale.get(1));
  Tile<T>* const block = own_tiles<T>();
  Sum<T> anchored, pairs;
  Uniform<T> uniform[kMost + 1];
  Mixed<T, kCopies ? kCopies + 1 : 0> mixed[kMost + 1];
  const T* numbers = nullptr;  // whose rules `mixed` holds
  int64_t summed = 0;
  sums[0] = sums[1] = sums[2] = 0;
  const auto fold = [&] {
    sums[0] += anchored.total(), sums[1] += pairs.total();
    anchored = pairs = {}, summed = 0;
  };
  for (int64_t start = begin; start < end;) {
    int64_t tiles = 0;
    for (; tiles < (before ? kBlock : 1) && start < end; start += block[tiles++].count) {
      block[tiles].open(args.pattern, args.rules, m, m, args.anchor, start, end, true);
      block[tiles].extend(args.pattern, std::min(end, start + kSummed<T>));
    }
    for (int32_t j = 0; j < before; ++j)
      for (int64_t b = 0; b < tiles; ++b) propose<P, kStates, false>(args, block[b], NoRules{}, scale, j, NoSum{});
    for (int64_t b = 0; b < tiles; ++b) {
      const Tile<T>& tile = block[b];
      if (tile.uniform >= 0) {
        for (int j = 0; j <= m; ++j) uniform[j] = {tile, j};
        step_together<P, kStates, kCopies>(args, tile, uniform, scale, anchored, pairs);
      } else {
        for (int j = 0; j <= m && tile.numbers != numbers; ++j) mixed[j] = {tile, j};
        numbers = tile.numbers;
        step_together<P, kStates, kCopies>(args, tile, mixed, scale, anchored, pairs);
      }
      if ((summed += tile.count) >= kSummed<T>) fold();
    }
  }
  fold();
  // A gradient that is not finite leaves copies, and so sums, that are not. Only then are the gradients looked at.
  for (int32_t j = 0; j < m && !std::isfinite(sums[0] + sums[1]); ++j)
    sums[2] += poison_range(args.grads[j], begin, end, scale);
}

// One phase of a lone copy's step over a tile: it proposes, and leaves its part of the sum in `sums`, or takes its share
// of what stands there.
template <class P, bool kStates, bool kProposes, class T, class Rules>
HTA_INLINE void step_alone(const StepArgs<T>& args, const Tile<T>& tile, const Rules& rules, const Rules& centre_rules, T scale,
                           Sum<T>& anchored, Sum<T>& poison) {
  T *const x_ = args.copies[0] + tile.start, *const s_ = args.sums + tile.start;
  Labels labels = tile.labels;
  if constexpr (kProposes) {
    const Rows<P, kStates, T> rows(args, tile.start, 0);
    const auto number = numbers_of<P>(tile, scale);
    each<T>(tile.count, [&](auto lanes, int64_t i) __attribute__((always_inline)) {
      using V = decltype(lanes);
      prefetch(i, s_);
      rows.ahead(i);
      const auto& rule = rules.at(Rules::template label<V>(labels, i));
      const V x = load<V>(x_ + i), g = rows.template gradient<V>(i, number);
      poison.add(g - g);
      const V a = rows.propose(x, g, i, number);
      store(s_ + i, V(rule.read * a));
      store(x_ + i, a);
    });
  } else {
    const T* const z_ = tile.anchor;
    T* const centre_ = args.centre ? args.centre + tile.start : nullptr;
    each<T>(tile.count, [&](auto lanes, int64_t i) __attribute__((always_inline)) {
      using V = decltype(lanes);
      prefetch(i, x_, s_, z_);
      const auto label = Rules::template label<V>(labels, i);
      const auto& rule = rules.at(label);
      const V s = load<V>(s_ + i), z = load<V>(z_ + i), x = shared(load<V>(x_ + i), s, z, rule);
      anchored.add(rule.anchored * ((x - z) * (x - z)));
      if (centre_) store(centre_ + i, shared(load<V>(centre_ + i), s, z, centre_rules.at(label)));
      store(x_ + i, x);
    });
  }
}

template <class P, bool kStates, bool kProposes, class T>
void step_range_alone(const StepArgs<T>& args, int64_t begin, int64_t end, double sums[3]) {
  const T scale = T(1.0 / args.grad_scale.get(1));
  Tile<T>& tile = own_tiles<T>()[0];
  Sum<T> poison;
  sums[0] = sums[1] = 0;
  for (int64_t start = begin; start < end; start += tile.count) {
    tile.open(args.pattern, args.rules, 1, args.blocks, args.anchor, start, end, true);
    tile.extend(args.pattern, std::min(end, start + kSummed<T>));
    Sum<T> anchored;
    if (tile.uniform >= 0) {
      step_alone<P, kStates, kProposes>(args, tile, Uniform<T>(tile, 0), Uniform<T>(tile, 1), scale, anchored, poison);
    } else {
      step_alone<P, kStates, kProposes>(args, tile, Mixed<T>(tile, 0), Mixed<T>(tile, 1), scale, anchored, poison);
    }
    sums[0] += anchored.total();
  }
  sums[2] = poison.total();
}

// Calls call(rules) with row j's rules over a tile, in either kind.
template <class T, class Call> HTA_INLINE void with_rules(const Tile<T>& tile, int32_t j, const Call& call) {
  tile.uniform >= 0 ? call(Uniform<T>(tile, j)) : call(Mixed<T>(tile, j));
}

template <class P, bool kStates, bool kExplicit, class T>
void step_range(const StepArgs<T>& args, int64_t begin, int64_t end, double sums[3]) {
  const int32_t m = args.m;
  const T scale = T(1.0 / args.grad_scale.get(1));
  sums[0] = sums[1] = sums[2] = 0;
  Tile<T>* const block = own_tiles<T>();
  for (int64_t start = begin; start < end; start += kBlock * kTile) {
    Sum<T> poison;
    const int64_t tiles = std::min<int64_t>(kBlock, (end - start + kTile - 1) / kTile);
    for (int64_t b = 0; b < tiles; ++b)
      block[b].open(args.pattern, args.rules, m, args.blocks, args.anchor, start + b * kTile, end);
    // One row of the block after the other. Copy 0 comes last where the others' gradients need it as it was.
    const auto rows = [&](bool descending, const auto& work) __attribute__((always_inline)) {
      for (int32_t i = 0; i < m; ++i)
        for (int64_t b = 0; b < tiles; ++b) {
          const int32_t j = descending ? m - 1 - i : i;
          with_rules(block[b], j, [&](const auto& rules) __attribute__((always_inline)) { work(block[b], rules, j); });
        }
    };
    for (int64_t b = 0; b < tiles; ++b) block[b].clear(args.phase & kPropose ? nullptr : args.sums, kExplicit);
    if (args.phase & kPropose) {
      if (kExplicit) rows(false, [&](Tile<T>& tile, const auto& rules, int32_t j) __attribute__((always_inline)) {
        sum_gaps(args.copies, tile, rules, j);
      });
      rows(kExplicit, [&](Tile<T>& tile, const auto& rules, int32_t j) __attribute__((always_inline)) {
        propose<P, kStates, kExplicit>(args, tile, rules, scale, j, poison);
      });
      if (args.sums)
        for (int64_t b = 0; b < tiles; ++b) std::copy(block[b].s, block[b].s + block[b].count, args.sums + block[b].start);
    }
    if (args.phase & kShare) {
      rows(false, [&](Tile<T>& tile, const auto& rules, int32_t j) __attribute__((always_inline)) {
        sums[0] += share<kExplicit>(args, tile, rules, j);
      });
      for (int64_t b = 0; b < tiles; ++b) {
        if (m > 1) sums[1] += pairs_of(args.copies, block[b], m);
        if (args.centre) with_rules(block[b], m, [&](const auto& rules) { move_centre(args, block[b], rules); });
      }
    }
    sums[2] += poison.total();
  }
}

}  // namespace hta::cpu::HTA_ISA
