// Tensors arrive from Python by the address of their data.
#pragma once

#include <cstdint>

namespace spear {

template <typename Element>
Element* pointer(uintptr_t address) {
    return reinterpret_cast<Element*>(address);
}

}  // namespace spear
