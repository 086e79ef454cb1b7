// TTT-MLP forward for mini-batches of 16 tokens: that of mlp_forward.cu with two barriers a mini-batch instead of four.
//
// A step is one chunk, so all it has of tokens stays in registers, and what the recurrence does not wait for is late:
//     z2_bar of mini-batch n is summed over warps beside z2 of mini-batch n + 1, and its LayerNorm beside that one's
//     q1 = xq w1 + b1, what the read-out takes from the old weights, and xq xk^T are computed beside z1, of the latter
//     a part by each warp
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
    Values<D> sent[SPLIT == 1 ? 1 : 3][SPLIT == 1 ? 1 : S::PLACES];  // by the other block: z2, in turns; z2_bar
    // Causal: scores over tokens in the places of an accumulator of two products, 8 columns each: of xq xk^T a part for
    // each 16 d, -eta, and -eta (xq xk^T + 1) rounded, as an A operand.
    float scores[CAUSAL ? D / 16 : 1][2 * 4 * 32], eta[2 * 4 * 32];
    T read[8 * 32];
    float lr[3][CHUNK], token_eta[CHUNK], b1[S::OWN], b2_part[S::PLACE_WARPS][D];
    Mbarrier there[2];  // what was sent, in turns
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
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    const int64_t chain = blockIdx.x / SPLIT, batch = chain / a.heads, head = chain % a.heads;
    const int N = int(a.mini_batches), group = int(a.group), groups = (N + group - 1) / group;
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

    float gamma[EACH], beta[EACH], b2[EACH], last_b2[EACH];
    for (int i = 0; i < EACH; i++) {
        gamma[i] = a.ln_weight[head * D + at.d + i], beta[i] = a.ln_bias[head * D + at.d + i];
        b2[i] = last_b2[i] = a.b2[chain * D + at.d + i];
    }
    const int column = rank * S::OWN + warp * SLICE;  // this warp's first
    float* b1 = s.b1 + SLICE * warp;
    if (lane < SLICE) b1[lane] = a.b1[chain * F + column + lane];
    if (thread < M) s.token_eta[thread] = a.token_eta[thread];
    float w1[FK][D / 8][4], w2[D / 16][FT][4];
    load_weights<D>(w1, w2, a.w1 + chain * F * D, a.w2 + chain * F * D, column, lane);

    constexpr int LATE = CAUSAL ? 0 : 1;  // stage n has xq of mini-batch n - LATE
    // Half of the threads copy xq and xk, half xv: what this one copies next.
    constexpr int PIECES = D / 8, HALF = M * PIECES;
    static_assert(2 * HALF == S::THREADS);
    const bool upper = thread >= HALF;
    const int to_row = thread % HALF / PIECES, to_d = thread % PIECES * 8, copied = to_row * ROW + to_d;
    const T *xkv = upper ? xv : xk, *from_xq = nullptr, *from_kv = nullptr;
    auto aim = [&](int n) {
        from_xq = xq + (int64_t(n > LATE ? n - LATE : 0) * M + to_row) * a.xq.t + to_d;
        from_kv = xkv + (int64_t(n) * M + to_row) * (upper ? a.xv.t : a.xk.t) + to_d;
    };
    auto copy = [&](T* to, const T* from) {
        if (a.aligned) copy_async_16(to, from);
        else
#pragma unroll 1
            for (int k = 0; k < 8; k++) to[k] = from[k];
    };
    auto lr_of = [&](int n) { return lr + (int64_t(n) * M + thread) * a.lr.t; };  // of token `thread`
    auto store_lr = [&](int n) {
        if (thread < M) convert_number(s.lr[n % 3] + thread, lr_of(n));
    };
    auto fetch = [&](int n) {
        const int stage = n % 3;
        if (n == 0 || D > 64) aim(n);  // above 64 there are no registers to keep it in
        if (n >= LATE && n < N + LATE && !upper) copy(s.xq[stage] + copied, from_xq), from_xq += M * a.xq.t;
        if (n < N && thread < M) copy_number(s.lr[stage] + thread, lr_of(n));
        if (n < N) copy((upper ? s.xv : s.xk)[stage] + copied, from_kv), from_kv += M * (upper ? a.xv.t : a.xk.t);
        copy_async_commit();
    };
    auto gelu_columns = [&](float(&z)[FT][4]) {
#pragma unroll
        for (int e = 0; e < 4 * FT; e++) z[e / 4][e % 4] *= gelu_sigmoid(z[e / 4][e % 4]);
        return round_columns<T>(z);
    };

    int next_saved = 0;  // the mini-batch whose fast weights are
    fetch(0);
    fetch(1);
    copy_async_wait<1>();
    store_lr(0);
    sync();
    if (SPLIT == 2) {
        if (thread < 2) mbarrier_init(&s.there[thread]);
        cluster_sync();  // both blocks have started
    }
    for (int n = 0; n <= N; n++) {
        const int stage = n % 3;
        const T *xq_tile = s.xq[stage], *xk_tile = s.xk[stage];
        const float* lr_n = s.lr[stage];
        if (n < N && n == next_saved) {
            float* record = a.saved + ((chain * groups + n / group) * SPLIT + rank) * S::RECORD;
            next_saved += group;
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
                    static_assert(S::WARPS == 2 * (D / 16));  // each warp has 8 columns of the scores, over 16 d
                    const int k = warp / 2, half = warp % 2;
                    float p[4] = {};
                    uint32_t x[4], y[2];
                    load_a<ROW>(x, xq_tile, 0, 16 * k, lane);
                    ldmatrix_x2(y, xk_tile + (8 * half + lane % 8) * ROW + 16 * k + lane / 8 % 2 * 8);
                    mma<T>(p, x, y[0], y[1]);
                    reinterpret_cast<Four*>(s.scores[k])[32 * half + lane] = {p[0], p[1], p[2], p[3]};
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
            const int turn = n & 1;
            writes = writes && turn == rank;
            if (thread == 0) mbarrier_expect(&s.there[turn], (turn == rank ? 2 : 1) * int(sizeof s.sent[0]));
            if (has_place<D>(thread)) {
                store_async(s.sent[turn][thread].x, z2.x, &s.there[turn], 1 - rank);
                if (turn != rank) store_async(s.sent[2][thread].x, z2_bar.x, &s.there[turn], 1 - rank);
            }
        }
        if (CAUSAL)
#pragma unroll
            for (int first = 0; first < 256; first += S::THREADS) {
                const int i = first + thread, place = i / 4 % 32;
                if (S::THREADS > 256 && i >= 256) break;
                const int row = place / 4 + i / 2 % 2 * 8, col = i / 128 * 8 + place % 4 * 2 + i % 2;
                float score = s.scores[0][i];
#pragma unroll
                for (int k = 1; k < D / 16; k++) score += s.scores[k][i];
                const float eta = row >= col ? -s.token_eta[row] * lr_n[col] : 0.0f;
                s.eta[i] = eta, s.read[8 * place + i / 128 * 4 + i % 4] = from_float<T>(eta * (score + 1));
            }
        if (has_place<D>(thread)) {
            if (SPLIT == 2) {
                mbarrier_wait(&s.there[n & 1], n / 2 % 2);
                const Values<D> more = s.sent[n & 1][thread], more_bar = s.sent[2][thread];
                for (int i = 0; i < EACH; i++) z2.x[i] += more.x[i], z2_bar.x[i] += more_bar.x[i];
            }
            // Both LayerNorms at once, without a branch, also where one is of no use.
            for (int i = 0; i < EACH; i++) z2.x[i] += b2[i], z2_bar.x[i] += CAUSAL ? last_b2[i] : b2[i];
            const NormOf<D> norm = normalise<D>(z2, eps), norm_bar = normalise<D>(z2_bar, eps);
            const Values<D> k = load_values<D>(xk_tile + at.token * ROW + at.d),
                            v = load_values<D>(s.xv[stage] + at.token * ROW + at.d);
            Values<D> p, x = load_values<D>(s.xq[(n + 2 + LATE) % 3] + at.token * ROW + at.d);
            for (int i = 0; i < EACH; i++)
                p.x[i] = gamma[i] * (gamma[i] * norm.x_hat[i] + beta[i] - (v.x[i] - k.x[i]));
            Values<D> g_z2 = project<D>(p, norm);
            store_values(s.g_z2 + at.token * ROW + at.d, g_z2.x);
            const float step = -eta_last * lr_n[at.token];
            for (int i = 0; i < EACH; i++) g_z2.x[i] *= step;
            store_values(s.step_z2 + at.token * ROW + at.d, g_z2.x);
#pragma unroll
            for (int i = 0; i < EACH; i++) g_z2.x[i] = sum_tokens<D>(g_z2.x[i]);
            if (lane < S::LANES) *reinterpret_cast<Values<D>*>(&s.b2_part[warp][at.d]) = g_z2;
            for (int i = 0; i < EACH; i++) x.x[i] += gamma[i] * norm_bar.x_hat[i] + beta[i];
            if (n < N && n % SPLIT == rank) {
                store_hat<T, D>(x_hat + int64_t(n) * M * D, norm.x_hat);
                if (at.d == 0) rstd[n * M] = norm.rstd;
            }
            if (writes) {
                store_values(out + int64_t(n - 1) * M * a.heads * D, x.x);
                store_hat<T, D>(x_hat_bar + int64_t(n - 1) * M * D, norm_bar.x_hat);
                if (at.d == 0) rstd_bar[(n - 1) * M] = norm_bar.rstd;
            }
        }
        if (n == N) break;
        copy_async_wait<0>();
        if (n + 1 < N) store_lr(n + 1);
        sync();
        fetch(n + 2);
        if (has_place<D>(thread)) {
            for (int i = 0; i < EACH; i++) last_b2[i] = b2[i];
#pragma unroll
            for (int w = 0; w < S::PLACE_WARPS; w++) {
                const Values<D> part = *reinterpret_cast<const Values<D>*>(&s.b2_part[w][at.d]);
                for (int i = 0; i < EACH; i++) b2[i] += part.x[i];
            }
        }

        float g_z1[FT][4] = {}, step_b1[2 * FT];
        times_second_t<T, D>(g_z1, s.g_z2, 0, transpose(round_second<T, D>(w2)), lane);
        const float step[2] = {-eta_last * lr_n[g], -eta_last * lr_n[g + 8]};
#pragma unroll
        for (int k = 0; k < FT; k++) {
            const float2 upper = unpack<fp16>(slope.x[k][0]), lower = unpack<fp16>(slope.x[k][1]);
            g_z1[k][0] *= upper.x, g_z1[k][1] *= upper.y, g_z1[k][2] *= lower.x, g_z1[k][3] *= lower.y;
        }
        if (CAUSAL) {
            const Four upper = reinterpret_cast<const Four*>(s.eta)[lane],
                       lower = reinterpret_cast<const Four*>(s.eta)[32 + lane];
            uint32_t read[4];
            {
                const Words words = reinterpret_cast<const Words*>(s.read)[lane];
                for (int i = 0; i < 4; i++) read[i] = words.x[i];
            }
            times_columns<T>(q1, read, transpose(round_columns<T>(g_z1)));  // now z1_bar
            const Columns x2_bar = gelu_columns(q1);
            float part[S::PIECE / 8][4] = {};
            times_second<T, D>(part, x2_bar, round_second<T, D>(w2));
            float attn2[2][4] = {};
            scores<T>(attn2, x2_bar, x2);
            const float one = warp + rank == 0 ? 1 : 0;
#pragma unroll
            for (int e = 0; e < 4; e++)
                attn2[0][e] = upper.x[e] * (attn2[0][e] + one), attn2[1][e] = lower.x[e] * (attn2[1][e] + one);
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
