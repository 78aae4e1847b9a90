// Linear layers on few rows for one instruction set; included by skinny.cpp through foreach_isa.h.

#include "vec.h"
#include "vecmath.h"
#include "activation_body.h"
#include "gemm.h"
#include "rows.h"
#include "elements.h"
#include "epilogue_body.h"
#include "skinny_math_body.h"
#include "skinny_rows_body.h"
#include "skinny_columns_body.h"

namespace lmk {
namespace LMK_NS {
namespace {

inline bool is_in_parts(const SkinnyArgs& a) { return a.sum_depth > 0 && a.sum_depth < a.depth; }

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk

#if LMK_TILES
#include "skinny_tiles_body.h"
#endif

namespace lmk {
namespace LMK_NS {
namespace {

template <class M>
void pack_skinny_x(const SkinnyArgs& a, void* packed, int64_t row) {
  using X = typename M::X;
  const char* src = static_cast<const char*>(a.x) + row * a.x_row * element_size(a.dtype);
  X* dst = static_cast<X*>(packed) + row * a.packed_row;
  if constexpr (sizeof(X) == 2)
    memcpy(dst, src, size_t(a.depth) * 2);
  else
    load_row(a.dtype, src, a.depth, dst);
  for (int64_t k = a.depth; k < a.packed_row; ++k) dst[k] = X(0);
}

template <class M>
int64_t skinny_scratch(const SkinnyArgs& a, int64_t cols) {
  return a.transposed ? columns_scratch<M>(a, cols) : rows_scratch<M>(a, cols);
}

template <class M>
void run_skinny(const SkinnyArgs& a, int64_t first, int64_t cols, void* scratch) {
  if (!a.transposed) return run_rows<M>(a, first, cols, scratch);
  if (!is_in_parts(a)) return run_columns<M>(a, first, cols, scratch);
  for (int64_t k = 0; k < a.depth; k += a.sum_depth) {
    SkinnyArgs part = a;
    part.depth = a.depth - k < a.sum_depth ? a.depth - k : a.sum_depth;
    part.weight = static_cast<const typename M::Elem*>(a.weight) + k * a.weight_row;
    part.packed = static_cast<const typename M::X*>(a.packed) + k;
    if (k > 0) part.epilogue.bias = nullptr;
    if (k > 0) part.epilogue.residual = a.epilogue.out, part.epilogue.residual_row = a.epilogue.out_row;
    if (k + a.sum_depth < a.depth) part.next = {};
    run_columns<M>(part, first, cols, scratch);
  }
}

template <class M>
constexpr SkinnyKernels skinny_kernels_of() {
  return {sizeof(typename M::X), M::kDepth,        kColumnVecs * M::V::kLanes,
          skinny_scratch<M>,     pack_skinny_x<M>, run_skinny<M>};
}

#if LMK_BF16_DOT
using SkinnyForBf16 = SkinnyBf16;
#else
using SkinnyForBf16 = SkinnyWiden<load_bf16>;
#endif

#if LMK_TILES
constexpr SkinnyKernels kForBf16 = {2, kTileK, 2 * kTilePanel, tiles_scratch, pack_skinny_x<SkinnyBf16>, run_tiles};
#else
constexpr SkinnyKernels kForBf16 = skinny_kernels_of<SkinnyForBf16>();
#endif

// One row per DType, in its order.
constexpr SkinnyKernels kSkinny[] = {skinny_kernels_of<SkinnySame<float>>(), kForBf16,
                                     skinny_kernels_of<SkinnyWiden<load_f16>>(),
                                     skinny_kernels_of<SkinnySame<double>>()};

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk
