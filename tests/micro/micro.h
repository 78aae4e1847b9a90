// What the test-only module calls: vectors, products, rows and Philox of csrc/cpu as plain functions, one table for
// each instruction set. Free of torch and of Python.
#pragma once

#include <cstdint>

#include "activation.h"
#include "dtypes.h"
#include "isa.h"

namespace lmk {

// A function of vectors over arrays (n,) of any length.
template <class T>
struct UnaryFn {
  const char* name;
  void (*run)(const T* x, int64_t n, T* y);
};
template <class T>
struct BinaryFn {
  const char* name;
  void (*run)(const T* a, const T* b, int64_t n, T* y);
};

// Of float or double; a name may be missing (null).
template <class T>
struct MicroVectors {
  int64_t lanes;
  UnaryFn<T> unary[5];
  BinaryFn<T> binary[4];
  T (*reduce_add)(const T* x);  // of one vector
  T (*reduce_max)(const T* x);
  void (*activate)(Activation activation, const T* x, int64_t n, T* y);
  void (*activate_grad)(Activation activation, const T* x, int64_t n, T* y);
  // for results that are rounded to bfloat16; null where there is none
  void (*activate_bf16)(Activation activation, const T* x, int64_t n, T* y);
  void (*activate_grad_bf16)(Activation activation, const T* x, int64_t n, T* y);
  void (*log_row)(const T* x, int64_t n, double* y);
  void (*load_row)(DType dtype, const void* src, int64_t n, T* dst);
  void (*store_row)(DType dtype, const T* src, int64_t n, void* dst);
};

struct GemmCall {
  int start;  // of enum class Start
  int64_t rows, vecs, depth;
  const void* a;
  int64_t a_row, a_depth;
  const void* b;
  int64_t b_depth, b_panel;
  void* c;
  int64_t c_row;
  const void* factor;
};

// Of float, double or pairs of bfloat16; all null where the instruction set has no such products.
struct MicroProducts {
  int64_t lanes;
  void (*gemm)(const GemmCall& call);
  void (*pack_rows)(DType dtype, const void* const* rows, int64_t n, int64_t n_cols, void* dst, int64_t ld);
  void (*pack_depth)(DType dtype, const void* const* rows, int64_t n, int64_t n_cols, void* dst, int64_t ld);
  void (*pack_columns)(DType dtype, const void* const* rows, int64_t n, int64_t n_cols, void* dst, void* buffer);
};

struct Micro {
  MicroVectors<float> float32;
  MicroVectors<double> float64;
  MicroProducts products_f32, products_f64, products_bf16;
  int64_t tile_vecs;
  // null where there is none
  void (*transpose_tile)(const void* const* rows, int64_t k, void* dst, int64_t dst_ld);
  void (*pack_row)(const float* x, int64_t n, uint32_t* dst);
  void (*pack_row_pair)(const float* even, const float* odd, int64_t n, uint32_t* dst);
  uint16_t (*to_bf16)(float x);
  uint16_t (*to_f16)(float x);
  float (*from_f16)(uint16_t half);
  // y (lanes,): x (32,), times factor and rounded, times the weights less zero. weights: 4 bytes of each lane, one per
  // element of x, 8 times; with 4 bits (the second function) the low
  // halves of 4 times 4 bytes, and then the high halves
  void (*integer_dot[2])(const float* x, float factor, const uint8_t* weights, float* y);
  // words (lanes, 4)
  void (*philox)(uint64_t seed, uint32_t first, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t* words);
};

const Micro& micro(Isa isa);

}  // namespace lmk
