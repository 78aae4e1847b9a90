// torch's side of embed: checks, allocates, groups tokens by the row they read, runs the kernels. Included by
// bindings.cpp.

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <vector>

#include "embed.h"

namespace {

// A contiguous tensor of zeros, of which no more is touched than is written later. What a large vocabulary's gradient
// costs is the page faults of its zeros, so it asks for huge pages.
Tensor untouched_zeros(const Tensor& like, int64_t rows, int64_t columns, ScalarType dtype) {
#if defined(__linux__)
  constexpr int64_t kHugePage = 2 << 20, kLarge = 8 << 20;
  const int64_t element = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
  const int64_t bytes = rows * columns * element;
  if (bytes >= kLarge) {
    const size_t mapped = size_t(bytes + kHugePage);
    void* base = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    STD_TORCH_CHECK(base != MAP_FAILED, "out of memory: ", bytes, " bytes for the gradient of a table");
    const uintptr_t address = reinterpret_cast<uintptr_t>(base);
    void* data = reinterpret_cast<void*>((address + kHugePage - 1) / kHugePage * kHugePage);
    madvise(data, size_t(bytes), MADV_HUGEPAGE);  // a wish: without huge pages it is slower, not wrong
    const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
    return torch::stable::from_blob(data, sizes, strides, like.device(), dtype,
                                    [base, mapped](void*) { munmap(base, mapped); });
  }
#endif
  Tensor zeros = new_tensor(like, {rows, columns}, dtype);
  return torch::stable::zero_(zeros);
}

// x itself where its last axis is contiguous, else a copy.
Tensor rows_of_tensor(const Tensor& x) {
  return x.stride(x.dim() - 1) == 1 || x.size(x.dim() - 1) <= 1 ? x : torch::stable::contiguous(x);
}

// x (b, s, d) or (s, d), or token_ids (b, s) or (s,), gives the tokens; at least one table is there.
Tensor embed_fwd(const OptionalTensor& x_, double scale, const OptionalTensor& token_ids,
                 const OptionalTensor& token_table, const OptionalTensor& positions,
                 const OptionalTensor& position_table, const OptionalTensor& type_ids,
                 const OptionalTensor& type_table) {
  STD_TORCH_CHECK(x_ || (token_ids && token_table), "embed needs x, or token_ids and token_table");
  const Tensor& tokens = x_ ? *x_ : *token_ids;
  const int64_t axes = tokens.dim() - (x_ ? 1 : 0);
  STD_TORCH_CHECK(tokens.is_cpu() && (axes == 1 || axes == 2), "tokens must be (b, s) or (s,), on the CPU");
  lmk::EmbedArgs a{};
  a.batch = axes == 2 ? tokens.size(0) : 1, a.seq = tokens.size(axes - 1);
  const Tensor first = rows_of_tensor(x_ ? *x_ : *token_table);
  a.dtype = dtype_of(first), a.dim = first.size(first.dim() - 1), a.scale = scale;
  if (x_) {
    a.x = first.const_data_ptr();
    a.x_batch = axes == 2 ? first.stride(0) : 0, a.x_seq = first.stride(axes - 1);
  }
  std::vector<Tensor> kept;  // copies of tables live until the kernel is done
  auto add = [&](const OptionalTensor& table, const OptionalTensor& ids, const char* name) {
    if (!table) return;
    STD_TORCH_CHECK(table->is_cpu() && table->dim() == 2 && table->size(1) == a.dim, "tables must be (n, d)");
    kept.push_back(rows_of_tensor(*table));
    const Tensor& t = kept.back();
    const lmk::DType dtype = dtype_of(t);
    STD_TORCH_CHECK((dtype == lmk::DType::f64) == (a.dtype == lmk::DType::f64), "float64 goes with float64 only");
    a.tables[a.n_tables++] = {t.const_data_ptr(), t.stride(0), dtype,
                              checked_indices(ids, a.batch, a.seq, name, t.size(0))};
  };
  add(token_table, token_ids, "token_ids");
  add(position_table, positions, "positions");
  add(type_table, type_ids, "type_ids");
  STD_TORCH_CHECK(a.n_tables > 0 && a.n_tables + (x_ ? 1 : 0) <= lmk::kMostTables, "one to three terms");
  Tensor out = axes == 2 ? new_tensor(first, {a.batch, a.seq, a.dim}) : new_tensor(first, {a.seq, a.dim});
  if (out.numel() == 0) return out;
  a.out = out.mutable_data_ptr();

  const lmk::EmbedFn kernel = lmk::embed_kernel(a.dtype);
  constexpr int64_t kTaskBytes = 64 * 1024;
  const int64_t row_bytes = 2 * a.dim * lmk::element_size(a.dtype), count = a.batch * a.seq;
  const int64_t per_task = std::max<int64_t>(1, kTaskBytes / row_bytes);
  // a byte moved is counted as a flop
  run_tasks((count + per_task - 1) / per_task, 2 * a.dim * int64_t(sizeof(double)), double(count * row_bytes),
            [&](int64_t task, void* scratch) {
              const int64_t begin = task * per_task;
              kernel(a, begin, std::min(per_task, count - begin), scratch);
            });
  return out;
}

// The gradient of a table (n_rows, d): rows of dout (b, s, d) or (s, d) added up by index, in the order of the tokens,
// whatever the threads; in dout's dtype, or in float32.
Tensor embed_bwd(const Tensor& dout_, const OptionalTensor& ids, int64_t n_rows, bool float32) {
  STD_TORCH_CHECK(dout_.is_cpu() && (dout_.dim() == 2 || dout_.dim() == 3), "dout must be (b, s, d) or (s, d)");
  const Tensor dout = torch::stable::contiguous(dout_);
  const int64_t axes = dout.dim() - 1, batch = axes == 2 ? dout.size(0) : 1, seq = dout.size(axes - 1);
  lmk::EmbedGradArgs a{};
  a.dtype = dtype_of(dout), a.dim = dout.size(axes);
  STD_TORCH_CHECK(!float32 || a.dtype != lmk::DType::f64, "float64 has gradients of float64");
  a.table_dtype = float32 ? lmk::DType::f32 : a.dtype;
  const lmk::Indices indices = checked_indices(ids, batch, seq, "ids", n_rows);
  Tensor dtable = untouched_zeros(dout, n_rows, a.dim, float32 ? ScalarType::Float : dout.scalar_type());
  const int64_t tokens = batch * seq;
  if (dout.numel() == 0) return dtable;
  a.dout = dout.const_data_ptr(), a.dtable = dtable.mutable_data_ptr();

  // groups of tokens with one index: counted, then written one after the other, so the order within each is kept
  std::vector<int64_t> slot(size_t(n_rows), -1), order(static_cast<size_t>(tokens));
  std::vector<lmk::EmbedGroup> groups;
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t target = indices.at(t / seq, t % seq);
    if (slot[target] < 0) {
      slot[target] = int64_t(groups.size());
      groups.push_back({target, 0, 0});
    }
    ++groups[slot[target]].end;
  }
  int64_t total = 0;
  for (lmk::EmbedGroup& group : groups) {
    const int64_t count = group.end;
    group.begin = group.end = total;
    total += count;
  }
  for (int64_t t = 0; t < tokens; ++t) order[groups[slot[indices.at(t / seq, t % seq)]].end++] = t;
  a.rows = order.data(), a.groups = groups.data();

  // a task is a block of columns of some groups that together have enough rows
  constexpr int64_t kRows = 64, kColumns = 256;
  std::vector<int64_t> starts{0};
  for (size_t g = 1; g < groups.size(); ++g)
    if (groups[g].begin - groups[starts.back()].begin >= kRows) starts.push_back(int64_t(g));
  starts.push_back(int64_t(groups.size()));
  const int64_t blocks = (a.dim + kColumns - 1) / kColumns, pieces = int64_t(starts.size()) - 1;
  const lmk::EmbedGradFn kernel = lmk::embed_grad_kernel(a.dtype);
  run_tasks(pieces * blocks, 0, double(tokens * a.dim * lmk::element_size(a.dtype)), [&](int64_t task, void*) {
    const int64_t piece = task / blocks, column = task % blocks * kColumns;
    kernel(a, starts[piece], starts[piece + 1], column, std::min(kColumns, a.dim - column));
  });
  return dtable;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmkernels, CPU, m) {
  m.impl("embed_fwd", TORCH_BOX(&embed_fwd));
  m.impl("embed_bwd", TORCH_BOX(&embed_bwd));
}
