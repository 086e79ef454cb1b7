// What the tensor-core kernels of TTT-Linear share: tiles in shared memory, and the recurrence over the fast weights.
//
// A block runs one chain (batch, head). The first D / 16 warps are its recurrence: warp i keeps columns e of
// [16 i, 16 i + 16) of w1 as accumulators of w1^T [16 e, D], so that a product's accumulators, rounded in pairs, are at
// once the B operand of z1 [M, 16 e] = xk w1, and the update w1^T -= (eta_last lr g_z1)^T xk adds to them where they
// are. The other warps are readers, which load tokens and compute what no later mini-batch waits for.
//
// w1 and b1 are kept less their mean over e. A LayerNorm does not see it, every g_z1 has mean 0 over e, so that no
// update changes it, and z1 comes out with a mean near 0: its variance is then E[z1^2] - E[z1]^2 without cancellation,
// and all sums over e that the inner gradient takes cross the warps in one exchange.
//
// With fp16, w1 and b1 are kept 256 times larger: eta_last lr g_z1 would be subnormal.
#pragma once
#include "device.cuh"

namespace ttt {

struct View { void* p; int64_t batch, token, head; };  // a tensor B T H D or B T H; strides in numbers

template <typename T> TTT_INLINE T* chain_of(const View& view, int64_t chain, int64_t heads) {
    return static_cast<T*>(view.p) + chain / heads * view.batch + chain % heads * view.head;
}

TTT_INLINE int lane_id() { return threadIdx.x % 32; }
TTT_INLINE int row_in_tile() { return lane_id() / 4; }         // g of an accumulator, and g + 8
TTT_INLINE int column_in_tile() { return lane_id() % 4 * 2; }  // 2t, and 2t + 1

// Rows of D numbers, each followed by 16 bytes, which spread the rows of an 8 x 8 matrix over all banks.
template <typename T_, int D_> struct Tile {
    static constexpr int ROW = D_ + 8;
    T_* p;
    TTT_INLINE T_* at(int row, int column) const { return p + row * ROW + column; }
    // What this lane points ldmatrix at for four matrices: rows 0 and 8, columns 0; then both rows, columns 8.
    TTT_INLINE const T_* lane(int row, int column) const {
        return at(row + (lane_id() & 15), column + (lane_id() >> 4) * 8);
    }
    TTT_INLINE void set(int row, int column, uint32_t pair) const {
        *reinterpret_cast<uint32_t*>(at(row, column)) = pair;
    }
};

template <int D, int ROWS> constexpr int tile_bytes = 2 * ROWS * (D + 8);

template <typename T> constexpr float weight_scale = 1.0f;
template <> constexpr float weight_scale<fp16> = 256.0f;

// Sizes, warps and shared memory of a chain.
template <typename T_, int D_, int M_, bool CAUSAL_, int GROUPS_, int SLOTS_, int STAGES_> struct Plan {
    using T = T_;
    static constexpr int D = D_, M = M_, GROUPS = GROUPS_, SLOTS = SLOTS_, STAGES = STAGES_;
    static constexpr bool CAUSAL = CAUSAL_;
    static constexpr int TILES = M / 16;
    static constexpr int WARPS = D / 16;                 // of the recurrence
    static constexpr int TEAM = TILES < 4 ? TILES : 4;   // readers that share a mini-batch; team i reads n = i mod GROUPS
    static constexpr int TURN = 16 * (TILES / TEAM);     // tokens of a reader
    static constexpr int THREADS = 32 * (WARPS + TEAM * GROUPS);
    static constexpr int HAND_OVER = 32 * (WARPS + TEAM);  // threads at a barrier of a slot
    static constexpr float SCALE = weight_scale<T>;
    static constexpr int TOKENS = tile_bytes<D, M>;
    static constexpr int STAGE = 3 * TOKENS + 4 * M;     // xq, xk, xv, lr
    static constexpr int SLOT = tile_bytes<D, D> + 4 * D + (CAUSAL ? TOKENS : 0);  // w1^T, b1, g_z1
    static constexpr int EXCHANGE = WARPS * M * 32;
    static constexpr int FIXED = 8 * D + 4 * M + 4 * D + 16;  // gamma and beta, token_eta, means of w1 and b1
    static constexpr int BYTES = GROUPS * (STAGES * STAGE + SLOTS * SLOT) + 2 * EXCHANGE + FIXED;
    static_assert(STAGES >= 2 * SLOTS && 2 + 2 * GROUPS * SLOTS <= 16, "slots are handed over by named barriers");

    unsigned char* shared;
    TTT_INLINE unsigned char* stage(int i) const { return shared + i * STAGE; }
    TTT_INLINE Tile<T, D> xq(int i) const { return {reinterpret_cast<T*>(stage(i))}; }
    TTT_INLINE Tile<T, D> xk(int i) const { return {reinterpret_cast<T*>(stage(i) + TOKENS)}; }
    TTT_INLINE Tile<T, D> xv(int i) const { return {reinterpret_cast<T*>(stage(i) + 2 * TOKENS)}; }
    TTT_INLINE float* lr(int i) const { return reinterpret_cast<float*>(stage(i) + 3 * TOKENS); }
    TTT_INLINE unsigned char* slot(int i) const { return shared + GROUPS * STAGES * STAGE + i * SLOT; }
    TTT_INLINE Tile<T, D> w(int i) const { return {reinterpret_cast<T*>(slot(i))}; }
    TTT_INLINE float* b(int i) const { return reinterpret_cast<float*>(slot(i) + tile_bytes<D, D>); }
    TTT_INLINE Tile<T, D> g(int i) const { return {reinterpret_cast<T*>(slot(i) + tile_bytes<D, D> + 4 * D)}; }
    TTT_INLINE unsigned char* after_slots() const { return slot(GROUPS * SLOTS); }
    TTT_INLINE float4* exchange(int i) const { return reinterpret_cast<float4*>(after_slots() + i * EXCHANGE); }
    TTT_INLINE float4* ln() const { return exchange(2); }  // gamma, gamma, beta, beta of two columns
    TTT_INLINE float* token_eta() const { return reinterpret_cast<float*>(ln() + D / 2); }
    TTT_INLINE float* mean() const { return token_eta() + M; }  // of w1 over e, D of them, and of b1

    static constexpr int BETWEEN = 1;  // named barriers: among the recurrence's warps;
    TTT_INLINE static int ready(int slot) { return 2 + slot; }                 // tokens have come, the slot is free;
    TTT_INLINE static int full(int slot) { return 2 + GROUPS * SLOTS + slot; }  // the slot is filled
};

// A counter through the slots and stages of all teams, mini-batch by mini-batch.
template <typename P> struct Place {
    int group = 0, in_slots = 0, in_stages = 0;
    TTT_INLINE int slot() const { return group * P::SLOTS + in_slots; }
    TTT_INLINE int stage() const { return group * P::STAGES + in_stages; }
    TTT_INLINE void next_turn() {
        in_slots = in_slots + 1 == P::SLOTS ? 0 : in_slots + 1;
        in_stages = in_stages + 1 == P::STAGES ? 0 : in_stages + 1;
    }
    TTT_INLINE void next() {
        if (++group == P::GROUPS) {
            group = 0;
            next_turn();
        }
    }
};

// Fast weights of one warp: w1^T [16 e, D] and b1 [16 e] (each four times), and w1^T rounded.
template <typename P> struct Weights {
    float w[P::D / 8][4], b[4];
    uint32_t rounded[P::D / 8][2];

    TTT_INLINE void round() {
#pragma unroll
        for (int j = 0; j < P::D / 8; j++) {
            rounded[j][0] = pack<typename P::T>(w[j][0] / P::SCALE, w[j][1] / P::SCALE);
            rounded[j][1] = pack<typename P::T>(w[j][2] / P::SCALE, w[j][3] / P::SCALE);
        }
    }

    // From and to w1 [D, D] and b1 [D] of a chain, whose means over e are `mean` [D + 1].
    TTT_INLINE void load(const float* w1, const float* b1, const float* mean, int first) {
        const int g = row_in_tile(), t = column_in_tile();
#pragma unroll
        for (int j = 0; j < P::D / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int d = 8 * j + t + i % 2, e = first + g + i / 2 * 8;
                w[j][i] = (w1[d * P::D + e] - mean[d]) * P::SCALE;
            }
#pragma unroll
        for (int i = 0; i < 4; i++) b[i] = (b1[first + g + i / 2 * 8] - mean[P::D]) * P::SCALE;
    }
    TTT_INLINE void store(float* w1, float* b1, const float* mean, int first) const {
        const int g = row_in_tile(), t = column_in_tile();
#pragma unroll
        for (int j = 0; j < P::D / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int d = 8 * j + t + i % 2, e = first + g + i / 2 * 8;
                w1[d * P::D + e] = w[j][i] / P::SCALE + mean[d];
            }
        if (t == 0) {
            b1[first + g] = b[0] / P::SCALE + mean[P::D];
            b1[first + g + 8] = b[2] / P::SCALE + mean[P::D];
        }
    }

    // From and to memory in the order of the accumulators, D (D + 1) numbers a chain.
    TTT_INLINE void save(float* place, int warp) const {
        float4* mine = reinterpret_cast<float4*>(place) + warp * (P::D / 8) * 32 + lane_id();
#pragma unroll
        for (int j = 0; j < P::D / 8; j++) mine[j * 32] = make_float4(w[j][0], w[j][1], w[j][2], w[j][3]);
        if (lane_id() % 4 == 0) {
            float* bias = place + P::D * P::D + 16 * warp + row_in_tile();
            bias[0] = b[0];
            bias[8] = b[2];
        }
    }
    TTT_INLINE void restore(const float* place, int warp) {
        const float4* mine = reinterpret_cast<const float4*>(place) + warp * (P::D / 8) * 32 + lane_id();
#pragma unroll
        for (int j = 0; j < P::D / 8; j++) {
            const float4 x = mine[j * 32];
            w[j][0] = x.x, w[j][1] = x.y, w[j][2] = x.z, w[j][3] = x.w;
        }
        const float* bias = place + P::D * P::D + 16 * warp + row_in_tile();
        b[0] = b[1] = bias[0];
        b[2] = b[3] = bias[8];
    }

    // To the readers of a slot, as rows e of w1^T.
    TTT_INLINE void show(const Tile<typename P::T, P::D>& tile, float* bias, int first) const {
        const int row = first + row_in_tile(), t = column_in_tile();
#pragma unroll
        for (int j = 0; j < P::D / 8; j++) {
            tile.set(row, 8 * j + t, rounded[j][0]);
            tile.set(row + 8, 8 * j + t, rounded[j][1]);
        }
        if (t == 0) {
            bias[row] = b[0] / P::SCALE;
            bias[row + 8] = b[2] / P::SCALE;
        }
    }

    // -= (eta_last lr g_z1)^T xk, of 16 tokens whose rounded -SCALE eta_last lr g_z1 are `g` [column half][row half].
    TTT_INLINE void add(const uint32_t (&g)[2][2], const Tile<typename P::T, P::D>& xk, int token) {
        using T = typename P::T;
        const uint32_t a[4] = {movmatrix(g[0][0]), movmatrix(g[1][0]), movmatrix(g[0][1]), movmatrix(g[1][1])};
#pragma unroll
        for (int j = 0; j < P::D / 8; j += 2) {
            uint32_t x[4];
            ldmatrix_x4_trans(x, xk.lane(token, 8 * j));
            mma<T>(w[j], a, x[0], x[1]);
            mma<T>(w[j + 1], a, x[2], x[3]);
        }
        const uint32_t ones = pack<T>(1.0f, 1.0f);
        mma<T>(b, a, ones, ones);
    }
};

// What a token's LayerNorm and inner gradient take beside z1: x_hat = z1 rstd - shift,
// g_z1 = rstd (p - mean_p - x_hat along) with p = gamma (gamma x_hat + beta - target), along = mean(p x_hat).
struct Token { float rstd, shift, mean_p, along; };

// The chain of mini-batches, by one of its warps: (w1, b1) -> z1 -> g_z1 -> (w1', b1'). `keep` may write down what passes.
template <typename P, typename Keep>
TTT_INLINE void recurrence(const P& at, Weights<P>& weights, int warp, int mini_batches, float eps, Keep& keep) {
    using T = typename P::T;
    constexpr int D = P::D, TILES = P::TILES;
    const int lane = lane_id(), g = row_in_tile(), t = column_in_tile(), first = 16 * warp;
    const float eta_last = at.token_eta()[P::M - 1];
    float gamma[2][2], gamma_beta[2][2], gamma_squared[2][2], mean_gamma_squared = 0.0f;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const float4 ln = at.ln()[(first + 8 * h + t) / 2];
        gamma[h][0] = ln.x, gamma[h][1] = ln.y;
        gamma_beta[h][0] = ln.x * ln.z, gamma_beta[h][1] = ln.y * ln.w;
        gamma_squared[h][0] = ln.x * ln.x, gamma_squared[h][1] = ln.y * ln.y;
    }
    for (int j = 0; j < D / 2; j++) {
        const float4 ln = at.ln()[j];
        mean_gamma_squared += ln.x * ln.x + ln.y * ln.y;
    }
    mean_gamma_squared /= D;

    Place<P> place;
    for (int n = 0; n < mini_batches; n++, place.next()) {
        const int slot = place.slot();
        const Tile<T, D> xk = at.xk(place.stage()), xv = at.xv(place.stage());
        const float* lr = at.lr(place.stage());
        float4* exchange = at.exchange(n & 1);
        weights.round();
        keep.start(n, weights, warp);
        float b[2][2];
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int j = 0; j < 2; j++) b[h][j] = shuffle(weights.b[2 * h], 4 * (t + j)) / P::SCALE;
        named_sync(P::ready(slot), P::HAND_OVER);

        // z1 [16 tokens, 16 e] of each tile, and c = gamma (beta - target), which p adds to gamma^2 x_hat.
        float z[TILES][2][4], c[TILES][2][4];
#pragma unroll
        for (int m = 0; m < TILES; m++) {
            float odd[2][4] = {};  // two sums that do not wait for each other
#pragma unroll
            for (int h = 0; h < 2; h++)
#pragma unroll
                for (int i = 0; i < 4; i++) z[m][h][i] = b[h][i % 2];
#pragma unroll
            for (int k = 0; k < D / 16; k++) {
                uint32_t x[4];
                ldmatrix_x4(x, xk.lane(16 * m, 16 * k));
#pragma unroll
                for (int h = 0; h < 2; h++)
                    mma<T>(TILES == 1 && k % 2 ? odd[h] : z[m][h], x, weights.rounded[2 * k][h], weights.rounded[2 * k + 1][h]);
            }
            uint32_t k4[4], v4[4];
            ldmatrix_x4(k4, xk.lane(16 * m, first));
            ldmatrix_x4(v4, xv.lane(16 * m, first));
#pragma unroll
            for (int h = 0; h < 2; h++)
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const float2 k = unpack<T>(k4[2 * h + r]), v = unpack<T>(v4[2 * h + r]);
                    c[m][h][2 * r] = gamma_beta[h][0] - gamma[h][0] * (v.x - k.x);
                    c[m][h][2 * r + 1] = gamma_beta[h][1] - gamma[h][1] * (v.y - k.y);
                }
            if (TILES == 1)
#pragma unroll
                for (int h = 0; h < 2; h++)
#pragma unroll
                    for (int i = 0; i < 4; i++) z[m][h][i] += odd[h][i];
        }
        if (P::CAUSAL) weights.show(at.w(slot), at.b(slot), first);

        // Sums over this warp's e of z1, z1^2, gamma^2 z1, gamma^2 z1^2, c z1 and c: halved between lanes at each step.
#pragma unroll
        for (int m = 0; m < TILES; m++) {
            float sums[2][6] = {};
#pragma unroll
            for (int r = 0; r < 2; r++)
#pragma unroll
                for (int h = 0; h < 2; h++)
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        const float x = z[m][h][2 * r + j], y = gamma_squared[h][j] * x, w = c[m][h][2 * r + j];
                        sums[r][0] += x;
                        sums[r][1] += x * x;
                        sums[r][2] += y;
                        sums[r][3] += y * x;
                        sums[r][4] += w * x;
                        sums[r][5] += w;
                    }
            const bool low = lane & 2, second = lane & 1;  // this lane's row of the tile, and half of the sums
            float row[6], half[3];
#pragma unroll
            for (int i = 0; i < 6; i++)
                row[i] = (low ? sums[1][i] : sums[0][i]) + shuffle_xor(low ? sums[0][i] : sums[1][i], 2);
#pragma unroll
            for (int i = 0; i < 3; i++)
                half[i] = (second ? row[i + 3] : row[i]) + shuffle_xor(second ? row[i] : row[i + 3], 1);
            const int token = 16 * m + g + (low ? 8 : 0);
            exchange[(warp * P::M + token) * 2 + second] = make_float4(half[0], half[1], half[2], 0.0f);
        }
        named_sync(P::BETWEEN, 32 * P::WARPS);

#pragma unroll
        for (int m = 0; m < TILES; m++) {
            // Lanes 2i and 2i + 1 work out token i of the tile.
            float own[3] = {}, other[3];
#pragma unroll
            for (int i = 0; i < P::WARPS; i++) {
                const float4 part = exchange[(i * P::M + 16 * m) * 2 + lane];
                own[0] += part.x, own[1] += part.y, own[2] += part.z;
            }
#pragma unroll
            for (int i = 0; i < 3; i++) other[i] = shuffle_xor(own[i], 1);
            const bool second = lane & 1;
            const float mean = (second ? other[0] : own[0]) / D, square = (second ? other[1] : own[1]) / D;
            const float mean_y = (second ? other[2] : own[2]) / D, mean_yz = (second ? own[0] : other[0]) / D;
            const float mean_cz = (second ? own[1] : other[1]) / D, mean_c = (second ? own[2] : other[2]) / D;
            Token mine;
            mine.rstd = rsqrt(max(square - mean * mean, 0.0f) + eps);
            mine.shift = mean * mine.rstd;
            mine.mean_p = mine.rstd * (mean_y - mean * mean_gamma_squared) + mean_c;
            const float along_x = mean_yz - 2.0f * mean * mean_y + mean * mean * mean_gamma_squared;
            mine.along = mine.rstd * (mine.rstd * along_x + mean_cz - mean * mean_c);

            uint32_t step[2][2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int from = 2 * (g + 8 * r), token = 16 * m + g + 8 * r;
                const Token of = {shuffle(mine.rstd, from), shuffle(mine.shift, from), shuffle(mine.mean_p, from),
                                  shuffle(mine.along, from)};
                const float factor = -P::SCALE * eta_last * lr[token];
                float x_hat[2][2], gradient[2][2];
#pragma unroll
                for (int h = 0; h < 2; h++) {
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        x_hat[h][j] = z[m][h][2 * r + j] * of.rstd - of.shift;
                        const float rest = c[m][h][2 * r + j] - of.mean_p;
                        gradient[h][j] = of.rstd * (rest + x_hat[h][j] * (gamma_squared[h][j] - of.along));
                    }
                    step[h][r] = pack<T>(factor * gradient[h][0], factor * gradient[h][1]);
                    if (P::CAUSAL)
                        at.g(slot).set(token, first + 8 * h + t, pack<T>(gradient[h][0], gradient[h][1]));
                }
                keep.tokens(n, warp, m, r, of, x_hat);
            }
            if (P::CAUSAL && m == TILES - 1) named_arrive(P::full(slot), P::HAND_OVER);
            weights.add(step, xk, 16 * m);
        }
        if (!P::CAUSAL) {
            weights.round();
            weights.show(at.w(slot), at.b(slot), first);
            named_arrive(P::full(slot), P::HAND_OVER);
        }
    }
}

// Puts what all mini-batches share into shared memory: gamma, beta and token_eta.
template <typename P>
TTT_INLINE void load_shared(const P& at, const float* ln_weight, const float* ln_bias, const float* token_eta) {
    for (int i = threadIdx.x; i < P::D / 2; i += P::THREADS)
        at.ln()[i] = make_float4(ln_weight[2 * i], ln_weight[2 * i + 1], ln_bias[2 * i], ln_bias[2 * i + 1]);
    for (int i = threadIdx.x; i < P::M; i += P::THREADS) at.token_eta()[i] = token_eta[i];
}

// The inputs of a chain as its readers load them.
template <typename P> struct Source {
    using T = typename P::T;
    const T *xq, *xk, *xv, *lr;
    int64_t xq_token, xk_token, xv_token, lr_token;

    TTT_INLINE static void rows(const Tile<T, P::D>& tile, int row, const T* from, int64_t stride) {
#pragma unroll
        for (int i = 0; i < P::D / 16; i++) {
            const int chunk = lane_id() + 32 * i, r = chunk / (P::D / 8), column = chunk % (P::D / 8) * 8;
            copy_async_16(tile.at(row + r, column), from + r * stride + column);
        }
    }
    // 16 tokens from `row` of a mini-batch into a stage.
    TTT_INLINE void load(const P& at, int stage, int n, int row) const {
        const int64_t token = int64_t(n) * P::M + row;
        rows(at.xk(stage), row, xk + token * xk_token, xk_token);
        rows(at.xv(stage), row, xv + token * xv_token, xv_token);
        rows(at.xq(stage), row, xq + token * xq_token, xq_token);
    }
    TTT_INLINE float load_lr(int n, int row) const { return to_float(lr[(int64_t(n) * P::M + row) * lr_token]); }
};

// A reader's work apart from what it computes: loading tokens ahead, and taking over and giving back slots.
// `work.early(n, stage)` may start on tokens of its own before the slot is full; `work.read(n, slot, stage)` follows.
template <typename P, typename Work>
TTT_INLINE void reader(const P& at, const Source<P>& source, int index, int mini_batches, Work& work) {
    const int group = index / P::TEAM, member = index % P::TEAM;
    const int turns = (mini_batches - group + P::GROUPS - 1) / P::GROUPS;
    auto tile = [&](int i) { return 16 * (member + P::TEAM * i); };  // first token of this reader's tile i
    auto load = [&](int turn) {
        if (turn < turns)
            for (int i = 0; i < P::TURN / 16; i++)
                source.load(at, group * P::STAGES + turn % P::STAGES, turn * P::GROUPS + group, tile(i));
        copy_async_commit();
    };
    const int lr_row = tile(lane_id() / 16) + lane_id() % 16;
    const bool has_lr = lane_id() < P::TURN;
    auto hand_over = [&](int turn, float lr) {  // the tokens have come
        if (has_lr) at.lr(group * P::STAGES + turn % P::STAGES)[lr_row] = lr;
        named_arrive(P::ready(group * P::SLOTS + turn % P::SLOTS), P::HAND_OVER);
    };
    for (int turn = 0; turn < P::STAGES - P::SLOTS; turn++) load(turn);
    copy_async_wait<P::STAGES - 2 * P::SLOTS>();
    for (int turn = 0; turn < min(P::SLOTS, turns); turn++)
        hand_over(turn, has_lr ? source.load_lr(turn * P::GROUPS + group, lr_row) : 0.0f);

    for (int turn = 0; turn < turns; turn++) {
        const int n = turn * P::GROUPS + group, ahead = turn + P::SLOTS;
        const int slot = group * P::SLOTS + turn % P::SLOTS, stage = group * P::STAGES + turn % P::STAGES;
        const float lr = has_lr && ahead < turns ? source.load_lr(ahead * P::GROUPS + group, lr_row) : 0.0f;
        if (P::TEAM == 1) {
            sync_warp();  // every lane's copies have come
            work.early(n, stage);
        }
        named_sync(P::full(slot), P::HAND_OVER);
        load(turn - P::SLOTS + P::STAGES);  // all of the team have left turn - SLOTS
        #ifndef NO_READ
        for (int i = 0; i < P::TURN / 16; i++) work.read(n, slot, stage, tile(i));
#endif
        copy_async_wait<P::STAGES - 2 * P::SLOTS>();
        if (ahead < turns) hand_over(ahead, lr);
    }
}

}  // namespace ttt
