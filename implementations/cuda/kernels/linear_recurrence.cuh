// The recurrence of TTT-Linear over the fast weights.
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
#include "linear_sums.cuh"
#include "linear_weights.cuh"

namespace ttt {

// gamma and beta of the four columns that a lane has in its warp's accumulators [16 tokens, 16 e].
template <typename P> struct Columns {
    float gamma[2][2], beta[2][2], mean_gamma_squared = 0.0f;
    TTT_INLINE Columns(const P& at, int first) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float4 ln = at.ln()[(first + 8 * h + column_in_tile()) / 2];
            gamma[h][0] = ln.x, gamma[h][1] = ln.y, beta[h][0] = ln.z, beta[h][1] = ln.w;
        }
        for (int j = 0; j < P::D / 2; j++) {
            const float4 ln = at.ln()[j];
            mean_gamma_squared += ln.x * ln.x + ln.y * ln.y;
        }
        mean_gamma_squared /= P::D;
    }
    // beta - target of a tile's accumulators, where target = xv - xk.
    TTT_INLINE void less_target(const P& at, int stage, int tile, int first, float (&x)[2][4]) const {
        uint32_t k4[4], v4[4];
        ldmatrix_x4(k4, at.xk(stage).by_columns(16 * tile, first));
        ldmatrix_x4(v4, at.xv(stage).by_columns(16 * tile, first));
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float2 k = unpack<typename P::T>(k4[2 * h + r]), v = unpack<typename P::T>(v4[2 * h + r]);
                x[h][2 * r] = beta[h][0] - (v.x - k.x);
                x[h][2 * r + 1] = beta[h][1] - (v.y - k.y);
            }
    }
};

// The inner gradient in the accumulators of one warp, from z1 and rest = beta - target of a tile. With
// p = gamma (gamma x_hat + rest) and x_hat = z1 rstd - shift, g_z1 = rstd (p - mean(p) - x_hat along), where along is
// mean(p x_hat): all its means follow from six sums over z1 and rest, which cross the warps together.
template <typename P> struct Gradient {
    using T = typename P::T;
    static constexpr int D = P::D;
    const P& at;
    const int warp, first;
    const float eps, to_step;
    const Columns<P> columns;
    float gamma_squared[2][2];
    float bias[2][2] = {};  // what the mini-batch adds to b1, still to be summed over lanes

    TTT_INLINE Gradient(const P& at, int warp)
        : at(at), warp(warp), first(16 * warp), eps(*at.eps()), to_step(-P::SCALE * at.token_eta()[P::M - 1]),
          columns(at, first) {
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int j = 0; j < 2; j++) gamma_squared[h][j] = columns.gamma[h][j] * columns.gamma[h][j];
    }

    // Sums over this warp's columns of z1, z1^2, gamma u, u^2, rest u and gamma rest, with u = gamma z1.
    TTT_INLINE void put(float4* exchange, int tile, const float (&z)[2][4], const float (&rest)[2][4]) const {
        float sums[2][6];
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float gamma = columns.gamma[h][i % 2], x = z[h][i], u = gamma * x;
                float(&of)[6] = sums[i / 2];
                const bool start = h == 0 && i % 2 == 0;
                of[0] = start ? x : of[0] + x;
                of[1] = start ? x * x : of[1] + x * x;
                of[2] = start ? gamma * u : of[2] + gamma * u;
                of[3] = start ? u * u : of[3] + u * u;
                of[4] = start ? rest[h][i] * u : of[4] + rest[h][i] * u;
                of[5] = start ? rest[h][i] * gamma : of[5] + rest[h][i] * gamma;
            }
        put_sums<P>(exchange, warp, tile, sums);
    }

    // rstd, shift, mean(p) and along of token lane / 2 of the tile.
    template <typename Keep> TTT_INLINE float4 work_out(const float4* exchange, int n, int tile, const Keep& keep) const {
        float sums[6];
        get_sums<P>(exchange, tile, sums);
        const float mean = sums[0] / D, mean_u = sums[2] / D, mean_rest = sums[5] / D;
        const float rstd = rsqrt(max(sums[1] / D - mean * mean, 0.0f) + eps);
        const float along_x = rstd * (mean_u - mean * columns.mean_gamma_squared);  // mean(gamma^2 x_hat)
        const float along_x2 = rstd * rstd *                                        // mean(gamma^2 x_hat^2)
            (sums[3] / D - 2.0f * mean * mean_u + mean * mean * columns.mean_gamma_squared);
        const float4 of = make_float4(rstd, mean * rstd, along_x + mean_rest,
                                      along_x2 + rstd * (sums[4] / D - mean * mean_rest));
        keep.token(n, warp, tile, of, along_x, along_x2);
        return of;
    }

    // Rounded -SCALE eta_last lr g_z1, for the update, and g_z1, for readers: [column half][row half].
    template <typename Keep>
    TTT_INLINE void finish(const float4 (&of)[2], const float* lr, int n, int tile, const float (&z)[2][4],
                           const float (&rest)[2][4], uint32_t (&step)[2][2], uint32_t (&seen)[2][2], const Keep& keep) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float factor = to_step * lr[16 * tile + row_in_tile() + 8 * r], rstd = of[r].x;
            float x_hat[2][2], g[2][2];
#pragma unroll
            for (int h = 0; h < 2; h++) {
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    x_hat[h][j] = z[h][2 * r + j] * rstd - of[r].y;
                    const float p = columns.gamma[h][j] * rest[h][2 * r + j] - of[r].z;  // less gamma^2 x_hat
                    g[h][j] = rstd * (p + x_hat[h][j] * (gamma_squared[h][j] - of[r].w));
                    bias[h][j] = tile == 0 && r == 0 ? factor * g[h][j] : bias[h][j] + factor * g[h][j];
                }
                step[h][r] = pack<T>(factor * g[h][0], factor * g[h][1]);
                seen[h][r] = pack<T>(g[h][0], g[h][1]);
            }
            keep.x_hat(n, warp, tile, r, x_hat);
        }
    }

    TTT_INLINE void show(const Tile<T, D>& to, int tile, const uint32_t (&seen)[2][2]) const {
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int r = 0; r < 2; r++)
                to.set(16 * tile + row_in_tile() + 8 * r, first + 8 * h + column_in_tile(), seen[h][r]);
    }
};

// The chain of mini-batches, by one of its warps: (w1, b1) -> z1 -> g_z1 -> (w1', b1'). `keep` may write down what passes.
template <typename P, typename Keep>
TTT_INLINE void recurrence(const P& at, Weights<P>& weights, int warp, int mini_batches, Keep& keep) {
    using T = typename P::T;
    constexpr int TILES = P::TILES;
    Gradient<P> gradient(at, warp);
    Place<P> place;
    for (int n = 0; n < mini_batches; n++, place.next()) {
        const int slot = place.slot(), stage = place.stage();
        const Tile<T, P::D> xk = at.xk(stage);
        float4* exchange = at.exchange(n & 1);
        P::wait_for_tokens(n, slot);
        Operand<P> x;  // all that does not wait for the weights comes before them
        x.load(xk, 0);
        float z[TILES][2][4], rest[TILES][2][4];
#pragma unroll
        for (int m = 0; m < TILES; m++) gradient.columns.less_target(at, stage, m, gradient.first, rest[m]);
        weights.round();
        through(weights, xk, x, z);
        if (P::CAUSAL) weights.add_bias(gradient.bias);
        keep.start(n, weights, warp);
#pragma unroll
        for (int m = 0; m < TILES; m++) {
            add_bias(z[m], weights);
            gradient.put(exchange, m, z[m], rest[m]);
        }
        named_sync(P::BETWEEN, 32 * P::WARPS);
        P::wait_for_slot(n, slot);
        if (P::CAUSAL) weights.show(at.w(slot), at.b(slot), gradient.first);

        auto work_out = [&](int m) { return gradient.work_out(exchange, n, m, keep); };
        const OfTokens<P, decltype(work_out)> of_tokens(at, warp, work_out);
#pragma unroll
        for (int m = 0; m < TILES; m++) {
            float4 of[2];
            of_tokens.get(m, of);
            uint32_t step[2][2], seen[2][2];
            gradient.finish(of, at.lr(stage), n, m, z[m], rest[m], step, seen, keep);
            weights.add(step, xk, 16 * m);
            if (P::CAUSAL) gradient.show(at.g(slot), m, seen);
        }
        if (!P::CAUSAL) {
            weights.add_bias(gradient.bias);
            weights.round();
            weights.show(at.w(slot), at.b(slot), gradient.first);
        }
        P::hand_over(slot);
    }
    if (P::CAUSAL) weights.add_bias(gradient.bias);
}

// The same for causal mini-batches of 16 tokens, with less on the way from one to the next: as
//   z1_{n+1} = xk_{n+1} w1_{n+1} + b1_{n+1} = xk_{n+1} w1_n - (xk_{n+1} xk_n^T) (eta_last lr g_z1_n) + b1_{n+1},
// one product follows g_z1_n; the update of w1, its rounding and xk_{n+1} w1_n come a mini-batch later, and fill the time
// that sums take to cross the warps. lm-1.3b-long: 1.79 -> 1.63 ms.
template <typename P, typename Keep>
TTT_INLINE void recurrence_ahead(const P& at, Weights<P>& weights, int warp, int mini_batches, Keep& keep) {
    using T = typename P::T;
    constexpr int D = P::D;
    static_assert(P::CAUSAL && P::TILES == 1, "a slot is filled before the weights are updated, and by one tile");
    static_assert(P::APART || P::GROUPS * P::SLOTS > 1, "the next tokens come before a slot is full");
    Gradient<P> gradient(at, warp);
    Place<P> place;
    uint32_t step_before[4] = {};  // -(eta_last lr g_z1)^T of the mini-batch before, an A operand
    Tile<T, D> before = at.xk(0);
    float z[1][2][4], rest[2][4];
    Operand<P> x;
    P::wait_for_tokens(0, 0);
    x.load(before, 0);
    gradient.columns.less_target(at, 0, 0, gradient.first, rest);
    weights.round();
    through(weights, before, x, z);
    add_bias(z[0], weights);

    for (int n = 0; n < mini_batches; n++) {
        const int slot = place.slot(), stage = place.stage();
        const Tile<T, D> xk = at.xk(stage);
        float4* exchange = at.exchange(n & 1);
        gradient.put(exchange, 0, z[0], rest);
        weights.add(step_before, before, 0);
        named_sync(P::BETWEEN, 32 * P::WARPS);

        // What does not wait for this mini-batch's gradient; at the last one, for nothing.
        place.next();
        const bool more = n + 1 < mini_batches;
        if (more) P::wait_for_tokens(n + 1, place.slot());
        const int next = more ? place.stage() : stage;
        x.load(at.xk(next), 0);
        weights.round();
        float base[1][2][4], attn[2][4], next_rest[2][4];
        through(weights, before, x, base);
        product_16(attn, x.x, xk, 0);
        uint32_t keys[4];  // xk_{n+1} xk_n^T
#pragma unroll
        for (int i = 0; i < 4; i++) keys[i] = pack<T>(attn[i / 2][i % 2 * 2], attn[i / 2][i % 2 * 2 + 1]);
        gradient.columns.less_target(at, next, 0, gradient.first, next_rest);
        P::wait_for_slot(n, slot);
        weights.show(at.w(slot), at.b(slot), gradient.first);

        auto work_out = [&](int m) { return gradient.work_out(exchange, n, m, keep); };
        const OfTokens<P, decltype(work_out)> of_tokens(at, warp, work_out);
        float4 of[2];
        of_tokens.get(0, of);
        uint32_t step[2][2], seen[2][2];
        gradient.finish(of, at.lr(stage), n, 0, z[0], rest, step, seen, keep);
#pragma unroll
        for (int i = 0; i < 4; i++) step_before[i] = movmatrix(step[i % 2][i / 2]);
        float rise[2][4] = {};
#pragma unroll
        for (int h = 0; h < 2; h++) mma<T>(rise[h], keys, step_before[h], step_before[2 + h]);
        sum_over_rows(gradient.bias);
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                z[0][h][i] = base[0][h][i] + (rise[h][i] + (weights.b[h][i % 2] + gradient.bias[h][i % 2])) / P::SCALE;
                rest[h][i] = next_rest[h][i];
            }
        gradient.show(at.g(slot), 0, seen);
        P::hand_over(slot);
        keep.start(n, weights, warp);
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int j = 0; j < 2; j++) weights.b[h][j] += gradient.bias[h][j];
        before = xk;
    }
    weights.add(step_before, before, 0);
}

// More than 8 warps have 168 registers a thread, in which the second one spills.
template <typename P, typename Keep>
TTT_INLINE void run_recurrence(const P& at, Weights<P>& weights, int warp, int mini_batches, Keep& keep) {
    if constexpr (P::CAUSAL && P::TILES == 1 && P::THREADS <= 256)
        recurrence_ahead(at, weights, warp, mini_batches, keep);
    else
        recurrence(at, weights, warp, mini_batches, keep);
}

}  // namespace ttt
