// What the kernels are made of: conversions, tensor cores, asynchronous copies, barriers. Each is a line or two of PTX
// for sm_80 and up; compiled by g++ instead, each has the same meaning in ../emulator/device.h.
//
// Fragments are those of the PTX ISA, with g = lane / 4 and t = lane % 4. Of an m16n8k16 product, in pairs along the
// inner axis: a[0] = A[g, 2t], a[1] = A[g + 8, 2t], a[2] = A[g, 2t + 8], a[3] = A[g + 8, 2t + 8], b0 = B[2t, g],
// b1 = B[2t + 8, g]; d[0] and d[1] = D[g, 2t] and D[g, 2t + 1], d[2] and d[3] the same of row g + 8.
// Of an m16n8k8 product in tf32: A[g, t], A[g + 8, t], A[g, t + 4], A[g + 8, t + 4]; B[t, g], B[t + 4, g].
#pragma once

#ifndef __CUDACC__
#include "../emulator/device.h"
#else

typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef long int64_t;  // NVRTC has no headers; these are what Linux has

#define TTT_SHARED(name)                                  \
    extern __shared__ __align__(128) unsigned char ttt_shared_memory[]; \
    unsigned char* const name = ttt_shared_memory

#define TTT_INLINE __device__ __forceinline__

namespace ttt {

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

// --- Conversions, rounding to nearest even ---

TTT_INLINE float to_float(float x) { return x; }
TTT_INLINE float to_float(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
TTT_INLINE float to_float(fp16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

template <typename T> TTT_INLINE T from_float(float x);
template <> TTT_INLINE float from_float<float>(float x) { return x; }
template <> TTT_INLINE bf16 from_float<bf16>(float x) {
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
template <> TTT_INLINE fp16 from_float<fp16>(float x) {
    fp16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}

// Two numbers in a register, the first in its lower half.
template <typename T> TTT_INLINE uint32_t pack(float lo, float hi);
template <> TTT_INLINE uint32_t pack<bf16>(float lo, float hi) {
    uint32_t y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
    return y;
}
template <> TTT_INLINE uint32_t pack<fp16>(float lo, float hi) {
    uint32_t y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
    return y;
}

template <typename T> TTT_INLINE float2 unpack(uint32_t x) {
    return {to_float(T{uint16_t(x)}), to_float(T{uint16_t(x >> 16)})};
}

// --- Tensor cores ---

// d[16 8] += a[16 16] b[16 8], accumulated in fp32.
template <typename T> TTT_INLINE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <> TTT_INLINE void mma<bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <> TTT_INLINE void mma<fp16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d[16 8] += a[16 8] b[8 8] of fp32 numbers, of which the tensor core drops the 13 last bits.
TTT_INLINE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

TTT_INLINE uint32_t shared_address(const void* pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }

// Matrices of 8 rows of 16 bytes. Lane i gives the address of row i % 8 of matrix i / 8, and gets of each matrix the
// pair [g, 2t] of 16-bit numbers; with _trans the pair of the transposed matrix, which is [2t, g] and [2t + 1, g].
TTT_INLINE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
TTT_INLINE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
TTT_INLINE void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
        : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}
TTT_INLINE void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
        : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}

// The 8 x 8 matrix that a warp holds in pairs [g, 2t], transposed.
TTT_INLINE uint32_t movmatrix(uint32_t x) {
    uint32_t y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// --- Copies from global to shared memory, both addresses multiples of 16 bytes ---

TTT_INLINE void copy_async_16(void* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(shared_address(shared)), "l"(global) : "memory");
}
// Of 4 bytes, at multiples of 4.
TTT_INLINE void copy_async_4(void* shared, const void* global) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(shared_address(shared)), "l"(global) : "memory");
}
TTT_INLINE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most N groups of this thread are on their way.
template <int N> TTT_INLINE void copy_async_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory"); }

// --- Within a warp, a block, a cluster ---

TTT_INLINE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
TTT_INLINE uint32_t shuffle_xor(uint32_t x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
TTT_INLINE float shuffle(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
TTT_INLINE uint32_t shuffle(uint32_t x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
TTT_INLINE void sync_warp() { __syncwarp(); }

TTT_INLINE void sync() { __syncthreads(); }
// Barrier `id` (1 to 15) of `threads` threads, whole warps: those that wait there and those that only arrive.
#ifndef TTT_MBARRIERS
TTT_INLINE void named_init(int, int) {}
TTT_INLINE void named_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" :: "r"(id), "r"(threads) : "memory"); }
TTT_INLINE void named_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" :: "r"(id), "r"(threads) : "memory");
}
#else  // the same by mbarriers, for `compute-sanitizer --tool racecheck`, which does not know that bar.arrive orders
__shared__ unsigned long long ttt_mbarriers[16];
TTT_INLINE void named_init(int id, int threads) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" :: "r"(shared_address(ttt_mbarriers + id)), "r"(threads) : "memory");
}
TTT_INLINE unsigned long long named_arrive(int id, int) {
    unsigned long long phase;
    asm volatile("mbarrier.arrive.shared.b64 %0, [%1];"
        : "=l"(phase) : "r"(shared_address(ttt_mbarriers + id)) : "memory");
    return phase;
}
TTT_INLINE void named_sync(int id, int threads) {
    const unsigned long long phase = named_arrive(id, threads);
    for (uint32_t over = 0; !over;)
        asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
            : "=r"(over) : "r"(shared_address(ttt_mbarriers + id)), "l"(phase) : "memory");
}
#endif

// Of a kernel with __cluster_dims__, sm_90 and up.
TTT_INLINE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
TTT_INLINE int cluster_rank() {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return int(rank);
}

// --- Stores into another block of a cluster, which count their bytes at an mbarrier there ---

struct alignas(8) Mbarrier { unsigned long long state; };

// By one thread, before a `cluster_sync`.
TTT_INLINE void mbarrier_init(Mbarrier* barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;"
        :: "r"(shared_address(barrier)) : "memory");
}
// By one thread of the block that has `barrier`: how many bytes are to come in this phase; 0 or more may have.
TTT_INLINE void mbarrier_expect(Mbarrier* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
        :: "r"(shared_address(barrier)), "r"(bytes) : "memory");
}
// Until the phase is over, and what was stored is there: of parity 0 the first, then in turns.
TTT_INLINE void mbarrier_wait(Mbarrier* barrier, int parity) {
    for (uint32_t over = 0; !over;)
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, p;\n}" : "=r"(over) : "r"(shared_address(barrier)), "r"(parity) : "memory");
}
// The same place in the shared memory of block `rank`.
TTT_INLINE uint32_t cluster_address(const void* shared, int rank) {
    uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(shared)), "r"(rank));
    return there;
}
// x, in pieces of 4, 8 or 16 bytes, into block `rank`, at its place `to`, for its `barrier`.
template <int N> TTT_INLINE void store_async(float* to, const float (&x)[N], Mbarrier* barrier, int rank) {
    const uint32_t there = cluster_address(to, rank), done = cluster_address(barrier, rank);
    constexpr int PIECE = N % 4 == 0 ? 4 : N % 2 == 0 ? 2 : 1;
#pragma unroll
    for (int i = 0; i < N; i += PIECE)
        if constexpr (PIECE == 4)
            asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1,%2,%3,%4}, [%5];"
                :: "r"(there + 4 * i), "f"(x[i]), "f"(x[i + 1]), "f"(x[i + 2]), "f"(x[i + 3]), "r"(done) : "memory");
        else if constexpr (PIECE == 2)
            asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1,%2}, [%3];"
                :: "r"(there + 4 * i), "f"(x[i]), "f"(x[i + 1]), "r"(done) : "memory");
        else
            asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];"
                :: "r"(there + 4 * i), "f"(x[i]), "r"(done) : "memory");
}

// --- Functions of the hardware: an error of about 1 (rsqrt, exp2: 2) units in the last place ---

TTT_INLINE float rsqrt(float x) {
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
TTT_INLINE float exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
TTT_INLINE float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

}  // namespace ttt
#endif
