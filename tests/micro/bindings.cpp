// The Python module `micro`: a submodule for each instruction set of this machine, with the functions of micro.h over
// numpy arrays. An array's dtype picks the overload. What writes into memory takes the array to write and checks no
// size, so that a test may hand over exactly what a kernel is promised, and see what it does beyond.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "micro.h"

namespace py = pybind11;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T>
void add_vectors(py::module_& m, const lmk::MicroVectors<T>& vectors) {
  const auto x = py::arg("x").noconvert(), a = py::arg("a").noconvert(), b = py::arg("b").noconvert();
  for (const auto& function : vectors.unary) {
    if (function.name == nullptr) continue;
    m.def(
        function.name,
        [run = function.run](const Array<T>& x) {
          Array<T> y(x.size());
          run(x.data(), x.size(), y.mutable_data());
          return y;
        },
        x);
  }
  for (const auto& function : vectors.binary) {
    m.def(
        function.name,
        [run = function.run](const Array<T>& a, const Array<T>& b) {
          Array<T> y(a.size());
          run(a.data(), b.data(), a.size(), y.mutable_data());
          return y;
        },
        a, b);
  }
  m.def("reduce_add", [run = vectors.reduce_add](const Array<T>& x) { return run(x.data()); }, x);
  m.def("reduce_max", [run = vectors.reduce_max](const Array<T>& x) { return run(x.data()); }, x);
  const auto add_activation = [&](const char* name, auto run) {
    m.def(
        name,
        [run](int activation, const Array<T>& x) {
          Array<T> y(x.size());
          run(static_cast<lmk::Activation>(activation), x.data(), x.size(), y.mutable_data());
          return y;
        },
        py::arg("activation"), x);
  };
  add_activation("activate", vectors.activate);
  add_activation("activate_grad", vectors.activate_grad);
  if (vectors.activate_bf16) {
    add_activation("activate_bf16", vectors.activate_bf16);
    add_activation("activate_grad_bf16", vectors.activate_grad_bf16);
  }
  m.def(
      "log_row",
      [run = vectors.log_row](const Array<T>& x) {
        Array<double> y(x.size());
        run(x.data(), x.size(), y.mutable_data());
        return y;
      },
      x);
  m.def(
      "load_row",
      [run = vectors.load_row](int dtype, const py::array& src, int64_t n, Array<T>& dst) {
        run(static_cast<lmk::DType>(dtype), src.data(), n, dst.mutable_data());
      },
      py::arg("dtype"), py::arg("src"), py::arg("n"), py::arg("dst").noconvert());
  m.def(
      "store_row",
      [run = vectors.store_row](int dtype, const Array<T>& src, int64_t n, py::array& dst) {
        run(static_cast<lmk::DType>(dtype), src.data(), n, dst.mutable_data());
      },
      py::arg("dtype"), py::arg("src").noconvert(), py::arg("n"), py::arg("dst"));
}

// Rows that need not be neighbours: each is an array of its own.
std::vector<const void*> addresses(const std::vector<py::array>& rows) {
  std::vector<const void*> found;
  for (const py::array& row : rows) found.push_back(row.data());
  return found;
}

// Elem and Acc: of the packed operands and of the sums
template <class Elem, class Acc>
void add_products(py::module_& m, const lmk::MicroProducts& products) {
  if (products.gemm == nullptr) return;
  m.def(
      "gemm",
      [run = products.gemm](int start, int64_t rows, int64_t vecs, int64_t depth, const Array<Elem>& a, int64_t a_row,
                            int64_t a_depth, const Array<Elem>& b, int64_t b_depth, int64_t b_panel, Array<Acc>& c,
                            int64_t c_row, const Array<Acc>& factor) {
        run({start, rows, vecs, depth, a.data(), a_row, a_depth, b.data(), b_depth, b_panel, c.mutable_data(), c_row,
             factor.data()});
      },
      py::arg("start"), py::arg("rows"), py::arg("vecs"), py::arg("depth"), py::arg("a").noconvert(), py::arg("a_row"),
      py::arg("a_depth"), py::arg("b").noconvert(), py::arg("b_depth"), py::arg("b_panel"), py::arg("c").noconvert(),
      py::arg("c_row"), py::arg("factor").noconvert());
  const auto add_pack = [&](const char* name, auto run) {
    m.def(
        name,
        [run](int dtype, const std::vector<py::array>& rows, int64_t n_cols, Array<Elem>& dst, int64_t ld) {
          run(static_cast<lmk::DType>(dtype), addresses(rows).data(), int64_t(rows.size()), n_cols, dst.mutable_data(),
              ld);
        },
        py::arg("dtype"), py::arg("rows"), py::arg("n_cols"), py::arg("dst").noconvert(), py::arg("ld"));
  };
  add_pack("pack_rows", products.pack_rows);
  add_pack("pack_depth", products.pack_depth);
  m.def(
      "pack_columns",
      [run = products.pack_columns](int dtype, const std::vector<py::array>& rows, int64_t n_cols, Array<Elem>& dst,
                                    Array<Elem>& buffer) {
        run(static_cast<lmk::DType>(dtype), addresses(rows).data(), int64_t(rows.size()), n_cols, dst.mutable_data(),
            buffer.mutable_data());
      },
      py::arg("dtype"), py::arg("rows"), py::arg("n_cols"), py::arg("dst").noconvert(), py::arg("buffer").noconvert());
}

void add_isa(py::module_& m, const lmk::Micro& micro) {
  m.attr("float_lanes") = micro.float32.lanes;
  m.attr("double_lanes") = micro.float64.lanes;
  m.attr("tile_vecs") = micro.tile_vecs;
  m.attr("has_bf16_products") = micro.products_bf16.gemm != nullptr;
  add_vectors(m, micro.float32);
  add_vectors(m, micro.float64);
  add_products<float, float>(m, micro.products_f32);
  add_products<double, double>(m, micro.products_f64);
  add_products<uint32_t, float>(m, micro.products_bf16);
  m.def("to_bf16", py::vectorize(micro.to_bf16));
  m.def("to_f16", py::vectorize(micro.to_f16));
  m.def("from_f16", py::vectorize(micro.from_f16));
  if (micro.transpose_tile != nullptr) {
    m.def("transpose_tile",
          [run = micro.transpose_tile](const std::vector<py::array>& rows, int64_t k, Array<uint32_t>& dst,
                                       int64_t dst_ld) { run(addresses(rows).data(), k, dst.mutable_data(), dst_ld); });
  }
  if (micro.pack_row != nullptr) {
    m.def("pack_row", [run = micro.pack_row](const Array<float>& x, Array<uint32_t>& dst) {
      run(x.data(), x.size(), dst.mutable_data());
    });
    m.def("pack_row_pair",
          [run = micro.pack_row_pair](const Array<float>& even, const Array<float>& odd, Array<uint32_t>& dst) {
            run(even.data(), odd.data(), even.size(), dst.mutable_data());
          });
  }
  m.def("integer_dot", [micro](int bits, const Array<float>& x, float factor, const Array<uint8_t>& weights) {
    Array<float> y(micro.float32.lanes);
    micro.integer_dot[bits == 4](x.data(), factor, weights.data(), y.mutable_data());
    return y;
  });
  m.def("philox", [&micro](uint64_t seed, uint32_t first, uint32_t c1, uint32_t c2, uint32_t c3) {
    Array<uint32_t> words({micro.float32.lanes, int64_t(4)});
    micro.philox(seed, first, c1, c2, c3, words.mutable_data());
    return words;
  });
}

}  // namespace

PYBIND11_MODULE(micro, m) {
  py::dict isas;
  for (int i = 0; i <= static_cast<int>(lmk::isa()); ++i) {
    const auto isa = static_cast<lmk::Isa>(i);
    py::module_ sub = m.def_submodule(lmk::isa_name(isa));
    add_isa(sub, lmk::micro(isa));
    isas[lmk::isa_name(isa)] = sub;
  }
  m.attr("isas") = isas;
}
