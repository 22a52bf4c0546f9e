// The penalty of the quadratic terms on the CPU, and its gradient, over a range of tiles.
namespace hta::cpu::HTA_ISA {

template <template <class> class Rules, class T>
HTA_INLINE void penalty_tile(const PenaltyArgs<T>& args, Tile<T>& tile, Sum<T>& energy) {
  const int32_t m = args.m;
  tile.clear(nullptr, true);
  for (int32_t j = 0; j < m; ++j) sum_gaps(args.copies, tile, Rules<T>(tile, j), j);
  const T* const first_ = args.copies[0] + tile.start;
  for (int32_t j = 0; j < m; ++j) {
    const Rules<T> rules(tile, j);
    const T* const x_ = args.copies[j] + tile.start;
    T* const g_ = args.grads[j] + tile.start;
    each<T>(tile.count, [&](auto lanes, int64_t i) __attribute__((always_inline)) {
      using V = decltype(lanes);
      prefetch(i, x_);
      const auto& rule = rules.at(Rules<T>::template label<V>(tile.labels, i));
      const V x = load<V>(x_ + i), z = load<V>(tile.anchor + i), gap = x - load<V>(first_ + i);
      const V gaps = load<V>(tile.gaps + i), reads = load<V>(tile.reads + i);
      const V g = quadratic_gradient(x, gap, gaps, reads, z, rule);
      // Over all j the squares of the distances to the mean, times m, are those of the pairs' distances.
      const V off = gap - gaps / reads;
      energy.add(T(0.5) * (rule.pull * ((x - z) * (x - z)) + rule.share * (reads * (off * off))));
      store(g_ + i, args.accumulate ? V(load<V>(g_ + i) + g) : g);
    });
  }
}

template <class T>
double penalty_range(const PenaltyArgs<T>& args, int64_t begin, int64_t end) {
  Tile<T> tile;
  double sum = 0;
  for (int64_t start = begin; start < end; start += kTile) {
    Sum<T> energy;
    tile.open(args.pattern, args.rules, args.m, args.m, args.anchor, start, end);
    tile.uniform >= 0 ? penalty_tile<Uniform>(args, tile, energy) : penalty_tile<Mixed>(args, tile, energy);
    sum += energy.total();
  }
  return sum;
}

}  // namespace hta::cpu::HTA_ISA
