// The instruction set that the CPU kernels run on.
#pragma once

#if defined(__x86_64__)
#define LMK_X86 1
#else
#define LMK_X86 0
#endif

namespace lmk {

// Each has all that the ones before it have.
enum class Isa : int { generic, avx2, avx512, avx512bf16, amx };

// Chosen once per process: the one LMKERNELS_CPU_ISA names, else the best that the CPU and the operating system have.
// Throws std::invalid_argument (ValueError in Python) when the variable names one that does not exist or that is not
// present here.
Isa isa();

const char* isa_name(Isa isa);

}  // namespace lmk

// {generic::fn, avx2::fn, ...}: an entry for each instruction set that foreach_isa.h compiles on this architecture, in
// the order of enum class Isa. For use in namespace lmk; fn may carry template arguments.
#if LMK_X86
#define LMK_ISA_TABLE(...) \
  {generic::__VA_ARGS__, avx2::__VA_ARGS__, avx512::__VA_ARGS__, avx512bf16::__VA_ARGS__, amx::__VA_ARGS__}
#else
#define LMK_ISA_TABLE(...) {generic::__VA_ARGS__}
#endif
