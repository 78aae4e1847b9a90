#include "quantize_weight.h"

#include <cmath>
#include <cstring>

#include "fetch.h"

#define LMK_BODY_HAS_TILES
#define LMK_BODY "quantize_weight_body.h"
#include "foreach_isa.h"

namespace lmk {

const QuantizedKernels& quantized_kernels() {
  static constexpr const QuantizedKernels* kTable[] = LMK_ISA_TABLE(kQuantized);
  return *kTable[static_cast<int>(isa())];
}

}  // namespace lmk
