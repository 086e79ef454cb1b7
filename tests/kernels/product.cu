// Kernels for the tests of the static report: one as it should be, one that cannot keep what it loads in registers.
#include <cuda_bf16.h>
#include <mma.h>

using namespace nvcuda;

// One warp: [16, K] @ [K, 16] -> [16, 16] on tensor cores, then exp.
template <int K>
__global__ void product(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c) {
    __shared__ float s_c[256];
    extern __shared__ float s_scale[];
    wmma::fragment<wmma::matrix_a, 16, 16, 16, __nv_bfloat16, wmma::row_major> tile_a;
    wmma::fragment<wmma::matrix_b, 16, 16, 16, __nv_bfloat16, wmma::row_major> tile_b;
    wmma::fragment<wmma::accumulator, 16, 16, 16, float> tile_c;
    wmma::fill_fragment(tile_c, 0.f);
    for (int k = 0; k < K; k += 16) {
        wmma::load_matrix_sync(tile_a, a + k, K);
        wmma::load_matrix_sync(tile_b, b + 16 * k, 16);
        wmma::mma_sync(tile_c, tile_a, tile_b, tile_c);
    }
    wmma::store_matrix_sync(s_c, tile_c, 16, wmma::mem_row_major);
    __syncthreads();
    for (int i = threadIdx.x; i < 256; i += 32) c[i] = __expf(s_c[i]) * s_scale[i % 32];
}

// 64 values are alive across the barrier; two blocks of 1024 threads leave 32 registers for them.
template <int N>
__global__ void __launch_bounds__(1024, 2) reversed(const float* a, float* c) {
    float kept[N];
    for (int i = 0; i < N; i++) kept[i] = a[i * 1024 + threadIdx.x];
    __syncthreads();
    for (int i = 0; i < N; i++) c[i * 1024 + threadIdx.x] = kept[N - 1 - i] * kept[i];
}
