// A loss of which the gradient is known when the loss is, for autograd: the backward pass hands it on.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

namespace spear {

struct KnownLoss {
    at::Tensor loss;      // scalar
    at::Tensor gradient;  // by the tensor that is differentiated, of its shape
};

class KnownGradient : public torch::autograd::Function<KnownGradient> {
public:
    static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& /* input */,
                              const KnownLoss& known) {
        context->save_for_backward({known.gradient});
        return known.loss;
    }

    static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                   torch::autograd::variable_list gradients) {
        TORCH_CHECK(!at::GradMode::is_enabled(),
                    "the kernels have no second derivative: run the backward pass without create_graph=True");
        const at::Tensor gradient = context->get_saved_variables()[0];
        const at::Tensor& outer = gradients[0];
        // The loss itself was differentiated.
        const bool readable = outer.is_cpu() && outer.scalar_type() == at::kFloat && !outer._is_zerotensor();
        const bool whole = readable && *outer.const_data_ptr<float>() == 1;
        return {whole ? gradient : gradient.mul(outer), at::Tensor()};
    }
};

// `known.loss` as a function of `input`.
inline at::Tensor attached(const at::Tensor& input, const KnownLoss& known) {
    return KnownGradient::apply(input, known);
}

}  // namespace spear
