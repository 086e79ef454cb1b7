// One kernel for each primitive of device.cuh, compared with NumPy by test_cuda_emulator.py and test_cupy.py.
#include "device.cuh"

namespace ttt {

struct Arguments { const unsigned char* in; unsigned char* out; int64_t n; };

template <typename T> __global__ void round_trip(const __grid_constant__ Arguments a) {
    const float* in = reinterpret_cast<const float*>(a.in);
    float* out = reinterpret_cast<float*>(a.out);
    for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < a.n / 2; i += gridDim.x * blockDim.x) {
        const float2 pair = unpack<T>(pack<T>(in[2 * i], in[2 * i + 1]));
        out[2 * i] = to_float(from_float<T>(in[2 * i]));
        out[2 * i + 1] = pair.y;
        if (__float_as_uint(out[2 * i]) != __float_as_uint(pair.x)) out[2 * i] = -12345.0f;
    }
}

// in: A [16 16], B [16 8] of T row by row; out: A B [16 8] in fp32, then A again through ldmatrix and movmatrix.
template <typename T> __global__ void product(const __grid_constant__ Arguments a) {
    TTT_SHARED(shared);
    T* s_a = reinterpret_cast<T*>(shared);
    T* s_b = s_a + 16 * 16;
    const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    for (int i = lane; i < 48; i += 32) copy_async_16(shared + 16 * i, a.in + 16 * i);
    copy_async_commit();
    copy_async_wait<0>();
    sync();
    uint32_t r_a[4], r_b[2], other[4];
    ldmatrix_x4(r_a, s_a + (lane % 16) * 16 + lane / 16 * 8);
    ldmatrix_x2_trans(r_b, s_b + (lane % 16) * 8);
    float d[4] = {0, 0, 0, 0};
    mma<T>(d, r_a, r_b[0], r_b[1]);
    float* out = reinterpret_cast<float*>(a.out);
    for (int j = 0; j < 4; j++) out[(g + j / 2 * 8) * 8 + 2 * t + j % 2] = d[j];
    ldmatrix_x4_trans(other, s_a + (lane % 16) * 16 + lane / 16 * 8);
    uint32_t* again = reinterpret_cast<uint32_t*>(out + 128);
    for (int j = 0; j < 4; j++) again[(g + j % 2 * 8) * 8 + t + j / 2 * 4] = movmatrix(other[j]);
    uint32_t half[2];
    ldmatrix_x2(half, s_a + (lane % 16) * 16);
    if (half[0] != r_a[0] || half[1] != r_a[1]) out[0] = -12345.0f;
}

// in: A [16 8], B [8 8] of fp32; out: A B [16 8].
__global__ void product_tf32(const __grid_constant__ Arguments a) {
    const uint32_t* in = reinterpret_cast<const uint32_t*>(a.in);
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    const uint32_t r_a[4] = {in[g * 8 + t], in[(g + 8) * 8 + t], in[g * 8 + t + 4], in[(g + 8) * 8 + t + 4]};
    float d[4] = {0, 0, 0, 0};
    mma_tf32(d, r_a, in[128 + t * 8 + g], in[128 + (t + 4) * 8 + g]);
    for (int j = 0; j < 4; j++) reinterpret_cast<float*>(a.out)[(g + j / 2 * 8) * 8 + 2 * t + j % 2] = d[j];
}

// Warp 0 hands numbers to warps 1 and 2 over two barriers and two places: out[i] = 3 i + (sum of the lanes' numbers).
__global__ void hand_over(const __grid_constant__ Arguments a) {
    TTT_SHARED(shared);
    float* place = reinterpret_cast<float*>(shared);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int i = 0; i < a.n; i++) {
        if (warp == 0) {
            if (i >= 2) named_sync(3 + i % 2, 96);  // it is empty
            float sum = 3.0f * i;
            float x = float(lane);
            for (int mask = 16; mask; mask /= 2) x += shuffle_xor(x, mask);
            place[32 * (i % 2) + lane] = sum + shuffle(x, i % 32);
            named_arrive(1 + i % 2, 96);  // it is full
        } else {
            named_sync(1 + i % 2, 96);
            const float x = place[32 * (i % 2) + lane];
            if (warp == 1) reinterpret_cast<float*>(a.out)[32 * i + lane] = x;
            if (i + 2 < a.n) named_arrive(3 + i % 2, 96);
        }
    }
    sync();
}

// Faults that the emulator must report, by number.
__global__ void faulty(const __grid_constant__ Arguments a) {
    TTT_SHARED(shared);
    float* place = reinterpret_cast<float*>(shared);
    float* out = reinterpret_cast<float*>(a.out);
    if (a.n == 0 && threadIdx.x < 32) sync();
    if (a.n == 1) shared[1024 + threadIdx.x] = 1;
    if (a.n == 2) copy_async_16(shared + 4, a.in);
    if (a.n == 3) out[0] = threadIdx.x % 2 ? shuffle_xor(1.0f, 1) : (sync_warp(), 0.0f);
    if (a.n == 4) out[threadIdx.x] = place[threadIdx.x];
    if (a.n == 5 && threadIdx.x == 0) {
        place[0] = 1;
        copy_async_16(shared, a.in);
        copy_async_commit();
        out[0] = place[0];
        copy_async_wait<0>();
        out[1] = place[0];
    }
    if (a.n == 6) named_sync(1, 64 + 32 * (threadIdx.x / 32 % 2));
}

#ifdef CLUSTERS
// The two blocks of a cluster send each other numbers in n % 16 rounds, over two places in turns: out[block, round,
// thread] = 7 thread + round + 100 (the other block), in pieces of 16, 8 and 4 bytes. n / 16 is a fault: 1 nobody
// expects them, 2 nobody waits for the last, 3 more come than expected, 4 they are read before they are waited for.
__global__ void __cluster_dims__(2, 1, 1) exchange(const __grid_constant__ Arguments a) {
    TTT_SHARED(shared);
    struct Shared { float sent[2][7 * 32]; Mbarrier there[2]; };
    auto& s = *reinterpret_cast<Shared*>(shared);
    const int rank = cluster_rank(), lane = threadIdx.x, rounds = int(a.n % 16), fault = int(a.n / 16);
    float* out = reinterpret_cast<float*>(a.out) + (blockIdx.x * rounds) * 32 * 7;
    if (lane < 2) mbarrier_init(&s.there[lane]);
    cluster_sync();
    for (int i = 0; i < rounds; i++) {
        const int turn = i % 2;
        const float x = float(7 * lane + i + 100 * rank);
        const float four[4] = {x, x + 1, x + 2, x + 3}, two[2] = {x + 4, x + 5}, one[1] = {x + 6};
        float* sent = s.sent[turn];
        if (lane == 0 && fault != 1) mbarrier_expect(&s.there[turn], 7 * 4 * 32 - (fault == 3 ? 4 : 0));
        store_async(sent + 4 * lane, four, &s.there[turn], 1 - rank);
        store_async(sent + 4 * 32 + 2 * lane, two, &s.there[turn], 1 - rank);
        store_async(sent + 6 * 32 + lane, one, &s.there[turn], 1 - rank);
        if (fault == 2 && i + 1 == rounds) break;
        if (fault != 4) mbarrier_wait(&s.there[turn], i / 2 % 2);
        float* to = out + (i * 32 + lane) * 7;
        for (int k = 0; k < 4; k++) to[k] = sent[4 * lane + k];
        to[4] = sent[4 * 32 + 2 * lane], to[5] = sent[4 * 32 + 2 * lane + 1], to[6] = sent[6 * 32 + lane];
        if (fault == 4) mbarrier_wait(&s.there[turn], i / 2 % 2);
    }
}
#endif

}  // namespace ttt
