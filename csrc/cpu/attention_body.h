// Softmax attention for one instruction set; included by attention.cpp through foreach_isa.h.

#include "vec.h"
#include "vecmath.h"
#include "gemm.h"
#include "rows.h"
#include "split.h"
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

// Short sequences have a way of their own; other tasks go by tiles where they can, with kProducts (TileWork) or, where
// that is 0, not.
template <class M, int kProducts>
int64_t fwd_scratch_of(const AttentionArgs& a) {
  const int64_t short_bytes = ShortScratch<typename M::Acc>(a, nullptr).bytes;
  const auto most = [](int64_t x, int64_t y) { return x > y ? x : y; };
#if LMK_TILES
  if constexpr (kProducts > 0)
    if (goes_by_tiles(a)) return most(FwdTiles<kPartsOf<kProducts>>(a, nullptr).bytes, short_bytes);
#endif
  return most(fwd_scratch<M>(a), short_bytes);
}
template <class M, int kProducts>
void fwd_of(const AttentionArgs& a, const AttentionTask& task, const AttentionTask* next, void* scratch) {
  if (is_short<M>(a, task.sequence)) return fwd_short<typename M::Acc>(a, task, next, scratch);
#if LMK_TILES
  if constexpr (kProducts > 0)
    if (goes_by_tiles(a)) return fwd_by_tiles<kProducts>(a, task, next, scratch);
#endif
  fwd<M>(a, task, next, scratch);
}
template <class M, int kProducts>
int64_t bwd_scratch_of(const AttentionArgs& a) {
  const auto most = [](int64_t x, int64_t y) { return x > y ? x : y; };
  int64_t bytes = ShortScratch<typename M::Acc>(a, nullptr).bytes;
#if LMK_TILES
  if constexpr (kProducts > 0)
    if (goes_by_tiles(a)) {
      bytes = most(bytes, bwd_tiles_scratch<kPartsOf<kProducts>>(a));
      if (kProducts == 1) return bytes;
    }
#endif
  return most(bytes, bwd_scratch<M>(a));
}
template <class M, int kProducts>
void bwd_of(const AttentionArgs& a, const AttentionTask& task, const AttentionTask* next, void* scratch) {
  if (is_short<M>(a, task.sequence)) return bwd_short<typename M::Acc>(a, task, next, scratch);
#if LMK_TILES
  if constexpr (kProducts > 0)
    if (goes_by_tiles(a) && (kProducts == 1 || grads_in_parts(a, task)))
      return bwd_by_tiles<kPartsOf<kProducts>>(a, task, next, scratch);
#endif
  bwd<M>(a, task, next, scratch);
}

// M: how products are made that do not go by tiles, with kProducts; P: how those of few rows are.
template <class M, class P, int kProducts = 0>
constexpr AttentionKernels kernels_of() {
  return {M::V::kLanes,
          sizeof(typename M::Acc),
          kBwdKeys,
          kBwdRows,
          kBwdKeys,
          fwd_scratch_of<M, kProducts>,
          fwd_of<M, kProducts>,
          split_scratch<P>,
          split_state<P>,
          split<P>,
          split_finish<P>,
          bwd_scratch_of<M, kProducts>,
          bwd_of<M, kProducts>,
          bwd_finish<M>,
          dbias_scratch<M>,
          dbias<M>};
}

// One row per DType, in its order, and one for float32 in two parts. A float16 is the sum of two exactly.
constexpr AttentionKernels kAttention[] = {
    kernels_of<MathFma<float>, FmaProducts<float>>(), kernels_of<MathForBf16, ProductsForBf16, 1>(),
    kernels_of<MathFma<float>, FmaProducts<F16>, 4>(), kernels_of<MathFma<double>, FmaProducts<double>>(),
    kernels_of<MathFma<float>, FmaProducts<float>, 3>()};

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk
