#include "embed.h"

#include <cmath>
#include <cstring>
#include <limits>

#define LMK_BODY "embed_body.h"
#include "foreach_isa.h"

namespace lmk {

EmbedFn embed_kernel(DType dtype) {
  static constexpr const EmbedFn* kTable[] = LMK_ISA_TABLE(kEmbed);
  return kTable[static_cast<int>(isa())][static_cast<int>(dtype)];
}

EmbedGradFn embed_grad_kernel(DType dtype) {
  static constexpr const EmbedGradFn* kTable[] = LMK_ISA_TABLE(kEmbedGrad);
  return kTable[static_cast<int>(isa())][static_cast<int>(dtype)];
}

}  // namespace lmk
