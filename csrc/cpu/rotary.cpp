#include "rotary.h"

#include <cmath>
#include <cstring>
#include <limits>

#define LMK_BODY "rotary_body.h"
#include "foreach_isa.h"

namespace lmk {

RotaryFn rotary_kernel(DType dtype) {
  static constexpr const RotaryFn* kTable[] = LMK_ISA_TABLE(kRotary);
  return kTable[static_cast<int>(isa())][static_cast<int>(dtype)];
}

}  // namespace lmk
