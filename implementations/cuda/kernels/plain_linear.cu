// TTT-Linear with shared memory and FMA: the rung to read first, beside implementations/torch/ttt_linear.py.
//
// One block a chain, the mini-batches of one head of one sequence, in steps with a barrier between them. All arithmetic
// is fp32; what a product takes is rounded to the problem's dtype. Two things are arranged differently from the page in
// torch, and equal to it: the inner learning rate goes into the gradient once, h = lr * g_z1, so that
//     z1_bar = xq w1 + b1 - eta_i (tril(xq xk^T) + tril(1)) h,   w1' = w1 - eta_last xk^T h
// and without causality the read-out from the updated weights is the same without tril, with eta_last for every eta_i.
// The forward keeps the weights at the start of every `group`-th mini-batch, and the backward computes the others again.
// Bytes from device memory: the inputs and outputs once, and 4 D (D + 1) / (M group) of kept weights a token and head.
#include "plain.cuh"

namespace ttt {
namespace plain {

struct State {
    float *w, *b;
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

template <int D> TTT_INLINE State at(State state, int64_t index) { return {state.w + index * D * D, state.b + index * D}; }

template <int D, int M> struct Tiles {
    Tile<D> xk, g, z, xq, w, target;
    Tile<M> attn;
    float* b;
    TTT_INLINE explicit Tiles(Arena& arena)
        : xk(arena.tile<M, D>()), g(arena.tile<M, D>()), z(arena.tile<M, D>()), xq(arena.tile<M, D>()),
          w(arena.tile<D, D>()), target(arena.tile<M, D>()), attn(arena.tile<M, M>()), b(arena.take(D)) {}
};

// One chain's inputs, and one mini-batch of it.
template <typename T, int D, int M, bool CAUSAL> struct Chain {
    const Inputs<T>& in;
    int64_t batch, head;
    const float *gamma, *beta;
    float eta_last;
    TTT_INLINE explicit Chain(const Inputs<T>& in)
        : in(in), batch(blockIdx.x / in.heads), head(blockIdx.x % in.heads), gamma(in.ln_weight + head * D),
          beta(in.ln_bias + head * D), eta_last(in.token_eta[M - 1]) {}
    TTT_INLINE float eta(int i) const { return CAUSAL ? in.token_eta[i] : eta_last; }
    TTT_INLINE float lr(int64_t n, int i) const { return to_float(*in.lr.token(batch, head, n * M + i)); }
    TTT_INLINE int64_t row(int64_t n, int i) const {  // of a contiguous B T H
        return ((batch * in.mini_batches + n) * M + i) * in.heads + head;
    }

    TTT_INLINE void load_tokens(const Tiles<D, M>& s, int64_t n) const {
        load<M>(s.xq, in.xq.token(batch, head, n * M), in.xq.t);
        load<M>(s.xk, in.xk.token(batch, head, n * M), in.xk.t);
        load<M>(s.target, in.xv.token(batch, head, n * M), in.xv.t);
        for (int x = threadIdx.x; x < M * D; x += THREADS) s.target(x / D, x % D) -= s.xk(x / D, x % D);
    }

    // The mini-batch n from the weights `from` to the weights `to`; its output only if READ.
    template <bool READ> TTT_INLINE void forward(const Tiles<D, M>& s, int64_t n, State from, State keep, State to, T* out) const {
        load_tokens(s, n);
        load_weights<T, D>(s.w, from.w, keep.w);
        load_bias<D>(s.b, from.b, keep.b);
        sync();

        product<M, D>([&](auto& part) {
            part.template add<D>(s.xk, s.w);
            part.each([&](int i, int j, float x) { s.z(i, j) = x + s.b[j]; });
        });
        if (READ)
            product<M, M>([&](auto& part) {
                part.template add<D>(s.xq, transpose(s.xk));
                part.each([&](int i, int j, float x) {
                    s.attn(i, j) = j <= i || !CAUSAL ? rounded<T>(eta(i) * (x + 1)) : 0;
                });
            });
        sync();

        for_rows<M>([&](int i) {
            inner_gradient<D>(s.z.row(i), s.target.row(i), gamma, beta, s.g.row(i), in.eps);
            const float rate = lr(n, i);
            for_lane<D>([&](int d) { s.g(i, d) *= rate; });  // h
        });
        sync();

        for (int j = threadIdx.x; j < D; j += THREADS) to.b[j] = s.b[j] - eta_last * sum_and_round<T, M>(s.g, j);
        sync();

        product<D, D>([&](auto& part) {
            part.template add<M>(transpose(s.xk), s.g);
            part.each([&](int i, int j, float x) { to.w[i * D + j] = from.w[i * D + j] - eta_last * x; });
        });
        if (READ)
            product<M, D>([&](auto& part) {
                part.template add<M>(s.attn, s.g);
                part.scale(-1);
                part.template add<D>(s.xq, s.w);
                part.each([&](int i, int j, float x) { s.z(i, j) = x + s.b[j]; });
            });
        sync();

        if (READ)
            for_rows<M>([&](int i) {
                normalise<D>(s.z.row(i), in.eps);
                T* p = out + row(n, i) * D;
                for_lane<D>([&](int d) { p[d] = from_float<T>(s.xq(i, d) + gamma[d] * s.z(i, d) + beta[d]); });
            });
        sync();
    }
};

template <typename T, int D, int M, bool CAUSAL>
__global__ void __launch_bounds__(THREADS, 1) linear_forward(const __grid_constant__ ForwardArguments<T> a) {
    TTT_SHARED(shared);
    Arena arena{reinterpret_cast<float*>(shared), a.in.scratch + blockIdx.x * a.in.scratch_size};
    const Tiles<D, M> s(arena);
    const Chain<T, D, M, CAUSAL> chain(a.in);
    const State first = at<D>(a.first, blockIdx.x), last = at<D>(a.last, blockIdx.x);
    for (int64_t n = 0; n < a.in.mini_batches; n++) {
        const bool keeps = n % a.in.group == 0;
        const State keep = keeps ? at<D>(a.kept, blockIdx.x * a.in.groups + n / a.in.group) : State{nullptr, nullptr};
        chain.template forward<true>(s, n, n ? last : first, keep, last, a.out);
    }
}

template <typename T, int D, int M, bool CAUSAL>
__global__ void __launch_bounds__(THREADS, 1) linear_backward(const __grid_constant__ BackwardArguments<T> a) {
    TTT_SHARED(shared);
    Arena arena{reinterpret_cast<float*>(shared), a.in.scratch + blockIdx.x * a.in.scratch_size};
    const Tiles<D, M> s(arena);
    const auto d_z_bar = arena.tile<M, D>(), d_z = arena.tile<M, D>(), h = arena.tile<M, D>();
    const auto d_w = arena.tile<D, D>();
    const auto d_attn = arena.tile<M, M>(), attn_eta = arena.tile<M, M>();
    const auto x_hat_bar = arena.tile<M, D>(), pulled = arena.tile<M, D>(), d_out = arena.tile<M, D>();
    float *d_b = arena.take(D), *rstd = arena.take(M);

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
            chain.template forward<false>(s, first + i, state(i), State{nullptr, nullptr}, state(i + 1), nullptr);

        for (int64_t n = first + count - 1; n >= first; n--) {
            chain.load_tokens(s, n);
            load<M>(d_out, a.d_out.token(chain.batch, chain.head, n * M), a.d_out.t);
            load_weights<T, D>(s.w, state(n - first).w, nullptr);
            load_bias<D>(s.b, state(n - first).b, nullptr);
            load_weights<T, D>(d_w, d_state.w, nullptr);
            load_bias<D>(d_b, d_state.b, nullptr);
            sync();

            // The forward again, up to the read-out.
            product<M, D>([&](auto& part) {
                part.template add<D>(s.xk, s.w);
                part.each([&](int i, int j, float x) { s.z(i, j) = x + s.b[j]; });
            });
            product<M, M>([&](auto& part) {
                part.template add<D>(s.xq, transpose(s.xk));
                part.each([&](int i, int j, float x) {
                    s.attn(i, j) = j <= i || !CAUSAL ? x + 1 : 0;
                    attn_eta(i, j) = rounded<T>(chain.eta(i) * s.attn(i, j));
                });
            });
            sync();
            for_rows<M>([&](int i) {
                rstd[i] = inner_gradient<D>(s.z.row(i), s.target.row(i), gamma, beta, s.g.row(i), a.in.eps);
                const float rate = chain.lr(n, i);
                for_lane<D>([&](int d) { h(i, d) = rounded<T>(rate * s.g(i, d)); });
            });
            sync();
            product<M, D>([&](auto& part) {
                part.template add<M>(attn_eta, h);
                part.scale(-1);
                part.template add<D>(s.xq, s.w);
                part.each([&](int i, int j, float x) { x_hat_bar(i, j) = x + s.b[j]; });
            });
            sync();

            // out = xq + LN(z1_bar)
            for_rows<M>([&](int i) {
                const float rstd_bar = normalise<D>(x_hat_bar.row(i), a.in.eps);
                for_lane<D>([&](int d) { d_z_bar(i, d) = d_out(i, d) * gamma[d]; });
                project<D>(d_z_bar.row(i), x_hat_bar.row(i), rstd_bar);
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
                d_first.b[j] = d_b[j] + sum_and_round<T, M>(d_z_bar, j);
            }
            sync();

            // The read-out, and what the update w1' = w1 - eta_last xk^T h sends to -eta_last h.
            product<M, M>([&](auto& part) {
                part.template add<D>(d_z_bar, transpose(h));
                part.each([&](int i, int j, float x) { d_attn(i, j) = j <= i || !CAUSAL ? -x : 0; });
            });
            product<M, D>([&](auto& part) {
                part.template add<D>(s.xk, d_w);
                part.each([&](int i, int j, float x) { pulled(i, j) = x + d_b[j]; });
            });
            sync();
            for_rows<M>([&](int i) {
                const float read = row_sum<M>([&](int j) { return d_attn(i, j) * s.attn(i, j); });
                const float update = row_sum<D>([&](int d) { return -pulled(i, d) * h(i, d); });
                if (threadIdx.x % 32 == 0) {
                    sums[i] += read;
                    sums[M + i] += update;
                }
                for_lane<M>([&](int j) { d_attn(i, j) = rounded<T>(d_attn(i, j) * chain.eta(i)); });
            });
            sync();
            product<M, D>([&](auto& part) {  // d_h
                part.template add<M>(transpose(attn_eta), d_z_bar);
                part.each([&](int i, int j, float x) { d_z(i, j) = -x - eta_last * pulled(i, j); });
            });
            product<M, D>([&](auto& part) {
                part.template add<D>(d_z_bar, transpose(s.w));
                part.template add<M>(d_attn, s.xk);
                part.each([&](int i, int j, float x) {
                    a.d_xq[chain.row(n, i) * D + j] = from_float<T>(x + d_out(i, j));
                });
            });
            sync();

            // h = lr * g_z1, and the inner gradient's second order.
            for_rows<M>([&](int i) {
                const float d_lr = row_sum<D>([&](int d) { return d_z(i, d) * s.g(i, d); }), rate = chain.lr(n, i);
                if (threadIdx.x % 32 == 0) a.d_lr[chain.row(n, i)] = from_float<T>(d_lr);
                for_lane<D>([&](int d) { d_z(i, d) *= rate; });
                inner_gradient_backward<D>(d_z.row(i), s.g.row(i), s.z.row(i), rstd[i], s.target.row(i), gamma, beta,
                                           pulled.row(i));
            });
            sync();
            for (int j = threadIdx.x; j < D; j += THREADS) {
                float sum_gamma = 0, sum_beta = 0;
                for (int i = 0; i < M; i++) {
                    sum_gamma += pulled(i, j);
                    sum_beta -= s.target(i, j);
                }
                d_gamma += sum_gamma;
                d_beta += sum_beta;
                d_first.b[j] += sum_and_round<T, M>(d_z, j);
            }
            sync();

            // z1 = xk w1 + b1
            product<M, D>([&](auto& part) {
                part.template add<D>(h, transpose(d_w));
                part.scale(-eta_last);
                part.template add<M>(transpose(d_attn), s.xq);
                part.template add<D>(d_z, transpose(s.w));
                part.each([&](int i, int j, float x) {
                    a.d_xk[chain.row(n, i) * D + j] = from_float<T>(x - s.target(i, j));
                    a.d_xv[chain.row(n, i) * D + j] = from_float<T>(s.target(i, j));
                });
            });
            product<D, D>([&](auto& part) {
                part.template add<M>(transpose(s.xq), d_z_bar);
                part.template add<M>(transpose(s.xk), d_z);
                part.each([&](int i, int j, float x) { d_first.w[i * D + j] = d_state.w[i * D + j] + x; });
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
