#include "fetch.h"

#include <cstdlib>
#include <cstring>

#include "isa.h"

#if LMK_X86
#include <cpuid.h>
#endif

namespace lmk {
namespace {

bool is_intel() {
#if LMK_X86
  unsigned eax, name[3];
  return __get_cpuid(0, &eax, &name[0], &name[2], &name[1]) && std::memcmp(name, "GenuineIntel", 12) == 0;
#else
  return false;
#endif
}

}  // namespace

bool prefers_streams() {
  static const bool chosen = [] {
    const char* variable = std::getenv("LMKERNELS_STREAMS");
    return variable ? std::strcmp(variable, "0") != 0 : is_intel();
  }();
  return chosen;
}

}  // namespace lmk
