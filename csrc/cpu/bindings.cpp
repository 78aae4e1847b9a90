// The only file that knows torch: checks, allocates, runs the kernels on torch's threads. What an op needs of that is
// in its <op>_binding.h, included at the end. Schemas and fakes are in Python, beside each op.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <vector>

#include "dtypes.h"
#include "isa.h"

namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

std::string cpu_isa() { return lmk::isa_name(lmk::isa()); }

// Scratch of one thread of torch's pool, kept from call to call: a fresh megabyte costs more in page faults than a
// small op computes.
void* thread_scratch(int64_t bytes) {
  struct Buffer {
    std::unique_ptr<char[]> data;
    int64_t size = 0;
  };
  static thread_local Buffer buffer;
  constexpr int64_t kAlign = 64;
  if (buffer.size < bytes + kAlign) {
    buffer.data.reset();
    buffer.data.reset(new char[size_t(bytes + kAlign)]);
    buffer.size = bytes + kAlign;
  }
  const uintptr_t address = reinterpret_cast<uintptr_t>(buffer.data.get());
  char* scratch = reinterpret_cast<char*>((address + kAlign - 1) / kAlign * kAlign);
#ifdef __SANITIZE_ADDRESS__
  // what an earlier call has left is neither in bounds nor worth reading: NaN
  ASAN_UNPOISON_MEMORY_REGION(buffer.data.get(), size_t(buffer.size));
  memset(scratch, 0xff, size_t(bytes));
  ASAN_POISON_MEMORY_REGION(scratch + bytes, size_t(buffer.data.get() + buffer.size - (scratch + bytes)));
#endif
  return scratch;
}

// Runs task(i, scratch) for i in [0, count), each thread taking the next one when it is done: tasks differ in size
// (causal) and cores in speed. Which thread runs a task changes nothing in its result.
template <class F>
void run_tasks(int64_t count, int64_t scratch_bytes, double flops, const F& task) {
  constexpr double kWorthThreads = 3e5;  // some 10 us of one core
  const int64_t threads = std::min<int64_t>(count, torch::stable::get_num_threads());
  if (threads <= 1 || flops < kWorthThreads) {
    void* scratch = thread_scratch(scratch_bytes);
    for (int64_t i = 0; i < count; ++i) task(i, scratch);
    return;
  }
  // where asking each other for the next task would take longer than to wait for an uneven share
  constexpr double kQuick = 1e7;
  const int64_t shares = flops < kQuick ? threads : count;
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    void* scratch = thread_scratch(scratch_bytes);
    for (int64_t share = next++; share < shares; share = next++)
      for (int64_t i = share; i < count; i += shares) task(i, scratch);
  });
}

lmk::DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return lmk::DType::f32;
    case ScalarType::BFloat16:
      return lmk::DType::bf16;
    case ScalarType::Half:
      return lmk::DType::f16;
    case ScalarType::Double:
      return lmk::DType::f64;
    default:
      break;
  }
  STD_TORCH_CHECK(false, "expected float32, bfloat16, float16 or float64");
  return lmk::DType::f32;
}

// Asks for huge pages where `bytes` from `data` on hold some: fresh memory costs a page fault for each page, which is
// more than a fast op takes to fill it. Where the system gives none, or memory has been used before, this changes
// nothing.
void want_huge_pages(void* data, int64_t bytes) {
#ifdef __linux__
  if (bytes < 4 << 20) return;
  constexpr uintptr_t kHuge = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// A contiguous tensor on the CPU, not written yet; without a dtype, in that of `like`. torch::stable::new_empty goes
// through the dispatcher, which costs more than a microsecond each time. With LMKERNELS_POISON_MEMORY, as in the tests,
// it holds NaN.
Tensor new_tensor(const Tensor& like, IntHeaderOnlyArrayRef sizes, std::optional<ScalarType> dtype = std::nullopt) {
  static const bool poisoned = std::getenv("LMKERNELS_POISON_MEMORY") != nullptr;
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t axis = sizes.size(); axis-- > 0; stride *= std::max<int64_t>(1, sizes[axis])) strides[axis] = stride;
  const ScalarType type = dtype ? *dtype : like.scalar_type();
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(),
                                                  torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
                                                  aoti_torch_device_type_cpu(), 0, &made));
  Tensor x(made);
  if (stride >= 1 << 19) want_huge_pages(x.mutable_data_ptr(), x.numel() * int64_t(x.element_size()));
  if (poisoned && x.numel() > 0) memset(x.mutable_data_ptr(), 0xff, size_t(x.numel()) * x.element_size());
  return x;
}

ScalarType accumulator(const Tensor& q) {
  return q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmkernels, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&cpu_isa)); }

// what others use comes first
#include "attention_binding.h"
#include "indices_binding.h"
#include "linear_binding.h"
#include "row_view_binding.h"
#include "skinny_binding.h"

#include "attention_decode_binding.h"
#include "attention_varlen_binding.h"
#include "decode_step_binding.h"
#include "dropout_binding.h"
#include "embed_binding.h"
#include "linear_cross_entropy_binding.h"
#include "norms_binding.h"
#include "qkv_projection_binding.h"
#include "quantize_weight_binding.h"
#include "rotary_binding.h"
#include "softmax_binding.h"

#include "encoder_layers_binding.h"
