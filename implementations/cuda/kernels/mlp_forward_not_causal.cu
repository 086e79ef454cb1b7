// TTT-MLP forward, not causal: the read-out of a mini-batch reads the weights that the next one starts from, so both are
// one pass. One block a chain (or SPLIT = 2, a cluster), the fast weights in registers as accumulators of their own
// updates (mlp.cuh). Of mini-batch n, and of the read-out of n - 1 ("bar"):
//     1. by hidden columns:     z1 = xk w1 + b1, x2 = gelu(z1); z1_bar, x2_bar       -> x2, x2_bar and w2 in shared memory
//     2. by 16 tokens a warp:   z2 = x2 w2, z2_bar = x2_bar w2, of a cluster summed  -> LayerNorms in its accumulators,
//                               g_z2; out
//     3. by hidden columns:     g_x2 = g_z2 w2^T, g_z1 = g_x2 gelu'(z1);
//                               W1^T -= (eta lr g_z1)^T xk, W2^T -= (eta lr g_z2)^T x2
// A sum over f is a product's own: no warp has a part of it to add up, and a mini-batch has three barriers. On an H100,
// video-5b: 2.17 ms with a cluster's barrier as the fourth, where sums of parts, as in mlp_forward.cu, took 2.74; now
// the warps that have the same 16 tokens in both blocks exchange them, and wait for nobody else: 2.03.
//
// Bytes: as mlp_forward.cu.
#include "mlp_arguments.cuh"

namespace ttt {

template <typename T, int D, int M> struct NotCausalShared {
    using S = Sizes<D>;
    static constexpr int CHUNKS = M / CHUNK, TILE = M * S::ROW;
    static constexpr int WIDE = S::OWN + 8;  // a row of hidden columns
    T xq[2][TILE], xk[2][TILE], xv[2][TILE];
    T g_z2[TILE], step_z2[TILE];     // and -eta_last lr g_z2
    T x2[2][M * WIDE];               // x2, x2_bar
    T w2[D * WIDE];                  // w2^T
    uint32_t slope[CHUNKS][S::WARPS][SLOT_WORDS];  // gelu'(z1)
    // What the other block of a cluster summed, in turns: z2 of every chunk, z2_bar of every other one.
    Four sent[2][SPLIT == 1 ? 1 : CHUNKS + CHUNKS / 2][SPLIT == 1 ? 1 : D / 8][32];
    Four ln[D / 2];                  // gamma, gamma, beta, beta
    float lr[2][M], b1[S::OWN], b2[D], b2_part[CHUNKS][D];
    Mbarrier there[2][2 * CHUNKS];  // what was sent of each 16 tokens' z2 and z2_bar
};

// Accumulators [16 tokens, D] of a warp: two rows in each quad, which become their x_hat.
template <int D> TTT_INLINE void normalise_rows(float (&z)[D / 8][4], float (&rstd)[2], float eps) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float mean = 0, square = 0;
#pragma unroll
        for (int j = 0; j < D / 8; j++) mean += z[j][2 * r] + z[j][2 * r + 1];
        mean += shuffle_xor(mean, 1);
        mean = (mean + shuffle_xor(mean, 2)) * (1.0f / D);
#pragma unroll
        for (int j = 0; j < D / 8; j++)
#pragma unroll
            for (int i = 2 * r; i < 2 * r + 2; i++) z[j][i] -= mean, square += z[j][i] * z[j][i];
        square += shuffle_xor(square, 1);
        rstd[r] = rsqrt((square + shuffle_xor(square, 2)) * (1.0f / D) + eps);
#pragma unroll
        for (int j = 0; j < D / 8; j++) z[j][2 * r] *= rstd[r], z[j][2 * r + 1] *= rstd[r];
    }
}
// p becomes rstd (p - mean(p) - x_hat mean(p x_hat)).
template <int D> TTT_INLINE void project_rows(float (&p)[D / 8][4], const float (&x_hat)[D / 8][4], const float (&rstd)[2]) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float mean = 0, along = 0;
#pragma unroll
        for (int j = 0; j < D / 8; j++)
#pragma unroll
            for (int i = 2 * r; i < 2 * r + 2; i++) mean += p[j][i], along += p[j][i] * x_hat[j][i];
        mean += shuffle_xor(mean, 1), along += shuffle_xor(along, 1);
        mean = (mean + shuffle_xor(mean, 2)) * (1.0f / D), along = (along + shuffle_xor(along, 2)) * (1.0f / D);
#pragma unroll
        for (int j = 0; j < D / 8; j++)
#pragma unroll
            for (int i = 2 * r; i < 2 * r + 2; i++) p[j][i] = rstd[r] * (p[j][i] - mean - x_hat[j][i] * along);
    }
}
// The pair of 16-bit numbers at [row, column] of a tile.
template <int WIDTH, typename T> TTT_INLINE uint32_t& pair_of(T* tile, int row, int column) {
    return *reinterpret_cast<uint32_t*>(tile + row * WIDTH + column);
}
// 16 rows of a tile to memory, by a warp; what it wrote of them is there, and they are free after.
template <int D, typename T> TTT_INLINE void write_rows(const T* tile, T* to, int64_t stride, int lane) {
    sync_warp();
#pragma unroll
    for (int i = lane; i < CHUNK * D / 8; i += 32) {
        const int row = i / (D / 8), column = i % (D / 8) * 8;
        *reinterpret_cast<Words*>(to + row * stride + column) =
            *reinterpret_cast<const Words*>(tile + row * Sizes<D>::ROW + column);
    }
    sync_warp();
}

template <typename T, int D, int M>
__global__ void TTT_CLUSTER
__launch_bounds__(Sizes<D>::THREADS, 1) mlp_forward_not_causal(const __grid_constant__ ForwardArguments a) {
    using S = Sizes<D>;
    using Shared = NotCausalShared<T, D, M>;
    constexpr int CHUNKS = M / CHUNK, F = S::F, ROW = S::ROW, WIDE = Shared::WIDE;
    constexpr int PAIR = SPLIT;  // chunks whose products overlap in time, where there are registers for it
    constexpr int UNITS = (2 * CHUNKS + S::WARPS - 1) / S::WARPS;  // of 16 tokens' z2 or z2_bar, for a warp
    TTT_SHARED(memory);
    auto& s = *reinterpret_cast<Shared*>(memory);
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    const int rank = SPLIT == 1 ? 0 : cluster_rank();
    const int64_t chain = blockIdx.x / SPLIT, batch = chain / a.heads, head = chain % a.heads;
    const int N = int(a.mini_batches), group = int(a.group), groups = (N + group - 1) / group;
    auto of = [&](const View& x) { return static_cast<const T*>(x.p) + batch * x.b + head * x.h; };
    const T *xq = of(a.xq), *xk = of(a.xk), *xv = of(a.xv), *lr = of(a.lr);
    const int64_t out_stride = a.heads * D;
    T* out = static_cast<T*>(a.out) + (batch * N * M * a.heads + head) * D;
    fp16* x_hat = static_cast<fp16*>(a.x_hat) + chain * N * M * D;
    fp16* x_hat_bar = static_cast<fp16*>(a.x_hat_bar) + chain * N * M * D;
    float *rstd = a.rstd + chain * N * M, *rstd_bar = a.rstd_bar + chain * N * M;
    const float eps = float(a.eps), eta_last = a.token_eta[M - 1];

    const float *gamma = a.ln_weight + head * D, *beta = a.ln_bias + head * D;
    for (int i = thread; i < D / 2; i += S::THREADS)
        s.ln[i] = {gamma[2 * i], gamma[2 * i + 1], beta[2 * i], beta[2 * i + 1]};
    if (thread < S::OWN) s.b1[thread] = a.b1[chain * F + rank * S::OWN + thread];
    if (thread < D) s.b2[thread] = a.b2[chain * D + thread];
    const int first = warp * SLICE;  // of this warp's hidden columns, in the block
    float w1[FK][D / 8][4], w2[D / 16][FT][4];
    load_weights<D>(w1, w2, a.w1 + chain * F * D, a.w2 + chain * F * D, rank * S::OWN + first, lane);
    float* b1 = s.b1 + first;

    int next_saved = 0;  // the mini-batch whose fast weights are
    T next_lr{};  // of token `thread`, on its way to shared memory
    auto fetch = [&](int n) {  // and xq of the mini-batch before
        const int stage = n & 1;
        load_tokens<T, D, M>(s.xq[stage], xq + int64_t(n ? n - 1 : 0) * M * a.xq.t, a.xq.t, a.aligned, thread);
        if (n < N) {
            load_tokens<T, D, M>(s.xk[stage], xk + int64_t(n) * M * a.xk.t, a.xk.t, a.aligned, thread);
            load_tokens<T, D, M>(s.xv[stage], xv + int64_t(n) * M * a.xv.t, a.xv.t, a.aligned, thread);
            if (thread < M) next_lr = lr[(int64_t(n) * M + thread) * a.lr.t];
        }
        copy_async_commit();
    };
    // z [16 tokens, D] += b2.
    auto add_b2 = [&](float (&z)[D / 8][4]) {
#pragma unroll
        for (int j = 0; j < D / 8; j++) {
            const Two b = *reinterpret_cast<const Two*>(s.b2 + 8 * j + 2 * t);
            z[j][0] += b.x[0], z[j][1] += b.x[1], z[j][2] += b.x[0], z[j][3] += b.x[1];
        }
    };
    auto save_norm = [&](T* tile, const float (&z)[D / 8][4], const float (&rstd)[2], fp16* p, float* p_rstd) {
        fp16* halves = reinterpret_cast<fp16*>(tile);
#pragma unroll
        for (int j = 0; j < D / 8; j++)
#pragma unroll
            for (int r = 0; r < 2; r++)
                pair_of<ROW>(halves, g + 8 * r, 8 * j + 2 * t) = pack<fp16>(z[j][2 * r], z[j][2 * r + 1]);
        write_rows<D>(halves, p, D, lane);
        if (t == 0) p_rstd[g] = rstd[0], p_rstd[g + 8] = rstd[1];
    };
    // From z2 of 16 tokens to g_z2, and what it adds to b2.
    auto inner_gradient = [&](float (&z)[D / 8][4], int n, int c) {
        const int row = CHUNK * c;
        const int64_t token = int64_t(n) * M + row;
        T *xk_tile = s.xk[n & 1] + row * ROW, *xv_tile = s.xv[n & 1] + row * ROW;
        T *g_tile = s.g_z2 + row * ROW, *step_tile = s.step_z2 + row * ROW;
        float norm_rstd[2], p[D / 8][4];
        add_b2(z);
        normalise_rows<D>(z, norm_rstd, eps);
        if (c % SPLIT == rank) save_norm(step_tile, z, norm_rstd, x_hat + token * D, rstd + token);
#pragma unroll
        for (int j = 0; j < D / 8; j++) {
            const Four ln = s.ln[4 * j + t];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float2 k = unpack<T>(pair_of<ROW>(xk_tile, g + 8 * r, 8 * j + 2 * t));
                const float2 v = unpack<T>(pair_of<ROW>(xv_tile, g + 8 * r, 8 * j + 2 * t));
                p[j][2 * r] = ln.x[0] * (ln.x[0] * z[j][2 * r] + ln.x[2] - (v.x - k.x));
                p[j][2 * r + 1] = ln.x[1] * (ln.x[1] * z[j][2 * r + 1] + ln.x[3] - (v.y - k.y));
            }
        }
        project_rows<D>(p, z, norm_rstd);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float step = -eta_last * s.lr[n & 1][row + g + 8 * r];
#pragma unroll
            for (int j = 0; j < D / 8; j++) {
                float &lo = p[j][2 * r], &hi = p[j][2 * r + 1];
                pair_of<ROW>(g_tile, g + 8 * r, 8 * j + 2 * t) = pack<T>(lo, hi);
                lo *= step, hi *= step;
                pair_of<ROW>(step_tile, g + 8 * r, 8 * j + 2 * t) = pack<T>(lo, hi);
            }
        }
#pragma unroll
        for (int j = 0; j < D / 8; j++) {
            Two sum = {p[j][0] + p[j][2], p[j][1] + p[j][3]};
#pragma unroll
            for (int mask = 4; mask < 32; mask *= 2)
                sum.x[0] += shuffle_xor(sum.x[0], mask), sum.x[1] += shuffle_xor(sum.x[1], mask);
            if (g == 0) *reinterpret_cast<Two*>(s.b2_part[c] + 8 * j + 2 * t) = sum;
        }
    };
    // From z2_bar of 16 tokens to out.
    auto write_out = [&](float (&z)[D / 8][4], int n, int c) {
        const int row = CHUNK * c;
        const int64_t token = int64_t(n) * M + row;
        T* tile = s.xq[(n + 1) & 1] + row * ROW;
        float norm_rstd[2];
        add_b2(z);
        normalise_rows<D>(z, norm_rstd, eps);
#pragma unroll
        for (int j = 0; j < D / 8; j++) {
            const Four ln = s.ln[4 * j + t];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                uint32_t& place = pair_of<ROW>(tile, g + 8 * r, 8 * j + 2 * t);
                const float2 x = unpack<T>(place);
                place = pack<T>(x.x + (ln.x[0] * z[j][2 * r] + ln.x[2]), x.y + (ln.x[1] * z[j][2 * r + 1] + ln.x[3]));
            }
        }
        write_rows<D>(tile, out + token * out_stride, out_stride, lane);
        save_norm(tile, z, norm_rstd, x_hat_bar + token * D, rstd_bar + token);
    };

    fetch(0);
    if (SPLIT == 2) {
        if (thread < 4 * CHUNKS) mbarrier_init(&s.there[0][thread]);
        cluster_sync();  // both blocks have started
    }
    for (int n = 0; n <= N; n++) {
        const int stage = n & 1;
        copy_async_wait<0>();
        if (thread < M) s.lr[stage][thread] = to_float(next_lr);
        sync();
        if (n < N) fetch(n + 1);
        if (n < N && n == next_saved) {
            float* record = a.saved + ((chain * groups + n / group) * SPLIT + rank) * S::RECORD;
            next_saved += group;
            save_weights<D>(record, w1, w2, thread);
            if (thread < S::OWN) record[S::RECORD - S::OWN + thread] = s.b1[thread];
        }

        // 1. x2 and x2_bar. In the first round x2_bar is of no use, in the last x2: a branch would cost more.
        {
            const First<D> w1_r = round_first<T, D>(w1);
            const Second<D> w2_r = round_second<T, D>(w2);
#pragma unroll
            for (int m = 0; m < D / 16; m++)
#pragma unroll
                for (int k = 0; k < FT; k++)
                    for (int h = 0; h < 2; h++)
                        pair_of<WIDE>(s.w2, 16 * m + 8 * h + g, first + 8 * k + 2 * t) = w2_r.x[m][k][h];
#pragma unroll 1
            for (int c = 0; c < CHUNKS; c += PAIR) {
                float z[2 * PAIR][FT][4];
#pragma unroll
                for (int k = 0; k < 2 * PAIR; k++) {
                    start_columns(z[k], b1, t);
                    times_first<T, D>(z[k], (k % 2 ? s.xq : s.xk)[stage], CHUNK * (c + k / 2), w1_r, lane);
                }
#pragma unroll
                for (int k = 0; k < 2 * PAIR; k++) {
                    float slope[FT][4];
#pragma unroll
                    for (int e = 0; e < 4 * FT; e++) {
                        float& y = z[k][e / 4][e % 4];
                        if (k % 2) y *= gelu_sigmoid(y);
                        else {
                            const Gelu both = gelu_first(y);
                            y = both.value, slope[e / 4][e % 4] = both.first;
                        }
                    }
                    const Columns x = round_columns<T>(z[k]);
#pragma unroll
                    for (int e = 0; e < 2 * FT; e++)
                        pair_of<WIDE>(s.x2[k % 2], CHUNK * (c + k / 2) + g + e % 2 * 8, first + e / 2 * 8 + 2 * t) =
                            x.x[e / 2][e % 2];
                    if (k % 2 == 0) keep(s.slope[c + k / 2][warp], round_columns<fp16>(slope), lane);
                }
            }
        }
        sync();

        // 2. z2 and z2_bar, over this block's f; then of both blocks, z2 in both and z2_bar in the one that writes it.
        {
            float z[UNITS][D / 8][4] = {};
            const int last_unit = 2 * CHUNKS;  // z2 of every chunk, then z2_bar
#pragma unroll
            for (int u = 0; u < UNITS; u++) {
                const int unit = warp + S::WARPS * u, bar = unit / CHUNKS, c = unit % CHUNKS;
                if (unit >= last_unit) break;
#pragma unroll
                for (int k = 0; k < S::OWN / 16; k++) {
                    uint32_t x[4];
                    load_a<WIDE>(x, s.x2[bar], CHUNK * c, 16 * k, lane);
#pragma unroll
                    for (int j = 0; j < D / 16; j++) {
                        uint32_t w[4];
                        load_b_trans<WIDE>(w, s.w2, 16 * j, 16 * k, lane);
                        mma<T>(z[u][2 * j], x, w[0], w[1]);
                        mma<T>(z[u][2 * j + 1], x, w[2], w[3]);
                    }
                }
                if (SPLIT == 1) continue;
                auto& sent = s.sent[stage][bar ? CHUNKS + c / 2 : c];
                Mbarrier* const there = &s.there[stage][unit];
                if (lane == 0 && !(bar && c % 2 != rank)) mbarrier_expect(there, sizeof sent);
                if (bar && c % 2 == rank) continue;
#pragma unroll
                for (int j = 0; j < D / 8; j++) store_async(sent[j][lane].x, z[u][j], there, 1 - rank);
            }
#pragma unroll
            for (int u = 0; u < UNITS; u++) {
                const int unit = warp + S::WARPS * u, bar = unit / CHUNKS, c = unit % CHUNKS;
                if (unit >= last_unit) break;
                if (SPLIT == 2) {
                    if (bar && c % 2 != rank) continue;
                    const auto& sent = s.sent[stage][bar ? CHUNKS + c / 2 : c];
                    mbarrier_wait(&s.there[stage][unit], n / 2 % 2);
#pragma unroll
                    for (int j = 0; j < D / 8; j++) {
                        const Four more = sent[j][lane];
                        for (int i = 0; i < 4; i++) z[u][j][i] += more.x[i];
                    }
                }
                if (!bar && n < N) inner_gradient(z[u], n, c);
                if (bar && n > 0) write_out(z[u], n - 1, c);
            }
        }
        if (n == N) break;
        sync();

        // 3. g_z1 and the updates.
        float step_b1[2 * FT] = {};
        {
            const Second<D> w2_t = transpose(round_second<T, D>(w2));
#pragma unroll 1
            for (int c = 0; c < CHUNKS; c += PAIR) {
                float g_z1[PAIR][FT][4] = {};
#pragma unroll
                for (int p = 0; p < PAIR; p++) times_second_t<T, D>(g_z1[p], s.g_z2, CHUNK * (c + p), w2_t, lane);
#pragma unroll
                for (int p = 0; p < PAIR; p++) {
                    const int row = CHUNK * (c + p);
                    const float step[2] = {-eta_last * s.lr[stage][row + g], -eta_last * s.lr[stage][row + g + 8]};
                    const Columns slope = kept(s.slope[c + p][warp], lane);
#pragma unroll
                    for (int k = 0; k < FT; k++)
#pragma unroll
                        for (int h = 0; h < 2; h++) {
                            const float2 y = unpack<fp16>(slope.x[k][h]);
                            float &lo = g_z1[p][k][2 * h], &hi = g_z1[p][k][2 * h + 1];
                            lo *= y.x * step[h], hi *= y.y * step[h];
                            step_b1[2 * k] += lo, step_b1[2 * k + 1] += hi;
                        }
                    update_first<T, D>(w1, transpose(round_columns<T>(g_z1[p])), s.xk[stage], row, lane);
                    Columns x2_t;
#pragma unroll
                    for (int k = 0; k < FK; k++) {
                        uint32_t x[4];
                        load_b<WIDE>(x, s.x2[0], row, first + 16 * k, lane);
                        x2_t.x[2 * k][0] = x[0], x2_t.x[2 * k][1] = x[1];
                        x2_t.x[2 * k + 1][0] = x[2], x2_t.x[2 * k + 1][1] = x[3];
                    }
                    update_second<T, D>(w2, x2_t, s.step_z2, row, lane);
                }
            }
        }
        sync_warp();  // every lane has read b1
        const float step = sum_columns(step_b1, lane);
        if (owns_column(lane)) b1[column_of(lane)] += step;
        sync_warp();
        if (thread < D)
            for (int c = 0; c < CHUNKS; c++) s.b2[thread] += s.b2_part[c][thread];
    }

    store_weights<D>(
        a.final_w1 + chain * F * D, a.final_w2 + chain * F * D, w1, w2, rank * S::OWN + first, lane
    );
    if (thread < S::OWN) a.final_b1[chain * F + rank * S::OWN + thread] = s.b1[thread];
    if (thread < D && rank == 0) a.final_b2[chain * D + thread] = s.b2[thread];
}

}  // namespace ttt
