// TTT-MLP backward: one block a chain (or a cluster of two), with the cotangents of the fast weights in registers, where
// the forward has the weights.
//
// The chain is walked in groups of mini-batches, from the last to the first. For each group:
//     again: the fast weights in it are computed again from the saved ones, without products with w2 (the LayerNorms
//            are saved, so g_z2 is known), and stored rounded to the I/O dtype, as operands lie in registers
//     back:  mini-batch by mini-batch, the cotangents; d_w waits in global memory while `again` has the registers
// Every warp has its hidden columns. A mini-batch goes in chunks of 16 tokens, through these loops, where
// "sum" is a sum over warps through shared memory, and what a later loop needs is kept in the warp's own slots:
//     norms     d_z2_bar through the output's LayerNorm, and g_z2 again: D / EACH lanes a token
//     read      z1_bar, x2_bar, d_x2_bar, d_z1_bar                       -> sum: d_xq
//     update    z1, g_x2, g_z1; what d_w pulls back; d_g_z1, d_g_x2      -> sum: d_g_z2, then the second order: d_z2
//     first     d_x2, d_z1                                               -> sum: d_xk
//     weights   d_w1 += xk^T d_z1 + .., d_w2 += x2^T d_z2 + g_x2 .., causal what the read-out adds as well
// Causal, scores over tokens that are sums over f (attn2, d_attn1) only enter linearly: every warp applies its own
// part. Of a cluster, each block has half of the hidden columns; sums over f are handed over twice a mini-batch.
//
// Global memory of a chain beside the tensors: the states of a group, rounded, (group + 1) (16 D D + 16 D) bytes; d_w,
// 32 D D; and what `BackwardShared` has no room to keep.
#include "mlp_cotangents.cuh"

namespace ttt {

template <typename T, int D, int M, bool CAUSAL>
__global__ void TTT_CLUSTER
__launch_bounds__(Sizes<D>::THREADS, 1) mlp_backward(const __grid_constant__ BackwardArguments a) {
    using S = Sizes<D>;
    using Shared = BackwardShared<T, D, M, CAUSAL>;
    using W = Work<D, M>;
    constexpr int CHUNKS = M / CHUNK, F = S::F, ROW = S::ROW, STAGES = Shared::STAGES, EACH = S::EACH;
    constexpr bool AHEAD = Shared::AHEAD, FAR = S::PIECE < D;  // FAR: rounded weights are read where they are used
    static_assert(!FAR || CHUNKS == 1);
    constexpr int PAIR = SPLIT == 2 && CHUNKS > 1 ? 2 : 1;  // chunks whose products overlap in time
    constexpr int TOGETHER = CHUNKS < 2 * SPLIT ? CHUNKS : 2 * SPLIT;  // chunks that are loaded before one is stored
    TTT_SHARED(memory);
    auto& s = *reinterpret_cast<Shared*>(memory);
    int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    const int rank = SPLIT == 1 ? 0 : cluster_rank();
    const int64_t chain = blockIdx.x / SPLIT, batch = chain / a.heads, head = chain % a.heads;
    const int N = int(a.mini_batches), group = int(a.group), groups = (N + group - 1) / group;
    Place<D> at(thread);
    const int64_t own_stride = a.heads * D;  // of contiguous gradients
    const float eta_last = a.token_eta[M - 1];
    if (thread == 0) {
        const int64_t own = batch * N * M * a.heads + head, tokens = chain * N * M;
        auto of = [&](const View& x) { return static_cast<const T*>(x.p) + batch * x.b + head * x.h; };
        s.base = {
            of(a.xq), of(a.xk), of(a.xv), of(a.lr), of(a.d_out),
            static_cast<T*>(a.d_xq) + own * D, static_cast<T*>(a.d_xk) + own * D, static_cast<T*>(a.d_xv) + own * D,
            static_cast<T*>(a.d_lr) + own,
            static_cast<const fp16*>(a.x_hat) + tokens * D, static_cast<const fp16*>(a.x_hat_bar) + tokens * D,
            a.rstd + tokens, a.rstd_bar + tokens, a.work + blockIdx.x * a.work_size};
    }
    auto held = [&](int c) -> Values<D>& {  // d_target of this thread's place
        return reinterpret_cast<Values<D>*>(s.base.work + W::D_WEIGHTS)[c * S::PLACES + thread];
    };
    auto work_d_w = [&] { return reinterpret_cast<float*>(s.base.work); };
    auto work_attn = [&](int number) -> Words& {  // d_attn1 of a square, of this warp
        return reinterpret_cast<Words*>(
            s.base.work + W::D_WEIGHTS + W::HELD + 7 * W::KEPT
        )[(number * S::WARPS + warp) * 32 + lane];
    };

    float d_b2[EACH], d_eta_last = 0;
    for (int i = 0; i < EACH; i++) d_b2[i] = a.d_final_b2[chain * D + at.d + i];
    if (thread < D) s.gamma[thread] = a.ln_weight[head * D + thread], s.beta[thread] = a.ln_bias[head * D + thread];
    if (has_place<D>(thread))
        for (int i = 0; i < EACH; i++) s.d_gamma[thread].x[i] = s.d_beta[thread].x[i] = 0;
    if (thread < S::OWN) s.d_b1[thread] = a.d_final_b1[chain * F + rank * S::OWN + thread];
    for (int i = thread; i < M; i += S::THREADS) s.token_eta[i] = a.token_eta[i];
    if (CAUSAL)
        for (int i = thread; i < S::WARPS * M; i += S::THREADS) s.eta_part[i / M][i % M] = 0;
    float *b1 = s.b1 + SLICE * warp, *d_b1 = s.d_b1 + SLICE * warp;
    // What depends on the thread alone is computed again in every phase: kept over a mini-batch, addresses would spill.
    auto refresh = [&] {
        pin(thread);
        warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4, at = Place<D>(thread);
        b1 = s.b1 + SLICE * warp, d_b1 = s.d_b1 + SLICE * warp;
    };

    // This warp's slot of what is kept of a chunk.
    auto slot = [&](int what, int c) -> uint32_t* {
        if (what < Shared::KEPT_SHARED) return s.kept[what][c][warp];
        return reinterpret_cast<uint32_t*>(s.base.work + W::D_WEIGHTS + W::HELD) +
               ((what * CHUNKS + c) * S::WARPS + warp) * SLOT_WORDS;
    };
    auto weights_of = [&](int k) { return reinterpret_cast<Words*>(s.base.work + W::FIXED + k * W::SLOT); };
    auto second_of = [&](int k) { return weights_of(k) + D / 8 / SPLIT * S::THREADS; };
    auto b1_of = [&](int k) { return reinterpret_cast<float*>(s.base.work + W::FIXED + k * W::SLOT + W::WEIGHTS); };
    // The rounded weights of a slot, as they lie or with every block transposed.
    auto first_of = [&](int k) {
        if constexpr (AHEAD) return Blocks<false>{s.weights[warp], lane};
        else if constexpr (FAR) return Far<D, false>{weights_of(k) + thread};
        else return restore_words<D, First<D>>(weights_of(k), thread);
    };
    auto first_t_of = [&](int k) {
        if constexpr (AHEAD) return Blocks<true>{s.weights[warp], lane};
        else if constexpr (FAR) return Far<D, true>{weights_of(k) + thread};
        else return transpose(restore_words<D, First<D>>(weights_of(k), thread));
    };
    auto second_r_of = [&](int k) {
        if constexpr (AHEAD) return Blocks<false>{s.weights[warp] + 16 * D / SPLIT, lane};
        else if constexpr (FAR) return Far<D, false>{second_of(k) + thread};
        else return restore_words<D, Second<D>>(second_of(k), thread);
    };
    auto second_t_of = [&](int k) {
        if constexpr (AHEAD) return Blocks<true>{s.weights[warp] + 16 * D / SPLIT, lane};
        else if constexpr (FAR) return Far<D, true>{second_of(k) + thread};
        else return transpose(restore_words<D, Second<D>>(second_of(k), thread));
    };
    auto lr_of = [&](int n) { return s.base.lr + (int64_t(n) * M + thread) * a.lr.t; };  // of token `thread`
    auto fetch = [&](int n, bool both) {  // `both`: what the read-out needs as well
        const int stage = n % STAGES;
        const int64_t first = int64_t(n) * M;
        const T *from_xk = s.base.xk + first * a.xk.t, *from_xq = s.base.xq + first * a.xq.t;
        if constexpr (AHEAD) {
            const T *from_xv = s.base.xv + first * a.xv.t, *from_d_out = s.base.d_out + first * a.d_out.t;
            load_two<T, D>(s.xk[stage], from_xk, a.xk.t, s.xv[stage], from_xv, a.xv.t, a.aligned, thread);
            if (both)
                load_two<T, D>(s.xq[stage], from_xq, a.xq.t, s.d_out[stage], from_d_out, a.d_out.t, a.aligned, thread);
            const fp16 *from_x_hat = s.base.x_hat + first * D, *from_bar = s.base.x_hat_bar + first * D;
            load_two<fp16, D>(s.x_hat[stage], from_x_hat, D, s.x_hat_bar[stage], from_bar, D, true, thread);
        } else {
            load_tokens<T, D, M>(s.xk[stage], from_xk, a.xk.t, a.aligned, thread);
            if (both) load_tokens<T, D, M>(s.xq[stage], from_xq, a.xq.t, a.aligned, thread);
        }
        if (thread < M) {
            copy_number(s.lr[stage] + thread, lr_of(n));
            copy_async_4(s.rstd[stage] + thread, s.base.rstd + first + thread);
            if (both) copy_async_4(s.rstd_bar[stage] + thread, s.base.rstd_bar + first + thread);
        }
        copy_async_commit();
    };
    auto arrived = [&](int n) {  // and a barrier behind it: `fetched`
        copy_async_wait<0>();
        if (thread < M) convert_number(s.lr[n % STAGES] + thread, lr_of(n));
    };
    auto fetched = [&](int n) {
        arrived(n);
        sync();
    };
    auto fetch_weights = [&](int k) {
        if constexpr (AHEAD) {
            const uint32_t* from = reinterpret_cast<const uint32_t*>(weights_of(k)) + warp * 32 * D / SPLIT + 4 * lane;
            uint32_t* to = s.weights[warp] + 4 * lane;
#pragma unroll
            for (int i = 0; i < D / 4 / SPLIT; i++) copy_async_16(to + 128 * i, from + 128 * i);
            if (lane < SLICE / 4) copy_async_16(b1 + 4 * lane, b1_of(k) + SLICE * warp + 4 * lane);
            copy_async_commit();
        }
    };
    int turn = 0;
    // A sum over warps: every warp posts its part, and behind a barrier takes the sum, where its place is. What it does in
    // between fills the time until all have come. `wait`: the last sum may still be being taken.
    auto post = [&](const float(&part)[S::PIECE / 8][4], bool wait = (M > CHUNK)) {
        if (Shared::SUMS == 1 && wait) sync();
        store_partial<D>(s.partials[turn] + warp * S::PARTIAL, part, lane);
    };
    // Where parts come in pieces, one behind the first.
    auto post_more = [&](const float(&part)[S::PIECE / 8][4], int from) {
        store_partial<D>(s.partials[turn] + warp * S::PARTIAL, part, lane, from);
    };
    auto take = [&] {
        sync();
        Values<D> sum;
        if (has_place<D>(thread)) sum = sum_partials<D>(s.partials[turn], at);
        turn = (turn + 1) % Shared::SUMS;
        return sum;
    };
    // Of row `row` of mini-batch n: this place's d of what is there.
    auto norm_of = [&](int n, int row) {
        const int stage = n % STAGES;
        Values<D> x;
        if constexpr (AHEAD) x = load_hat<T, D>(s.x_hat[stage] + row * ROW + at.d);
        else x = load_hat<T, D>(s.base.x_hat + (int64_t(n) * M + row) * D + at.d);
        return norm_of_saved<D>(x, s.rstd[stage][row]);
    };
    auto norm_bar_of = [&](int n, int row) {
        const int stage = n % STAGES;
        Values<D> x;
        if constexpr (AHEAD) x = load_hat<T, D>(s.x_hat_bar[stage] + row * ROW + at.d);
        else x = load_hat<T, D>(s.base.x_hat_bar + (int64_t(n) * M + row) * D + at.d);
        return norm_of_saved<D>(x, s.rstd_bar[stage][row]);
    };
    auto d_out_of = [&](int n, int row) {
        if constexpr (AHEAD) return load_values<D>(s.d_out[n % STAGES] + row * ROW + at.d);
        else return load_values<D>(s.base.d_out + (int64_t(n) * M + row) * a.d_out.t + at.d, a.aligned);
    };
    // LN(z2) - target
    auto inner_error = [&](const NormOf<D>& norm, int n, int row) {
        Values<D> v, k = load_values<D>(s.xk[n % STAGES] + row * ROW + at.d);
        if constexpr (AHEAD) v = load_values<D>(s.xv[n % STAGES] + row * ROW + at.d);
        else v = load_values<D>(s.base.xv + (int64_t(n) * M + row) * a.xv.t + at.d, a.aligned);
        Values<D> error;
        for (int i = 0; i < EACH; i++)
            error.x[i] = s.gamma[at.d + i] * norm.x_hat[i] + s.beta[at.d + i] - (v.x[i] - k.x[i]);
        return error;
    };
    auto times_gamma = [&](const Values<D>& x) {
        const Values<D> gamma = *reinterpret_cast<const Values<D>*>(s.gamma + at.d);
        Values<D> y;
        for (int i = 0; i < EACH; i++) y.x[i] = x.x[i] * gamma.x[i];
        return y;
    };

    // Norms: d_z2_bar of a mini-batch, its sum over tokens, and g_z2 again.
    float read_b2[EACH];
    auto norms = [&](int n) {
        const int turn = n % Shared::NORMS;
        for (int i = 0; i < EACH; i++) read_b2[i] = 0;
        if (!has_place<D>(thread)) return;
#pragma unroll 1
        for (int first = 0; first < CHUNKS; first += TOGETHER) {
            NormOf<D> norm_bar[TOGETHER], norm[TOGETHER];
            Values<D> d_y[TOGETHER], error[TOGETHER];
#pragma unroll
            for (int c = 0; c < TOGETHER; c++) {
                const int row = CHUNK * (first + c) + at.token;
                norm_bar[c] = norm_bar_of(n, row), norm[c] = norm_of(n, row);
                d_y[c] = d_out_of(n, row), error[c] = inner_error(norm[c], n, row);
            }
#pragma unroll
            for (int c = 0; c < TOGETHER; c++) {
                const int at_row = (CHUNK * (first + c) + at.token) * ROW + at.d;
                const Values<D> d_z2_bar = project<D>(times_gamma(d_y[c]), norm_bar[c]);
                for (int i = 0; i < EACH; i++) {
                    s.d_gamma[thread].x[i] += d_y[c].x[i] * norm_bar[c].x_hat[i];
                    s.d_beta[thread].x[i] += d_y[c].x[i];
                    read_b2[i] += d_z2_bar.x[i];
                }
                store_values(s.d_z2_bar[turn] + at_row, d_z2_bar.x);
                store_values(s.g_z2[turn] + at_row, project<D>(times_gamma(error[c]), norm[c]).x);
            }
        }
    };

    sync();
    if (SPLIT == 2) {
        if (thread < Shared::TURNS) mbarrier_init(&s.there[thread]);
        if (thread == 0) mbarrier_init(&s.d_xk_there);
        cluster_sync();  // both blocks have started
    }
    for (int number = groups - 1; number >= 0; number--) {
        const int begin = number * group, end = begin + group < N ? begin + group : N;

        // Again: the fast weights of this group, and not causal those after it.
        {
            const float* record = a.saved + ((chain * groups + number) * SPLIT + rank) * S::RECORD;
            float w1[FK][D / 8][4], w2[D / 16][FT][4];
            restore_weights<D>(w1, w2, record, thread);
            sync();  // the shared memory of the last group is free
            if (thread < S::OWN) s.b1[thread] = record[S::RECORD - S::OWN + thread];
            fetch(begin, false);
            for (int n = begin;; n++) {
                refresh();
                if (CAUSAL || n < end) fetched(n);
                else sync();  // the weights after the group, for which nothing comes
                {
                    const First<D> w1_r = round_first<T, D>(w1);
                    const Second<D> w2_r = round_second<T, D>(w2), w2_t = transpose(w2_r);
                    if (AHEAD)
                        save_blocks<D>(
                            reinterpret_cast<uint32_t*>(weights_of(n - begin)) + warp * 32 * D / SPLIT, w1_r, w2_r, lane
                        );
                    else {
                        save_words<D>(weights_of(n - begin), w1_r, thread);
                        save_words<D>(second_of(n - begin), w2_r, thread);
                    }
                    if (thread < S::OWN) b1_of(n - begin)[thread] = s.b1[thread];
                    if (n == end - CAUSAL) break;
                    const T* xk_tile = s.xk[n % STAGES];
                    const float* lr_n = s.lr[n % STAGES];
                    if (STAGES == 2 && n + 1 < end) fetch(n + 1, false);
#pragma unroll 1
                    for (int first = 0; first < CHUNKS && has_place<D>(thread); first += TOGETHER) {
                        NormOf<D> norm[TOGETHER];
                        Values<D> error[TOGETHER];
#pragma unroll
                        for (int c = 0; c < TOGETHER; c++) {
                            const int row = CHUNK * (first + c) + at.token;
                            norm[c] = norm_of(n, row), error[c] = inner_error(norm[c], n, row);
                        }
#pragma unroll
                        for (int c = 0; c < TOGETHER; c++) {
                            const int row = CHUNK * (first + c) + at.token;
                            Values<D> g_z2 = project<D>(times_gamma(error[c]), norm[c]);
                            store_values(s.g_z2[0] + row * ROW + at.d, g_z2.x);
                            for (int i = 0; i < EACH; i++) g_z2.x[i] *= -eta_last * lr_n[row];
                            store_values(s.d_z2 + row * ROW + at.d, g_z2.x);
                        }
                    }
                    sync();
                    float step_b1[2 * FT] = {};
#pragma unroll 1
                    for (int c = 0; c < CHUNKS; c += PAIR) {
                        if (CHUNKS > 1) refresh();
                        float z1[PAIR][FT][4], g_z1[PAIR][FT][4] = {};
#pragma unroll
                        for (int p = 0; p < PAIR; p++) {
                            start_columns(z1[p], b1, t);
                            times_first<T, D>(z1[p], xk_tile, CHUNK * (c + p), w1_r, lane);
                            times_second_t<T, D>(g_z1[p], s.g_z2[0], CHUNK * (c + p), w2_t, lane);
                        }
#pragma unroll
                        for (int p = 0; p < PAIR; p++) {
                            const int row = CHUNK * (c + p);
                            const float step[2] = {-eta_last * lr_n[row + g], -eta_last * lr_n[row + g + 8]};
#pragma unroll
                            for (int e = 0; e < 4 * FT; e++) {
                                const Gelu y = gelu_first(z1[p][e / 4][e % 4]);
                                z1[p][e / 4][e % 4] = y.value;
                                g_z1[p][e / 4][e % 4] *= y.first * step[e / 2 % 2];
                            }
                            add_columns(step_b1, g_z1[p]);
                            update_first<T, D>(w1, transpose(round_columns<T>(g_z1[p])), xk_tile, row, lane);
                            update_second<T, D>(w2, transpose(round_columns<T>(z1[p])), s.d_z2, row, lane);
                        }
                    }
                    sync_warp();  // every lane has read b1
                    const float step = sum_columns(step_b1, lane);
                    if (owns_column(lane)) b1[column_of(lane)] += step;
                }
                if (STAGES == 1 && n + 1 < end) {
                    sync();
                    fetch(n + 1, false);
                }
            }
            sync();
        }

        // Back.
        float d_w1[FK][D / 8][4], d_w2[D / 16][FT][4];
        if (number == groups - 1)
            load_weights<D>(
                d_w1, d_w2, a.d_final_w1 + chain * F * D, a.d_final_w2 + chain * F * D, rank * S::OWN + warp * SLICE,
                lane
            );
        else restore_weights<D>(d_w1, d_w2, work_d_w(), thread);
        fetch(end - 1, true);
        if (AHEAD) {
            fetched(end - 1);
            norms(end - 1);
        }
        fetch_weights(end - 1 - begin);
        for (int n = end - 1; n >= begin; n--) {
            refresh();
            const int stage = n % STAGES;
            // Of this warp's column `lane`.
            const float b1_n = AHEAD || lane >= SLICE ? 0 : b1_of(n - begin)[SLICE * warp + lane];
            const float b1_next = CAUSAL || lane >= SLICE ? 0 : b1_of(n - begin + 1)[SLICE * warp + lane];
            if (AHEAD) {
                copy_async_wait<0>();
                sync();
            } else fetched(n);
            if (STAGES == 2 && n > begin) fetch(n - 1, true);
            const T *xq_tile = s.xq[stage], *xk_tile = s.xk[stage];
            T *g_z2_tile = s.g_z2[n % Shared::NORMS], *d_z2_bar_tile = s.d_z2_bar[n % Shared::NORMS];
            const float* lr_n = s.lr[stage];
            if (!AHEAD && lane < SLICE) b1[lane] = CAUSAL ? b1_n : b1_next;
            if (CAUSAL)
                for (int i = lane; i < M; i += 32) s.lr_part[warp][i] = 0;

            const float scale = -eta_last;

            refresh();
            if (!AHEAD) norms(n);
            float step_b2[EACH];
            for (int i = 0; i < EACH; i++) step_b2[i] = read_b2[i];
            auto share_b2 = [&]() {
                if (!has_place<D>(thread)) return;
                Values<D> sum;
#pragma unroll
                for (int i = 0; i < EACH; i++) sum.x[i] = step_b2[i] = sum_tokens<D>(step_b2[i]);
                if (lane < S::LANES) *reinterpret_cast<Values<D>*>(&s.b2_part[warp][at.d]) = sum;
            };
            auto add_b2 = [&]() {
#pragma unroll
                for (int w = 0; w < S::PLACE_WARPS; w++) {
                    Values<D> part = *reinterpret_cast<const Values<D>*>(&s.b2_part[w][at.d]);
                    for (int i = 0; i < EACH; i++) d_b2[i] += part.x[i], step_b2[i] = 0;
                }
            };
            if (!CAUSAL) share_b2();
            sync();
            if (!CAUSAL) add_b2();
            // The inner gradient's second order, as in implementations/torch/blocks.py: d_z2, d_xv, and d_target for
            // d_xk.
            auto second_order = [&](Values<D> d_g, int c, const NormOf<D>& norm, const Values<D>& error) {
                const int row = CHUNK * c + at.token;
                const int64_t token = int64_t(n) * M + row;
                const Values<D> p = times_gamma(error);
                const Values<D> g_z2 = project<D>(p, norm);
                float along_p = 0, along_b2 = 0, along_d_g = 0, through_rstd = 0;
                for (int i = 0; i < EACH; i++) {
                    d_g.x[i] += scale * lr_n[row] * d_b2[i];
                    along_p += p.x[i] * norm.x_hat[i], along_b2 += g_z2.x[i] * d_b2[i];
                    along_d_g += d_g.x[i] * norm.x_hat[i], through_rstd += d_g.x[i] * g_z2.x[i];
                }
                along_p = sum_token<D>(along_p) * (1.0f / D), along_b2 = sum_token<D>(along_b2);
                along_d_g = sum_token<D>(along_d_g) * (1.0f / D),
                through_rstd = sum_token<D>(through_rstd) * (1.0f / D);
                if (at.d == 0) s.along_b2[row] = along_b2;
                const Values<D> d_p = project<D>(d_g, norm), d_error = times_gamma(d_p);
                Values<D> d_x_hat = times_gamma(d_error);
                for (int i = 0; i < EACH; i++) {
                    d_x_hat.x[i] -= norm.rstd * (along_p * d_g.x[i] + along_d_g * p.x[i]);
                    s.d_gamma[thread].x[i] += d_p.x[i] * error.x[i] + d_error.x[i] * norm.x_hat[i];
                    s.d_beta[thread].x[i] += d_error.x[i];
                }
                Values<D> d_z2 = project<D>(d_x_hat, norm), d_target;
                for (int i = 0; i < EACH; i++) {
                    d_z2.x[i] -= norm.rstd * norm.x_hat[i] * through_rstd, step_b2[i] += d_z2.x[i];
                    d_target.x[i] = -d_error.x[i];
                }
                store_values(s.d_z2 + row * ROW + at.d, d_z2.x);
                if (c % SPLIT == rank) store_values(s.base.d_xv + token * own_stride + at.d, d_target.x);
                held(c) = d_target;
            };
            // Of a cluster: what is sent to the other block, and the sum of both.
            constexpr int TURNS = Shared::TURNS;
            const int round = N - 1 - n, turn = round % TURNS, own_chunks = (CHUNKS + 1 - rank) / 2;
            auto send = [&](const Values<D>& x, Values<D>& place, Mbarrier* there) {
                store_async(place.x, x.x, there, 1 - rank);
            };
            auto both = [&](int own, const Values<D>& sent) {
                Values<D> x = s.mine[own][thread];
                for (int i = 0; i < EACH; i++) x.x[i] += sent.x[i];
                return x;
            };
            if (SPLIT == 2 && thread == 0) {
                constexpr int BYTES = S::PLACES * int(sizeof(Values<D>));
                mbarrier_expect(&s.there[turn], (CHUNKS + own_chunks) * BYTES + (rank == 0 ? 8 * M : 0));
                if (own_chunks) mbarrier_expect(&s.d_xk_there, own_chunks * BYTES);
            }
            auto write_d_xq = [&](Values<D> sum, int c) {
                const Values<D> d_y = d_out_of(n, CHUNK * c + at.token);
                for (int i = 0; i < EACH; i++) sum.x[i] += d_y.x[i];
                store_values(s.base.d_xq + (int64_t(n) * M + CHUNK * c + at.token) * own_stride + at.d, sum.x);
            };
            auto write_d_xk = [&](Values<D> sum, int c) {
                const Values<D> d_target = held(c);
                for (int i = 0; i < EACH; i++) sum.x[i] -= d_target.x[i];
                store_values(s.base.d_xk + (int64_t(n) * M + CHUNK * c + at.token) * own_stride + at.d, sum.x);
            };
            auto eta_of = [&](int i, int j,
                              int e) {  // of token rows in chunk i, columns in chunk j; 0 above the diagonal
                const int row = CHUNK * i + g + e / 2 % 2 * 8, col = CHUNK * j + e / 4 * 8 + 2 * t + e % 2;
                return row >= col ? s.token_eta[row] * lr_n[col] : 0.0f;
            };
            // d_eta of a square: its parts of d_token_eta and d_lr.
            auto add_d_eta = [&](const Square& d_eta, int i, int j) {
                float rows[2] = {}, cols[4] = {};
#pragma unroll
                for (int e = 0; e < 8; e++) {
                    const int h = e / 2 % 2, row = CHUNK * i + g + h * 8, col = CHUNK * j + e / 4 * 8 + 2 * t + e % 2;
                    rows[h] += d_eta.x[e] * lr_n[col];
                    cols[e / 4 * 2 + e % 2] += d_eta.x[e] * s.token_eta[row];
                }
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    rows[h] += shuffle_xor(rows[h], 1), rows[h] += shuffle_xor(rows[h], 2);
                    if (t == 0) s.eta_part[warp][CHUNK * i + g + 8 * h] += rows[h];
                }
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    for (int mask = 4; mask < 32; mask *= 2) cols[k] += shuffle_xor(cols[k], mask);
                    if (g == 0) s.lr_part[warp][CHUNK * j + k / 2 * 8 + 2 * t + k % 2] += cols[k];
                }
            };
            if (CAUSAL) {
                for (int k = warp; k < 2 * Shared::SQUARES; k += S::WARPS) {
                    const bool second = k >= Shared::SQUARES;
                    const int number = second ? k - Shared::SQUARES : k;
                    int i = 0, j = number;
                    while (j > i) j -= ++i;
                    float p[2][4] = {};
                    row_scores<T, D>(
                        p, second ? d_z2_bar_tile : xq_tile, CHUNK * i, second ? g_z2_tile : xk_tile, CHUNK * j, lane
                    );
                    Square square;
#pragma unroll
                    for (int e = 0; e < 8; e++) {
                        const int row = CHUNK * i + g + e / 2 % 2 * 8, col = CHUNK * j + e / 4 * 8 + 2 * t + e % 2;
                        const float x = p[e / 4][e % 4];
                        square.x[e] = row < col ? 0.0f : second ? -x : x + 1;
                    }
                    store_square<T, Shared::WIDE>(second ? s.d_scores2[number] : s.attn1[number], square, lane);
                }
                sync();
            }

            refresh();
            // Read: the read-out's own cotangents; not causal they are part of d_w already where the update is pulled
            // back.
            float read_b1[2 * FT] = {};
            if (CAUSAL) {
                const auto w1_r = first_of(n - begin);
                const auto w2_t = second_t_of(n - begin);
#pragma unroll 1
                for (int c = 0; c < CHUNKS; c++) {
                    if (CHUNKS > 1) refresh();
                    float z1[FT][4], g_z1[FT][4] = {};
                    start_columns(z1, b1, t);
                    times_first<T, D>(z1, xk_tile, CHUNK * c, w1_r, lane);
                    times_second_t<T, D>(g_z1, g_z2_tile, CHUNK * c, w2_t, lane);
                    if constexpr (Shared::BEND) {
                        float slope[FT][4], bend[FT][4];
#pragma unroll
                        for (int k = 0; k < FT; k++) {
#pragma unroll
                            for (int i = 0; i < 4; i++) {
                                const GeluSecond y = gelu_second(z1[k][i]);
                                z1[k][i] = y.value, slope[k][i] = y.first, bend[k][i] = g_z1[k][i] * y.second;
                                g_z1[k][i] *= y.first;
                            }
                        }
                        keep(slot(SLOPE, c), round_columns<fp16>(slope), lane);
                        keep(s.bend[warp], round_columns<T>(bend), lane);
                    } else {
#pragma unroll
                        for (int e = 0; e < 4 * FT; e++) {
                            const Gelu y = gelu_first(z1[e / 4][e % 4]);
                            z1[e / 4][e % 4] = y.value, g_z1[e / 4][e % 4] *= y.first;
                        }
                    }
                    keep(slot(X2, c), round_columns<T>(z1), lane);
                    keep(slot(G_Z1, c), round_columns<T>(g_z1), lane);
                }
            }
            {
                const int now = n - begin + (CAUSAL ? 0 : 1);
                auto w1_r = first_of(now);
                const auto w2_t = second_t_of(now);
#pragma unroll 1
                for (int c = 0; c < CHUNKS; c++) {
                    if (CHUNKS > 1) refresh();
                    float z1_bar[FT][4], d_z1_bar[FT][4] = {};
                    start_columns(z1_bar, b1, t);
                    times_first<T, D>(z1_bar, xq_tile, CHUNK * c, w1_r, lane);
                    times_second_t<T, D>(d_z1_bar, d_z2_bar_tile, CHUNK * c, w2_t, lane);
                    if (CAUSAL) {
#pragma unroll 1
                        for (int j = 0; j <= c; j++) {
                            const int number = c * (c + 1) / 2 + j;
                            Square read = load_square<T, Shared::WIDE>(s.attn1[number], lane);
                            Square d_attn2 = load_square<T, Shared::WIDE>(s.d_scores2[number], lane);
#pragma unroll
                            for (int e = 0; e < 8; e++) {
                                const float eta = eta_of(c, j, e);
                                read.x[e] *= -eta, d_attn2.x[e] *= eta;
                            }
                            uint32_t p[4];
                            square_as_a<T>(p, read);
                            times_columns<T>(z1_bar, p, transpose(kept(slot(G_Z1, j), lane)));
                            square_as_a<T>(p, d_attn2);
                            times_columns<T>(d_z1_bar, p, transpose(kept(slot(X2, j), lane)));
                        }
                    }
#pragma unroll
                    for (int e = 0; e < 4 * FT; e++) {
                        const Gelu y = gelu_first(z1_bar[e / 4][e % 4]);
                        z1_bar[e / 4][e % 4] = y.value, d_z1_bar[e / 4][e % 4] *= y.first;
                    }
                    add_columns(read_b1, d_z1_bar);
                    const Columns x2_bar_t = transpose(round_columns<T>(z1_bar)),
                                  d_z1_bar_r = round_columns<T>(d_z1_bar);
                    const Columns d_z1_bar_t = transpose(d_z1_bar_r);
                    float part[S::PIECE / 8][4] = {};
                    uint32_t p[4];
                    if constexpr (AHEAD || FAR) times_first_t<T, D>(part, d_z1_bar_r, first_t_of(now));
                    else {
                        if (CHUNKS > 1) pin(w1_r);
                        times_first_t<T, D>(part, d_z1_bar_r, transpose(w1_r));
                    }
                    if (CAUSAL) {
                        keep(slot(X2_BAR, c), x2_bar_t, lane);
                        keep(slot(D_Z1_BAR, c), d_z1_bar_t, lane);
#pragma unroll 1
                        for (int j = 0; j <= c; j++) {
                            const int number = c * (c + 1) / 2 + j;
                            const Square attn1 = load_square<T, Shared::WIDE>(s.attn1[number], lane);
                            float d_scores[2][4] = {};
                            scores<T>(d_scores, d_z1_bar_r, kept(slot(G_Z1, j), lane));
                            Square d_eta, d_attn;
#pragma unroll
                            for (int e = 0; e < 8; e++) {
                                const float d_score = -d_scores[e / 4][e % 4];
                                d_eta.x[e] = d_score * attn1.x[e];  // attn1 is 0 above the diagonal
                                d_attn.x[e] = d_score * eta_of(c, j, e);
                            }
                            add_d_eta(d_eta, c, j);
                            square_as_a<T>(p, d_attn);
                            times_rows<T, D>(part, p, xk_tile, CHUNK * j, lane);
                            work_attn(number) = {p[0], p[1], p[2], p[3]};
                        }
                    }
                    post(part);
#pragma unroll
                    for (int from = S::PIECE; from < D; from += S::PIECE) {
                        fill(part, 0);
                        times_first_t<T, D>(part, d_z1_bar_r, first_t_of(now), from);
                        if (CAUSAL) times_rows<T, D>(part, p, xk_tile, 0, lane, from);
                        post_more(part, from);
                    }
                    if (!CAUSAL) {
                        update_first<T, D>(d_w1, d_z1_bar_t, xq_tile, CHUNK * c, lane);
                        update_second<T, D>(d_w2, x2_bar_t, d_z2_bar_tile, CHUNK * c, lane);
                    }
                    const Values<D> sum = take();
                    if (SPLIT == 1) write_d_xq(sum, c);
                    else if (!has_place<D>(thread)) continue;
                    else if (c % 2 == rank) s.mine[CHUNKS + c / 2][thread] = sum;
                    else send(sum, s.sent[turn][CHUNKS + c / 2][thread], &s.there[turn]);
                }
            }
            const float read_b1_sum = sum_columns(read_b1, lane);
            if (!CAUSAL) {
                if (owns_column(lane)) d_b1[column_of(lane)] += read_b1_sum;
                if (lane < SLICE) b1[lane] = b1_n;
                sync_warp();
            }

            refresh();
            // Update: what d_w pulls back, up to d_z2.
            {
                const auto w1_r = first_of(n - begin);
                const auto w2_t = second_t_of(n - begin);
#pragma unroll 1
                for (int c = 0; c < CHUNKS; c++) {
                    if (CHUNKS > 1) refresh();
                    if (CHUNKS > 1) pin(d_w1), pin(d_w2);
                    const float step[2] = {scale * lr_n[CHUNK * c + g], scale * lr_n[CHUNK * c + g + 8]};
                    float slope[FT][4], bend[FT][4], pulled1[FT][4], pulled_x2[FT][4] = {}, along[2] = {};
                    start_columns(pulled1, d_b1, t);
                    times_first<T, D>(pulled1, xk_tile, CHUNK * c, round_first<T, D>(d_w1), lane);
                    const Second<D> d_w2_r = round_second<T, D>(d_w2);
                    times_second_t<T, D>(pulled_x2, g_z2_tile, CHUNK * c, transpose(d_w2_r), lane);
                    Columns x2_r;
                    if constexpr (Shared::BEND) {
                        x2_r = kept(slot(X2, c), lane);
                        const Columns slope_r = kept(slot(SLOPE, c), lane), g_z1_r = kept(slot(G_Z1, c), lane);
                        const Columns bend_r = kept(s.bend[warp], lane);
#pragma unroll
                        for (int k = 0; k < FT; k++) {
#pragma unroll
                            for (int h = 0; h < 2; h++) {
                                const float2 x = unpack<T>(x2_r.x[k][h]), first = unpack<fp16>(slope_r.x[k][h]);
                                const float2 g_z1 = unpack<T>(g_z1_r.x[k][h]), second = unpack<T>(bend_r.x[k][h]);
                                slope[k][2 * h] = first.x, slope[k][2 * h + 1] = first.y;
                                bend[k][2 * h] = second.x, bend[k][2 * h + 1] = second.y;
                                along[h] += g_z1.x * pulled1[k][2 * h] + g_z1.y * pulled1[k][2 * h + 1];
                                along[h] += x.x * pulled_x2[k][2 * h] + x.y * pulled_x2[k][2 * h + 1];
                            }
                        }
                    } else {
                        float z1[FT][4], g_x2[FT][4] = {};
                        start_columns(z1, b1, t);
                        times_first<T, D>(z1, xk_tile, CHUNK * c, w1_r, lane);
                        times_second_t<T, D>(g_x2, g_z2_tile, CHUNK * c, w2_t, lane);
#pragma unroll
                        for (int e = 0; e < 4 * FT; e++) {
                            const int k = e / 4, i = e % 4, h = e / 2 % 2;
                            const GeluSecond y = gelu_second(z1[k][i]);
                            z1[k][i] = y.value, slope[k][i] = y.first, bend[k][i] = g_x2[k][i] * y.second;
                            g_x2[k][i] *= y.first;  // now x2 and g_z1
                            along[h] += g_x2[k][i] * pulled1[k][i] + z1[k][i] * pulled_x2[k][i];
                        }
                        x2_r = round_columns<T>(z1);
                        keep(slot(X2, c), x2_r, lane);
                        keep(slot(G_Z1, c), round_columns<T>(g_x2), lane);
                        keep(slot(SLOPE, c), round_columns<fp16>(slope), lane);
                    }
#pragma unroll
                    for (int e = 0; e < 4 * FT; e++)  // now d_g_z1 and d_x2
                        pulled1[e / 4][e % 4] *= step[e / 2 % 2], pulled_x2[e / 4][e % 4] *= step[e / 2 % 2];
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        along[h] += shuffle_xor(along[h], 1), along[h] += shuffle_xor(along[h], 2);
                        if (t == 0) s.along[warp][CHUNK * c + g + 8 * h] = along[h];
                    }
                    float part[S::PIECE / 8][4] = {};
                    uint32_t p[4];
                    times_second<T, D>(part, x2_r, d_w2_r);
                    scale_rows(part, step);
                    if (CAUSAL) {
#pragma unroll 1
                        for (int i = c; i < CHUNKS; i++) {
                            const int number = i * (i + 1) / 2 + c;
                            const Columns x2_bar_t = kept(slot(X2_BAR, i), lane);
                            Square attn1 = load_square<T, Shared::WIDE>(s.attn1[number], lane);
                            Square d_scores2 = load_square<T, Shared::WIDE>(s.d_scores2[number], lane), d_eta, read2;
                            float attn2[2][4] = {};
                            scores<T>(attn2, transpose(x2_bar_t), x2_r);
#pragma unroll
                            for (int e = 0; e < 8; e++) {
                                const float eta = eta_of(i, c, e),
                                            attn = attn2[e / 4][e % 4] + (warp + rank == 0 ? 1.0f : 0.0f);
                                d_eta.x[e] = d_scores2.x[e] * attn;  // d_scores2 is 0 above the diagonal
                                attn1.x[e] *= -eta, d_scores2.x[e] *= eta, read2.x[e] = -eta * attn;
                            }
                            add_d_eta(d_eta, i, c);
                            square_as_a<T>(p, attn1);
                            transpose_a(p);
                            times_columns<T>(pulled1, p, kept(slot(D_Z1_BAR, i), lane));
                            square_as_a<T>(p, d_scores2);
                            transpose_a(p);
                            times_columns<T>(pulled_x2, p, x2_bar_t);
                            square_as_a<T>(p, read2);
                            transpose_a(p);
                            times_rows<T, D>(part, p, d_z2_bar_tile, CHUNK * i, lane);
                        }
                    }
#pragma unroll
                    for (int e = 0; e < 4 * FT; e++) {
                        const int k = e / 4, i = e % 4;
                        bend[k][i] =
                            pulled1[k][i] * bend[k][i] + pulled_x2[k][i] * slope[k][i];  // of d_z1, without d_z2
                        pulled1[k][i] *= slope[k][i];                                             // d_g_x2
                    }
                    keep(slot(Z1, c), round_columns<T>(bend), lane);
                    const Columns d_g_x2 = round_columns<T>(pulled1);
                    keep(slot(G_X2, c), d_g_x2, lane);
                    times_second<T, D>(part, d_g_x2, second_r_of(n - begin));
                    post(part, true);
#pragma unroll
                    for (int from = S::PIECE; from < D; from += S::PIECE) {
                        fill(part, 0);
                        times_second<T, D>(part, x2_r, d_w2_r, from);
                        scale_rows(part, step);
                        if (CAUSAL) times_rows<T, D>(part, p, d_z2_bar_tile, 0, lane, from);
                        times_second<T, D>(part, d_g_x2, second_r_of(n - begin), from);
                        post_more(part, from);
                    }
                    if (SPLIT == 1) {
                        const NormOf<D> norm = norm_of(n, CHUNK * c + at.token);
                        const Values<D> error = inner_error(norm, n, CHUNK * c + at.token);
                        second_order(take(), c, norm, error);
                        continue;
                    }
                    const Values<D> d_g = take();
                    if (has_place<D>(thread))
                        s.mine[c][thread] = d_g, send(d_g, s.sent[turn][c][thread], &s.there[turn]);
                }
            }
            float along = 0, d_lr_read = 0;  // of token `thread`
            auto sum_along = [&]() {
                if (thread >= M) return;
                for (int w = 0; w < S::WARPS; w++) {
                    along += s.along[w][thread];
                    if (CAUSAL) d_lr_read += s.lr_part[w][thread];
                }
            };
            if (SPLIT == 2) {
                sync();
                sum_along();
                if (rank == 1 && thread < M) {
                    const float sums[2][1] = {{along}, {d_lr_read}};
                    store_async(s.sent_along[turn] + thread, sums[0], &s.there[turn], 0);
                    store_async(s.sent_lr[turn] + thread, sums[1], &s.there[turn], 0);
                }
                refresh();
                NormOf<D> norm[CHUNKS];
                Values<D> error[CHUNKS];
#pragma unroll
                for (int c = 0; c < CHUNKS && has_place<D>(thread); c++) {
                    const int row = CHUNK * c + at.token;
                    norm[c] = norm_of(n, row), error[c] = inner_error(norm[c], n, row);
                }
                mbarrier_wait(&s.there[turn], round / TURNS % 2);
                const auto& sent = s.sent[turn];
#pragma unroll
                for (int c = 0; c < CHUNKS && has_place<D>(thread); c++)
                    second_order(both(c, sent[c][thread]), c, norm[c], error[c]);
#pragma unroll
                for (int c = 0; c < CHUNKS; c += 2)
                    if (c + rank < CHUNKS && has_place<D>(thread))
                        write_d_xq(both(CHUNKS + c / 2, sent[CHUNKS + c / 2][thread]), c + rank);
                if (rank == 0 && thread < M)
                    along += s.sent_along[turn][thread], d_lr_read += s.sent_lr[turn][thread];
            }
            share_b2();
            sync();
            add_b2();
            if (SPLIT == 1) sum_along();
            if (rank == 0 && thread < M) {
                along += s.along_b2[thread];
                d_eta_last -= lr_n[thread] * along;
                s.base.d_lr[(int64_t(n) * M + thread) * a.heads] = from_float<T>(d_lr_read - eta_last * along);
            }

            refresh();
            // First: d_z1 and d_xk.
            float step_b1[2 * FT] = {};
            {
                const auto w1_t = first_t_of(n - begin);
                const auto w2_t = second_t_of(n - begin);
#pragma unroll 1
                for (int c = 0; c < CHUNKS; c++) {
                    if (CHUNKS > 1) refresh();
                    if (CHUNKS > 1) pin(d_w1);
                    const float step[2] = {scale * lr_n[CHUNK * c + g], scale * lr_n[CHUNK * c + g + 8]};
                    float part[S::PIECE / 8][4] = {}, d_z1[FT][4] = {};
                    times_first_t<T, D>(part, kept(slot(G_Z1, c), lane), transpose(round_first<T, D>(d_w1)));
                    scale_rows(part, step);
                    times_second_t<T, D>(d_z1, s.d_z2, CHUNK * c, w2_t, lane);
                    const Columns slope = kept(slot(SLOPE, c), lane), known = kept(slot(Z1, c), lane);
#pragma unroll
                    for (int k = 0; k < FT; k++)
                        for (int h = 0; h < 2; h++) {
                            const float2 y = unpack<fp16>(slope.x[k][h]), u = unpack<T>(known.x[k][h]);
                            d_z1[k][2 * h] = d_z1[k][2 * h] * y.x + u.x,
                                        d_z1[k][2 * h + 1] = d_z1[k][2 * h + 1] * y.y + u.y;
                        }
                    add_columns(step_b1, d_z1);
                    const Columns d_z1_r = round_columns<T>(d_z1);
                    keep(slot(Z1, c), transpose(d_z1_r), lane);
                    times_first_t<T, D>(part, d_z1_r, w1_t);
                    if (CAUSAL) {
#pragma unroll 1
                        for (int i = c; i < CHUNKS; i++) {
                            const int number = i * (i + 1) / 2 + c;
                            Words p = work_attn(number);
                            transpose_a(p.x);
                            times_rows<T, D>(part, p.x, xq_tile, CHUNK * i, lane);
                        }
                    }
                    if (AHEAD && n > begin) arrived(n - 1);  // the sum's barrier is behind it
                    post(part);
#pragma unroll
                    for (int from = S::PIECE; from < D; from += S::PIECE) {
                        fill(part, 0);
                        times_first_t<T, D>(part, kept(slot(G_Z1, c), lane), transpose(round_first<T, D>(d_w1)), from);
                        scale_rows(part, step);
                        times_first_t<T, D>(part, d_z1_r, w1_t, from);
                        if (CAUSAL) {
                            Words p = work_attn(0);
                            transpose_a(p.x);
                            times_rows<T, D>(part, p.x, xq_tile, 0, lane, from);
                        }
                        post_more(part, from);
                    }
                    update_second<T, D>(d_w2, transpose(kept(slot(X2, c), lane)), s.d_z2, CHUNK * c, lane);
                    update_second<T, D>(d_w2, transpose(kept(slot(G_X2, c), lane)), g_z2_tile, CHUNK * c, lane);
                    if (CAUSAL) update_second<T, D>(d_w2, kept(slot(X2_BAR, c), lane), d_z2_bar_tile, CHUNK * c, lane);
                    const Values<D> sum = take();
                    if (SPLIT == 1) write_d_xk(sum, c);
                    else if (!has_place<D>(thread)) continue;
                    else if (c % 2 == rank) s.mine[CHUNKS + c / 2][thread] = sum;
                    else send(sum, s.sent_d_xk[c / 2][thread], &s.d_xk_there);
                }
            }

            refresh();
            // Weights of the first layer: those of the second are done.
            if (n > begin) fetch_weights(n - 1 - begin);
            if (AHEAD && n > begin) norms(n - 1);
#pragma unroll 1
            for (int c = 0; c < CHUNKS; c++) {
                update_first<T, D>(d_w1, kept(slot(Z1, c), lane), xk_tile, CHUNK * c, lane);
                if (CAUSAL) update_first<T, D>(d_w1, kept(slot(D_Z1_BAR, c), lane), xq_tile, CHUNK * c, lane);
            }
            const float step = sum_columns(step_b1, lane) + (CAUSAL ? read_b1_sum : 0.0f);
            if (owns_column(lane)) d_b1[column_of(lane)] += step;
            if (SPLIT == 2) {
                if (own_chunks) mbarrier_wait(&s.d_xk_there, round % 2);
                for (int c = rank; c < CHUNKS && has_place<D>(thread); c += 2)
                    write_d_xk(both(CHUNKS + c / 2, s.sent_d_xk[c / 2][thread]), c);
                if (STAGES == 1) sync();
            } else if (STAGES == 1) sync();
            if (STAGES == 1 && n > begin) fetch(n - 1, true);
        }
        if (number > 0) save_weights<D>(work_d_w(), d_w1, d_w2, thread);
        else
            store_weights<D>(
                a.d_w1 + chain * F * D, a.d_w2 + chain * F * D, d_w1, d_w2, rank * S::OWN + warp * SLICE, lane
            );
    }

    // What is left: the first state's biases, and this chain's part of what is summed over the batch and time.
    sync();
    if (thread < S::OWN) a.d_b1[chain * F + rank * S::OWN + thread] = s.d_b1[thread];
    float* last = s.partials[0];
    if (thread < M) last[thread] = d_eta_last;
    if (has_place<D>(thread)) {
        Values<D> d_gamma = s.d_gamma[thread], d_beta = s.d_beta[thread];
#pragma unroll
        for (int i = 0; i < EACH; i++)
            d_gamma.x[i] = sum_tokens<D>(d_gamma.x[i]), d_beta.x[i] = sum_tokens<D>(d_beta.x[i]);
        if (lane < S::LANES)
            for (int i = 0; i < EACH; i++) {
                last[M + warp * 2 * D + at.d + i] = d_gamma.x[i], last[M + warp * 2 * D + D + at.d + i] = d_beta.x[i];
                if (warp + rank == 0) a.d_b2[chain * D + at.d + i] = d_b2[i];
            }
    }
    sync();
    for (int i = thread; i < M; i += S::THREADS) {
        float sum = 0;
        if (CAUSAL)
            for (int w = 0; w < S::WARPS; w++) sum += s.eta_part[w][i];
        if (i == M - 1 && rank == 0)
            for (int k = 0; k < M; k++) sum += last[k];
        a.d_token_eta[blockIdx.x * M + i] = sum;
    }
    for (int i = thread; i < 2 * D && rank == 0; i += S::THREADS) {
        float sum = 0;
        for (int w = 0; w < S::PLACE_WARPS; w++) sum += last[M + w * 2 * D + i];
        (i < D ? a.d_ln_weight : a.d_ln_bias)[chain * D + i % D] = sum;
    }
}

}  // namespace ttt
