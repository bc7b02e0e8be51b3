// Python module spear_megatron._C. Every kernel file offers register_<name>; declare and call it here.
#include <pybind11/pybind11.h>

namespace py = pybind11;

void register_cpu_info(py::module_&);
void register_token_logprobs(py::module_&);
void register_decoder(py::module_&);
void register_policy_loss(py::module_&);
void register_cov_select(py::module_&);
void register_drawn_loss(py::module_&);
void register_row_emulation(py::module_&);
void register_softmax_merge(py::module_&);

PYBIND11_MODULE(_C, module) {
    module.doc() = "Compiled CPU kernels of spear_megatron; use them through spear_megatron.kernels.";
    register_cpu_info(module);
    register_token_logprobs(module);
    register_decoder(module);
    register_policy_loss(module);
    register_cov_select(module);
    register_drawn_loss(module);
    register_row_emulation(module);
    register_softmax_merge(module);
}
