// TTT-MLP with shared memory and FMA: read plain_linear.cu and implementations/torch/ttt_mlp.py first.
//
// One block a chain, in steps with a barrier between them; fp32 arithmetic, and products take numbers rounded where that
// page rounds them: a token whose z2_bar hardly varies over D magnifies each rounding, and its error is then the same.
//     g_z1   = (g_z2 w2^T) * gelu'(z1) = u * gelu'(z1)
//     z1_bar = xq w1 + b1 - (eta * (tril(xq xk^T) + tril(1))) g_z1,        w1' = w1 - eta_last (lr * xk)^T g_z1
//     z2_bar = x2_bar w2 + b2 - (eta * (tril(x2_bar x2^T) + tril(1))) g_z2,  w2' = w2 - eta_last (lr * x2)^T g_z2
// Without causality there is no tril, and eta_last is every token_eta[i]. What does not fit into shared memory of the
// 8 D (D + 1) fast weights, their cotangents and the tiles [M F] lies in the chain's scratch, in the L2 cache.
#include "plain.cuh"

namespace ttt {
namespace plain {

struct State {
    float *w1, *b1, *w2, *b2;
};

template <typename T> struct Inputs {
    View<const T> xq, xk, xv, lr;
    const float *token_eta, *ln_weight, *ln_bias;
    int64_t heads, mini_batches, group, groups;
    double eps;
    float* scratch;
    int64_t scratch_size;  // floats a chain
};

template <typename T> struct ForwardArguments {
    Inputs<T> in;
    State first, kept, last;  // kept [B H groups ...]
    T* out;
};

template <typename T> struct BackwardArguments {
    Inputs<T> in;
    State kept, work;  // work [B H group ...]: the weights at the start of each mini-batch of a group
    View<const T> d_out;
    State d_last, d_first;
    T *d_xq, *d_xk, *d_xv, *d_lr;
    float* sums;  // [B H 2 M + 2 D]: d_token_eta of the read-out and of the update, d_ln_weight, d_ln_bias
};

template <int D> TTT_INLINE State at(State state, int64_t index) {
    constexpr int F = 4 * D;
    return {state.w1 + index * D * F, state.b1 + index * F, state.w2 + index * F * D, state.b2 + index * D};
}

// --- gelu(z) = z sigmoid(v) with v = 2 sqrt(2 / pi) (z + 0.044715 z^3), and its derivatives ---

constexpr float SCALE = 1.5957691216057308f, CUBIC = 0.044715f;

TTT_INLINE float sigmoid(float v) {  // never the exponential of a positive number
    const float e = expf(-fabsf(v));
    return (v >= 0 ? 1 : e) / (1 + e);
}
TTT_INLINE float gelu(float z) { return z * sigmoid(SCALE * (z + CUBIC * z * z * z)); }
TTT_INLINE float gelu_first(float z) {
    const float v = SCALE * (z + CUBIC * z * z * z), slope = SCALE * (1 + 3 * CUBIC * z * z);
    return sigmoid(v) * (1 + z * sigmoid(-v) * slope);
}
TTT_INLINE float gelu_second(float z) {
    const float v = SCALE * (z + CUBIC * z * z * z), slope = SCALE * (1 + 3 * CUBIC * z * z);
    const float s = sigmoid(v), s_other = sigmoid(-v);
    return s * s_other * (2 * slope + z * (SCALE * 6 * CUBIC * z + (s_other - s) * slope * slope));
}

template <int D, int M> struct Tiles {
    static constexpr int F = 4 * D;
    Tile<D> xk, g2, z2, xq, target;  // g2, g1: g_z2 and g_z1, rounded
    Tile<M> attn;
    Tile<D> w2;  // the weights before the tiles [M F]: they are read by columns too, which only shared memory does well
    Tile<F> w1, x2, g1, x2_bar, z1;
    float *b1, *b2, *lr;
    TTT_INLINE explicit Tiles(Arena& arena)
        : xk(arena.tile<M, D>()), g2(arena.tile<M, D>()), z2(arena.tile<M, D>()), xq(arena.tile<M, D>()),
          target(arena.tile<M, D>()), attn(arena.tile<M, M>()), w2(arena.tile<F, D>()), w1(arena.tile<D, F>()),
          x2(arena.tile<M, F>()), g1(arena.tile<M, F>()), x2_bar(arena.tile<M, F>()), z1(arena.tile<M, F>()),
          b1(arena.take(F)), b2(arena.take(D)), lr(arena.take(M)) {}
};

// One chain's inputs, and one mini-batch of it.
template <typename T, int D, int M, bool CAUSAL> struct Chain {
    static constexpr int F = 4 * D;
    const Inputs<T>& in;
    int64_t batch, head;
    const float *gamma, *beta;
    float eta_last;
    TTT_INLINE explicit Chain(const Inputs<T>& in)
        : in(in), batch(blockIdx.x / in.heads), head(blockIdx.x % in.heads), gamma(in.ln_weight + head * D),
          beta(in.ln_bias + head * D), eta_last(in.token_eta[M - 1]) {}
    TTT_INLINE float eta(int i) const { return CAUSAL ? in.token_eta[i] : eta_last; }  // less lr
    TTT_INLINE bool reads(int i, int j) const { return j <= i || !CAUSAL; }
    // What token i subtracts of the gradient of token j, from x = x_bar_i x_j^T.
    TTT_INLINE float score(const Tiles<D, M>& s, int i, int j, float x) const {
        return reads(i, j) ? rounded<T>(eta(i) * s.lr[j] * (x + 1)) : 0;
    }
    TTT_INLINE int64_t row(int64_t n, int i) const {  // of a contiguous B T H
        return ((batch * in.mini_batches + n) * M + i) * in.heads + head;
    }

    TTT_INLINE void load_all(const Tiles<D, M>& s, int64_t n, State from, State keep) const {
        load<M>(s.xq, in.xq.token(batch, head, n * M), in.xq.t);
        load<M>(s.xk, in.xk.token(batch, head, n * M), in.xk.t);
        load<M>(s.target, in.xv.token(batch, head, n * M), in.xv.t);
        for (int x = threadIdx.x; x < M * D; x += THREADS) s.target(x / D, x % D) -= s.xk(x / D, x % D);
        for (int i = threadIdx.x; i < M; i += THREADS) s.lr[i] = to_float(*in.lr.token(batch, head, n * M + i));
        load_weights<T, D>(s.w1, from.w1, keep.w1);
        load_bias<F>(s.b1, from.b1, keep.b1);
        load_weights<T, F>(s.w2, from.w2, keep.w2);
        load_bias<D>(s.b2, from.b2, keep.b2);
    }

    // z1, x2 = gelu(z1) and z2; x2 is rounded.
    TTT_INLINE void project_xk(const Tiles<D, M>& s) const {
        product<M, F>([&](auto& part) {
            part.template add<D>(s.xk, s.w1);
            part.each([&](int i, int j, float x) {
                s.z1(i, j) = x + s.b1[j];
                s.x2(i, j) = rounded<T>(gelu(x + s.b1[j]));
            });
        });
        sync();
        product<M, D>([&](auto& part) {
            part.template add<F>(s.x2, s.w2);
            part.each([&](int i, int j, float x) { s.z2(i, j) = x + s.b2[j]; });
        });
        sync();
    }

    // The mini-batch n from the weights `from` to the weights `to`; its output only if READ.
    template <bool READ> TTT_INLINE void forward(const Tiles<D, M>& s, int64_t n, State from, State keep, State to, T* out) const {
        load_all(s, n, from, keep);
        sync();
        project_xk(s);

        if (READ)
            product<M, M>([&](auto& part) {
                part.template add<D>(s.xq, transpose(s.xk));
                part.each([&](int i, int j, float x) { s.attn(i, j) = score(s, i, j, x); });
            });
        for_rows<M>([&](int i) {
            inner_gradient<D>(s.z2.row(i), s.target.row(i), gamma, beta, s.g2.row(i), in.eps);
        });
        sync();
        auto lr = [&](int i) { return s.lr[i]; };
        for (int j = threadIdx.x; j < D; j += THREADS) to.b2[j] = s.b2[j] - eta_last * sum_and_round<T, M>(s.g2, j, lr);
        sync();

        product<M, F>([&](auto& part) {
            part.template add<D>(s.g2, transpose(s.w2));
            part.each([&](int i, int j, float x) { s.g1(i, j) = x * gelu_first(s.z1(i, j)); });
        });
        product<F, D>([&](auto& part) {
            part.template add<M>([&](int f, int i) { return rounded<T>(s.lr[i] * s.x2(i, f)); }, s.g2);
            part.each([&](int i, int j, float x) { to.w2[i * D + j] = from.w2[i * D + j] - eta_last * x; });
        });
        sync();
        for (int j = threadIdx.x; j < F; j += THREADS) to.b1[j] = s.b1[j] - eta_last * sum_and_round<T, M>(s.g1, j, lr);
        sync();
        product<D, F>([&](auto& part) {
            part.template add<M>([&](int d, int i) { return rounded<T>(s.lr[i] * s.xk(i, d)); }, s.g1);
            part.each([&](int i, int j, float x) { to.w1[i * F + j] = from.w1[i * F + j] - eta_last * x; });
        });
        if (READ) {
            product<M, F>([&](auto& part) {
                part.template add<M>(s.attn, s.g1);
                part.scale(-1);
                part.template add<D>(s.xq, s.w1);
                part.each([&](int i, int j, float x) { s.x2_bar(i, j) = rounded<T>(gelu(x + s.b1[j])); });
            });
            sync();
            product<M, M>([&](auto& part) {
                part.template add<F>(s.x2_bar, transpose(s.x2));
                part.each([&](int i, int j, float x) { s.attn(i, j) = score(s, i, j, x); });
            });
            sync();
            product<M, D>([&](auto& part) {
                part.template add<M>(s.attn, s.g2);
                part.scale(-1);
                part.template add<F>(s.x2_bar, s.w2);
                part.each([&](int i, int j, float x) { s.z2(i, j) = x + s.b2[j]; });
            });
            sync();
            for_rows<M>([&](int i) {
                normalise<D>(s.z2.row(i), in.eps);
                T* p = out + row(n, i) * D;
                for_lane<D>([&](int d) { p[d] = from_float<T>(s.xq(i, d) + gamma[d] * s.z2(i, d) + beta[d]); });
            });
        }
        sync();
    }
};

template <typename T, int D, int M, bool CAUSAL>
__global__ void __launch_bounds__(THREADS, 1) mlp_forward(const __grid_constant__ ForwardArguments<T> a) {
    TTT_SHARED(shared);
    Arena arena{reinterpret_cast<float*>(shared), a.in.scratch + blockIdx.x * a.in.scratch_size};
    const Tiles<D, M> s(arena);
    const Chain<T, D, M, CAUSAL> chain(a.in);
    const State first = at<D>(a.first, blockIdx.x), last = at<D>(a.last, blockIdx.x);
    for (int64_t n = 0; n < a.in.mini_batches; n++) {
        State keep{};
        if (n % a.in.group == 0) keep = at<D>(a.kept, blockIdx.x * a.in.groups + n / a.in.group);
        chain.template forward<true>(s, n, n ? last : first, keep, last, a.out);
    }
}

template <typename T, int D, int M, bool CAUSAL>
__global__ void __launch_bounds__(THREADS, 1) mlp_backward(const __grid_constant__ BackwardArguments<T> a) {
    constexpr int F = 4 * D;
    TTT_SHARED(shared);
    Arena arena{reinterpret_cast<float*>(shared), a.in.scratch + blockIdx.x * a.in.scratch_size};
    const Tiles<D, M> s(arena);
    const auto d_z2_bar = arena.tile<M, D>(), d_g2 = arena.tile<M, D>(), g_z2 = arena.tile<M, D>();
    const auto attn1 = arena.tile<M, M>(), attn1_eta = arena.tile<M, M>(), d_attn1 = arena.tile<M, M>();
    const auto attn2_eta = arena.tile<M, M>(), d_attn2 = arena.tile<M, M>();
    const auto x_hat_bar = arena.tile<M, D>(), pulled2 = arena.tile<M, D>(), d_out = arena.tile<M, D>();
    const auto d_w2 = arena.tile<F, D>();
    const auto d_w1 = arena.tile<D, F>();
    const auto d_z1_bar = arena.tile<M, F>(), d_z1 = arena.tile<M, F>(), d_u = arena.tile<M, F>();
    const auto u = arena.tile<M, F>(), z1_bar = arena.tile<M, F>();
    float *d_b1 = arena.take(F), *d_b2 = arena.take(D), *rstd = arena.take(M), *d_lr = arena.take(M);

    const Chain<T, D, M, CAUSAL> chain(a.in);
    const float *gamma = chain.gamma, *beta = chain.beta, eta_last = chain.eta_last;
    const State d_first = at<D>(a.d_first, blockIdx.x);
    State d_state = at<D>(a.d_last, blockIdx.x);
    float* sums = a.sums + blockIdx.x * (2 * M + 2 * D);
    float d_gamma = 0, d_beta = 0;  // of the column that this thread has
    for (int i = threadIdx.x; i < 2 * M; i += THREADS) sums[i] = 0;

    for (int64_t group = a.in.groups - 1; group >= 0; group--) {
        const int64_t first = group * a.in.group, count = min(a.in.group, a.in.mini_batches - first);
        const State kept = at<D>(a.kept, blockIdx.x * a.in.groups + group);
        auto state = [&](int64_t i) { return i ? at<D>(a.work, blockIdx.x * a.in.group + i) : kept; };
        for (int64_t i = 0; i + 1 < count; i++)
            chain.template forward<false>(s, first + i, state(i), State{}, state(i + 1), nullptr);

        for (int64_t n = first + count - 1; n >= first; n--) {
            chain.load_all(s, n, state(n - first), State{});
            load<M>(d_out, a.d_out.token(chain.batch, chain.head, n * M), a.d_out.t);
            load_weights<T, D>(d_w1, d_state.w1, nullptr);
            load_bias<F>(d_b1, d_state.b1, nullptr);
            load_weights<T, F>(d_w2, d_state.w2, nullptr);
            load_bias<D>(d_b2, d_state.b2, nullptr);
            sync();

            // The forward again, up to the read-out.
            chain.project_xk(s);
            product<M, M>([&](auto& part) {
                part.template add<D>(s.xq, transpose(s.xk));
                part.each([&](int i, int j, float x) {
                    attn1(i, j) = chain.reads(i, j) ? x + 1 : 0;
                    attn1_eta(i, j) = chain.score(s, i, j, x);
                });
            });
            for_rows<M>([&](int i) {
                rstd[i] = inner_gradient<D>(s.z2.row(i), s.target.row(i), gamma, beta, g_z2.row(i), a.in.eps);
                for_lane<D>([&](int d) { s.g2(i, d) = rounded<T>(g_z2(i, d)); });
            });
            sync();
            product<M, F>([&](auto& part) {
                part.template add<D>(s.g2, transpose(s.w2));
                part.each([&](int i, int j, float x) {
                    u(i, j) = x;
                    s.g1(i, j) = rounded<T>(x * gelu_first(s.z1(i, j)));
                });
            });
            sync();
            product<M, F>([&](auto& part) {
                part.template add<M>(attn1_eta, s.g1);
                part.scale(-1);
                part.template add<D>(s.xq, s.w1);
                part.each([&](int i, int j, float x) {
                    z1_bar(i, j) = x + s.b1[j];
                    s.x2_bar(i, j) = rounded<T>(gelu(x + s.b1[j]));
                });
            });
            sync();
            product<M, M>([&](auto& part) {
                part.template add<F>(s.x2_bar, transpose(s.x2));
                part.each([&](int i, int j, float x) {
                    s.attn(i, j) = chain.reads(i, j) ? x + 1 : 0;
                    attn2_eta(i, j) = chain.score(s, i, j, x);
                });
            });
            sync();
            product<M, D>([&](auto& part) {
                part.template add<M>(attn2_eta, s.g2);
                part.scale(-1);
                part.template add<F>(s.x2_bar, s.w2);
                part.each([&](int i, int j, float x) { x_hat_bar(i, j) = x + s.b2[j]; });
            });
            sync();

            // out = xq + LN(z2_bar)
            for_rows<M>([&](int i) {
                const float rstd_bar = normalise<D>(x_hat_bar.row(i), a.in.eps);
                for_lane<D>([&](int d) { d_z2_bar(i, d) = d_out(i, d) * gamma[d]; });
                project<D>(d_z2_bar.row(i), x_hat_bar.row(i), rstd_bar);
            });
            sync();
            for (int j = threadIdx.x; j < D; j += THREADS) {
                float sum_gamma = 0, sum_beta = 0;
                for (int i = 0; i < M; i++) {
                    sum_gamma += d_out(i, j) * x_hat_bar(i, j);
                    sum_beta += d_out(i, j);
                }
                d_gamma += sum_gamma;
                d_beta += sum_beta;
                d_first.b2[j] = d_b2[j] + sum_and_round<T, M>(d_z2_bar, j);
            }
            sync();

            // The second layer's read-out, and what its update sends to -eta_last lr g_z2.
            product<M, M>([&](auto& part) {
                part.template add<D>(d_z2_bar, transpose(s.g2));
                part.each([&](int i, int j, float x) { d_attn2(i, j) = chain.reads(i, j) ? -x : 0; });
            });
            product<M, D>([&](auto& part) {
                part.template add<F>(s.x2, d_w2);
                part.each([&](int i, int j, float x) { pulled2(i, j) = x + d_b2[j]; });
            });
            sync();
            for_rows<M>([&](int i) {
                const float read = row_sum<M>([&](int j) { return d_attn2(i, j) * s.attn(i, j) * s.lr[j]; });
                const float update = row_sum<D>([&](int d) { return -pulled2(i, d) * g_z2(i, d); });
                const float column = row_sum<M>([&](int j) { return d_attn2(j, i) * s.attn(j, i) * chain.eta(j); });
                if (threadIdx.x % 32 == 0) {
                    sums[i] += read;
                    sums[M + i] += s.lr[i] * update;
                    d_lr[i] = column + eta_last * update;
                }
            });
            sync();
            for_rows<M>([&](int i) {
                for_lane<M>([&](int j) { d_attn2(i, j) = rounded<T>(d_attn2(i, j) * chain.eta(i) * s.lr[j]); });
            });
            product<M, D>([&](auto& part) {
                part.template add<M>(transpose(attn2_eta), d_z2_bar);
                part.each([&](int i, int j, float x) { d_g2(i, j) = -x - eta_last * s.lr[i] * pulled2(i, j); });
            });
            sync();
            product<M, F>([&](auto& part) {
                part.template add<D>(d_z2_bar, transpose(s.w2));
                part.template add<M>(d_attn2, s.x2);
                part.each([&](int i, int j, float x) { d_z1_bar(i, j) = x * gelu_first(z1_bar(i, j)); });
            });
            product<M, F>([&](auto& part) {  // d_x2, of which more comes
                part.template add<D>(s.g2, transpose(d_w2));
                part.scale_rows([&](int i) { return -eta_last * s.lr[i]; });
                part.template add<M>(transpose(d_attn2), s.x2_bar);
                part.each([&](int i, int j, float x) { d_z1(i, j) = x; });
            });
            sync();
            for (int j = threadIdx.x; j < F; j += THREADS) d_first.b1[j] = d_b1[j] + sum_and_round<T, M>(d_z1_bar, j);
            sync();

            // The first layer's, in the same way.
            product<M, M>([&](auto& part) {
                part.template add<F>(d_z1_bar, transpose(s.g1));
                part.each([&](int i, int j, float x) { d_attn1(i, j) = chain.reads(i, j) ? -x : 0; });
            });
            product<M, F>([&](auto& part) {
                part.template add<D>(s.xk, d_w1);
                part.each([&](int i, int j, float x) { d_u(i, j) = x + d_b1[j]; });  // what the update sends
            });
            sync();
            for_rows<M>([&](int i) {
                const float read = row_sum<M>([&](int j) { return d_attn1(i, j) * attn1(i, j) * s.lr[j]; });
                const float update = row_sum<F>([&](int f) { return -d_u(i, f) * u(i, f) * gelu_first(s.z1(i, f)); });
                const float column = row_sum<M>([&](int j) { return d_attn1(j, i) * attn1(j, i) * chain.eta(j); });
                if (threadIdx.x % 32 == 0) {
                    sums[i] += read;
                    sums[M + i] += s.lr[i] * update;
                    a.d_lr[chain.row(n, i)] = from_float<T>(d_lr[i] + column + eta_last * update);
                }
            });
            sync();
            for_rows<M>([&](int i) {
                for_lane<M>([&](int j) { d_attn1(i, j) = rounded<T>(d_attn1(i, j) * chain.eta(i) * s.lr[j]); });
            });
            product<M, F>([&](auto& part) {  // d_g1, and with g1 = u gelu'(z1) what goes to u and, into z1_bar, to z1
                part.template add<M>(transpose(attn1_eta), d_z1_bar);
                part.each([&](int i, int j, float x) {
                    const float d_g1 = -x - eta_last * s.lr[i] * d_u(i, j);
                    d_u(i, j) = rounded<T>(d_g1 * gelu_first(s.z1(i, j)));
                    z1_bar(i, j) = d_g1 * u(i, j) * gelu_second(s.z1(i, j));
                });
            });
            sync();
            product<M, D>([&](auto& part) {
                part.template add<F>(d_z1_bar, transpose(s.w1));
                part.template add<M>(d_attn1, s.xk);
                part.each([&](int i, int j, float x) {
                    a.d_xq[chain.row(n, i) * D + j] = from_float<T>(x + d_out(i, j));
                });
            });
            sync();
            product<M, D>([&](auto& part) {  // u = g2 w2^T
                part.template add<F>(d_u, s.w2);
                part.each([&](int i, int j, float x) { d_g2(i, j) += x; });
            });
            sync();

            // The inner gradient's second order: d_g2 becomes d_z2.
            for_rows<M>([&](int i) {
                inner_gradient_backward<D>(d_g2.row(i), g_z2.row(i), s.z2.row(i), rstd[i], s.target.row(i), gamma, beta,
                                           pulled2.row(i));
            });
            sync();
            for (int j = threadIdx.x; j < D; j += THREADS) {
                float sum_gamma = 0, sum_beta = 0;
                for (int i = 0; i < M; i++) {
                    sum_gamma += pulled2(i, j);
                    sum_beta -= s.target(i, j);
                }
                d_gamma += sum_gamma;
                d_beta += sum_beta;
                d_first.b2[j] += sum_and_round<T, M>(d_g2, j);
            }
            sync();

            // z2 = gelu(z1) w2 + b2
            product<M, F>([&](auto& part) {
                part.template add<D>(d_g2, transpose(s.w2));
                part.each([&](int i, int j, float x) {
                    d_z1(i, j) = (d_z1(i, j) + x) * gelu_first(s.z1(i, j)) + z1_bar(i, j);
                });
            });
            product<F, D>([&](auto& part) {
                part.template add<M>(transpose(s.x2_bar), d_z2_bar);
                part.template add<M>(transpose(s.x2), d_g2);
                part.template add<M>(transpose(d_u), s.g2);
                part.each([&](int i, int j, float x) { d_first.w2[i * D + j] = d_state.w2[i * D + j] + x; });
            });
            sync();
            for (int j = threadIdx.x; j < F; j += THREADS) d_first.b1[j] += sum_and_round<T, M>(d_z1, j);
            sync();

            // z1 = xk w1 + b1
            product<M, D>([&](auto& part) {
                part.template add<F>(s.g1, transpose(d_w1));
                part.scale_rows([&](int i) { return -eta_last * s.lr[i]; });
                part.template add<M>(transpose(d_attn1), s.xq);
                part.template add<F>(d_z1, transpose(s.w1));
                part.each([&](int i, int j, float x) {
                    a.d_xk[chain.row(n, i) * D + j] = from_float<T>(x - s.target(i, j));
                    a.d_xv[chain.row(n, i) * D + j] = from_float<T>(s.target(i, j));
                });
            });
            product<D, F>([&](auto& part) {
                part.template add<M>(transpose(s.xq), d_z1_bar);
                part.template add<M>(transpose(s.xk), d_z1);
                part.each([&](int i, int j, float x) { d_first.w1[i * F + j] = d_state.w1[i * F + j] + x; });
            });
            sync();
            d_state = d_first;
        }
    }
    for (int j = threadIdx.x; j < D; j += THREADS) {
        sums[2 * M + j] = d_gamma;
        sums[2 * M + D + j] = d_beta;
    }
}

}  // namespace plain
}  // namespace ttt
