// SPEAR_HOST_DEVICE marks what C++ and CUDA sources share: such code uses neither the standard library nor exceptions.
#pragma once

#if defined(__CUDACC__)
#define SPEAR_HOST_DEVICE __host__ __device__ inline
#else
#define SPEAR_HOST_DEVICE inline
#endif
