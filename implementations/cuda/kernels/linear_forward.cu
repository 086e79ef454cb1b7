// TTT-Linear forward on tensor cores, one block a chain: the recurrence in the registers of some warps, and the read-out
// of each mini-batch by others, behind it. See linear_recurrence.cuh.
//
//   z1_bar = xq w1 + b1 - (eta * (tril(xq xk^T) + tril(1))) g_z1      causal
//          = xq w1' + b1'                                             not causal
//   out    = xq + LN(z1_bar)
//
// Memory: reads the inputs once, writes `out` once, and w1, b1 of every `group`-th mini-batch for the backward.
#include "linear_readers.cuh"
#include "linear_recurrence.cuh"

namespace ttt {

struct ForwardArguments {
    View xq, xk, xv, lr;
    const float *token_eta, *ln_weight, *ln_bias, *w1, *b1;
    View out;
    float *final_w1, *final_b1, *saved;  // saved [B H, ceil(N / group), D (D + 1)]
    int64_t heads, mini_batches, group;
    double eps;
};

template <typename P> struct Save {
    float* saved;
    int group, next;
    TTT_INLINE void start(int n, const Weights<P>& weights, int warp) {
        if (n != next) return;
        weights.save(saved, warp);
        saved += P::D * (P::D + 1);
        next += group;
    }
    TTT_INLINE void token(int, int, int, const float4&, float, float) const {}
    TTT_INLINE void x_hat(int, int, int, int, const float (&)[2][2]) const {}
};

template <typename P> struct Output : ReadOut<P> {
    using T = typename P::T;
    static constexpr int D = P::D;
    Rows<const T> from_xq, from_xk, from_xv, from_lr;
    Rows<T> out;

    TTT_INLINE void load(int n, int stage, int row) const {
        const int64_t token = int64_t(n) * P::M + row;
        load_rows(this->at.xk(stage), row, from_xk.at(token), from_xk.token);
        load_rows(this->at.xv(stage), row, from_xv.at(token), from_xv.token);
        load_rows(this->at.xq(stage), row, from_xq.at(token), from_xq.token);
    }
    TTT_INLINE float lr(int n, int row) const { return to_float(*from_lr.at(int64_t(n) * P::M + row)); }

    TTT_INLINE void read(int n, int slot, int stage, int, int row) {
        float z[D / 8][4], rstd[2];
        this->normalised(slot, stage, row, z, rstd);
#pragma unroll
        for (int j = 0; j < D / 8; j++) {
            const float4 ln = this->at.ln()[(8 * j + column_in_tile()) / 2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float2 x = unpack<T>(this->xq[j / 2][j % 2 * 2 + r]);
                z[j][2 * r] = x.x + (ln.x * z[j][2 * r] + ln.z);
                z[j][2 * r + 1] = x.y + (ln.y * z[j][2 * r + 1] + ln.w);
            }
        }
        store_accumulators(z, this->at.xq(stage), row, out.at(int64_t(n) * P::M + row), out.token);
    }
};

template <typename T, int D, int M, bool CAUSAL, int GROUPS, int SLOTS, int STAGES>
__global__ void __launch_bounds__(TTT_THREADS, 1) linear_forward(const __grid_constant__ ForwardArguments a) {
    using P = Plan<FORWARD, T, D, M, CAUSAL, GROUPS, SLOTS, STAGES>;
    static_assert(P::BYTES == TTT_SHARED_BYTES && P::THREADS == TTT_THREADS, "the host counts as the kernel does");
    TTT_SHARED(shared);
    const P at = {shared};
    const int64_t chain = blockIdx.x;
    const int warp = threadIdx.x / 32, mini_batches = int(a.mini_batches);
    const float* w1 = a.w1 + chain * D * D;
    const float* b1 = a.b1 + chain * D;
    load_shared(at, a.ln_weight + chain % a.heads * D, a.ln_bias + chain % a.heads * D, a.token_eta, a.eps);
    if (threadIdx.x <= D) {
        const float* row = threadIdx.x < D ? w1 + threadIdx.x * D : b1;
        float sum = 0.0f;
        for (int e = 0; e < D; e++) sum += row[e];
        at.mean()[threadIdx.x] = sum / D;
    }
    sync();
    if (warp < P::WARPS) {
        Weights<P> weights;
        weights.load(w1, b1, at.mean(), 16 * warp);
        const int64_t saves = (a.mini_batches + a.group - 1) / a.group;
        Save<P> keep = {a.saved + chain * saves * (D * (D + 1)), int(a.group), 0};
        run_recurrence(at, weights, warp, mini_batches, keep);
        weights.store(a.final_w1 + chain * D * D, a.final_b1 + chain * D, at.mean(), 16 * warp);
    } else {
        const int64_t h = a.heads;
        Output<P> work = {{at}, {a.xq, chain, h}, {a.xk, chain, h}, {a.xv, chain, h}, {a.lr, chain, h},
                          {a.out, chain, h}};
        reader(at, warp - P::WARPS, mini_batches, work);
    }
}

}  // namespace ttt
