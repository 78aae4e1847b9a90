#include "attention_decode.h"
#include "row_view.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "fetch.h"

#define LMK_BODY "attention_decode_body.h"
#include "foreach_isa.h"

namespace lmk {

const DecodeKernels& decode_kernels(CacheType type) {
  static constexpr const DecodeKernels* kTable[] = LMK_ISA_TABLE(kDecode);
  return kTable[static_cast<int>(isa())][static_cast<int>(type)];
}

}  // namespace lmk
