#include "attention.h"

#include <cmath>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <type_traits>

#include "fetch.h"

#define LMK_BODY "attention_body.h"
#define LMK_BODY_HAS_TILES
#include "foreach_isa.h"

namespace lmk {

const AttentionKernels& attention_kernels(DType dtype, int64_t parts) {
  constexpr int kFloatInParts = 4;
  static constexpr const AttentionKernels* kTable[] = LMK_ISA_TABLE(kAttention);
  return kTable[static_cast<int>(isa())][dtype == DType::f32 && parts < 3 ? kFloatInParts : static_cast<int>(dtype)];
}

}  // namespace lmk
