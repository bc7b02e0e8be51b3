// Log-probability of one target per row of logits, and the entropy of the row's softmax: row statistics (one read of
// the logits) and the gradient, which recomputes the softmax from the logits. Tensors arrive as addresses.
#include <pybind11/pybind11.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "dtype.h"
#include "isa.h"
#include "online_softmax.h"
#include "softmax_scale.h"

namespace py = pybind11;

namespace spear {
namespace {

struct RowKernels {
    using Forward = OnlineSoftmax (*)(const void* row, int64_t columns, const Scale& scale);
    using Backward = void (*)(const void* row, void* out, int64_t columns, const Scale& scale, const RowGradient& grad,
                              bool stream);
    Forward forward;
    Forward forward_entropy;
    Backward backward;
    Backward backward_entropy;
};

}  // namespace
}  // namespace spear

#define SPEAR_ROWS "token_logprobs_rows.h"
#include "foreach_isa.h"

namespace spear {
namespace {

// A matrix of logits (or of their gradient) in memory of torch; only `columns` of each row are real vocabulary.
struct Matrix {
    Matrix(uintptr_t address, int dtype_code, int64_t row_stride, int64_t columns)
        : address(address), dtype(static_cast<Dtype>(dtype_code)), row_stride(row_stride), columns(columns) {
        if (dtype != Dtype::float32 && dtype != Dtype::bfloat16) throw std::invalid_argument("unknown dtype code");
    }

    int64_t element_size() const { return dtype == Dtype::float32 ? 4 : 2; }
    char* row(int64_t index) const { return reinterpret_cast<char*>(address) + index * row_stride * element_size(); }
    float at(int64_t index, int64_t column) const {
        const char* p = row(index) + column * element_size();
        return dtype == Dtype::float32 ? *reinterpret_cast<const float*>(p)
                                       : to_float(*reinterpret_cast<const Bfloat16*>(p));
    }
    void set(int64_t index, int64_t column, float value) const {
        char* p = row(index) + column * element_size();
        if (dtype == Dtype::float32) *reinterpret_cast<float*>(p) = value;
        else assign(*reinterpret_cast<Bfloat16*>(p), value);
    }

    uintptr_t address;
    Dtype dtype;
    int64_t row_stride;
    int64_t columns;
};

RowKernels kernels_for(Dtype dtype, Isa isa) {
#if defined(__x86_64__)
    if (isa == Isa::avx512) return avx512::row_kernels(dtype);
    if (isa == Isa::avx2) return avx2::row_kernels(dtype);
#endif
    return generic::row_kernels(dtype);
}

// stats[row] = (max, sum exp, sum exp * (x - max), target logit or -inf when another rank holds it).
void forward(uintptr_t logits, int dtype, int64_t rows, int64_t row_stride, int64_t columns, uintptr_t targets,
             int64_t first_column, double temperature, bool with_entropy, uintptr_t stats, int threads,
             const char* isa) {
    const Matrix x(logits, dtype, row_stride, columns);
    const Scale scale(temperature);
    const RowKernels kernels = kernels_for(x.dtype, parse_isa(isa));
    const RowKernels::Forward kernel = with_entropy ? kernels.forward_entropy : kernels.forward;
    const int64_t* target = reinterpret_cast<const int64_t*>(targets);
    float* out = reinterpret_cast<float*>(stats);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && rows > 1)
    for (int64_t row = 0; row < rows; ++row) {
        const OnlineSoftmax state = kernel(x.row(row), columns, scale);
        const int64_t local = target[row] - first_column;
        out[4 * row] = state.max;
        out[4 * row + 1] = static_cast<float>(state.sum);
        out[4 * row + 2] = with_entropy ? static_cast<float>(state.weighted) : 0.0f;
        out[4 * row + 3] =
            local >= 0 && local < columns ? x.at(row, local) : -std::numeric_limits<float>::infinity();
    }
}

constexpr int64_t kStreamBytes = int64_t{32} << 20;  // a gradient of this size leaves the last level of cache anyway

// One row of the gradient, see GradientTerms for `g`. `target` is a local column, or outside of the row.
void backward_row(const Matrix& x, const Matrix& y, int64_t row, int64_t target, const float* g, const Scale& scale,
                  RowKernels::Backward kernel, bool stream) {
    const int64_t columns = x.columns;
    const GradientTerms terms(g, scale.inv_temperature);
    std::memset(y.row(row) + columns * y.element_size(), 0,
                static_cast<size_t>((y.columns - columns) * y.element_size()));
    if (terms.is_zero) {
        std::memset(y.row(row), 0, static_cast<size_t>(columns * y.element_size()));
        return;
    }
    if (terms.is_nan()) {
        const float nan = std::numeric_limits<float>::quiet_NaN();
        for (int64_t column = 0; column < columns; ++column) y.set(row, column, nan);
        return;
    }
    const bool owned = target >= 0 && target < columns;
    const float at_target = owned ? terms.at_target(x.at(row, target)) : 0;
    kernel(x.row(row), y.row(row), columns, scale, terms.narrowed(), stream);
    if (owned) y.set(row, target, at_target);
}

// row_grads holds five numbers per row, see GradientTerms; `out` may be the logits.
void backward(uintptr_t logits, int dtype, int64_t rows, int64_t row_stride, int64_t columns, uintptr_t targets,
              int64_t first_column, double temperature, bool with_entropy, uintptr_t row_grads, uintptr_t out,
              int64_t out_stride, int64_t out_columns, int threads, const char* isa) {
    const Matrix x(logits, dtype, row_stride, columns);
    const Matrix y(out, dtype, out_stride, out_columns);
    const Scale scale(temperature);
    const RowKernels kernels = kernels_for(x.dtype, parse_isa(isa));
    const RowKernels::Backward kernel = with_entropy ? kernels.backward_entropy : kernels.backward;
    const bool stream = out != logits && rows * out_stride * y.element_size() >= kStreamBytes;
    const int64_t* target = reinterpret_cast<const int64_t*>(targets);
    const float* grads = reinterpret_cast<const float*>(row_grads);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && rows > 1)
    for (int64_t row = 0; row < rows; ++row) {
        backward_row(x, y, row, target[row] - first_column, grads + 5 * row, scale, kernel, stream);
    }
}

}  // namespace
}  // namespace spear

void register_token_logprobs(py::module_& module) {
    using py::arg;
    module.def("token_logprobs_forward", &spear::forward, py::call_guard<py::gil_scoped_release>(), arg("logits"),
               arg("dtype"), arg("rows"), arg("row_stride"), arg("columns"), arg("targets"), arg("first_column"),
               arg("temperature"), arg("with_entropy"), arg("stats"), arg("threads"), arg("isa"),
               "Row statistics [rows, 4] of logits: max, sum exp, first moment, target logit.");
    module.def("token_logprobs_backward", &spear::backward, py::call_guard<py::gil_scoped_release>(), arg("logits"),
               arg("dtype"), arg("rows"), arg("row_stride"), arg("columns"), arg("targets"), arg("first_column"),
               arg("temperature"), arg("with_entropy"), arg("row_grads"), arg("out"), arg("out_stride"),
               arg("out_columns"), arg("threads"), arg("isa"),
               "Gradient of the logits; `out` may be the logits themselves.");
}
