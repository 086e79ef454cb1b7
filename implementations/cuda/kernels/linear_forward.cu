// TTT-Linear forward on tensor cores, one block a chain: the recurrence in the registers of some warps, and the read-out
// of each mini-batch by others, behind it. See linear_blocks.cuh.
//
//   z1_bar = xq w1 + b1 - (eta * (tril(xq xk^T) + tril(1))) g_z1      causal
//          = xq w1' + b1'                                             not causal
//   out    = xq + LN(z1_bar)
//
// Memory: reads the inputs once, writes `out` once, and w1, b1 of every `group`-th mini-batch for the backward.
#include "linear_blocks.cuh"

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
    TTT_INLINE void tokens(int, int, int, int, const Token&, const float (&)[2][2]) const {}
};

template <typename P> struct ReadOut {
    using T = typename P::T;
    static constexpr int D = P::D;
    const P& at;
    T* out;
    int64_t out_token;
    float eps;
    uint32_t xq[D / 16][4];
    uint32_t scores[4];

    TTT_INLINE void load(int stage, int row) {
#pragma unroll
        for (int k = 0; k < D / 16; k++) ldmatrix_x4(xq[k], at.xq(stage).lane(row, 16 * k));
    }

    // -eta (xq xk^T + 1) of 16 tokens and the 16 keys from `key`, as an A operand.
    TTT_INLINE void attend(int stage, int row, int key) {
        float s[2][4] = {};
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
            uint32_t x[4];
            ldmatrix_x4(x, at.xk(stage).lane(key, 16 * k));
            mma<T>(s[0], xq[k], x[0], x[2]);
            mma<T>(s[1], xq[k], x[1], x[3]);
        }
        const int i = row + row_in_tile(), j = key + column_in_tile();
        const float eta[2] = {-at.token_eta()[i], -at.token_eta()[i + 8]};
        const float* lr = at.lr(stage);
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float x[2];
#pragma unroll
                for (int l = 0; l < 2; l++) {
                    const int column = j + 8 * h + l;
                    x[l] = column <= i + 8 * r ? eta[r] * lr[column] * (s[h][2 * r + l] + 1.0f) : 0.0f;
                }
                scores[2 * h + r] = pack<T>(x[0], x[1]);
            }
    }

    TTT_INLINE void early(int, int stage) {
        load(stage, 0);
        if (P::CAUSAL) attend(stage, 0, 0);
    }

    TTT_INLINE void read(int n, int slot, int stage, int row) {
        if (P::TEAM > 1) load(stage, row);
        const int t = column_in_tile();
        float z[D / 8][4];
#pragma unroll
        for (int j = 0; j < D / 8; j++) {
            const float2 b = *reinterpret_cast<const float2*>(at.b(slot) + 8 * j + t);
            z[j][0] = z[j][2] = b.x, z[j][1] = z[j][3] = b.y;
        }
        const Tile<T, D> w = at.w(slot);
#pragma unroll
        for (int j = 0; j < D / 16; j++)
#pragma unroll
            for (int k = 0; k < D / 16; k++) {  // [16, D] @ [D, 16 of D]
                uint32_t x[4];
                ldmatrix_x4(x, w.lane(16 * j, 16 * k));
                mma<T>(z[2 * j], xq[k], x[0], x[2]);
                mma<T>(z[2 * j + 1], xq[k], x[1], x[3]);
            }
        if (P::CAUSAL)
            for (int key = 0; key <= row; key += 16) {
                if (P::TEAM > 1) attend(stage, row, key);
#pragma unroll
                for (int j = 0; j < D / 8; j += 2) {  // [16, 16 tokens] @ [16 tokens, D]
                    uint32_t x[4];
                    ldmatrix_x4_trans(x, at.g(slot).lane(key, 8 * j));
                    mma<T>(z[j], scores, x[0], x[1]);
                    mma<T>(z[j + 1], scores, x[2], x[3]);
                }
            }

        // LayerNorm: a row is in the four lanes of a quad.
        float mean[2] = {}, rstd[2] = {};
#pragma unroll
        for (int j = 0; j < D / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) mean[i / 2] += z[j][i];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            mean[r] += shuffle_xor(mean[r], 1);
            mean[r] = (mean[r] + shuffle_xor(mean[r], 2)) / D;
        }
#pragma unroll
        for (int j = 0; j < D / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                z[j][i] -= mean[i / 2];
                rstd[i / 2] += z[j][i] * z[j][i];
            }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            rstd[r] += shuffle_xor(rstd[r], 1);
            rstd[r] = rsqrt((rstd[r] + shuffle_xor(rstd[r], 2)) / D + eps);
        }

        // Through shared memory, over this tile's own xq, so that a row leaves in pieces of 16 bytes.
        const Tile<T, D> rows = at.xq(stage);
        sync_warp();
#pragma unroll
        for (int j = 0; j < D / 8; j++) {
            const float4 ln = at.ln()[(8 * j + t) / 2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float2 x = unpack<T>(xq[j / 2][j % 2 * 2 + r]);
                rows.set(row + row_in_tile() + 8 * r, 8 * j + t,
                         pack<T>(x.x + (ln.x * (z[j][2 * r] * rstd[r]) + ln.z), x.y + (ln.y * (z[j][2 * r + 1] * rstd[r]) + ln.w)));
            }
        }
        sync_warp();
        T* to = out + (int64_t(n) * P::M + row) * out_token;
#pragma unroll
        for (int i = 0; i < D / 16; i++) {
            const int chunk = lane_id() + 32 * i, r = chunk / (D / 8), column = chunk % (D / 8) * 8;
            *reinterpret_cast<uint4*>(to + r * out_token + column) = *reinterpret_cast<const uint4*>(rows.at(row + r, column));
        }
        sync_warp();
    }
};

template <typename T, int D, int M, bool CAUSAL, int GROUPS, int SLOTS, int STAGES>
__global__ void __launch_bounds__(Plan<T, D, M, CAUSAL, GROUPS, SLOTS, STAGES>::THREADS, 1)
linear_forward(const __grid_constant__ ForwardArguments a) {
    using P = Plan<T, D, M, CAUSAL, GROUPS, SLOTS, STAGES>;
    static_assert(P::BYTES == TTT_SHARED_BYTES && P::THREADS == TTT_THREADS, "the host counts as the kernel does");
    TTT_SHARED(shared);
    const P at = {shared};
    const int64_t chain = blockIdx.x;
    const int warp = threadIdx.x / 32, mini_batches = int(a.mini_batches);
    const float* w1 = a.w1 + chain * D * D;
    const float* b1 = a.b1 + chain * D;
    load_shared(at, a.ln_weight + chain % a.heads * D, a.ln_bias + chain % a.heads * D, a.token_eta);
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
        recurrence(at, weights, warp, mini_batches, float(a.eps), keep);
        weights.store(a.final_w1 + chain * D * D, a.final_b1 + chain * D, at.mean(), 16 * warp);
    } else {
        const Source<P> source = {
            chain_of<const T>(a.xq, chain, a.heads), chain_of<const T>(a.xk, chain, a.heads),
            chain_of<const T>(a.xv, chain, a.heads), chain_of<const T>(a.lr, chain, a.heads),
            a.xq.token, a.xk.token, a.xv.token, a.lr.token};
        ReadOut<P> work = {at, chain_of<T>(a.out, chain, a.heads), a.out.token, float(a.eps)};
        reader(at, source, warp - P::WARPS, mini_batches, work);
    }
}

}  // namespace ttt
