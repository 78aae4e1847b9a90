// Softmax attention for one instruction set; included by attention.cpp through foreach_isa.h.

#include "vec.h"
#include "vecmath.h"
#include "gemm.h"
#include "rows.h"
#include "philox.h"
#include "attention_score_body.h"
#include "attention_fwd_body.h"
#include "attention_split_body.h"
#include "attention_bwd_body.h"

namespace lmk {
namespace LMK_NS {
namespace {

template <class M>
constexpr AttentionKernels kernels_of() {
  using T = typename M::Acc;
  return {M::V::kLanes,   sizeof(T), kBwdKeys,         kBwdRows,         kBwdKeys,
          fwd_scratch<M>, fwd<M>,    split_scratch<T>, split<T>,         split_finish<T>,
          bwd_scratch<M>, bwd<M>,    bwd_finish<M>,    dbias_scratch<M>, dbias<M>};
}

// One row per DType, in its order.
constexpr AttentionKernels kAttention[] = {kernels_of<MathFma<float>>(), kernels_of<MathForBf16>(),
                                           kernels_of<MathFma<float>>(), kernels_of<MathFma<double>>()};

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk
