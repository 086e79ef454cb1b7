// TTT-MLP forward, causal: one block a chain (or SPLIT = 2, a cluster), the fast weights in registers as accumulators of
// their own updates (mlp.cuh).
//
// A mini-batch goes in chunks of 16 tokens. Every warp has its hidden columns of everything:
//     1. z1 = xk w1 + b1, x2 = gelu(z1), its part of z2 = x2 w2     -> summed over warps through shared memory
//        LayerNorm and inner gradient there, D / 4 lanes a token    -> g_z2 in shared memory
//     2. g_x2 = g_z2 w2^T, g_z1 = g_x2 gelu'(z1); W1^T -= (eta lr g_z1)^T xk, W2^T -= (eta lr g_z2)^T x2
// The read-out follows from the old weights: z1_bar = xq w1 + b1 - (eta (tril(xq xk^T) + tril(1))) g_z1, and since
// z2_bar is linear in attn2 = x2_bar x2^T, a sum over f, every warp applies its own part of attn2 to g_z2 and only
// z2_bar is summed. A cluster hands over what its blocks summed, z2 to both and z2_bar of every other chunk.
//
// Bytes: the inputs and out once; for the backward the fast weights of every `group`-th mini-batch in fp32 (8 D D + 4 D
// floats in group M tokens), and x_hat (16 bits, `store_hat`) and rstd of both LayerNorms, 4 D + 8 bytes a token.
#include "mlp_arguments.cuh"

namespace ttt {

template <typename T, int D, int M> struct ForwardShared {
    using S = Sizes<D>;
    static constexpr int CHUNKS = M / CHUNK, TILE = M * S::ROW;
    static constexpr int SQUARES = CHUNKS * (CHUNKS + 1) / 2;
    T xq[2][TILE], xk[2][TILE], xv[2][TILE];
    T g_z2[TILE];
    T step_z2[TILE];  // -eta_last lr g_z2
    static constexpr int SUMS = SPLIT == 2 && CHUNKS == 4 ? 1 : 2;  // buffers of partial sums
    float partials[SUMS][S::WARPS * S::PARTIAL];
    // Of a cluster: what this block summed of a chunk, and what the other sent (in turns); of z2, then of z2_bar.
    static constexpr int SENT = SPLIT == 1 ? 0 : CHUNKS, SENT_BAR = (SENT + 1) / 2;
    Four mine[SPLIT == 1 ? 1 : SENT + SENT_BAR][SPLIT == 1 ? 1 : S::THREADS];
    Four sent[2][SPLIT == 1 ? 1 : SENT + SENT_BAR][SPLIT == 1 ? 1 : S::THREADS];
    uint32_t x2[CHUNKS][S::WARPS][SLOT_WORDS];
    uint32_t slope[CHUNKS][S::WARPS][SLOT_WORDS];  // gelu'(z1), then g_z1
    uint32_t read[SQUARES + 1][128];        // -eta (attn1 + 1), squares of 16 tokens as A operands
    float lr[2][M], token_eta[M], b1[S::OWN], b2_part[S::WARPS][D];
    Mbarrier there[2][2];  // what was sent of z2, and of z2_bar, in turns
};

template <typename T, int D, int M>
__global__ void TTT_CLUSTER
__launch_bounds__(Sizes<D>::THREADS, 1) mlp_forward(const __grid_constant__ ForwardArguments a) {
    using S = Sizes<D>;
    constexpr int CHUNKS = M / CHUNK, F = S::F, ROW = S::ROW;
    constexpr int PAIR = SPLIT;  // chunks whose products overlap in time, where there are registers for it
    static_assert(CHUNKS % PAIR == 0);
    TTT_SHARED(memory);
    using Shared = ForwardShared<T, D, M>;
    auto& s = *reinterpret_cast<Shared*>(memory);
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    const int rank = SPLIT == 1 ? 0 : cluster_rank();
    const int64_t chain = blockIdx.x / SPLIT, batch = chain / a.heads, head = chain % a.heads;
    const int N = int(a.mini_batches), group = int(a.group), groups = (N + group - 1) / group;
    const Place<D> at(thread);
    const T* xq = static_cast<const T*>(a.xq.p) + batch * a.xq.b + head * a.xq.h;
    const T* xk = static_cast<const T*>(a.xk.p) + batch * a.xk.b + head * a.xk.h;
    const T* xv = static_cast<const T*>(a.xv.p) + batch * a.xv.b + head * a.xv.h;
    const T* lr = static_cast<const T*>(a.lr.p) + batch * a.lr.b + head * a.lr.h;
    const int64_t out_stride = a.heads * D;
    T* out = static_cast<T*>(a.out) + (batch * N * M * a.heads + head) * D;
    fp16* x_hat = static_cast<fp16*>(a.x_hat) + chain * N * M * D;
    fp16* x_hat_bar = static_cast<fp16*>(a.x_hat_bar) + chain * N * M * D;
    float *rstd = a.rstd + chain * N * M, *rstd_bar = a.rstd_bar + chain * N * M;
    const float eps = float(a.eps), eta_last = a.token_eta[M - 1];

    float gamma[4], beta[4], b2[4];
    for (int i = 0; i < 4; i++) {
        gamma[i] = a.ln_weight[head * D + at.d + i], beta[i] = a.ln_bias[head * D + at.d + i];
        b2[i] = a.b2[chain * D + at.d + i];
    }
    if (thread < S::OWN) s.b1[thread] = a.b1[chain * F + rank * S::OWN + thread];
    for (int i = thread; i < M; i += S::THREADS) s.token_eta[i] = a.token_eta[i];
    float w1[FK][D / 8][4], w2[D / 16][FT][4];
    load_weights<D>(w1, w2, a.w1 + chain * F * D, a.w2 + chain * F * D, rank * S::OWN + warp * SLICE, lane);
    float* b1 = s.b1 + SLICE * warp;

    auto lr_of = [&](int n) { return lr + (int64_t(n) * M + thread) * a.lr.t; };  // of token `thread`
    auto fetch = [&](int n) {
        const int stage = n & 1;
        const int64_t first = int64_t(n) * M;
        load_tokens<T, D, M>(s.xq[stage], xq + first * a.xq.t, a.xq.t, a.aligned, thread);
        load_tokens<T, D, M>(s.xk[stage], xk + first * a.xk.t, a.xk.t, a.aligned, thread);
        load_tokens<T, D, M>(s.xv[stage], xv + first * a.xv.t, a.xv.t, a.aligned, thread);
        if (thread < M) copy_number(s.lr[stage] + thread, lr_of(n));
        copy_async_commit();
    };
    int next_saved = 0;  // the mini-batch whose fast weights are
    int turn = 0;  // which of the two buffers of partial sums is next
    // A sum over warps, where the caller's token and four d are: every warp posts its part, and behind a barrier takes.
    auto post = [&](const float(&part)[D / 8][4]) {
        if (Shared::SUMS == 1) sync();  // the last sum has been taken
        store_partial<D>(s.partials[turn] + warp * S::PARTIAL, part, lane);
    };
    auto take = [&] {
        sync();
        const Four sum = sum_partials<D>(s.partials[turn], at);
        turn = (turn + 1) % Shared::SUMS;
        return sum;
    };
    auto write_out = [&](Four z2_bar, const T* tile, int n, int chunk) {
        Norm norm;
        for (int i = 0; i < 4; i++) z2_bar.x[i] += b2[i];
        norm = normalise<D>(z2_bar, eps);
        const int row = CHUNK * chunk + at.token;
        const int64_t token = int64_t(n) * M + row;
        Four x = load_four(tile + row * ROW + at.d);
        for (int i = 0; i < 4; i++) x.x[i] += gamma[i] * norm.x_hat[i] + beta[i];
        store_four(out + token * out_stride + at.d, x.x);
        store_hat<T, D>(x_hat_bar + token * D + at.d, norm.x_hat);
        if (at.d == 0) rstd_bar[token] = norm.rstd;
    };

    fetch(0);
    if (SPLIT == 2) {
        if (thread < 4) mbarrier_init(&s.there[0][thread]);
        cluster_sync();  // both blocks have started
    }
    for (int n = 0; n < N; n++) {
        const int stage = n & 1;
        copy_async_wait<0>();
        if (thread < M) convert_number(s.lr[stage] + thread, lr_of(n));
        sync();
        if (n + 1 < N) fetch(n + 1);
        // Of a cluster: the sum of both blocks, and z2_bar, which goes to the block that writes the chunk.
        auto both = [&](int k) {
            Four x = s.mine[k][thread], y = s.sent[n & 1][k][thread];
            return Four{x.x[0] + y.x[0], x.x[1] + y.x[1], x.x[2] + y.x[2], x.x[3] + y.x[3]};
        };
        auto send = [&](const Four& x, int k, int bar) {
            store_async(s.sent[n & 1][k][thread].x, x.x, &s.there[n & 1][bar], 1 - rank);
        };
        if (SPLIT == 2 && thread < 2)
            mbarrier_expect(&s.there[n & 1][thread], (thread ? CHUNKS / 2 : CHUNKS) * int(sizeof s.sent[0][0]));
        auto read = [&](const Four& z2_bar, const T* tile, int c) {
            if (SPLIT == 1) write_out(z2_bar, tile, n, c);
            else if (c % 2 == rank) s.mine[CHUNKS + c / 2][thread] = z2_bar;
            else send(z2_bar, CHUNKS + c / 2, 1);
        };
        const T *xq_tile = s.xq[stage], *xk_tile = s.xk[stage], *xv_tile = s.xv[stage];
        const float* lr_n = s.lr[stage];
        if (n == next_saved) {
            float* record = a.saved + ((chain * groups + n / group) * SPLIT + rank) * S::RECORD;
            next_saved += group;
            save_weights<D>(record, w1, w2, thread);
            if (thread < S::OWN) record[S::RECORD - S::OWN + thread] = s.b1[thread];
        }
        for (int square = warp; square < CHUNKS * (CHUNKS + 1) / 2; square += S::WARPS) {
            int i = 0, j = square;
            while (j > i) j -= ++i;
            float p[2][4] = {};
            row_scores<T, D>(p, xq_tile, CHUNK * i, xk_tile, CHUNK * j, lane);
#pragma unroll
            for (int e = 0; e < 8; e++) {
                int row = CHUNK * i + g + e / 2 % 2 * 8, col = CHUNK * j + e / 4 * 8 + 2 * t + e % 2;
                float& x = p[e / 4][e % 4];
                x = row >= col ? -s.token_eta[row] * lr_n[col] * (x + 1) : 0.0f;
            }
            uint32_t packed[4];
            round_scores<T>(packed, p);
            reinterpret_cast<Words*>(s.read[square])[lane] = {packed[0], packed[1], packed[2], packed[3]};
        }

        // 1. z2 and g_z2.
        float step_b2[4] = {};
        auto inner_gradient = [&](Four z2, int c) {
            Four p;
            for (int i = 0; i < 4; i++) z2.x[i] += b2[i];
            const Norm norm = normalise<D>(z2, eps);
            const int row = CHUNK * c + at.token;
            const Four k = load_four(xk_tile + row * ROW + at.d), v = load_four(xv_tile + row * ROW + at.d);
            for (int i = 0; i < 4; i++) p.x[i] = gamma[i] * (gamma[i] * norm.x_hat[i] + beta[i] - (v.x[i] - k.x[i]));
            Four g_z2 = project<D>(p, norm);
            store_four(s.g_z2 + row * ROW + at.d, g_z2.x);
            const float step = -eta_last * lr_n[row];
            for (int i = 0; i < 4; i++) g_z2.x[i] *= step, step_b2[i] += g_z2.x[i];
            store_four(s.step_z2 + row * ROW + at.d, g_z2.x);
            if (c % SPLIT != rank) return;
            store_hat<T, D>(x_hat + (int64_t(n) * M + row) * D + at.d, norm.x_hat);
            if (at.d == 0) rstd[int64_t(n) * M + row] = norm.rstd;
        };
        {
            const First<D> w1_r = round_first<T, D>(w1);
            const Second<D> w2_r = round_second<T, D>(w2);
#pragma unroll 1
            for (int c = 0; c < CHUNKS; c += PAIR) {
                Columns x2[PAIR];
                {
                    float z1[PAIR][FT][4];
#pragma unroll
                    for (int p = 0; p < PAIR; p++) {
                        start_columns(z1[p], b1, t);
                        times_first<T, D>(z1[p], xk_tile, CHUNK * (c + p), w1_r, lane);
                    }
#pragma unroll
                    for (int p = 0; p < PAIR; p++) {
                        float slope[FT][4];
#pragma unroll
                        for (int e = 0; e < 4 * FT; e++) {
                            const Gelu y = gelu_first(z1[p][e / 4][e % 4]);
                            z1[p][e / 4][e % 4] = y.value, slope[e / 4][e % 4] = y.first;
                        }
                        x2[p] = round_columns<T>(z1[p]);
                        keep(s.x2[c + p][warp], x2[p], lane);
                        keep(s.slope[c + p][warp], round_columns<fp16>(slope), lane);
                    }
                }
                float part[D / 8][4] = {};
                times_second<T, D>(part, x2[0], w2_r);
#pragma unroll
                for (int p = 0; p < PAIR; p++) {
                    post(part);
                    if (p + 1 < PAIR) {
                        for (int e = 0; e < D / 2; e++) part[e / 4][e % 4] = 0;
                        times_second<T, D>(part, x2[p + 1], w2_r);
                    }
                    const Four sum = take();
                    if (SPLIT == 2) s.mine[c + p][thread] = sum, send(sum, c + p, 0);
                    else inner_gradient(sum, c + p);
                }
            }
        }
        if (SPLIT == 2) {
            mbarrier_wait(&s.there[n & 1][0], n / 2 % 2);
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) inner_gradient(both(c), c);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) step_b2[i] = sum_tokens<D>(step_b2[i]);
        if (lane < S::LANES)
            *reinterpret_cast<Four*>(&s.b2_part[warp][at.d]) = {step_b2[0], step_b2[1], step_b2[2], step_b2[3]};
        sync();

        // 2. g_z1, the read-out, the updates.
        float step_b1[2 * FT] = {};
        {
            const Second<D> w2_t = transpose(round_second<T, D>(w2));
#pragma unroll 1
            for (int c = 0; c < CHUNKS; c += PAIR) {
                float g_z1[PAIR][FT][4] = {};
                Columns slope[PAIR];
#pragma unroll
                for (int p = 0; p < PAIR; p++) {
                    times_second_t<T, D>(g_z1[p], s.g_z2, CHUNK * (c + p), w2_t, lane);
                    slope[p] = kept(s.slope[c + p][warp], lane);
                }
#pragma unroll
                for (int p = 0; p < PAIR; p++) {
                    const int row = CHUNK * (c + p) + g;
                    const float step[2] = {-eta_last * lr_n[row], -eta_last * lr_n[row + 8]};
#pragma unroll
                    for (int k = 0; k < FT; k++)
#pragma unroll
                        for (int h = 0; h < 2; h++) {
                            float2 y = unpack<fp16>(slope[p].x[k][h]);
                            float &lo = g_z1[p][k][2 * h], &hi = g_z1[p][k][2 * h + 1];
                            lo *= y.x, hi *= y.y;
                            step_b1[2 * k] += step[h] * lo, step_b1[2 * k + 1] += step[h] * hi;
                        }
                    keep(s.slope[c + p][warp], transpose(round_columns<T>(g_z1[p])), lane);
                }
            }
        }
        {
            const First<D> w1_r = round_first<T, D>(w1);
            const Second<D> w2_r = round_second<T, D>(w2);
#pragma unroll 1
            for (int c = 0; c < CHUNKS; c++) {
                float z1_bar[FT][4];
                start_columns(z1_bar, b1, t);
                times_first<T, D>(z1_bar, xq_tile, CHUNK * c, w1_r, lane);
#pragma unroll 1
                for (int j = 0; j <= c; j++) {
                    const Words p = reinterpret_cast<const Words*>(s.read[c * (c + 1) / 2 + j])[lane];
                    times_columns<T>(z1_bar, p.x, kept(s.slope[j][warp], lane));
                }
#pragma unroll
                for (int e = 0; e < 4 * FT; e++) {
                    float& z = z1_bar[e / 4][e % 4];
                    z *= gelu_sigmoid(z);
                }
                const Columns x2_bar = round_columns<T>(z1_bar);
                float part[D / 8][4] = {};
                times_second<T, D>(part, x2_bar, w2_r);
#pragma unroll 1
                for (int j = 0; j <= c; j++) {
                    float p[2][4] = {};
                    scores<T>(p, x2_bar, kept(s.x2[j][warp], lane));
#pragma unroll
                    for (int e = 0; e < 8; e++) {
                        int row = CHUNK * c + g + e / 2 % 2 * 8, col = CHUNK * j + e / 4 * 8 + 2 * t + e % 2;
                        float& x = p[e / 4][e % 4];
                        x = row >= col ? -s.token_eta[row] * lr_n[col] * (x + (warp + rank == 0 ? 1.0f : 0.0f))
                                       : 0.0f;
                    }
                    uint32_t packed[4];
                    round_scores<T>(packed, p);
                    times_rows<T, D>(part, packed, s.g_z2, CHUNK * j, lane);
                }
                post(part);
                read(take(), xq_tile, c);
            }
        }
        if (SPLIT == 2) {
            mbarrier_wait(&s.there[n & 1][1], n / 2 % 2);
#pragma unroll 1
            for (int c = rank; c < CHUNKS; c += 2) write_out(both(CHUNKS + c / 2), xq_tile, n, c);
        }
#pragma unroll 1
        for (int c = 0; c < CHUNKS; c++) {
            Columns g_z1_t = kept(s.slope[c][warp], lane);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int row = CHUNK * c + 8 * h + 2 * t;
                const float lo = -eta_last * lr_n[row], hi = -eta_last * lr_n[row + 1];
#pragma unroll
                for (int k = 0; k < FT; k++) {
                    float2 y = unpack<T>(g_z1_t.x[k][h]);
                    g_z1_t.x[k][h] = pack<T>(lo * y.x, hi * y.y);
                }
            }
            update_first<T, D>(w1, g_z1_t, xk_tile, CHUNK * c, lane);
            update_second<T, D>(w2, transpose(kept(s.x2[c][warp], lane)), s.step_z2, CHUNK * c, lane);
        }
        sync_warp();  // every lane has read b1
        const float step = sum_columns(step_b1, lane);
        if (owns_column(lane)) b1[column_of(lane)] += step;
        sync_warp();
#pragma unroll
        for (int w = 0; w < S::WARPS; w++) {
            Four part = *reinterpret_cast<const Four*>(&s.b2_part[w][at.d]);
            for (int i = 0; i < 4; i++) b2[i] += part.x[i];
        }
    }

    sync();  // b1 is there
    store_weights<D>(
        a.final_w1 + chain * F * D, a.final_w2 + chain * F * D, w1, w2, rank * S::OWN + warp * SLICE, lane
    );
    if (thread < S::OWN) a.final_b1[chain * F + rank * S::OWN + thread] = s.b1[thread];
    if (thread < S::LANES && rank == 0)
        for (int i = 0; i < 4; i++) a.final_b2[chain * D + at.d + i] = b2[i];
}

}  // namespace ttt
