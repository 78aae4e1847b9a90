#include "micro.h"

#include <cmath>
#include <cstring>

#include "fetch.h"
#include "quantize_weight.h"

#define LMK_BODY "micro_body.h"
#define LMK_BODY_HAS_TILES
#include "foreach_isa.h"

namespace lmk {

const Micro& micro(Isa isa) {
  static constexpr const Micro* kTable[] = LMK_ISA_TABLE(kMicro);
  return *kTable[static_cast<int>(isa)];
}

}  // namespace lmk
