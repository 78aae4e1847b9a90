#include "decode_step.h"

#include <cmath>
#include <cstring>

#include "norms.h"
#include "quantize_weight.h"
#include "skinny.h"

#define LMK_BODY "decode_step_body.h"
#include "foreach_isa.h"

namespace lmk {

const DecodeStepKernels& decode_step_kernels() {
  static constexpr const DecodeStepKernels* kTable[] = LMK_ISA_TABLE(kDecodeStep);
  return *kTable[static_cast<int>(isa())];
}

}  // namespace lmk
