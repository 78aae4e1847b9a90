#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if LMK_X86
#include <cpuid.h>
#endif
#if LMK_X86 && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lmk {
namespace {

constexpr const char* kNames[] = {"generic", "avx2", "avx512", "avx512bf16", "amx"};
constexpr int kCount = sizeof(kNames) / sizeof(kNames[0]);

#if LMK_X86
// __builtin_cpu_supports("f16c") does not compile with clang 14.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}

// The tiles of bfloat16 and int8, and the operating system's leave to use them, which Linux gives a process on request.
bool has_tiles() {
#if defined(__linux__)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || ~edx & (kBf16 | kTile | kInt8)) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

// __builtin_cpu_supports also asks whether the operating system saves the wide registers.
bool is_present(Isa isa) {
  switch (isa) {
    case Isa::generic:
      return true;
#if LMK_X86
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    case Isa::avx512:
      return is_present(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case Isa::avx512bf16:
      return is_present(Isa::avx512) && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
    case Isa::amx:
      return is_present(Isa::avx512bf16) && has_tiles();
#endif
    default:
      return false;
  }
}

Isa choose() {
  const char* variable = std::getenv("LMKERNELS_CPU_ISA");
  const std::string wanted = variable ? variable : "";
  Isa best = Isa::generic;
  std::string all, present;
  bool known = false;
  for (int i = 0; i < kCount; ++i) {
    const Isa isa = static_cast<Isa>(i);
    const std::string name = kNames[i];
    all += (i ? ", " : "") + name;
    known |= wanted == name;
    if (!is_present(isa)) continue;
    if (wanted == name) return isa;
    present += (i ? ", " : "") + name;
    best = isa;
  }
  if (wanted.empty()) return best;
  throw std::invalid_argument(
      known ? "LMKERNELS_CPU_ISA must name an instruction set that this CPU has (" + present + "), got '" + wanted + "'"
            : "LMKERNELS_CPU_ISA must be one of " + all + " (this CPU has " + present + "), got '" + wanted + "'");
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

}  // namespace lmk
