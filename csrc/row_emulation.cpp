// Runs the row code of the CUDA kernels (row_threads.h) on the host, thread by thread, so that tests reach its
// arithmetic and its indices on machines without a device. Not used by the library itself.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "row_threads.h"

namespace py = pybind11;

namespace spear {
namespace {

// (max, sum exp, sum exp * (x - max)) of one row, merged over the threads as the block does it.
template <typename Element>
std::tuple<float, double, double> emulate_stats(uintptr_t row, int columns, double temperature, bool with_entropy,
                                                int threads) {
    const Scale scale(temperature);
    const Element* x = reinterpret_cast<const Element*>(row);
    std::vector<SoftmaxState<float>> states;
    SoftmaxState<double> merged;
    for (int thread = 0; thread < threads; ++thread) {
        states.push_back(with_entropy ? thread_stats<Element, true>(x, columns, thread, threads, scale)
                                      : thread_stats<Element, false>(x, columns, thread, threads, scale));
        merged.max = std::max(merged.max, states.back().max);
    }
    for (SoftmaxState<float>& state : states) {
        state.move_to(merged.max, FastDecay{scale.log2_factor});
        merged.sum += state.sum;
        merged.weighted += state.weighted;
    }
    return {merged.max, merged.sum, with_entropy ? merged.weighted : 0};
}

// One row of the gradient as the block writes it, but for the rows that are 0 or NaN throughout.
template <typename Element>
void emulate_gradient(uintptr_t row, uintptr_t out, int columns, int out_columns, int target, double temperature,
                      const float* row_grads, int threads) {
    const Scale scale(temperature);
    const GradientTerms terms(row_grads, scale.inv_temperature);
    const Element* x = reinterpret_cast<const Element*>(row);
    Element* y = reinterpret_cast<Element*>(out);
    const float at_target = terms.at_target(to_float(x[target]));
    for (int thread = 0; thread < threads; ++thread) {
        thread_fill(y, columns, out_columns, thread, threads, 0.0f);
        thread_gradient(x, y, columns, thread, threads, scale, terms.narrowed());
    }
    assign(y[target], at_target);
}

Dtype checked(int dtype) {
    if (dtype != 0 && dtype != 1) throw std::invalid_argument("unknown dtype code");
    return static_cast<Dtype>(dtype);
}

std::tuple<float, double, double> stats(uintptr_t row, int dtype, int columns, double temperature, bool with_entropy,
                                        int threads) {
    return checked(dtype) == Dtype::float32
               ? emulate_stats<float>(row, columns, temperature, with_entropy, threads)
               : emulate_stats<Bfloat16>(row, columns, temperature, with_entropy, threads);
}

void gradient(uintptr_t row, uintptr_t out, int dtype, int columns, int out_columns, int target, double temperature,
              uintptr_t row_grads, int threads) {
    const float* grads = reinterpret_cast<const float*>(row_grads);
    const auto emulate = checked(dtype) == Dtype::float32 ? emulate_gradient<float> : emulate_gradient<Bfloat16>;
    emulate(row, out, columns, out_columns, target, temperature, grads, threads);
}

}  // namespace
}  // namespace spear

void register_row_emulation(py::module_& module) {
    using py::arg;
    module.def("emulate_row_stats", &spear::stats, arg("row"), arg("dtype"), arg("columns"), arg("temperature"),
               arg("with_entropy"), arg("threads"), "Statistics of one row by the code of the CUDA kernels.");
    module.def("emulate_row_gradient", &spear::gradient, arg("row"), arg("out"), arg("dtype"), arg("columns"),
               arg("out_columns"), arg("target"), arg("temperature"), arg("row_grads"), arg("threads"),
               "Gradient of one row by the code of the CUDA kernels; `out` may be the row.");
}
