// Attention over a cache of keys and values that grows by a few tokens per call; free of torch.
#pragma once

#include <algorithm>
#include <cstdint>

#include "dtypes.h"

namespace lmk {

// What the elements of a cache are, and with that which kernels read them.
enum class CacheType : int { f32, bf16, f16, f64, int8 };

// A tensor indexed (sequence or page, token, head, :) with a contiguous last axis; strides in bytes.
struct TokenRows {
  char* data;
  int64_t outer, token, head;
};

constexpr int64_t kDecodeBlock = 64;     // keys whose scores are held at once; shares of the keys are multiples of it
constexpr int64_t kDecodeMostRows = 64;  // query rows of one task
// Tasks of one sequence, or a few more: 16 where it has the keys, up to 64 of 256 keys or more and up to 256 of 1024 or
// more, as to begin a task costs as much as some 20 keys.
inline int64_t decode_tasks(int64_t keys) {
  return std::clamp<int64_t>(keys / 1024, std::clamp<int64_t>(keys / 256, 16, 64), 256);
}

// One sequence of the batch: what it holds and how its keys are shared out. All of it follows from the sequence alone.
struct DecodeSequence {
  int64_t before, total;  // tokens in the cache before and after the append
  int64_t first;          // no query sees a key before this one; a multiple of kDecodeBlock
  int64_t share, shares;  // keys of a task, and tasks per key head and chunk of rows: at least one
};

struct DecodeArgs {
  DType dtype;  // of q, k_new, v_new and out
  int64_t batch, heads, heads_kv, seq_q, seq_new, head_dim, head_dim_v;
  const DecodeSequence* sequences;  // (batch,)
  int64_t most_shares;              // of any sequence
  TokenRows q, k_new, v_new;        // (batch, seq_q or seq_new, heads or heads_kv, :)
  TokenRows k, v;                   // the cache
  TokenRows k_scale, v_scale;       // float32, one per row of an int8 cache; else null
  const int32_t* block_table;       // (batch, max_blocks) numbers of pages, or null: then a sequence is one page
  int64_t table_stride, block_size, num_blocks;

  const void *cos, *sin;  // (max_position, half_rotary) in table_dtype, or null
  DType table_dtype;
  int64_t cos_stride, sin_stride;  // in bytes
  int64_t max_position, half_rotary;
  bool interleaved;

  double scale, softcap;  // softcap 0 is off
  int64_t left;           // a query sees keys from its own position - left on; -1 is unbounded
  const float* slopes;    // ALiBi, (batch or 1, heads); doubles for float64, as are sink and lse
  int64_t slopes_batch;   // 0 or heads
  const float* sink;      // (heads,)

  void* out;      // (batch, seq_q, heads, head_dim_v), contiguous
  void* lse;      // (batch, heads, seq_q), contiguous
  void* partial;  // per task of a sequence with several shares: the state of its rows

  int64_t group() const { return heads_kv ? heads / heads_kv : 0; }
  int64_t rows() const { return group() * seq_q; }  // of one key head
  int64_t row_chunks() const { return (rows() + kDecodeMostRows - 1) / kDecodeMostRows; }
  int64_t chunk_rows() const { return std::min(rows(), kDecodeMostRows); }
  // tasks are numbered with the key heads innermost: in a cache (b, s, h, d) they read neighbours in memory
  int64_t tasks() const { return batch * most_shares * row_chunks() * heads_kv; }
};

inline DecodeSequence decode_sequence(const DecodeArgs& a, int64_t before) {
  DecodeSequence s;
  s.before = before;
  s.total = before + a.seq_new;
  const int64_t seen = a.left < 0 ? 0 : std::max<int64_t>(0, s.total - a.seq_q - a.left);
  s.first = seen / kDecodeBlock * kDecodeBlock;
  const int64_t keys = s.total - s.first, heads = std::max<int64_t>(1, a.heads_kv * a.row_chunks());
  const int64_t most = std::max<int64_t>(1, decode_tasks(heads * keys) / heads);
  const int64_t blocks = std::max<int64_t>(1, (keys + kDecodeBlock - 1) / kDecodeBlock);
  const int64_t blocks_per_share = (blocks + most - 1) / most;
  s.share = blocks_per_share * kDecodeBlock;
  s.shares = (blocks + blocks_per_share - 1) / blocks_per_share;
  return s;
}

// Everything for one cache and instruction set. No function allocates, throws or starts threads.
struct DecodeKernels {
  int64_t (*scratch)(const DecodeArgs&);  // bytes of one thread, aligned to 64
  int64_t (*state)(const DecodeArgs&);    // bytes that one task leaves in partial

  // Appends all new tokens of one key head; batch * heads_kv tasks. Only needed where rows come in several chunks or
  // not at all: else attend appends what falls into its share.
  void (*append)(const DecodeArgs&, int64_t task, void* scratch);
  void (*attend)(const DecodeArgs&, int64_t task, void* scratch);  // tasks()
  void (*finish)(const DecodeArgs&, int64_t task);                 // batch * row_chunks * heads_kv: merges the shares
};

const DecodeKernels& decode_kernels(CacheType type);

}  // namespace lmk
