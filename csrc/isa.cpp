#include "isa.h"

#include <pybind11/pybind11.h>

#include <cstring>
#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace spear {

Isa detected_isa() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")) {
        return Isa::avx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        return Isa::avx2;
    }
#endif
    return Isa::generic;
}

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::avx512: return "avx512";
        case Isa::avx2: return "avx2";
        default: return "generic";
    }
}

Isa parse_isa(const char* name) {
    const Isa best = detected_isa();
    if (std::strcmp(name, "auto") == 0) {
        return best;
    }
    for (Isa isa : {Isa::generic, Isa::avx2, Isa::avx512}) {
        if (std::strcmp(name, isa_name(isa)) == 0) {
            if (static_cast<int>(isa) > static_cast<int>(best)) {
                throw std::invalid_argument(std::string("this processor has no ") + name + "; the widest it has is " +
                                            isa_name(best));
            }
            return isa;
        }
    }
    throw std::invalid_argument(std::string("unknown instruction set '") + name +
                                "'; use auto, generic, avx2 or avx512");
}

}  // namespace spear

void register_cpu_info(py::module_& module) {
    module.def(
        "isa", [] { return spear::isa_name(spear::detected_isa()); },
        "Widest instruction set of this processor that the kernels use: generic, avx2 or avx512.");
}
