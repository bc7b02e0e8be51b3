// Run-time choice of the instruction set. Kernels are compiled for several sets by target attributes, never by
// -march=native.
#pragma once

namespace spear {

enum class Isa { generic = 0, avx2 = 1, avx512 = 2 };

// The widest instruction set that the processor and the compiler support.
Isa detected_isa();

const char* isa_name(Isa isa);

// Throws std::invalid_argument for an unknown name or for one that this processor lacks; "auto" is detected_isa().
Isa parse_isa(const char* name);

}  // namespace spear
