// Fetching memory before it is needed. A function that does nothing else is always_inline: gcc takes it for pure, and
// leaves out the calls that it does not inline.
#pragma once

#include <cstdint>

namespace lmk {

// For what is needed some kilobytes later. To the L2 cache: the lines that may be under way to L1 are few, and rows
// that lie a multiple of 4096 bytes apart share its sets.
inline void fetch_to_l2(const void* p) { __builtin_prefetch(p, 0, 2); }

// For what is needed soon, or is read in an order that the CPU does not see through.
inline void fetch_to_l1(const void* p) { __builtin_prefetch(p, 0, 3); }

// How many bytes ahead a single stream is best fetched: with 9 kB it came a sixth slower than with 4 to 6 (Zen 4).
constexpr int64_t kDistance = 4096;

// Whether a core reads memory faster from kStreams places in turn than from one: an Emerald Rapids 15.5 GB/s against
// 12.0, without any fetching ahead, where a Zen 4 reads 31 from one place and 23 from four. So it is taken to be with
// Intel's CPUs, unless LMKERNELS_STREAMS (0 or 1) says otherwise. No result depends on it.
bool prefers_streams();
constexpr int kStreams = 8;

// What will be read after a task: runs of so many bytes, from one of which to the next it is `stride` bytes.
struct Ahead {
  const char* data = nullptr;  // null where it is not known
  int64_t run = 0, stride = 0;
};

}  // namespace lmk
