// What the kernels ask of the GPU beyond CUDA's own language: element types, copies that run while threads compute,
// sums over warps, launches. tests/gpu/emulated/common.cuh has the same for a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace lmk {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(Bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ inline float widen(F16 x) { return __half2float(__ushort_as_half(x.bits)); }

__device__ inline void narrow(float x, float* y) { *y = x; }
__device__ inline void narrow(float x, Bf16* y) { y->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
__device__ inline void narrow(float x, F16* y) { y->bits = __half_as_ushort(__float2half_rn(x)); }

// Copies kBytes (4 or 16, both addresses aligned to them) to shared memory, or zeros where nothing is `held`. It lands
// when its group has been waited for. Reads of 16 bytes do not go through the first-level cache: they come once.
template <int kBytes>
__device__ inline void copy_async(void* shared, const void* global, bool held) {
  const uint32_t to = uint32_t(__cvta_generic_to_shared(shared));
  const int bytes = held ? kBytes : 0;
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(kBytes), "r"(bytes)
                 : "memory");
}

// Closes the group of the copies that this thread has begun since the last one.
__device__ inline void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for this thread's groups, but for the newest kOpen.
template <int kOpen>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");
}

// kernel<<<grid, threads, 0, stream>>>(argument); what went wrong, or null.
template <class Argument>
inline const char* launch(void (*kernel)(Argument), dim3 grid, int threads, void* stream, const Argument& argument) {
  kernel<<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(argument);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Of the current GPU.
inline int multiprocessors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

}  // namespace lmk
