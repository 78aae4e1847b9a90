#include "skinny.h"

#include <cmath>
#include <cstring>

#include "fetch.h"

#define LMK_BODY "skinny_body.h"
#define LMK_BODY_HAS_TILES
#include "foreach_isa.h"

namespace lmk {

const SkinnyKernels& skinny_kernels(DType dtype) {
  static constexpr const SkinnyKernels* kTable[] = LMK_ISA_TABLE(kSkinny);
  return kTable[static_cast<int>(isa())][static_cast<int>(dtype)];
}

}  // namespace lmk
