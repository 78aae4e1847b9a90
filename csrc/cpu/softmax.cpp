#include "softmax.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#define LMK_BODY "softmax_body.h"
#include "foreach_isa.h"

namespace lmk {

const SoftmaxKernels& softmax_kernels(DType dtype) {
  static constexpr const SoftmaxKernels* kTable[] = LMK_ISA_TABLE(kSoftmax);
  return kTable[static_cast<int>(isa())][static_cast<int>(dtype)];
}

}  // namespace lmk
