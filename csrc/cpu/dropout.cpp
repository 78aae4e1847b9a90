#include "dropout.h"

#include <cmath>
#include <cstring>
#include <limits>

#define LMK_BODY "dropout_body.h"
#include "foreach_isa.h"

namespace lmk {

DropoutFn dropout_kernel() {
  static constexpr DropoutFn kTable[] = LMK_ISA_TABLE(dropout);
  return kTable[static_cast<int>(isa())];
}

}  // namespace lmk
