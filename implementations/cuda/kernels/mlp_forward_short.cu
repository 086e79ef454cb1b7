// TTT-MLP forward for mini-batches of 16 tokens: that of mlp_forward.cu with two barriers a mini-batch instead of four.
//
// A step is one chunk, so all it has of tokens stays in registers, and what the recurrence does not wait for is late:
//     z2_bar of mini-batch n is summed over warps beside z2 of mini-batch n + 1, and its LayerNorm beside that one's
//     q1 = xq w1 + b1, what the read-out takes from the old weights, is computed beside z1
//     tokens come two mini-batches ahead, in three stages, and become visible at a barrier that is there anyway
// Between the barriers of mini-batch n:
//     z1, q1, x2 and this warp's part of z2                                   then a barrier
//     sums over warps; out of n - 1; g_z2 of n                                then a barrier
//     g_z1; causal, z1_bar, x2_bar and this warp's part of z2_bar; the updates
// D = 96 takes a cluster: 96 of a thread's 168 registers are state, and parts of z2 and z2_bar are made in pieces.
// Not causal, z2_bar of n - 1 is computed from the weights that n starts from, beside z2 of n.
#include "mlp_arguments.cuh"

namespace ttt {

template <typename T, int D, bool CAUSAL> struct ShortShared {
    using S = Sizes<D>;
    static constexpr int TILE = CHUNK * S::ROW;
    T xq[3][TILE], xk[3][TILE], xv[3][TILE];
    T g_z2[TILE];
    T step_z2[TILE];  // -eta_last lr g_z2
    float partials[2][S::WARPS * S::PARTIAL];                            // of z2 and of z2_bar
    Values<D> sent[SPLIT == 1 ? 1 : 2][2][SPLIT == 1 ? 1 : S::PLACES];  // by the other block of a cluster, in turns
    float lr[3][CHUNK], token_eta[CHUNK], b1[S::OWN], b2_part[2][S::PLACE_WARPS][D];
};

template <typename T, int D, int M, bool CAUSAL>
__global__ void TTT_CLUSTER __launch_bounds__(Sizes<D>::THREADS, 1)
mlp_forward_short(const __grid_constant__ ForwardArguments a) {
    static_assert(M == CHUNK);
    using S = Sizes<D>;
    using Shared = ShortShared<T, D, CAUSAL>;
    constexpr int F = S::F, ROW = S::ROW, EACH = S::EACH;
    TTT_SHARED(memory);
    auto& s = *reinterpret_cast<Shared*>(memory);
    const int rank = SPLIT == 1 ? 0 : cluster_rank();
    Shared* const other = SPLIT == 1 ? &s : cluster_map(&s, 1 - rank);
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    const int64_t chain = blockIdx.x / SPLIT, batch = chain / a.heads, head = chain % a.heads;
    const int N = int(a.mini_batches), groups = int((N + a.group - 1) / a.group);
    const Place<D> at(thread);
    const T* xq = static_cast<const T*>(a.xq.p) + batch * a.xq.b + head * a.xq.h;
    const T* xk = static_cast<const T*>(a.xk.p) + batch * a.xk.b + head * a.xk.h;
    const T* xv = static_cast<const T*>(a.xv.p) + batch * a.xv.b + head * a.xv.h;
    const T* lr = static_cast<const T*>(a.lr.p) + batch * a.lr.b + head * a.lr.h;
    const int64_t own = chain * N * M;  // tokens before this chain's
    T* out = static_cast<T*>(a.out) + ((batch * N * M + at.token) * a.heads + head) * D + at.d;
    fp16* x_hat = static_cast<fp16*>(a.x_hat) + (own + at.token) * D + at.d;
    fp16* x_hat_bar = static_cast<fp16*>(a.x_hat_bar) + (own + at.token) * D + at.d;
    float *rstd = a.rstd + own + at.token, *rstd_bar = a.rstd_bar + own + at.token;
    const float eps = float(a.eps), eta_last = a.token_eta[M - 1];

    float gamma[EACH], beta[EACH], b2[EACH];
    for (int i = 0; i < EACH; i++) {
        gamma[i] = a.ln_weight[head * D + at.d + i], beta[i] = a.ln_bias[head * D + at.d + i];
        b2[i] = a.b2[chain * D + at.d + i];
    }
    const int column = rank * S::OWN + warp * SLICE;  // this warp's first
    float* b1 = s.b1 + SLICE * warp;
    if (lane < SLICE) b1[lane] = a.b1[chain * F + column + lane];
    if (thread < M) s.token_eta[thread] = a.token_eta[thread];
    for (int i = thread; i < 2 * S::PLACE_WARPS * D; i += S::THREADS) (&s.b2_part[0][0][0])[i] = 0;
    float w1[FK][D / 8][4], w2[D / 16][FT][4];
    load_weights<D>(w1, w2, a.w1 + chain * F * D, a.w2 + chain * F * D, column, lane);

    constexpr int LATE = CAUSAL ? 0 : 1;  // stage n has xq of mini-batch n - LATE
    float next_lr = 0;                    // of token `thread`, on its way to shared memory
    auto fetch = [&](int n) {
        const int stage = n % 3;
        if (n >= LATE && n < N + LATE)
            load_tokens<T, D, M>(s.xq[stage], xq + int64_t(n - LATE) * M * a.xq.t, a.xq.t, a.aligned, thread);
        if (n < N) {
            const T *from_xk = xk + int64_t(n) * M * a.xk.t, *from_xv = xv + int64_t(n) * M * a.xv.t;
            load_two<T, D>(s.xk[stage], from_xk, a.xk.t, s.xv[stage], from_xv, a.xv.t, a.aligned, thread);
            if (thread < M) next_lr = to_float(lr[(int64_t(n) * M + thread) * a.lr.t]);
        }
        copy_async_commit();
    };
    auto gelu_columns = [&](float(&z)[FT][4]) {
#pragma unroll
        for (int e = 0; e < 4 * FT; e++) z[e / 4][e % 4] *= gelu_sigmoid(z[e / 4][e % 4]);
        return round_columns<T>(z);
    };

    fetch(0);
    if (thread < M) s.lr[0][thread] = next_lr;
    fetch(1);
    copy_async_wait<1>();
    sync();
    if (SPLIT == 2) cluster_sync();  // both blocks have started
    for (int n = 0; n <= N; n++) {
        const int stage = n % 3;
        const T *xq_tile = s.xq[stage], *xk_tile = s.xk[stage];
        const float* lr_n = s.lr[stage];
        if (n < N && n % a.group == 0) {
            float* record = a.saved + ((chain * groups + n / a.group) * SPLIT + rank) * S::RECORD;
            save_weights<D>(record, w1, w2, thread);
            if (lane < SLICE) record[S::RECORD - S::OWN + SLICE * warp + lane] = b1[lane];
        }

        float q1[FT][4];
        Columns x2, slope;
        {
            const First<D> w1_r = round_first<T, D>(w1);
            const Second<D> w2_r = round_second<T, D>(w2);
            if (n < N) {
                float z1[FT][4], first[FT][4];
                start_columns(z1, b1, t);
                times_first<T, D>(z1, xk_tile, 0, w1_r, lane);
                if (CAUSAL) {
                    start_columns(q1, b1, t);
                    times_first<T, D>(q1, xq_tile, 0, w1_r, lane);
                }
#pragma unroll
                for (int e = 0; e < 4 * FT; e++) {
                    const Gelu y = gelu_first(z1[e / 4][e % 4]);
                    z1[e / 4][e % 4] = y.value, first[e / 4][e % 4] = y.first;
                }
                x2 = round_columns<T>(z1);
                slope = round_columns<fp16>(first);
#pragma unroll
                for (int from = 0; from < D; from += S::PIECE) {
                    float part[S::PIECE / 8][4] = {};
                    times_second<T, D>(part, x2, w2_r, from);
                    store_partial<D>(s.partials[0] + warp * S::PARTIAL, part, lane, from);
                }
            }
            if (!CAUSAL && n > 0) {
                float z1_bar[FT][4];
                start_columns(z1_bar, b1, t);
                times_first<T, D>(z1_bar, xq_tile, 0, w1_r, lane);
                const Columns x2_bar = gelu_columns(z1_bar);
#pragma unroll
                for (int from = 0; from < D; from += S::PIECE) {
                    float part[S::PIECE / 8][4] = {};
                    times_second<T, D>(part, x2_bar, w2_r, from);
                    store_partial<D>(s.partials[1] + warp * S::PARTIAL, part, lane, from);
                }
            }
        }
        sync();

        Values<D> z2, z2_bar;
        bool writes = n > 0;  // out of mini-batch n - 1; of a cluster, the blocks in turn
        if (has_place<D>(thread)) z2 = sum_partials<D>(s.partials[0], at), z2_bar = sum_partials<D>(s.partials[1], at);
        if (SPLIT == 2) {
            auto& send = other->sent[n & 1];
            writes = writes && (n & 1) == rank;
            if (has_place<D>(thread)) {
                send[0][thread] = z2;
                if ((n & 1) != rank) send[1][thread] = z2_bar;
            }
            cluster_sync();
        }
        if (has_place<D>(thread)) {
            if (SPLIT == 2) {
                auto& sent = s.sent[n & 1];
                for (int i = 0; i < EACH; i++) z2.x[i] += sent[0][thread].x[i], z2_bar.x[i] += sent[1][thread].x[i];
            }
            float last_b2[EACH];
            for (int i = 0; i < EACH; i++) last_b2[i] = b2[i];
#pragma unroll
            for (int w = 0; w < S::PLACE_WARPS; w++) {  // of mini-batch n - 1
                Values<D> part = *reinterpret_cast<const Values<D>*>(&s.b2_part[(n + 1) & 1][w][at.d]);
                for (int i = 0; i < EACH; i++) b2[i] += part.x[i];
            }
            if (n < N) {
                for (int i = 0; i < EACH; i++) z2.x[i] += b2[i];
                const NormOf<D> norm = normalise<D>(z2, eps);
                const Values<D> k = load_values<D>(xk_tile + at.token * ROW + at.d),
                                v = load_values<D>(s.xv[stage] + at.token * ROW + at.d);
                Values<D> p;
                for (int i = 0; i < EACH; i++)
                    p.x[i] = gamma[i] * (gamma[i] * norm.x_hat[i] + beta[i] - (v.x[i] - k.x[i]));
                Values<D> g_z2 = project<D>(p, norm);
                store_values(s.g_z2 + at.token * ROW + at.d, g_z2.x);
                const float step = -eta_last * lr_n[at.token];
                for (int i = 0; i < EACH; i++) g_z2.x[i] *= step;
                store_values(s.step_z2 + at.token * ROW + at.d, g_z2.x);
                if (n % SPLIT == rank) {
                    store_hat<T, D>(x_hat + int64_t(n) * M * D, norm.x_hat);
                    if (at.d == 0) rstd[n * M] = norm.rstd;
                }
#pragma unroll
                for (int i = 0; i < EACH; i++) g_z2.x[i] = sum_tokens<D>(g_z2.x[i]);
                if (lane < S::LANES) *reinterpret_cast<Values<D>*>(&s.b2_part[n & 1][warp][at.d]) = g_z2;
            }
            if (writes) {
                for (int i = 0; i < EACH; i++) z2_bar.x[i] += CAUSAL ? last_b2[i] : b2[i];
                const NormOf<D> norm = normalise<D>(z2_bar, eps);
                Values<D> x = load_values<D>(s.xq[(n - 1 + LATE) % 3] + at.token * ROW + at.d);
                for (int i = 0; i < EACH; i++) x.x[i] += gamma[i] * norm.x_hat[i] + beta[i];
                store_values(out + int64_t(n - 1) * M * a.heads * D, x.x);
                store_hat<T, D>(x_hat_bar + int64_t(n - 1) * M * D, norm.x_hat);
                if (at.d == 0) rstd_bar[(n - 1) * M] = norm.rstd;
            }
        }
        if (n == N) break;
        copy_async_wait<0>();
        if (thread < M) s.lr[(n + 1) % 3][thread] = next_lr;
        sync();
        fetch(n + 2);

        float g_z1[FT][4] = {}, step_b1[2 * FT];
        times_second_t<T, D>(g_z1, s.g_z2, 0, transpose(round_second<T, D>(w2)), lane);
        const float step[2] = {-eta_last * lr_n[g], -eta_last * lr_n[g + 8]};
#pragma unroll
        for (int k = 0; k < FT; k++) {
            const float2 upper = unpack<fp16>(slope.x[k][0]), lower = unpack<fp16>(slope.x[k][1]);
            g_z1[k][0] *= upper.x, g_z1[k][1] *= upper.y, g_z1[k][2] *= lower.x, g_z1[k][3] *= lower.y;
        }
        if (CAUSAL) {
            float p[2][4] = {}, eta[8];
            uint32_t read[4];
            row_scores<T, D>(p, xq_tile, 0, xk_tile, 0, lane);
#pragma unroll
            for (int e = 0; e < 8; e++) {
                const int row = g + e / 2 % 2 * 8, col = e / 4 * 8 + 2 * t + e % 2;
                eta[e] = row >= col ? -s.token_eta[row] * lr_n[col] : 0.0f;
                p[e / 4][e % 4] = eta[e] * (p[e / 4][e % 4] + 1);
            }
            round_scores<T>(read, p);
            times_columns<T>(q1, read, transpose(round_columns<T>(g_z1)));  // now z1_bar
            const Columns x2_bar = gelu_columns(q1);
            float part[S::PIECE / 8][4] = {};
            times_second<T, D>(part, x2_bar, round_second<T, D>(w2));
            float attn2[2][4] = {};
            scores<T>(attn2, x2_bar, x2);
#pragma unroll
            for (int e = 0; e < 8; e++)
                attn2[e / 4][e % 4] = eta[e] * (attn2[e / 4][e % 4] + (warp + rank == 0 ? 1.0f : 0.0f));
            round_scores<T>(read, attn2);
#pragma unroll
            for (int from = 0; from < D; from += S::PIECE) {
                if (from) {  // the first is on its way beside the scores
                    fill(part, 0);
                    times_second<T, D>(part, x2_bar, round_second<T, D>(w2), from);
                }
                times_rows<T, D>(part, read, s.g_z2, 0, lane, from);
                store_partial<D>(s.partials[1] + warp * S::PARTIAL, part, lane, from);
            }
        }
#pragma unroll
        for (int k = 0; k < FT; k++) {
            for (int i = 0; i < 4; i++) g_z1[k][i] *= step[i / 2];
            step_b1[2 * k] = g_z1[k][0] + g_z1[k][2], step_b1[2 * k + 1] = g_z1[k][1] + g_z1[k][3];
        }
        update_first<T, D>(w1, transpose(round_columns<T>(g_z1)), xk_tile, 0, lane);
        update_second<T, D>(w2, transpose(x2), s.step_z2, 0, lane);
        const float b1_step = sum_columns(step_b1, lane);
        sync_warp();  // every lane has read b1
        if (owns_column(lane)) b1[column_of(lane)] += b1_step;
        sync_warp();
    }

    store_weights<D>(a.final_w1 + chain * F * D, a.final_w2 + chain * F * D, w1, w2, column, lane);
    if (lane < SLICE) a.final_b1[chain * F + column + lane] = b1[lane];
    if (thread < S::LANES && rank == 0)
        for (int i = 0; i < EACH; i++) a.final_b2[chain * D + at.d + i] = b2[i];
}

}  // namespace ttt
