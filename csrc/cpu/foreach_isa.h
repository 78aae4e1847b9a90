// Compiles LMK_BODY once per instruction set. No include guard: a file may do this for several bodies.
//
//   #include <cmath>                        // every header of the standard library comes before this one
//   #define LMK_BODY "softmax_body.h"
//   #include "foreach_isa.h"
//
//   namespace lmk {
//   SoftmaxFn softmax_rows() {
//     static constexpr SoftmaxFn kTable[] = LMK_ISA_TABLE(softmax_rows);
//     return kTable[static_cast<int>(isa())];
//   }
//   }
//
// A body sees
//   LMK_NS        the namespace of this instruction set: it puts its code in lmk::LMK_NS
//   LMK_LANES     floats per vector
//   LMK_BF16_DOT  1 where the CPU multiplies pairs of bfloat16 (vdpbf16ps), else 0
//   LMK_TILES     1 where it multiplies tiles (AMX), else 0
// and tests these, never __AVX2__ and its like, which clang does not set here. A body that has something to do with
// tiles is compiled for amx where LMK_BODY_HAS_TILES is defined; others run there as they are for avx512bf16.
//
// prfchw lets __builtin_prefetch(p, 1) ask for a line to write; a CPU without it (Haswell) takes that for a nop.
//
// The target is set by pragma around the body alone, so what the standard library's headers define stays code for the
// baseline CPU, and the linker cannot let a copy that needs AVX stand in for it.
#include "isa.h"

#ifndef LMK_BODY
#error "define LMK_BODY, the file to compile for each instruction set, before including foreach_isa.h"
#endif

#define LMK_NS generic
#define LMK_LANES 4
#define LMK_BF16_DOT 0
#define LMK_TILES 0
#include LMK_BODY
#undef LMK_NS
#undef LMK_LANES
#undef LMK_BF16_DOT
#undef LMK_TILES

#if LMK_X86

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12's header makes its undefined vectors by "__Y = __Y"
#include <immintrin.h>
#pragma GCC diagnostic pop

#define LMK_PRAGMA(...) _Pragma(#__VA_ARGS__)
#if defined(__clang__)
#define LMK_PUSH_TARGET(target_) LMK_PRAGMA(clang attribute push(__attribute__((target(target_))), apply_to = function))
#define LMK_POP_TARGET LMK_PRAGMA(clang attribute pop)
#else
#define LMK_PUSH_TARGET(target_) LMK_PRAGMA(GCC push_options) LMK_PRAGMA(GCC target(target_))
#define LMK_POP_TARGET LMK_PRAGMA(GCC pop_options)
#endif

LMK_PUSH_TARGET("avx2,fma,f16c,prfchw")
#define LMK_NS avx2
#define LMK_LANES 8
#define LMK_BF16_DOT 0
#define LMK_TILES 0
#include LMK_BODY
#undef LMK_NS
#undef LMK_LANES
#undef LMK_BF16_DOT
#undef LMK_TILES
LMK_POP_TARGET

LMK_PUSH_TARGET("avx2,fma,f16c,prfchw,avx512f,avx512bw,avx512dq,avx512vl")
#define LMK_NS avx512
#define LMK_LANES 16
#define LMK_BF16_DOT 0
#define LMK_TILES 0
#include LMK_BODY
#undef LMK_NS
#undef LMK_LANES
#undef LMK_BF16_DOT
#undef LMK_TILES
LMK_POP_TARGET

LMK_PUSH_TARGET("avx2,fma,f16c,prfchw,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")
#define LMK_NS avx512bf16
#define LMK_LANES 16
#define LMK_BF16_DOT 1
#define LMK_TILES 0
#include LMK_BODY
#undef LMK_NS
#undef LMK_LANES
#undef LMK_BF16_DOT
#undef LMK_TILES
LMK_POP_TARGET

#ifdef LMK_BODY_HAS_TILES
LMK_PUSH_TARGET(
    "avx2,fma,f16c,prfchw,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,amx-tile,amx-bf16,amx-int8")
#define LMK_NS amx
#define LMK_LANES 16
#define LMK_BF16_DOT 1
#define LMK_TILES 1
#include LMK_BODY
#undef LMK_NS
#undef LMK_LANES
#undef LMK_BF16_DOT
#undef LMK_TILES
LMK_POP_TARGET
#else
namespace lmk {
namespace amx {
using namespace avx512bf16;
}
}  // namespace lmk
#endif

#undef LMK_PRAGMA
#undef LMK_PUSH_TARGET
#undef LMK_POP_TARGET

#endif  // LMK_X86

#undef LMK_BODY
#undef LMK_BODY_HAS_TILES
