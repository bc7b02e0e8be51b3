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

namespace py = pybind11;

namespace spear {
namespace {

// The temperature in the forms that the kernels use.
struct Scale {
    explicit Scale(double temperature)
        : inv_temperature(1.0 / temperature),
          log2_factor(static_cast<float>(inv_temperature * 1.4426950408889634)),
          floor(static_cast<float>(-125.0 / (inv_temperature * 1.4426950408889634))) {}

    double inv_temperature;
    float log2_factor;  // exp(d / T) = 2^(d * log2_factor)
    float floor;        // differences below it are clamped: their exponential is at most 2^-125
};

struct RowGradient {
    float max;
    float factor;
    float slope;
};

struct RowKernels {
    using Forward = OnlineSoftmax (*)(const void* row, int64_t columns, const Scale& scale);
    using Backward = void (*)(const void* row, void* out, int64_t columns, const Scale& scale, const RowGradient& grad);
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
        out[4 * row + 2] = static_cast<float>(state.weighted);
        out[4 * row + 3] =
            local >= 0 && local < columns ? x.at(row, local) : -std::numeric_limits<float>::infinity();
    }
}

// One row of the gradient from g = (max, sum exp, entropy, gradient of the log-prob, gradient of the entropy), where
// max and sum are those of the whole vocabulary. With p = exp((x - max) / T) / sum:
//   d log p_t / dx_j = (1[j = t] - p_j) / T,   d H / dx_j = -p_j (log p_j + H) / T.
// `target` is a local column, or outside of the row.
void backward_row(const Matrix& x, const Matrix& y, int64_t row, int64_t target, const float* g, const Scale& scale,
                  RowKernels::Backward kernel) {
    const double max = g[0], sum = g[1], entropy = g[2], grad_logprob = g[3], grad_entropy = g[4];
    const int64_t columns = x.columns;
    std::memset(y.row(row) + columns * y.element_size(), 0,
                static_cast<size_t>((y.columns - columns) * y.element_size()));
    if (grad_logprob == 0 && grad_entropy == 0) {
        std::memset(y.row(row), 0, static_cast<size_t>(columns * y.element_size()));
        return;
    }
    const double inv_t = scale.inv_temperature;
    const double factor = -inv_t / sum * (grad_logprob + grad_entropy * (entropy - std::log(sum)));
    const double slope = -inv_t / sum * inv_t * grad_entropy;
    if (std::isnan(factor) || std::isnan(slope)) {
        const float nan = std::numeric_limits<float>::quiet_NaN();
        for (int64_t column = 0; column < columns; ++column) y.set(row, column, nan);
        return;
    }
    const bool owned = target >= 0 && target < columns;
    const double d = owned ? x.at(row, target) - max : 0;
    kernel(x.row(row), y.row(row), columns, scale, {g[0], static_cast<float>(factor), static_cast<float>(slope)});
    if (owned) {
        const double e = std::exp(d * inv_t);
        y.set(row, target, static_cast<float>((e > 0 ? e * (factor + slope * d) : 0) + inv_t * grad_logprob));
    }
}

// row_grads holds five numbers per row, see backward_row; `out` may be the logits.
void backward(uintptr_t logits, int dtype, int64_t rows, int64_t row_stride, int64_t columns, uintptr_t targets,
              int64_t first_column, double temperature, bool with_entropy, uintptr_t row_grads, uintptr_t out,
              int64_t out_stride, int64_t out_columns, int threads, const char* isa) {
    const Matrix x(logits, dtype, row_stride, columns);
    const Matrix y(out, dtype, out_stride, out_columns);
    const Scale scale(temperature);
    const RowKernels kernels = kernels_for(x.dtype, parse_isa(isa));
    const RowKernels::Backward kernel = with_entropy ? kernels.backward_entropy : kernels.backward;
    const int64_t* target = reinterpret_cast<const int64_t*>(targets);
    const float* grads = reinterpret_cast<const float*>(row_grads);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && rows > 1)
    for (int64_t row = 0; row < rows; ++row) {
        backward_row(x, y, row, target[row] - first_column, grads + 5 * row, scale, kernel);
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
