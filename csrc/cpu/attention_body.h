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
#include "attention_split_body.h"
#include "attention_bwd_body.h"

namespace lmk {
namespace LMK_NS {
namespace {

// M: how tiles multiply; P: how few rows do.
template <class M, class P>
constexpr AttentionKernels kernels_of() {
  return {M::V::kLanes, sizeof(typename M::Acc), kBwdKeys,         kBwdRows, kBwdKeys,        fwd_scratch<M>,
          fwd<M>,       split_scratch<P>,        split_state<P>,   split<P>, split_finish<P>, bwd_scratch<M>,
          bwd<M>,       bwd_finish<M>,           dbias_scratch<M>, dbias<M>};
}

// One row per DType, in its order.
constexpr AttentionKernels kAttention[] = {
    kernels_of<MathFma<float>, FmaProducts<float>>(), kernels_of<MathForBf16, ProductsForBf16>(),
    kernels_of<MathFma<float>, FmaProducts<F16>>(), kernels_of<MathFma<double>, FmaProducts<double>>()};

}  // namespace
}  // namespace LMK_NS
}  // namespace lmk
