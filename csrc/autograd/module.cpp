// Python module spear_megatron._autograd: kernels of spear_megatron._C as functions that autograd differentiates. It is
// the only part that is compiled against torch, and saves what autograd functions in Python cost per call.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <optional>
#include <string>
#include <tuple>

#include "../drawn_loss.h"
#include "known_gradient.h"

namespace spear {
namespace {

DrawnLoss drawn_loss_kernel = nullptr;

bool fits(const at::Tensor& tensor, at::ScalarType dtype, int64_t count) {
    return tensor.scalar_type() == dtype && tensor.dim() == 1 && tensor.size(0) == count && tensor.is_cpu() &&
           tensor.is_contiguous();
}

template <typename Element>
const Element* data(const at::Tensor& tensor) {
    return static_cast<const Element*>(tensor.const_data_ptr());
}

// drawn_loss with constants that are taken once.
class DrawnLossCall {
public:
    DrawnLossCall(int mode, double low, double high, double coef, double ratio, double lb, double ub, double nearness,
                  double clip_low, double clip_high)
        : settings_{mode,
                    {static_cast<float>(low), static_cast<float>(high), 0, static_cast<float>(coef)},
                    ratio,
                    {lb, ub, nearness, clip_low, clip_high, mode == kKlCov}} {}

    // Loss, sums [9] and selected tokens; nothing where the tensors do not fit or tokens tie at the border.
    std::optional<std::tuple<at::Tensor, at::Tensor, at::Tensor>> operator()(
        const at::Tensor& log_probs, const at::Tensor& old_log_probs, const at::Tensor& advantages,
        const at::Tensor& weights, const at::Tensor& keys, const std::optional<at::Tensor>& mask) const {
        if (log_probs.dim() != 1) return std::nullopt;
        const int64_t count = log_probs.size(0);
        for (const at::Tensor* column : {&log_probs, &old_log_probs, &advantages, &weights}) {
            if (!fits(*column, at::kFloat, count)) return std::nullopt;
        }
        if (!fits(keys, at::kLong, count) || (mask && !fits(*mask, at::kBool, count))) return std::nullopt;
        const at::Tensor gradient = at::empty({count}, at::kFloat), selected = at::empty({count}, at::kBool);
        const at::Tensor loss = at::empty({}, at::kFloat), sums = at::empty({kDrawnSums}, at::kDouble);
        const DrawnColumns columns = {data<float>(log_probs),
                                      data<float>(old_log_probs),
                                      data<float>(advantages),
                                      data<float>(weights),
                                      data<int64_t>(keys),
                                      mask ? data<uint8_t>(*mask) : nullptr,
                                      count};
        const DrawnResults results = {
            gradient.mutable_data_ptr<float>(), static_cast<uint8_t*>(selected.mutable_data_ptr()),
            loss.mutable_data_ptr<float>(), sums.mutable_data_ptr<double>()};
        if (!drawn_loss_kernel(columns, settings_, results, at::get_num_threads())) return std::nullopt;
        return std::make_tuple(attached(log_probs, {loss, gradient}), sums, selected);
    }

private:
    DrawnSettings settings_;
};

at::Tensor attached_loss(const at::Tensor& input, const at::Tensor& loss, const at::Tensor& gradient) {
    return attached(input, {loss, gradient});
}

void load_kernels() {
    const py::module_ module = py::module_::import("spear_megatron._C");
    if (module.attr("headers").cast<std::string>() != SPEAR_HEADERS) {
        throw py::import_error("spear_megatron._C and spear_megatron._autograd are of different builds");
    }
    drawn_loss_kernel = reinterpret_cast<DrawnLoss>(module.attr("drawn_loss_address").cast<uintptr_t>());
}

}  // namespace
}  // namespace spear

PYBIND11_MODULE(_autograd, module) {
    using py::arg;
    using Guard = py::call_guard<py::gil_scoped_release>;
    module.doc() = "Kernels of spear_megatron that autograd differentiates; use them through spear_megatron.kernels.";
    module.attr("torch_version") = TORCH_VERSION;
    spear::load_kernels();
    py::class_<spear::DrawnLossCall>(module, "DrawnLoss",
                                     "_C.drawn_loss on tensors, with constants that are taken once.")
        .def(py::init<int, double, double, double, double, double, double, double, double, double>(), arg("mode"),
             arg("low"), arg("high"), arg("coef"), arg("ratio"), arg("lb"), arg("ub"), arg("nearness"),
             arg("clip_low"), arg("clip_high"))
        .def("__call__", &spear::DrawnLossCall::operator(), Guard(), arg("log_probs"), arg("old_log_probs"),
             arg("advantages"), arg("token_weight"), arg("token_keys"), arg("mask"),
             "(loss, sums fp64 [9], selected bool [T]), or None where the tensors do not fit or tokens tie at the "
             "border of the selection.");
    module.def("attached", &spear::attached_loss, Guard(), arg("input"), arg("loss"), arg("gradient"),
               "The loss as a function of the input, of the gradient given; differentiable once.");
}
