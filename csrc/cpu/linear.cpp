#include "linear.h"

#include <cmath>
#include <cstring>
#include <initializer_list>
#include <limits>

#define LMK_BODY "linear_body.h"
#define LMK_BODY_HAS_TILES
#include "foreach_isa.h"

namespace lmk {

const LinearKernels& linear_kernels(DType compute, int64_t parts) {
  if (compute == DType::f32 && parts < 3) compute = parts == 2 ? DType::f16 : DType::bf16;
  static constexpr const LinearKernels* kTable[] = LMK_ISA_TABLE(kLinear);
  return kTable[static_cast<int>(isa())][static_cast<int>(compute)];
}

}  // namespace lmk
