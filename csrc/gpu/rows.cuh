// How the GPU kernels read and write rows: what a thread takes of one at a time, in registers, and the walk over a block's
// elements. A row is a pointer to numbers of one type, or a Row in a format of its own.
#pragma once
#include "args.h"

#ifndef HTA_DEVICE
#define HTA_DEVICE __device__ __forceinline__
#endif

namespace hta::gpu {

constexpr int kThreads = 256;
constexpr int64_t kChunk = 8 * kTile;  // elements that a block walks

template <class T> constexpr bool kInFormats = false;
template <> inline constexpr bool kInFormats<Packed> = true;

// What one thread takes of one buffer.
template <class T, int kLanes>
struct alignas(sizeof(T) * kLanes < 16 ? sizeof(T) * kLanes : 16) Pack {
  T lane[kLanes];
};

template <class T> constexpr int kLanesOf = 16 / sizeof(T);

template <int kLanes, class T>
HTA_DEVICE Pack<T, kLanes> load(const T* p) {
  return *reinterpret_cast<const Pack<T, kLanes>*>(p);
}

template <int kLanes, class T>
HTA_DEVICE void store(T* p, const Pack<T, kLanes>& pack) {
  *reinterpret_cast<Pack<T, kLanes>*>(p) = pack;
}

// A group of consecutive elements.
template <int kCount>
struct Lanes {
  static constexpr int count = kCount;
  HTA_DEVICE bool has(int) const { return true; }
};

// Four of them, of which the first `live` exist; `whole`: so do all of this warp's, and they are read and written at once.
struct Quad {
  static constexpr int count = 4;
  bool whole;
  int live;
  HTA_DEVICE bool has(int lane) const { return lane < live; }
};

// Calls body(lanes, index) for every element of this block's chunk: in groups of kLanes where `wide`, the rest one by one.
template <int kLanes, class Body>
HTA_DEVICE void each_group(int64_t n, bool wide, const Body& body) {
  const int64_t begin = blockIdx.x * kChunk;
  const int count = n - begin < kChunk ? int(n - begin) : int(kChunk), whole = wide ? count - count % kLanes : 0;
#pragma unroll 1
  for (int at = threadIdx.x * kLanes; at < whole; at += kThreads * kLanes) body(Lanes<kLanes>{}, begin + at);
#pragma unroll 1
  for (int at = whole + threadIdx.x; at < count; at += kThreads) body(Lanes<1>{}, begin + at);
}

// The same in groups of four throughout. A warp takes kScaled elements, or the end of them, and no lane of it is left out.
template <class Body>
HTA_DEVICE void each_quad(int64_t n, bool wide, const Body& body) {
  static_assert(32 * Quad::count == kScaled);
  const int64_t begin = blockIdx.x * kChunk;
  const int count = n - begin < kChunk ? int(n - begin) : int(kChunk);
#pragma unroll 1
  for (int at = threadIdx.x * Quad::count, first = at - at % int(kScaled); first < count; at += kThreads * Quad::count, first += kThreads * Quad::count)
    body(Quad{wide && first + kScaled <= count, count - at}, begin + at);
}

template <class T, int kLanes, class Body>
HTA_DEVICE void each_group_of(int64_t n, bool wide, const Body& body) {
  if constexpr (kInFormats<T>) each_quad(n, wide, body);
  else each_group<kLanes>(n, wide, body);
}

// ------------------------------------------------------------------------------------------------- rows of one type

template <class T, class Group>
HTA_DEVICE Pack<T, Group::count> load(Group, const T* row, int64_t i) { return load<Group::count>(row + i); }

template <class T, class Group, class... Unused>
HTA_DEVICE void store(Group, T* row, int64_t i, const Pack<T, Group::count>& pack, const Unused&...) { store(row + i, pack); }

template <class T, int kLanes>
HTA_DEVICE const Pack<T, kLanes>& opened(const T*, const Pack<T, kLanes>& loaded) { return loaded; }

template <class Group, class Bytes>
HTA_DEVICE void load_labels(Group, const uint8_t* bytes, Bytes& packed) { packed = *reinterpret_cast<const Bytes*>(bytes); }

HTA_DEVICE bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }  // null is

// ------------------------------------------------------------------------------------------------ rows in formats

// Which formats a row may have, for less code: all have the first three. square: of codes, the unsigned ones.
template <bool kSplits, bool kCodes>
struct RowOf : Row {
  bool square = false;
  HTA_DEVICE bool is(Format other) const {
    const bool split = other == kSplitBFloat16 || other == kSplitHalf, codes = other >= kSigned8;
    return (split ? kSplits : codes ? kCodes && square == (other == kUnsigned8) : true) && format == other;
  }
};

HTA_DEVICE bool aligned(const Row& row) {
  const unsigned bytes = row.format == kFloat32 ? 16 : row.format >= kSigned8 ? 4 : 8;
  return reinterpret_cast<uintptr_t>(row.data) % bytes == 0 && reinterpret_cast<uintptr_t>(row.more) % 4 == 0;
}

// Four elements' codes as they lie in memory, and their corrections, or the scale.
struct Raw {
  uint32_t words[4], more;
};

template <class Code> HTA_DEVICE uint32_t code_at(const uint32_t* words, int lane) {  // a signed one's sign extended
  constexpr int kBits = 8 * sizeof(Code), kInWord = 4 / sizeof(Code);
  return uint32_t(Code(words[lane / kInWord] >> (lane % kInWord * kBits)));
}

template <class Code> HTA_DEVICE void put_code(uint32_t* words, int lane, uint32_t code) {  // no bits above the code's
  constexpr int kBits = 8 * sizeof(Code), kInWord = 4 / sizeof(Code);
  words[lane / kInWord] = (lane % kInWord ? words[lane / kInWord] : 0) | code << (lane % kInWord * kBits);
}

template <class Code>
HTA_DEVICE void load_codes(Quad lanes, const void* row, int64_t i, uint32_t* words) {
  const Code* const codes = static_cast<const Code*>(row) + i;
  if (lanes.whole) {
    const auto pack = load<int(sizeof(Code))>(reinterpret_cast<const uint32_t*>(codes));
    for (unsigned word = 0; word < sizeof(Code); ++word) words[word] = pack.lane[word];
  } else {
    for (int lane = 0; lane < 4; ++lane) put_code<Code>(words, lane, lanes.has(lane) ? codes[lane] : 0);
  }
}

HTA_DEVICE void load_labels(Quad lanes, const uint8_t* bytes, uint32_t& packed) { load_codes<uint8_t>(lanes, bytes, 0, &packed); }

template <class Code>
HTA_DEVICE void store_codes(Quad lanes, void* row, int64_t i, const uint32_t* words) {
  Code* const codes = static_cast<Code*>(row) + i;
  if (lanes.whole) {
    Pack<uint32_t, int(sizeof(Code))> pack;
    for (unsigned word = 0; word < sizeof(Code); ++word) pack.lane[word] = words[word];
    store(reinterpret_cast<uint32_t*>(codes), pack);
  } else {
    for (int lane = 0; lane < 4; ++lane)
      if (lanes.has(lane)) codes[lane] = Code(code_at<Code>(words, lane));
  }
}

// Issues the loads and waits for none.
template <bool kSplits, bool kCodes>
HTA_DEVICE Raw load(Quad lanes, const RowOf<kSplits, kCodes>& row, int64_t i) {
  Raw raw;
  if (row.is(kFloat32)) {
    load_codes<uint32_t>(lanes, row.data, i, raw.words);
  } else if (row.is(kSigned8) || row.is(kUnsigned8)) {
    load_codes<uint8_t>(lanes, row.data, i, raw.words);
    raw.more = static_cast<const uint32_t*>(row.more)[i / kScaled];
  } else {
    load_codes<uint16_t>(lanes, row.data, i, raw.words);
    if (row.is(kSplitBFloat16) || row.is(kSplitHalf)) load_codes<uint8_t>(lanes, row.more, i, &raw.more);
  }
  return raw;
}

template <bool kSplits, bool kCodes>
HTA_DEVICE Pack<Packed, 4> opened(const RowOf<kSplits, kCodes>& row, const Raw& raw) {
  Pack<Packed, 4> x;
  const auto all = [&](const auto& value) {
    for (int lane = 0; lane < 4; ++lane) x.lane[lane] = {value(lane)};
  };
  const auto low = [&](int lane) { return code_at<uint16_t>(raw.words, lane); };
  const auto correction = [&](int lane) { return code_at<int8_t>(&raw.more, lane); };
  const float scale = from_bits<float>(raw.more);
  if (row.is(kFloat32)) all([&](int lane) { return from_bits<float>(raw.words[lane]); });
  if (row.is(kBFloat16)) all([&](int lane) { return from_bits<float>(low(lane) << 16); });
  if (row.is(kHalf)) all([&](int lane) { return widen(Half{uint16_t(low(lane))}); });
  if (row.is(kSplitBFloat16)) all([&](int lane) { return join_bfloat16<float>(low(lane), correction(lane)); });
  if (row.is(kSplitHalf)) all([&](int lane) { return join_half<float>(low(lane), correction(lane)); });
  if (row.is(kSigned8)) all([&](int lane) { return decoded<true, float>(code_at<int8_t>(raw.words, lane), scale); });
  if (row.is(kUnsigned8)) all([&](int lane) { return decoded<false, float>(code_at<uint8_t>(raw.words, lane), scale); });
  return x;
}

// Random bits of a group in a row; none: to nearest.
struct Random {
  bool given = false;
  uint32_t bits[4] = {};
  HTA_DEVICE uint32_t at(int lane, uint32_t nearest) const { return given ? bits[lane] : nearest; }
};

// Codes relative to the largest magnitude of what this warp holds, NaN being larger than all.
template <bool kSigned>
HTA_DEVICE void encode(Quad lanes, const Row& row, int64_t i, const Pack<Packed, 4>& x, const Random& random, uint32_t* words) {
  uint32_t most = 0;
  const auto larger = [&](uint32_t other) { most = other > most ? other : most; };
  for (int lane = 0; lane < 4; ++lane) larger(lanes.has(lane) ? bits_of(x.lane[lane].value) & 0x7fffffffu : 0);
  for (int distance = 16; distance > 0; distance /= 2) larger(__shfl_xor_sync(0xffffffffu, most, distance));
  const float factor = to_codes<kSigned>(from_bits<float>(most));
  if (threadIdx.x % 32 == 0) static_cast<uint32_t*>(row.more)[i / kScaled] = most;
  for (int lane = 0; lane < 4; ++lane) {
    const uint32_t noise = random.at(lane, 1u << (kCodeShift - 1));
    put_code<uint8_t>(words, lane, encoded<kSigned>(x.lane[lane].value, factor, noise));
  }
}

template <bool kSplits, bool kCodes>
HTA_DEVICE void store(Quad lanes, const RowOf<kSplits, kCodes>& row, int64_t i, const Pack<Packed, 4>& x, const Random& random = {}) {
  uint32_t words[4], corrections;
  const auto all = [&](const auto& code) {
    for (int lane = 0; lane < 4; ++lane) put_code<uint16_t>(words, lane, code(x.lane[lane].value, lane));
  };
  if (row.is(kFloat32)) {
    for (int lane = 0; lane < 4; ++lane) words[lane] = bits_of(x.lane[lane].value);
    return store_codes<uint32_t>(lanes, row.data, i, words);
  }
  if (row.is(kSigned8) || row.is(kUnsigned8)) {
    if (row.is(kSigned8)) encode<true>(lanes, row, i, x, random, words);
    else encode<false>(lanes, row, i, x, random, words);
    return store_codes<uint8_t>(lanes, row.data, i, words);
  }
  const auto split = [&](const auto& code) {
    all([&](float value, int lane) {
      uint32_t low, correction;
      code(value, random.at(lane, kNearest), low, correction);
      put_code<uint8_t>(&corrections, lane, correction);
      return low;
    });
    store_codes<uint8_t>(lanes, row.more, i, &corrections);
  };
  if (row.is(kSplitBFloat16)) {
    split([](float value, uint32_t noise, uint32_t& low, uint32_t& correction) { split_bfloat16(value, noise, low, correction); });
  } else if (row.is(kSplitHalf)) {
    split([](float value, uint32_t noise, uint32_t& low, uint32_t& correction) { split_half(value, noise, low, correction); });
  } else if (row.is(kHalf)) {
    all([](float value, int) { return uint32_t(narrow<Half>(value).bits); });
  } else if (random.given) {
    all([&](float value, int lane) { return random_bfloat16(value, random.bits[lane]); });
  } else {
    all([](float value, int) { return nearest_bfloat16(value); });
  }
  store_codes<uint16_t>(lanes, row.data, i, words);
}

// ---------------------------------------------------------------------------------------------------- rows of a step

template <class T, class Group> struct LoadedOf { using type = Pack<T, Group::count>; };
template <class Group> struct LoadedOf<Packed, Group> { using type = Raw; };
template <class T, class Group> using Loaded = typename LoadedOf<T, Group>::type;

template <class Of> HTA_DEVICE bool aligned(int count, const Of& row) {
  bool all = true;
  for (int j = 0; j < count; ++j) all = all && aligned(row(j));
  return all;
}

template <class T, class G> struct Rows {
  const StepArgs<T, G>& args;
  HTA_DEVICE T* copy(int32_t j) const { return args.copies[j]; }
  HTA_DEVICE const G* grad(int32_t j) const { return args.grads[j]; }
  HTA_DEVICE T* state(int32_t buffer, int32_t j) const { return args.states[buffer * args.m + j]; }
  HTA_DEVICE G* low(int32_t j) const { return args.low[j]; }
  HTA_DEVICE const T* anchor() const { return args.anchor; }
  HTA_DEVICE T* centre() const { return args.centre; }
  HTA_DEVICE T* sums() const { return args.sums; }
};
template <> struct Rows<Packed, Packed> {
  const StepArgs<Packed>& args;
  HTA_DEVICE RowOf<true, false> copy(int32_t j) const { return {copy_row(args, j)}; }
  HTA_DEVICE RowOf<false, false> grad(int32_t j) const { return {grad_row(args, j)}; }
  HTA_DEVICE RowOf<false, true> state(int32_t buffer, int32_t j) const { return {state_row(args, buffer, j), buffer > 0}; }
  HTA_DEVICE RowOf<false, false> low(int32_t j) const { return {low_row(args, j)}; }
  HTA_DEVICE RowOf<false, false> anchor() const { return {anchor_row(args, args.anchor)}; }
  HTA_DEVICE RowOf<false, false> centre() const { return {anchor_row(args, args.centre)}; }
  HTA_DEVICE RowOf<false, false> sums() const { return {{kFloat32, args.sums, nullptr}}; }
};

// The random bits that a step's rows are rounded by: none for rows of one type.
template <class T> struct Noise {
  template <class Args> HTA_DEVICE explicit Noise(const Args&) {}
  HTA_DEVICE Noise of(int64_t) const { return *this; }  // a group's, then a row's
};
template <> struct Noise<Packed> {
  static constexpr int kTiles = kChunk / kTile;
  bool given;

  // [3 m + 3, kTiles]: the tiles' two keys, then what each row changes.
  static HTA_DEVICE uint32_t& key(int32_t row, int tile) {
    __shared__ uint32_t keys[(3 * kMaxCopies + 3) * kTiles];
    return keys[row * kTiles + tile];
  }

  // Made once for a block: keys cost as much as a whole element's step.
  HTA_DEVICE explicit Noise(const StepArgs<Packed>& args) : given(args.noise) {
    if (!given) return;
    for (int at = threadIdx.x; at < (3 * args.m + 2) * kTiles; at += kThreads) {
      const int32_t row = at / kTiles - 1, of_block = at % kTiles;
      const int64_t tile = int64_t(blockIdx.x) * kTiles + of_block;
      if (row >= 0) {
        key(row + 2, of_block) = row_noise(*args.noise, row, tile);
      } else {
        const HashKeys of_tile = hash_keys(*args.noise, tile);
        key(0, of_block) = of_tile.first;
        key(1, of_block) = of_tile.second;
      }
    }
    __syncthreads();
  }

  struct OfGroup {
    bool given;
    int tile;
    uint32_t bits[4];
    HTA_DEVICE Random of(int32_t row) const {
      Random random;
      if (!given) return random;
      const uint32_t of_row = key(row + 2, tile);
      for (int lane = 0; lane < 4; ++lane) random.bits[lane] = bits[lane] ^ of_row;
      random.given = true;
      return random;
    }
  };
  HTA_DEVICE OfGroup of(int64_t i) const {
    OfGroup group{given, int(i / kTile % kTiles), {}};
    for (int lane = 0; given && lane < 4; ++lane)
      group.bits[lane] = random_bits(HashKeys{key(0, group.tile), key(1, group.tile)}, uint32_t(i % kTile + lane));
    return group;
  }
};

}  // namespace hta::gpu
