// What the headers of the CUDA library share. Pointers are device memory of `device`, `stream` is a cudaStream_t.
// Functions return a cudaError_t unless they say otherwise; they neither wait nor allocate.
#pragma once

#include <cstdint>

#define SPEAR_EXPORT extern "C" __attribute__((visibility("default")))
