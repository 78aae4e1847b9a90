#include "linear_cross_entropy.h"

#include <cmath>
#include <cstring>
#include <initializer_list>
#include <limits>

#define LMK_BODY "linear_cross_entropy_body.h"
#define LMK_BODY_HAS_TILES
#include "foreach_isa.h"

namespace lmk {

const LossKernels& loss_kernels(DType compute, int64_t parts, int64_t tokens) {
  constexpr int64_t kFew = 32;
  const bool few = tokens <= kFew && (compute == DType::f32 || compute == DType::f16);
  if (compute == DType::f32 && parts < 3) compute = parts == 2 ? DType::f16 : DType::bf16;
  static constexpr const LossKernels* kTable[] = LMK_ISA_TABLE(kLoss);
  return kTable[static_cast<int>(isa())][few ? kLossOfFew : static_cast<int>(compute)];
}

}  // namespace lmk
