// Attention over a cache of keys and values on a GPU; free of torch and of CUDA's headers.
#pragma once

#include <cstdint>

namespace lmk {

enum class Element : int { f32, bf16, f16, int8 };

inline int64_t element_size(Element element) { return element == Element::f32 ? 4 : element == Element::int8 ? 1 : 2; }

// A tensor indexed (sequence or page, token, head, :) with a contiguous last axis; strides in bytes.
struct TokenRows {
  char* data;
  int64_t outer, token, head;
};

constexpr int kDecodeMostRows = 4;     // query rows of one block
constexpr int kDecodeLeastShare = 64;  // keys of one block, unless the sequence has fewer; shares are multiples of it
constexpr int kDecodeMostShares = 128;

struct DecodeArgs {
  Element dtype, cache_dtype;  // of q, k_new, v_new and out; of the cache: the same or int8
  int32_t batch, heads, heads_kv, seq_q, seq_new, head_dim, head_dim_v;
  const void* kv_lengths;  // (batch,) int64 or int32, tokens before the append; the kernels clamp them
  int64_t lengths_stride;
  bool long_lengths;
  TokenRows q, k_new, v_new;   // (batch, seq_q or seq_new, heads or heads_kv, :)
  TokenRows k, v;              // the cache
  TokenRows k_scale, v_scale;  // float32, one per row of an int8 cache; else null
  const int32_t* block_table;  // (batch, max_blocks) numbers of pages, or null: then a sequence is one page
  int64_t table_stride;        // in elements
  int32_t block_size, num_blocks;
  int32_t capacity;  // tokens that a sequence has room for

  const void *cos, *sin;  // (max_position, half_rotary) in table_dtype, or null
  Element table_dtype;
  int64_t cos_stride, sin_stride;  // in bytes
  int32_t max_position, half_rotary;
  bool interleaved;

  float scale, softcap;  // softcap 0 is off
  int32_t left;          // a query sees keys from its own position - left on; -1 is unbounded
  const float* slopes;   // ALiBi, (batch or 1, heads)
  int64_t slopes_batch;  // 0 or heads
  const float* sink;     // (heads,)

  void* out;   // (batch, seq_q, heads, head_dim_v), contiguous
  float* lse;  // (batch, heads, seq_q), contiguous

  // The plan, filled in by plan_decode.
  int32_t group, rows;             // query heads per key head; rows of one key head, group * seq_q
  int32_t block_rows, row_chunks;  // rows of a block, 1 or kDecodeMostRows, and blocks for all rows
  int32_t most_shares;             // into which a sequence is cut; follows from the GPU and the shape without the batch
  int32_t launched_shares;         // no sequence that fits into the cache has more
  bool wide_k, wide_v;             // rows can be read 16 bytes at a time
  float* partial;  // decode_scratch bytes: per row and share the accumulator (head_dim_v,), then (max, sum)
};

void plan_decode(DecodeArgs& a);              // for the current GPU
int64_t decode_scratch(const DecodeArgs& a);  // bytes of `partial`; 0 where no sequence is cut

// Appends, attends, combines the shares: all in the stream, with no wait and no look at a value, so that a CUDA graph
// can capture it. Returns what went wrong, or null.
const char* attention_decode(const DecodeArgs& a, void* stream);

}  // namespace lmk
