// Attention over a cache: split keys (Dao et al. 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html), pages
// (Kwon et al. 2023, arXiv:2309.06180), online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867).
//
// A block is a share of one key head's keys, for the query rows that read them. Its threads form teams: a team takes
// one key and its value, each thread 16 bytes of the row or several times that, and keeps a softmax of its own, so that
// teams meet only at the end. A thread copies what it will read itself, a few steps ahead, so that no step has a
// barrier.
#include "attention_decode.h"

#include <common.cuh>

#include <cmath>

namespace lmk {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kStages = 3;  // steps in shared memory: one is computed, the others arrive
constexpr int kMostHeadDim = 256;
constexpr int kBlocksPerProcessor = 4;  // that a sequence alone is cut for

__host__ __device__ inline int smaller(int a, int b) { return a < b ? a : b; }
__host__ __device__ inline int larger(int a, int b) { return a > b ? a : b; }
__host__ __device__ inline int clamped(int x, int low, int high) { return larger(low, smaller(x, high)); }
__host__ __device__ inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// --- sequences, rows, tokens

// What a sequence holds and how its keys are shared out. All of it follows from the sequence alone.
struct Sequence {
  int before, total;  // tokens in the cache before and after the append
  int first;          // no query sees a key before this one
  int share, shares;  // keys of a block, and blocks per key head and chunk of rows: at least one
};

__device__ inline Sequence sequence_of(const DecodeArgs& a, int b) {
  const int room = larger(0, a.capacity - a.seq_new);
  const int64_t length = a.long_lengths ? static_cast<const int64_t*>(a.kv_lengths)[b * a.lengths_stride]
                                        : static_cast<const int32_t*>(a.kv_lengths)[b * a.lengths_stride];
  Sequence s;
  s.before = length < 0 ? 0 : length > room ? room : int(length);
  s.total = s.before + a.seq_new;
  s.first = a.left < 0 ? 0 : larger(0, s.total - a.seq_q - a.left);
  const int keys = s.total - s.first;
  s.share = larger(1, ceil_div(ceil_div(keys, a.most_shares), kDecodeLeastShare)) * kDecodeLeastShare;
  s.shares = larger(1, ceil_div(keys, s.share));
  return s;
}

struct Row {
  int head, i;  // query head, and number of the query
};

// Number `row` of a key head's rows: all heads of the first query, then of the next.
__device__ inline Row row_of(const DecodeArgs& a, int hk, int row) {
  return {hk * a.group + row % a.group, row / a.group};
}

// Where a token's page is: the sequence itself in a cache without pages.
__device__ inline int page_of(const DecodeArgs& a, int b, int j) {
  if (!a.block_table) return b;
  // a number that is out of range must not be read through
  return clamped(a.block_table[b * a.table_stride + j / a.block_size], 0, a.num_blocks - 1);
}

__device__ inline char* token_row(const TokenRows& x, int64_t outer, int64_t token, int64_t head) {
  return x.data + outer * x.outer + token * x.token + head * x.head;
}

__device__ inline int token_in_page(const DecodeArgs& a, int j) { return a.block_table ? j % a.block_size : j; }

// --- elements outside the caches, whose type is known at run time only

__device__ inline float load_element(const void* row, Element type, int c) {
  if (type == Element::f32) return static_cast<const float*>(row)[c];
  if (type == Element::bf16) return widen(static_cast<const Bf16*>(row)[c]);
  return widen(static_cast<const F16*>(row)[c]);
}

__device__ inline void store_element(float x, void* row, Element type, int64_t c) {
  if (type == Element::f32)
    narrow(x, static_cast<float*>(row) + c);
  else if (type == Element::bf16)
    narrow(x, static_cast<Bf16*>(row) + c);
  else
    narrow(x, static_cast<F16*>(row) + c);
}

// Column c of a row of q or k_new, rotated by the angle of its position where there are tables.
__device__ inline float rotated_element(const DecodeArgs& a, const char* row, int position, int c) {
  const float x = load_element(row, a.dtype, c);
  if (!a.cos || c >= 2 * a.half_rotary) return x;
  const int p = clamped(position, 0, a.max_position - 1), half = a.half_rotary;
  const bool first = a.interleaved ? c % 2 == 0 : c < half;
  const int pair = a.interleaved ? c / 2 : first ? c : c - half;
  const int partner = a.interleaved ? c ^ 1 : first ? c + half : c - half;
  const float y = load_element(row, a.dtype, partner);
  const float cos = load_element(static_cast<const char*>(a.cos) + p * a.cos_stride, a.table_dtype, pair);
  const float sin = load_element(static_cast<const char*>(a.sin) + p * a.sin_stride, a.table_dtype, pair);
  return first ? x * cos - y * sin : x * cos + y * sin;
}

// --- the append

__device__ inline float warp_max(float x) {
  for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, offset));
  return x;
}

// A warp writes x, of which each lane holds columns lane, lane + 32, ..., to a row (d,) of an int8 cache: the largest
// magnitude over 127 as its scale, and integers rounded to nearest even.
__device__ inline void store_quantised(const float (&x)[kMostHeadDim / 32], int d, int8_t* row, float* scale_of_row) {
  const int lane = threadIdx.x % 32;
  float largest = 0, spoilt = 0;
  for (float value : x) {
    largest = fmaxf(largest, fabsf(value));
    if (!(fabsf(value) < INFINITY)) spoilt = 1;
  }
  largest = warp_max(largest);
  spoilt = warp_max(spoilt);
  const float scale = largest / 127;
  for (int i = 0; i < kMostHeadDim / 32; ++i) {
    const int c = lane + 32 * i;
    if (c < d) row[c] = spoilt > 0 || scale == 0 ? int8_t(0) : int8_t(rintf(x[i] / scale));
  }
  if (lane == 0) *scale_of_row = spoilt > 0 ? NAN : scale;
}

// Writes the new tokens at positions begin <= j < end of one key head, keys rotated; a warp of `warps` takes a row.
template <class T>
__device__ void append_tokens(const DecodeArgs& a, const Sequence& s, int b, int hk, int begin, int end, int warp,
                              int warps) {
  begin = larger(begin, s.before);
  end = smaller(end, s.total);
  const int lane = threadIdx.x % 32;
  for (int row = 2 * begin + warp; row < 2 * end; row += warps) {
    const int j = row / 2;
    const bool is_key = row % 2 == 0;
    const TokenRows& cache = is_key ? a.k : a.v;
    const int d = is_key ? a.head_dim : a.head_dim_v;
    const char* from = token_row(is_key ? a.k_new : a.v_new, b, j - s.before, hk);
    float x[kMostHeadDim / 32];
    for (int i = 0; i < kMostHeadDim / 32; ++i) {
      const int c = lane + 32 * i;
      x[i] = c >= d ? 0 : is_key ? rotated_element(a, from, j, c) : load_element(from, a.dtype, c);
    }
    const int page = page_of(a, b, j), token = token_in_page(a, j);
    T* to = reinterpret_cast<T*>(token_row(cache, page, token, hk));
    if constexpr (sizeof(T) == 1) {
      const TokenRows& scales = is_key ? a.k_scale : a.v_scale;
      store_quantised(x, d, to, reinterpret_cast<float*>(token_row(scales, page, token, hk)));
    } else {
      for (int i = 0; i < kMostHeadDim / 32; ++i)
        if (lane + 32 * i < d) narrow(x[i], to + lane + 32 * i);
    }
  }
}

// grid: (heads_kv * batch, any). Where the rows of a key head are several blocks, or none, which attend would all
// write.
template <class T>
__global__ void __launch_bounds__(kThreads) append(const __grid_constant__ DecodeArgs a) {
  const int hk = blockIdx.x % a.heads_kv, b = blockIdx.x / a.heads_kv;
  append_tokens<T>(a, sequence_of(a, b), b, hk, 0, a.capacity, blockIdx.y * kWarps + threadIdx.x / 32,
                   gridDim.y * kWarps);
}

// --- attention

// How a cache of T with head sizes up to D is read.
template <class T, int D>
struct Tile {
  static constexpr int kElements = 16 / sizeof(T);                        // of one load
  static constexpr int kLanes = D / kElements < 32 ? D / kElements : 32;  // threads of a team
  static constexpr int kVectors = D / (kElements * kLanes);               // loads of a thread per row
  static constexpr int kTeams = kThreads / kLanes;
  static constexpr int kAtOnce = kVectors == 1 ? 2 : 1;  // keys of a team per step
  static constexpr int kKeys = kTeams * kAtOnce;         // of a step
  static constexpr bool kScaled = sizeof(T) == 1;
  // Of a multiprocessor, at least: leaves the registers that a thread's columns of several rows need.
  static constexpr int kBlocks = kScaled ? 2 : 3;
};

// What has been copied: [stage][key of the team][load][thread], each thread's own. Scales only for int8.
template <class T, int D>
struct Staging {
  using X = Tile<T, D>;
  static constexpr int kScales = X::kScaled ? kThreads : 1;
  uint4 k[kStages][X::kAtOnce][X::kVectors][kThreads], v[kStages][X::kAtOnce][X::kVectors][kThreads];
  float k_scale[kStages][X::kAtOnce][kScales], v_scale[kStages][X::kAtOnce][kScales];
};

template <class T, int D, int kRows>
struct Shared {
  static constexpr int kTeams = Tile<T, D>::kTeams;
  union {
    Staging<T, D> staging;
    float o[kTeams][kRows][D];
  };
  float q[kRows][D];
  float m[kTeams][kRows], l[kTeams][kRows], weight[kTeams][kRows];
  float top[kRows], sum[kRows];
};

// 16 bytes of a row as floats.
__device__ inline void unpack(const uint4& x, float (&y)[4]) {
  y[0] = __uint_as_float(x.x), y[1] = __uint_as_float(x.y), y[2] = __uint_as_float(x.z), y[3] = __uint_as_float(x.w);
}

template <class T>
__device__ inline void unpack_pairs(const uint4& x, float (&y)[8]) {
  const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    y[2 * i] = widen(T{uint16_t(words[i])});
    y[2 * i + 1] = widen(T{uint16_t(words[i] >> 16)});
  }
}

// An integer plus 128 becomes the low bits of a float of 2^23, which a subtraction takes away again: conversions have a
// quarter of the rate.
__device__ inline void unpack_bytes(const uint4& x, float (&y)[16]) {
  const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < 16; ++i)
    y[i] = __uint_as_float(__byte_perm(words[i / 4] ^ 0x80808080u, 0x4b000000u, 0x7540 + i % 4)) - 8388736.0f;
}

template <class T, int n>
__device__ inline void unpack_as(const uint4& x, float (&y)[n]) {
  if constexpr (sizeof(T) == 4)
    unpack(x, y);
  else if constexpr (sizeof(T) == 2)
    unpack_pairs<T>(x, y);
  else
    unpack_bytes(x, y);
}

// Columns c, c + 1, ... of a row (d,) into 16 bytes of shared memory, zeros beyond d and where nothing is held.
template <class T>
__device__ inline void copy_columns(uint4* to, const char* row, int c, int d, bool held, bool wide) {
  held = held && c < d;
  if (wide) return copy_async<16>(to, held ? row + c * int(sizeof(T)) : row, held);
  T* elements = reinterpret_cast<T*>(to);
  for (int e = 0; e < int(16 / sizeof(T)); ++e)
    elements[e] = held && c + e < d ? reinterpret_cast<const T*>(row)[c + e] : T{};
}

// float32 keeps its accuracy; 16 and 8 bits do not notice the hardware's 2^-21.
template <class T>
__device__ inline float exponential(float x) {
  return sizeof(T) == 4 ? expf(x) : __expf(x);
}

// Closes the softmax of a row: o, its sum and its maximum over all keys. A row that saw nothing gets 0 and -inf.
struct Finish {
  float factor, lse;  // out = o * factor
  __device__ Finish(const DecodeArgs& a, int head, float top, float sum) {
    // a sum that is NaN has seen something
    const bool seen = top > -INFINITY || sum != sum;
    float kept = 1;
    if (a.sink && seen) {
      const float sink = a.sink[head], both = fmaxf(top, sink);
      kept = expf(top - both);
      sum = sum * kept + expf(sink - both);
      top = both;
    }
    factor = seen ? kept / sum : 0;
    lse = seen ? top + logf(sum) : -INFINITY;
  }
};

__device__ inline int64_t row_index(const DecodeArgs& a, int b, const Row& row) {
  return (int64_t(b) * a.heads + row.head) * a.seq_q + row.i;
}

__device__ inline int64_t out_index(const DecodeArgs& a, int b, const Row& row) {
  return ((int64_t(b) * a.seq_q + row.i) * a.heads + row.head) * a.head_dim_v;
}

// Maximum and sum of each row's shares, (rows, launched_shares), behind the accumulators.
__host__ __device__ inline int64_t partial_rows(const DecodeArgs& a) {
  return int64_t(a.batch) * a.heads * a.seq_q * a.launched_shares;
}

__device__ inline float2* partial_softmax(const DecodeArgs& a) {
  // an even number of floats lies before
  const int64_t floats = partial_rows(a) * a.head_dim_v;
  return reinterpret_cast<float2*>(a.partial + floats + floats % 2);
}

// grid: (row_chunks * heads_kv * batch, launched_shares)
template <class T, int D, int kRows>
__global__ void __launch_bounds__(kThreads, (Tile<T, D>::kBlocks)) attend(const __grid_constant__ DecodeArgs a) {
  using X = Tile<T, D>;
  constexpr int kElements = X::kElements, kVectors = X::kVectors, kAtOnce = X::kAtOnce, kLanes = X::kLanes;
  __shared__ Shared<T, D, kRows> shared;
  const int chunks = a.row_chunks;
  const int first_row = int(blockIdx.x % chunks) * kRows;
  const int hk = blockIdx.x / chunks % a.heads_kv, b = blockIdx.x / chunks / a.heads_kv;
  const int team = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const Sequence s = sequence_of(a, b);
  const int share = blockIdx.y;
  if (share >= s.shares) return;
  const int begin = s.first + share * s.share, end = smaller(begin + s.share, s.total);
  if (a.seq_new > 0 && chunks == 1) {  // the first share also takes what no query sees
    append_tokens<T>(a, s, b, hk, share == 0 ? 0 : begin, end, threadIdx.x / 32, kWarps);
    __syncthreads();
  }

  // lo <= j < hi: what some row sees. Everything else may never have been written, and 0 * NaN is NaN.
  const int position_of_first = s.total - a.seq_q + first_row / a.group;
  const int position_of_last = s.total - a.seq_q + (smaller(first_row + kRows, a.rows) - 1) / a.group;
  const int lo = larger(begin, a.left < 0 ? 0 : position_of_first - a.left), hi = smaller(end, position_of_last + 1);
  const int steps = hi > lo ? ceil_div(hi - lo, X::kKeys) : 0;

  int page[kAtOnce];  // of the keys that are copied next: a table is read one step before its pages are
  auto look_up = [&](int step) {
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int j = lo + step * X::kKeys + u * X::kTeams + team;
      page[u] = j < hi ? page_of(a, b, j) : 0;
    }
  };
  auto copy = [&](int step) {
    const int stage = step % kStages;
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int j = lo + step * X::kKeys + u * X::kTeams + team;
      const bool held = j < hi;
      const int token = held ? token_in_page(a, j) : 0;
      const char *key = token_row(a.k, page[u], token, hk), *value = token_row(a.v, page[u], token, hk);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int c = (i * kLanes + lane) * kElements;
        copy_columns<T>(&shared.staging.k[stage][u][i][threadIdx.x], key, c, a.head_dim, held, a.wide_k);
        copy_columns<T>(&shared.staging.v[stage][u][i][threadIdx.x], value, c, a.head_dim_v, held, a.wide_v);
      }
      if constexpr (X::kScaled) {
        copy_async<4>(&shared.staging.k_scale[stage][u][threadIdx.x], token_row(a.k_scale, page[u], token, hk), held);
        copy_async<4>(&shared.staging.v_scale[stage][u][threadIdx.x], token_row(a.v_scale, page[u], token, hk), held);
      }
    }
  };
  // groups are closed whether or not they hold a copy, so that waiting counts steps
  look_up(0);
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) copy(step), look_up(step + 1);
    close_copies();
  }

  for (int index = threadIdx.x; index < kRows * D; index += kThreads) {
    const int r = index / D, c = index % D;
    float x = 0;
    if (first_row + r < a.rows && c < a.head_dim) {
      const Row row = row_of(a, hk, first_row + r);
      x = rotated_element(a, token_row(a.q, b, row.i, row.head), s.total - a.seq_q + row.i, c);
    }
    shared.q[r][c] = x;
  }
  __syncthreads();
  float q[kRows][kVectors][kElements], o[kRows][kVectors][kElements];
  float m[kRows], l[kRows], slope[kRows];
  int position[kRows];  // in the sequence; below 0 a row sees nothing
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const bool exists = first_row + r < a.rows;
    position[r] = exists ? s.total - a.seq_q + (first_row + r) / a.group : -1;
    slope[r] = a.slopes && exists ? a.slopes[b * a.slopes_batch + row_of(a, hk, first_row + r).head] : 0;
    m[r] = -INFINITY;
    l[r] = 0;
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        q[r][i][e] = shared.q[r][(i * kLanes + lane) * kElements + e];
        o[r][i][e] = 0;
      }
  }

  for (int step = 0; step < steps; ++step) {
    if (step + kStages - 1 < steps) copy(step + kStages - 1), look_up(step + kStages);
    close_copies();
    wait_for_copies<kStages - 1>();
    const int stage = step % kStages;

    float p[kAtOnce][kRows];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) p[u][r] = 0;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        float key[kElements];
        unpack_as<T>(shared.staging.k[stage][u][i][threadIdx.x], key);
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int e = 0; e < kElements; ++e) p[u][r] = fmaf(q[r][i][e], key[e], p[u][r]);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int offset = kLanes / 2; offset > 0; offset /= 2) p[u][r] += __shfl_xor_sync(~0u, p[u][r], offset);
    }

    float top[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      top[r] = m[r];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int j = lo + step * X::kKeys + u * X::kTeams + team, distance = position[r] - j;
        float x = p[u][r] * a.scale;
        if constexpr (X::kScaled) x *= shared.staging.k_scale[stage][u][threadIdx.x];
        if (a.softcap > 0) x = a.softcap * tanhf(x / a.softcap);
        x -= slope[r] * float(distance);
        const bool seen = distance >= 0 && (a.left < 0 || distance <= a.left) && j < hi;
        p[u][r] = seen ? x : -INFINITY;
        top[r] = fmaxf(top[r], p[u][r]);
      }
      // a row that has seen nothing yet has -inf, which must not meet -inf
      const float shift = top[r] == -INFINITY ? 0 : top[r];
      const float kept = exponential<T>(m[r] - shift);
      m[r] = top[r];
      l[r] *= kept;
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        p[u][r] = exponential<T>(p[u][r] - shift);
        l[r] += p[u][r];
        if constexpr (X::kScaled) p[u][r] *= shared.staging.v_scale[stage][u][threadIdx.x];
      }
#pragma unroll
      for (int i = 0; i < kVectors; ++i)
#pragma unroll
        for (int e = 0; e < kElements; ++e) o[r][i][e] *= kept;
    }

#pragma unroll
    for (int u = 0; u < kAtOnce; ++u)
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        float value[kElements];
        unpack_as<T>(shared.staging.v[stage][u][i][threadIdx.x], value);
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int e = 0; e < kElements; ++e) o[r][i][e] = fmaf(p[u][r], value[e], o[r][i][e]);
      }
  }

  // The teams meet: their accumulators take the place of the copies, of which none is under way.
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
#pragma unroll
      for (int e = 0; e < kElements; ++e) shared.o[team][r][(i * kLanes + lane) * kElements + e] = o[r][i][e];
    if (lane == 0) shared.m[team][r] = m[r], shared.l[team][r] = l[r];
  }
  __syncthreads();
  static_assert(X::kTeams * kRows <= kThreads);
  if (threadIdx.x < X::kTeams * kRows) {
    const int r = threadIdx.x % kRows, of = threadIdx.x / kRows;
    float top = -INFINITY, sum = 0;
    for (int t = 0; t < X::kTeams; ++t) top = fmaxf(top, shared.m[t][r]);
    const float shift = top == -INFINITY ? 0 : top;
    shared.weight[of][r] = expf(shared.m[of][r] - shift);
    if (of == 0) {
      for (int t = 0; t < X::kTeams; ++t) sum += shared.l[t][r] * expf(shared.m[t][r] - shift);
      shared.top[r] = top, shared.sum[r] = sum;
    }
  }
  __syncthreads();
  for (int index = threadIdx.x; index < kRows * D; index += kThreads) {
    const int r = index / D, c = index % D;
    if (first_row + r >= a.rows || c >= a.head_dim_v) continue;
    float x = 0;
#pragma unroll
    for (int t = 0; t < X::kTeams; ++t) x = fmaf(shared.o[t][r][c], shared.weight[t][r], x);
    const Row row = row_of(a, hk, first_row + r);
    const float top = shared.top[r], sum = shared.sum[r];
    if (s.shares == 1) {
      const Finish finish(a, row.head, top, sum);
      store_element(x * finish.factor, a.out, a.dtype, out_index(a, b, row) + c);
      if (c == 0) a.lse[row_index(a, b, row)] = finish.lse;
    } else {
      const int64_t at = row_index(a, b, row) * a.launched_shares + share;
      a.partial[at * a.head_dim_v + c] = x;
      if (c == 0) partial_softmax(a)[at] = {top, sum};
    }
  }
}

// A row (b, head, i) from its shares, each warp adding up every fourth of them. grid: (seq_q, heads, batch)
__global__ void __launch_bounds__(kThreads) combine(const __grid_constant__ DecodeArgs a) {
  __shared__ float weight[kDecodeMostShares], scratch[2][kWarps], sums[kWarps][kMostHeadDim];
  static_assert(kDecodeMostShares <= kThreads);
  const int b = blockIdx.z, shares = sequence_of(a, b).shares;
  if (shares == 1) return;
  const Row row{int(blockIdx.y), int(blockIdx.x)};
  const int64_t first = row_index(a, b, row) * a.launched_shares;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  float2 softmax = {-INFINITY, 0};  // maximum and sum
  if (int(threadIdx.x) < shares) softmax = partial_softmax(a)[first + threadIdx.x];
  const float warp_top = warp_max(softmax.x);
  if (lane == 0) scratch[0][warp] = warp_top;
  __syncthreads();
  float top = -INFINITY, sum = 0;
  for (int w = 0; w < kWarps; ++w) top = fmaxf(top, scratch[0][w]);
  const float of_share = expf(softmax.x - (top == -INFINITY ? 0 : top));
  weight[threadIdx.x] = of_share;
  float warp_sum = softmax.y * of_share;
  for (int offset = 16; offset > 0; offset /= 2) warp_sum += __shfl_xor_sync(~0u, warp_sum, offset);
  if (lane == 0) scratch[1][warp] = warp_sum;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) sum += scratch[1][w];

  float x[kMostHeadDim / 32] = {};
  for (int share = warp; share < shares; share += kWarps) {
    const float* o = a.partial + (first + share) * a.head_dim_v;
#pragma unroll
    for (int i = 0; i < kMostHeadDim / 32; ++i)
      if (lane + 32 * i < a.head_dim_v) x[i] = fmaf(o[lane + 32 * i], weight[share], x[i]);
  }
#pragma unroll
  for (int i = 0; i < kMostHeadDim / 32; ++i) sums[warp][lane + 32 * i] = x[i];
  __syncthreads();
  const Finish finish(a, row.head, top, sum);
  for (int c = threadIdx.x; c < a.head_dim_v; c += kThreads) {
    float y = 0;
    for (int w = 0; w < kWarps; ++w) y += sums[w][c];
    store_element(y * finish.factor, a.out, a.dtype, out_index(a, b, row) + c);
  }
  if (threadIdx.x == 0) a.lse[row_index(a, b, row)] = finish.lse;
}

// --- launches

template <class T, int D>
const char* attend_rows(const DecodeArgs& a, void* stream) {
  const dim3 grid(uint32_t(a.row_chunks) * a.heads_kv * a.batch, a.launched_shares);
  return launch(a.block_rows == 1 ? &attend<T, D, 1> : &attend<T, D, kDecodeMostRows>, grid, kThreads, stream, a);
}

template <class T>
const char* decode(const DecodeArgs& a, void* stream) {
  if (a.seq_new > 0 && a.row_chunks != 1) {
    const dim3 grid(uint32_t(a.heads_kv) * a.batch, smaller(ceil_div(2 * a.seq_new, kWarps), 64));
    if (const char* error = launch(&append<T>, grid, kThreads, stream, a)) return error;
  }
  if (a.rows == 0) return nullptr;
  const int d = larger(a.head_dim, a.head_dim_v);
  const char* error = d <= 64    ? attend_rows<T, 64>(a, stream)
                      : d <= 128 ? attend_rows<T, 128>(a, stream)
                                 : attend_rows<T, 256>(a, stream);
  if (error || a.launched_shares == 1) return error;
  return launch(&combine, dim3(a.seq_q, a.heads, a.batch), kThreads, stream, a);
}

// Whether rows (d,) begin at multiples of 16 bytes and have whole 16 bytes.
bool is_wide(const TokenRows& x, int64_t row_bytes) {
  return (reinterpret_cast<uintptr_t>(x.data) | uint64_t(x.outer | x.token | x.head | row_bytes)) % 16 == 0;
}

}  // namespace

void plan_decode(DecodeArgs& a) {
  a.group = a.heads_kv ? a.heads / a.heads_kv : 0;
  a.rows = a.group * a.seq_q;
  a.block_rows = a.rows > 1 ? kDecodeMostRows : 1;
  a.row_chunks = ceil_div(a.rows, a.block_rows);
  const int64_t blocks = int64_t(larger(1, a.heads_kv)) * larger(1, a.row_chunks);
  a.most_shares =
      clamped(int((int64_t(kBlocksPerProcessor) * multiprocessors() + blocks - 1) / blocks), 1, kDecodeMostShares);
  const int span = a.left < 0 || a.left > a.capacity ? a.capacity : smaller(a.capacity, a.left + a.seq_q);
  a.launched_shares = clamped(ceil_div(span, kDecodeLeastShare), 1, a.most_shares);
  const int64_t size = element_size(a.cache_dtype);
  a.wide_k = is_wide(a.k, a.head_dim * size);
  a.wide_v = is_wide(a.v, a.head_dim_v * size);
}

int64_t decode_scratch(const DecodeArgs& a) {
  if (a.launched_shares == 1) return 0;
  const int64_t floats = partial_rows(a) * a.head_dim_v;
  return int64_t(sizeof(float)) * (floats + floats % 2 + 2 * partial_rows(a));
}

const char* attention_decode(const DecodeArgs& a, void* stream) {
  if (a.batch == 0 || a.heads_kv == 0) return nullptr;
  switch (a.cache_dtype) {
    case Element::f32:
      return decode<float>(a, stream);
    case Element::bf16:
      return decode<Bf16>(a, stream);
    case Element::f16:
      return decode<F16>(a, stream);
    case Element::int8:
      return decode<int8_t>(a, stream);
  }
  return "unknown dtype";
}

}  // namespace lmk
