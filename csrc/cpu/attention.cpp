#include "attention.h"

#include <cmath>
#include <cstring>
#include <initializer_list>
#include <limits>

#include "fetch.h"

#define LMK_BODY "attention_body.h"
#define LMK_BODY_HAS_TILES
#include "foreach_isa.h"

namespace lmk {

const AttentionKernels& attention_kernels(DType dtype) {
  static constexpr const AttentionKernels* kTable[] = LMK_ISA_TABLE(kAttention);
  return kTable[static_cast<int>(isa())][static_cast<int>(dtype)];
}

}  // namespace lmk
