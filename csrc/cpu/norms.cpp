#include "norms.h"

#include <cmath>
#include <cstring>
#include <limits>

#define LMK_BODY "norms_body.h"
#include "foreach_isa.h"

namespace lmk {

const NormKernels& layer_norm_kernels(DType dtype) {
  static constexpr const NormKernels* kTable[] = LMK_ISA_TABLE(kLayerNorm);
  return kTable[static_cast<int>(isa())][static_cast<int>(dtype)];
}

const NormKernels& rms_norm_kernels(DType dtype) {
  static constexpr const NormKernels* kTable[] = LMK_ISA_TABLE(kRmsNorm);
  return kTable[static_cast<int>(isa())][static_cast<int>(dtype)];
}

}  // namespace lmk
