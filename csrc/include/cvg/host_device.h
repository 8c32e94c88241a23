// Functions for CPU and GPU alike.
#pragma once

#ifdef __CUDACC__
#define CVG_HD __host__ __device__ inline
#else
#define CVG_HD inline
#endif
