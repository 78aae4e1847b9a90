// Softmax attention for one instruction set; included by attention.cpp through foreach_isa.h.

#include "vec.h"
#include "vecmath.h"
#include "gemm.h"
#include "rows.h"
#include "elements.h"
#include "row_products.h"
#include "philox.h"
#include "attention_score_body.h"
#include "attention_fwd_body.h"
#include "attention_tiles_body.h"
#include "attention_split_body.h"
#include "attention_bwd_body.h"
#include "attention_short_body.h"
#include "attention_bwd_tiles_body.h"

namespace lmk {
namespace LMK_NS {
namespace {

// Short sequences have a way of their own; other tasks of bfloat16 go by tiles where they can.
template <class M>
int64_t fwd_scratch_of(const AttentionArgs& a) {
  const int64_t short_bytes = ShortScratch<typename M::Acc>(a, nullptr).bytes;
  const auto most = [](int64_t x, int64_t y) { return x > y ? x : y; };
#if LMK_TILES
  if constexpr (kByTiles<M>)
    if (goes_by_tiles(a)) return most(FwdTiles(a, nullptr).bytes, short_bytes);
#endif
  return most(fwd_scratch<M>(a), short_bytes);
}
template <class M>
void fwd_of(const AttentionArgs& a, const AttentionTask& task, const AttentionTask* next, void* scratch) {
  if (is_short<M>(a, task.sequence)) return fwd_short<typename M::Acc>(a, task, next, scratch);
#if LMK_TILES
  if constexpr (kByTiles<M>)
    if (goes_by_tiles(a)) return fwd_by_tiles(a, task, next, scratch);
#endif
  fwd<M>(a, task, next, scratch);
}
template <class M>
int64_t bwd_scratch_of(const AttentionArgs& a) {
  const int64_t short_bytes = ShortScratch<typename M::Acc>(a, nullptr).bytes;
  const auto most = [](int64_t x, int64_t y) { return x > y ? x : y; };
#if LMK_TILES
  if constexpr (kByTiles<M>)
    if (goes_by_tiles(a)) return most(bwd_tiles_scratch(a), short_bytes);
#endif
  return most(bwd_scratch<M>(a), short_bytes);
}
template <class M>
void bwd_of(const AttentionArgs& a, const AttentionTask& task, const AttentionTask* next, void* scratch) {
  if (is_short<M>(a, task.sequence)) return bwd_short<typename M::Acc>(a, task, next, scratch);
#if LMK_TILES
  if constexpr (kByTiles<M>)
    if (goes_by_tiles(a)) return bwd_by_tiles(a, task, next, scratch);
#endif
  bwd<M>(a, task, next, scratch);
}

// M: how tiles multiply; P: how few rows do.
template <class M, class P>
constexpr AttentionKernels kernels_of() {
  return {M::V::kLanes, sizeof(typename M::Acc), kBwdKeys,         kBwdRows, kBwdKeys,        fwd_scratch_of<M>,
          fwd_of<M>,    split_scratch<P>,        split_state<P>,   split<P>, split_finish<P>, bwd_scratch_of<M>,
          bwd_of<M>,    bwd_finish<M>,           dbias_scratch<M>, dbias<M>};
}

// One row per DType, in its order.
constexpr AttentionKernels kAttention[] = {
    kernels_of<MathFma<float>, FmaProducts<float>>(), kernels_of<MathForBf16, ProductsForBf16>(),
    kernels_of<MathFma<float>, FmaProducts<F16>>(), kernels_of<MathFma<double>, FmaProducts<double>>()};

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk
