// TTT-Linear backward on tensor cores, in segments of `group` mini-batches from the last to the first, each in two passes:
//
//   Again    the forward from the segment's saved weights. Readers finish what hangs on the read-out alone: d_xq,
//            d_z1_bar, d_attn; the recurrence keeps x_hat and a few numbers of each token.
//   Reverse  the one thing that is sequential, d_w1 from the last mini-batch to the first, again in the registers of
//            some warps; readers finish d_xk.
//
// One block does both for its chain in turns; of a cluster of two, each block has one of them, a segment apart.
//
//   pulled = xk d_w1' + d_b1'                                 what the update is asked to change
//   q      = -(token_eta tril(xq xk^T + 1))^T d_z1_bar - eta_last pulled,   d_g_z1 = lr q,   d_lr = sum(q g_z1)
//   d_z1   = second order of the inner gradient, linear in d_g_z1: five sums over D
//   d_xk   = d_attn^T xq - eta_last lr g_z1 d_w1'^T + d_z1 w1^T - d_xv
//   d_w1   = d_w1' + xq^T d_z1_bar + xk^T d_z1                (not causal: xq^T d_z1_bar comes before `pulled`)
//
// All with w1 less its mean over e (linear_recurrence.cuh): d_z1_bar and d_z1 have mean 0 over e, so d_xq and d_xk do not
// see the mean either. Memory: inputs read twice and d_out once, gradients written once; what Again keeps for Reverse,
// D^2 / M + 4 D + ... numbers a token and head, stays in the L2 cache if the segments are short.
#include "linear_readers.cuh"
#include "linear_recurrence.cuh"

#if TTT_SPLIT > 1
#define TTT_CLUSTER __cluster_dims__(TTT_SPLIT, 1, 1)
#else
#define TTT_CLUSTER
#endif

namespace ttt {

constexpr int SPLIT = TTT_SPLIT;  // blocks of a chain

struct BackwardArguments {
    View xq, xk, xv, lr;
    const float *token_eta, *ln_weight, *ln_bias;
    const float* saved;  // [B H, ceil(N / group), D (D + 1)]
    View d_out;
    const float *d_final_w1, *d_final_b1;
    View d_xq, d_xk, d_xv, d_lr;
    float *d_token_eta, *d_ln_weight, *d_ln_bias, *d_w1, *d_b1;  // the first three of each block: [B H SPLIT, M or D]
    float* d_weights;        // [B H, D (D + 1)]: d_w1, d_b1 between segments
    unsigned char* scratch;  // [B H SPLIT, group + 1] times Kept::BYTES
    int64_t heads, mini_batches, group;
    double eps;
};

// What Again keeps of a mini-batch.
template <typename P> struct Kept {
    using T = typename P::T;
    static constexpr int D = P::D, M = P::M;
    static constexpr int WEIGHTS = 2 * D * D, TOKENS = 2 * M * D, PAIRS = P::CAUSAL ? 2 * M * M : 0;
    static constexpr int BYTES = WEIGHTS + 4 * M * D + 32 * M + TOKENS + 2 * PAIRS;
    unsigned char* p;
    TTT_INLINE uint4* w() const { return reinterpret_cast<uint4*>(p); }  // B operands of x w1^T, by 16 e, 16 d, lane
    TTT_INLINE float4* x_hat() const { return reinterpret_cast<float4*>(p + WEIGHTS); }  // by tile, warp, row half, lane
    TTT_INLINE float4* tokens() const { return x_hat() + M * D / 4; }                    // two of each token
    TTT_INLINE T* d_z1_bar() const { return reinterpret_cast<T*>(tokens() + 2 * M); }    // [M, D]
    TTT_INLINE T* scores() const { return d_z1_bar() + M * D; }                          // [M, M], less those above the
    TTT_INLINE T* d_attn() const { return scores() + M * M; }                            // diagonal's tiles
};
template <typename P> struct Scratch {
    unsigned char* p;
    TTT_INLINE Kept<P> of(int step) const { return {p + int64_t(step) * Kept<P>::BYTES}; }
};

template <typename P> struct KeepForReverse {
    Scratch<P> scratch;
    TTT_INLINE void start(int n, const Weights<P>& weights, int warp) const {
        if (P::CAUSAL || n > 0) return;  // the others are written by readers
        uint4* to = scratch.of(0).w() + warp * (P::D / 16) * 32 + lane_id();
#pragma unroll
        for (int j = 0; j < P::D / 8; j += 2)
            to[j / 2 * 32] = make_uint4(movmatrix(weights.rounded[j][0]), movmatrix(weights.rounded[j][1]),
                                        movmatrix(weights.rounded[j + 1][0]), movmatrix(weights.rounded[j + 1][1]));
    }
    TTT_INLINE void token(int n, int warp, int tile, const float4& of, float along_x, float along_x2) const {
        if (warp != tile % P::WARPS) return;
        const bool second = lane_id() & 1;
        scratch.of(n).tokens()[32 * tile + lane_id()] = second ? make_float4(along_x, along_x2, 0.0f, 0.0f) : of;
    }
    TTT_INLINE void x_hat(int n, int warp, int tile, int half, const float (&x)[2][2]) const {
        scratch.of(n).x_hat()[((tile * P::WARPS + warp) * 2 + half) * 32 + lane_id()] =
            make_float4(x[0][0], x[0][1], x[1][0], x[1][1]);
    }
};

template <typename P> struct Again : ReadOut<P> {
    using T = typename P::T;
    static constexpr int D = P::D, M = P::M;
    Rows<const T> from_xq, from_xk, from_xv, from_lr, from_d_out;
    Rows<T> to_d_xq;
    Scratch<P> scratch;
    static constexpr int COLUMNS = D < 32 ? 1 : D / 32;  // a lane's part of D sums that all lanes share
    float d_ln_weight[COLUMNS], d_ln_bias[COLUMNS], d_token_eta[P::TURN / 16][2];

    TTT_INLINE void load(int n, int stage, int row) const {
        const int64_t token = int64_t(n) * M + row;
        load_rows(this->at.xk(stage), row, from_xk.at(token), from_xk.token);
        load_rows(this->at.xv(stage), row, from_xv.at(token), from_xv.token);
        load_rows(this->at.xq(stage), row, from_xq.at(token), from_xq.token);
        load_rows(this->at.d_out(stage), row, from_d_out.at(token), from_d_out.token);
    }
    TTT_INLINE float lr(int n, int row) const { return to_float(*from_lr.at(int64_t(n) * M + row)); }

    TTT_INLINE void read(int n, int slot, int stage, int i_tile, int row) {
        const P& at = this->at;
        const int g = row_in_tile(), t = column_in_tile();
        float z[D / 8][4], rstd[2];
        this->normalised(slot, stage, row, z, rstd);

        // d_z1_bar = rstd (gamma d_out - mean - x_hat mean(gamma d_out x_hat)); z becomes d_out, where d_xq starts.
        const Tile<T, D> d_out = at.d_out(stage);
        float mean[2] = {}, along[2] = {}, of_weight[8 * COLUMNS] = {}, of_bias[8 * COLUMNS] = {};
#pragma unroll
        for (int j = 0; j < D / 8; j++) {
            const float4 ln = at.ln()[(8 * j + t) / 2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float2 d = unpack<T>(d_out.get(row + g + 8 * r, 8 * j + t));
                mean[r] += ln.x * d.x + ln.y * d.y;
                along[r] += ln.x * d.x * z[j][2 * r] + ln.y * d.y * z[j][2 * r + 1];
                of_weight[2 * j] += d.x * z[j][2 * r], of_weight[2 * j + 1] += d.y * z[j][2 * r + 1];
                of_bias[2 * j] += d.x, of_bias[2 * j + 1] += d.y;
            }
        }
        add_rows(of_weight, d_ln_weight);
        add_rows(of_bias, d_ln_bias);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            mean[r] += shuffle_xor(mean[r], 1), along[r] += shuffle_xor(along[r], 1);
            mean[r] = (mean[r] + shuffle_xor(mean[r], 2)) / D, along[r] = (along[r] + shuffle_xor(along[r], 2)) / D;
        }
        uint32_t d_z1_bar[D / 16][4];
#pragma unroll
        for (int j = 0; j < D / 8; j++) {
            const float4 ln = at.ln()[(8 * j + t) / 2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float2 d = unpack<T>(d_out.get(row + g + 8 * r, 8 * j + t));
                d_z1_bar[j / 2][j % 2 * 2 + r] = pack<T>(rstd[r] * (ln.x * d.x - mean[r] - z[j][2 * r] * along[r]),
                                                         rstd[r] * (ln.y * d.y - mean[r] - z[j][2 * r + 1] * along[r]));
                z[j][2 * r] = d.x, z[j][2 * r + 1] = d.y;
                d_out.set(row + g + 8 * r, 8 * j + t, d_z1_bar[j / 2][j % 2 * 2 + r]);
            }
        }
        sync_warp();
        const Kept<P> kept = scratch.of(n);
        store_rows(d_out, row, kept.d_z1_bar() + row * D, D);

        // d_xq = d_out + d_z1_bar w1^T + d_attn xk. The rows of w1 here are those that Reverse will read, too.
        uint4* w_kept = scratch.of(P::CAUSAL ? n : n + 1).w() + lane_id();
#pragma unroll
        for (int k = 0; k < D / 16; k++)
#pragma unroll
            for (int j = 0; j < D / 8; j += 2) {
                uint32_t r[4];
                ldmatrix_x4_trans(r, at.w(slot).by_columns(16 * k, 8 * j));
                mma<T>(z[j], d_z1_bar[k], r[0], r[1]);
                mma<T>(z[j + 1], d_z1_bar[k], r[2], r[3]);
                if (16 * (k % P::TEAM) == row) w_kept[(k * (D / 16) + j / 2) * 32] = make_uint4(r[0], r[1], r[2], r[3]);
            }
        if (P::CAUSAL)
            for (int key = 0; key <= row; key += 16) {
                if (P::TEAM > 1) this->attend(stage, row, key);
                float d_scores[2][4];
                product_16(d_scores, d_z1_bar, at.g(slot), key);  // -d_scores, before the mask and lr
                uint32_t d_attn[4];
                const float* lr = at.lr(stage) + key + t;
#pragma unroll
                for (int h = 0; h < 2; h++)
#pragma unroll
                    for (int r = 0; r < 2; r++) {
                        const int query = row + g + 8 * r, column = key + 8 * h + t;
                        const float eta = at.token_eta()[query], *s = this->attn[h] + 2 * r;
                        const float d0 = column <= query ? -lr[8 * h] * d_scores[h][2 * r] : 0.0f;
                        const float d1 = column + 1 <= query ? -lr[8 * h + 1] * d_scores[h][2 * r + 1] : 0.0f;
                        d_token_eta[i_tile][r] += d0 * s[0] + d1 * s[1];
                        d_attn[2 * h + r] = pack<T>(eta * d0, eta * d1);
                        const float scaled = eta / score_scale<T>;
                        *reinterpret_cast<uint32_t*>(kept.d_attn() + query * M + column) = d_attn[2 * h + r];
                        *reinterpret_cast<uint32_t*>(kept.scores() + query * M + column) =
                            pack<T>(scaled * s[0], scaled * s[1]);
                    }
                add_product_16(z, d_attn, at.xk(stage), key);
            }
        store_accumulators(z, at.xq(stage), row, to_d_xq.at(int64_t(n) * M + row), to_d_xq.token);
    }

    TTT_INLINE void start() {
#pragma unroll
        for (int i = 0; i < COLUMNS; i++) d_ln_weight[i] = d_ln_bias[i] = 0.0f;
#pragma unroll
        for (int i = 0; i < P::TURN / 16; i++) d_token_eta[i][0] = d_token_eta[i][1] = 0.0f;
    }
    // This reader's sums of a segment, to its own place.
    TTT_INLINE void finish(int reader) const {
        float* ln = this->at.ln_sums(reader);
#pragma unroll
        for (int i = 0; i < COLUMNS; i++) {
            const int place = COLUMNS * (lane_id() / 4) + i, column = place / 2 * 8 + column_in_tile() + place % 2;
            if (column < D) ln[column] += d_ln_weight[i], ln[D + column] += d_ln_bias[i];
        }
        if (!P::CAUSAL) return;
        float* eta = this->at.eta_sums() + reader / P::TEAM * M + 16 * (reader % P::TEAM);
#pragma unroll
        for (int i = 0; i < P::TURN / 16; i++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float a = d_token_eta[i][r];
                a += shuffle_xor(a, 1);
                a += shuffle_xor(a, 2);
                if (lane_id() % 4 == 0) eta[16 * P::TEAM * i + row_in_tile() + 8 * r] += a;
            }
    }
};

// The inner gradient of a tile again, in the accumulators of one warp.
template <typename P> struct Inner {
    float x_hat[2][4], error[2][4], p[2][4], g[2][4];  // error = gamma x_hat + beta - target, p = gamma error
    float rstd[2], along[2], mean_p[2];
    TTT_INLINE void load(const P& at, const Columns<P>& columns, const float (&rest)[2][4], int stage, int tile, int warp) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float4 of = at.kept(stage)[2 * (16 * tile + row_in_tile() + 8 * r)];
            const float4 x = at.x_hat(stage)[((tile * P::WARPS + warp) * 2 + r) * 32 + lane_id()];
            rstd[r] = of.x, mean_p[r] = of.z, along[r] = of.w;
            x_hat[0][2 * r] = x.x, x_hat[0][2 * r + 1] = x.y, x_hat[1][2 * r] = x.z, x_hat[1][2 * r + 1] = x.w;
        }
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                error[h][i] = columns.gamma[h][i % 2] * x_hat[h][i] + rest[h][i];
                p[h][i] = columns.gamma[h][i % 2] * error[h][i];
                g[h][i] = rstd[i / 2] * (p[h][i] - mean_p[i / 2] - x_hat[h][i] * along[i / 2]);
            }
    }
};

TTT_INLINE void add_columns(float (&b)[2][2], const float (&sums)[2][4]) {
#pragma unroll
    for (int h = 0; h < 2; h++) b[h][0] += sums[h][0], b[h][1] += sums[h][1];
}

// (d_w1', d_b1') -> (d_w1, d_b1), from the last of `steps` mini-batches to the first, by one warp.
template <typename P>
TTT_INLINE void reverse(const P& at, Weights<P>& d_weights, int warp, int steps, Rows<typename P::T> d_lr) {
    using T = typename P::T;
    constexpr int D = P::D, M = P::M, TILES = P::TILES;
    const int g = row_in_tile(), t = column_in_tile(), first = 16 * warp;
    const float eta_last = at.token_eta()[M - 1];
    const Columns<P> columns(at, first);
    // Whether what does not wait for d_w1 comes before it: where a tile of it fits into registers, once.
    constexpr bool EARLY = TILES == 1 && P::THREADS <= 256;
    float d_ln_weight[2][2] = {}, d_ln_bias[2][2] = {}, d_eta_last = 0.0f;
    float bias[2][2] = {};  // what the last step adds to d_b1, in parts
    float gamma_squared[2][2];
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int l = 0; l < 2; l++) gamma_squared[h][l] = columns.gamma[h][l] * columns.gamma[h][l];

    Place<P> place;
    for (int step = 0; step < steps; step++, place.next()) {
        const int slot = place.slot(), stage = place.stage();
        const Tile<T, D> xq = at.xq(stage), xk = at.xk(stage), d_z1_bar = at.d_z1_bar(stage);
        const float* lr = at.lr(stage) + g;
        float4* exchange = at.exchange(step & 1);
        P::wait_for_tokens(step, slot);
        float bar[2][4] = {};  // d_z1_bar summed over tokens, in every row
        const uint32_t one = pack<T>(1.0f, 1.0f), ones[4] = {one, one, one, one};
#pragma unroll
        for (int m = 0; m < TILES; m++) {
            uint32_t d[4];
            ldmatrix_x4_trans(d, d_z1_bar.by_columns(16 * m, first));
            mma<T>(bar[0], ones, d[0], d[1]);
            mma<T>(bar[1], ones, d[2], d[3]);
        }
        Operand<P> x;
        Inner<P> inner;
        float rest[TILES][2][4];  // beta - target
        float part[2][4];         // (token_eta tril(xq xk^T + 1))^T d_z1_bar, of a tile
        auto load = [&](int m) {
#pragma unroll
            for (int i = 0; i < 4; i++) part[0][i] = part[1][i] = 0.0f;
            if (P::CAUSAL)
#pragma unroll
                for (int k = m; k < TILES; k++) {
                    uint32_t s[4], d[4];
                    ldmatrix_x4_trans(s, at.scores(stage).by_rows(16 * k, 16 * m));
                    ldmatrix_x4_trans(d, d_z1_bar.by_columns(16 * k, first));
                    mma<T>(part[0], s, d[0], d[1]);
                    mma<T>(part[1], s, d[2], d[3]);
                }
            inner.load(at, columns, rest[m], stage, m, warp);
        };
        x.load(xk, 0);
#pragma unroll
        for (int m = 0; m < TILES; m++) columns.less_target(at, stage, m, first, rest[m]);
        if (EARLY) load(0);
        if (!P::CAUSAL) {
#pragma unroll
            for (int m = 0; m < TILES; m++) d_weights.add(d_z1_bar, first, xq, 16 * m);
        }
        d_weights.round();
        float q[TILES][2][4];  // at first pulled
        through(d_weights, xk, x, q);
        d_weights.add_bias(bias);
        if (!P::CAUSAL) add_columns(d_weights.b, bar);

#pragma unroll
        for (int m = 0; m < TILES; m++) {
            if (!EARLY) load(m);
            float sums[2][6];  // of q, q x_hat, q g, gamma^2 q, gamma^2 q x_hat
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float along = 0.0f;
                float(&of)[6] = sums[r];
#pragma unroll
                for (int h = 0; h < 2; h++)
#pragma unroll
                    for (int i = 2 * r; i < 2 * r + 2; i++) {
                        const float pulled = q[m][h][i] + d_weights.b[h][i % 2];
                        const float x = (P::CAUSAL ? -score_scale<T> * part[h][i] : 0.0f) - eta_last * pulled;
                        const float y = gamma_squared[h][i % 2] * x;
                        const bool start = h == 0 && i == 2 * r;
                        q[m][h][i] = x;
                        along += inner.g[h][i] * pulled;
                        of[0] = start ? x : of[0] + x;
                        of[1] = start ? x * inner.x_hat[h][i] : of[1] + x * inner.x_hat[h][i];
                        of[2] = start ? x * inner.g[h][i] : of[2] + x * inner.g[h][i];
                        of[3] = start ? y : of[3] + y;
                        of[4] = start ? y * inner.x_hat[h][i] : of[4] + y * inner.x_hat[h][i];
                    }
                of[5] = 0.0f;
                d_eta_last -= lr[16 * m + 8 * r] * along;
            }
            put_sums<P>(exchange, warp, m, sums);
        }
        named_sync(P::BETWEEN, 32 * P::WARPS);
        P::wait_for_slot(step, slot);
        d_weights.show(at.w(slot), first);

        auto work_out = [&](int m) {  // means of d_g_z1 and d_g_z1 x_hat, and what projects d_x_hat
            float sums[6];
            get_sums<P>(exchange, m, sums);
            const int token = 16 * m + lane_id() / 2;
            const float4 of = at.kept(stage)[2 * token], more = at.kept(stage)[2 * token + 1];
            const float rstd = of.x, mean_p = of.z, along_p = of.w, along_x = more.x, along_x2 = more.y;
            const float each = at.lr(stage)[token] / D, mean = each * sums[0], along = each * sums[1];
            if (warp == m % P::WARPS && lane_id() % 2 == 0)
                *d_lr.at(int64_t(steps - 1 - step) * M + token) = from_float<T>(sums[2]);
            return make_float4(
                mean, along,
                rstd * (each * sums[3] - mean * (columns.mean_gamma_squared + along_p) - along * (along_x + mean_p)),
                rstd * (each * sums[4] - mean * along_x - along * (along_x2 + 2.0f * along_p)) + each * sums[2]);
        };
        const OfTokens<P, decltype(work_out)> of_tokens(at, warp, work_out);
#pragma unroll
        for (int m = 0; m < TILES; m++) {
            if (!EARLY) inner.load(at, columns, rest[m], stage, m, warp);
            float4 of[2];
            of_tokens.get(m, of);
            uint32_t d_z1[2][2], d_xv[2][2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                // d_p = rstd (d_g - mean - x_hat along), d_error = gamma d_p,
                // d_z1 = rstd (gamma d_error - rstd (mean(p x_hat) d_g + along p) - mean_x - x_hat along_x)
                const float rstd = inner.rstd[r], lr_token = lr[16 * m + 8 * r];
                const float of_q = rstd * inner.along[r] * lr_token, of_p = rstd * of[r].y;
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    float d_z[2], d_error[2];
#pragma unroll
                    for (int l = 0; l < 2; l++) {
                        const int i = 2 * r + l;
                        const float gamma = columns.gamma[h][l], x = inner.x_hat[h][i], each = q[m][h][i];
                        const float d_p = rstd * (lr_token * each - of[r].x - x * of[r].y);
                        d_error[l] = gamma * d_p;
                        d_z[l] = rstd * (gamma * d_error[l] - of[r].z - of_q * each - of_p * inner.p[h][i] - of[r].w * x);
                        d_ln_weight[h][l] += d_p * inner.error[h][i];
                        d_ln_weight[h][l] += d_error[l] * x;
                        d_ln_bias[h][l] += d_error[l];
                        bias[h][l] = m == 0 && r == 0 ? d_z[l] : bias[h][l] + d_z[l];
                    }
                    d_z1[h][r] = pack<T>(d_z[0], d_z[1]);
                    d_xv[h][r] = pack<T>(-d_error[0], -d_error[1]);
                }
            }
            d_weights.add(d_z1, xk, 16 * m);
            if (P::CAUSAL) d_weights.add(d_z1_bar, first, xq, 16 * m);
#pragma unroll
            for (int h = 0; h < 2; h++)
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const int token = 16 * m + g + 8 * r, column = first + 8 * h + t;
                    at.d_z1(slot).set(token, column, d_z1[h][r]);
                    at.d_xv(slot).set(token, column, d_xv[h][r]);
                    at.g(slot).set(token, column, pack<T>(inner.g[h][2 * r], inner.g[h][2 * r + 1]));
                }
        }
        P::hand_over(slot);
        if (P::CAUSAL) add_columns(d_weights.b, bar);
    }
    d_weights.add_bias(bias);

    float* ln = at.ln_sums(P::READERS) + first;
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int l = 0; l < 2; l++) {
            float a = d_ln_weight[h][l], b = d_ln_bias[h][l];
#pragma unroll
            for (int mask = 4; mask < 32; mask *= 2) a += shuffle_xor(a, mask), b += shuffle_xor(b, mask);
            if (lane_id() < 4) ln[8 * h + t + l] += a, ln[D + 8 * h + t + l] += b;
        }
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) d_eta_last += shuffle_xor(d_eta_last, mask);
    if (lane_id() == 0) at.eta_sums()[P::GROUPS * M + warp] += d_eta_last;
}

template <typename P> struct Reverse {
    using T = typename P::T;
    static constexpr int D = P::D, M = P::M;
    const P& at;
    int last;  // mini-batch of the segment
    Rows<const T> from_xq, from_xk, from_xv, from_lr;
    Rows<T> to_d_xk, to_d_xv;
    Scratch<P> scratch;

    TTT_INLINE void load(int step, int stage, int row) const {
        const int n = last - step;
        const int64_t token = int64_t(n) * M + row;
        load_rows(at.xk(stage), row, from_xk.at(token), from_xk.token);
        load_rows(at.xv(stage), row, from_xv.at(token), from_xv.token);
        load_rows(at.xq(stage), row, from_xq.at(token), from_xq.token);
        const Kept<P> kept = scratch.of(n);
        load_rows(at.d_z1_bar(stage), row, static_cast<const T*>(kept.d_z1_bar()) + row * D, D);
        const int lane = lane_id(), tile = row / 16;
        copy_async_16(at.kept(stage) + 2 * row + lane, kept.tokens() + 2 * row + lane);
#pragma unroll
        for (int i = 0; i < 2 * P::WARPS; i++) {
            const int place = (tile * 2 * P::WARPS + i) * 32 + lane;
            copy_async_16(at.x_hat(stage) + place, kept.x_hat() + place);
        }
        if (P::CAUSAL)
            for (int i = 0; i <= tile; i++) {  // 16 rows of 2 (tile + 1) times 8 numbers
                const int chunk = lane + 32 * i, r = row + chunk / (2 * tile + 2), column = chunk % (2 * tile + 2) * 8;
                copy_async_16(at.scores(stage).at(r, column), kept.scores() + r * M + column);
                copy_async_16(at.d_attn(stage).at(r, column), kept.d_attn() + r * M + column);
            }
    }
    TTT_INLINE float lr(int step, int row) const { return to_float(*from_lr.at(int64_t(last - step) * M + row)); }
    TTT_INLINE void early(int) const {}

    TTT_INLINE void read(int step, int slot, int stage, int, int row) const {
        const int n = last - step, g = row_in_tile(), t = column_in_tile();
        float z[D / 8][4] = {};
        // Products whose operands are loaded together: those of w1 come from the L2 cache, and all at once if they fit.
        constexpr int AT_ONCE = P::THREADS <= 256 ? D / 16 : 2;
        uint32_t x[4];
#pragma unroll AT_ONCE
        for (int k = 0; k < D / 16; k++) {  // g_z1 d_w1'^T
            ldmatrix_x4(x, at.g(slot).by_columns(row, 16 * k));
            add_product_16(z, x, at.w(slot), 16 * k);
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float factor = -at.token_eta()[M - 1] * at.lr(stage)[row + g + 8 * r];
#pragma unroll
            for (int j = 0; j < D / 8; j++) {
                const float2 d_xv = unpack<T>(at.d_xv(slot).get(row + g + 8 * r, 8 * j + t));
                z[j][2 * r] = factor * z[j][2 * r] - d_xv.x, z[j][2 * r + 1] = factor * z[j][2 * r + 1] - d_xv.y;
            }
        }
        const uint4* w = scratch.of(n).w() + lane_id();
#pragma unroll AT_ONCE
        for (int k = 0; k < D / 16; k++) {  // d_z1 w1^T
            ldmatrix_x4(x, at.d_z1(slot).by_columns(row, 16 * k));
#pragma unroll
            for (int j = 0; j < D / 8; j += 2) {
                const uint4 r = w[(k * (D / 16) + j / 2) * 32];
                mma<T>(z[j], x, r.x, r.y);
                mma<T>(z[j + 1], x, r.z, r.w);
            }
        }
        if (P::CAUSAL)
            for (int query = row; query < M; query += 16) {  // d_attn^T xq
                uint32_t s[4];
                ldmatrix_x4_trans(s, at.d_attn(stage).by_rows(query, row));
                add_product_16(z, s, at.xq(stage), query);
            }
        const int64_t token = int64_t(n) * M + row;
        store_rows(at.d_xv(slot), row, to_d_xv.at(token), to_d_xv.token);
        store_accumulators(z, at.d_z1(slot), row, to_d_xk.at(token), to_d_xk.token);
    }
};

// A segment of mini-batches of one chain, by all warps of a block.
template <typename P> struct Segment {
    using T = typename P::T;
    const BackwardArguments& a;
    const int64_t chain, first;  // mini-batch
    const int steps;
    const Scratch<P> scratch;
    TTT_INLINE Segment(const BackwardArguments& a, int64_t chain, int index)
        : a(a), chain(chain), first(index * a.group), steps(int(min(a.group, a.mini_batches - first))),
          scratch{a.scratch + (chain * SPLIT + index % SPLIT) * (a.group + 1) * Kept<P>::BYTES} {}
    TTT_INLINE Rows<T> rows(const View& view) const { return {view, chain, a.heads, first * P::M}; }
    TTT_INLINE Rows<const T> read(const View& view) const { return {view, chain, a.heads, first * P::M}; }
};

template <typename P> TTT_INLINE void again(const P& at, const Segment<P>& s, const float* saved) {
    const int warp = threadIdx.x / 32, reader_index = warp - P::WARPS;
    if (warp < P::WARPS) {
        Weights<P> weights;
        weights.restore(saved, warp);
        KeepForReverse<P> keep = {s.scratch};
        run_recurrence(at, weights, warp, s.steps, keep);
    } else {
        Again<P> work = {{at}, s.read(s.a.xq), s.read(s.a.xk), s.read(s.a.xv), s.read(s.a.lr), s.read(s.a.d_out),
                         s.rows(s.a.d_xq), s.scratch};
        work.start();
        reader(at, reader_index, s.steps, work);
        work.finish(reader_index);
    }
}

template <typename P> TTT_INLINE void way_back(const P& at, const Segment<P>& s, bool is_last) {
    constexpr int D = P::D;
    const int warp = threadIdx.x / 32;
    const BackwardArguments& a = s.a;
    float* kept = a.d_weights + s.chain * (D * (D + 1));
    if (warp < P::WARPS) {
        Weights<P> d_weights;
        if (is_last)
            d_weights.load(a.d_final_w1 + s.chain * D * D, a.d_final_b1 + s.chain * D, at.mean(), 16 * warp);
        else
            d_weights.restore(kept, warp);
        reverse(at, d_weights, warp, s.steps, s.rows(a.d_lr));
        if (s.first == 0)
            d_weights.store(a.d_w1 + s.chain * D * D, a.d_b1 + s.chain * D, at.mean(), 16 * warp);
        else
            d_weights.save(kept, warp);
    } else {
        Reverse<P> work = {at, s.steps - 1, s.read(a.xq), s.read(a.xk), s.read(a.xv), s.read(a.lr), s.rows(a.d_xk),
                           s.rows(a.d_xv), s.scratch};
        reader(at, warp - P::WARPS, s.steps, work);
    }
}

template <typename T, int D, int M, bool CAUSAL, int GROUPS, int SLOTS, int STAGES, int REVERSE_STAGES>
__global__ void TTT_CLUSTER __launch_bounds__(TTT_THREADS, 1) linear_backward(const __grid_constant__ BackwardArguments a) {
    using F = Plan<AGAIN, T, D, M, CAUSAL, GROUPS, SLOTS, STAGES>;
    using R = Plan<REVERSE, T, D, M, CAUSAL, GROUPS, 1, REVERSE_STAGES>;
    constexpr int BYTES = F::BYTES > R::BYTES ? F::BYTES : R::BYTES;
    static_assert(BYTES == TTT_SHARED_BYTES && F::THREADS == TTT_THREADS && Kept<F>::BYTES == TTT_KEPT_BYTES,
                  "the host counts as the kernel does");
    TTT_SHARED(shared);
    const F forth = {shared};
    const R back = {shared};
    const int rank = SPLIT == 1 ? 0 : cluster_rank();
    const int64_t chain = blockIdx.x / SPLIT, h = a.heads;
    const int segments = int((a.mini_batches + a.group - 1) / a.group);
    load_shared(forth, a.ln_weight + chain % h * D, a.ln_bias + chain % h * D, a.token_eta, a.eps);
    for (int i = threadIdx.x; i <= D; i += F::THREADS) forth.mean()[i] = 0.0f;  // cotangents keep theirs
    for (int i = threadIdx.x; i < F::SUMS / 4; i += F::THREADS) forth.ln_sums(0)[i] = 0.0f;
    sync();

    // One block takes turns at the two passes; of a cluster, block 1 goes again through the segment before the one that
    // block 0 makes its way back through.
    for (int turn = 0; turn < segments + SPLIT - 1; turn++) {
        const int segment = segments - 1 - turn, behind = segment + SPLIT - 1;
        if ((SPLIT == 1 || rank == 1) && segment >= 0)
            again(forth, Segment<F>(a, chain, segment), a.saved + (chain * segments + segment) * (D * (D + 1)));
        if (SPLIT == 1) sync();
        if (rank == 0 && behind < segments) way_back(back, Segment<R>(a, chain, behind), behind == segments - 1);
        if (SPLIT == 1) sync(); else cluster_sync();
    }

    for (int i = threadIdx.x; i < 2 * D; i += F::THREADS) {
        float sum = 0.0f;
        for (int r = 0; r <= F::READERS; r++) sum += forth.ln_sums(r)[i];
        (i < D ? a.d_ln_weight : a.d_ln_bias)[blockIdx.x * D + i % D] = sum;
    }
    for (int i = threadIdx.x; i < M; i += F::THREADS) {
        float sum = 0.0f;
        for (int r = 0; r < GROUPS; r++) sum += forth.eta_sums()[r * M + i];
        if (i == M - 1)
            for (int r = 0; r < F::WARPS; r++) sum += forth.eta_sums()[GROUPS * M + r];
        a.d_token_eta[blockIdx.x * M + i] = sum;
    }
}

}  // namespace ttt
