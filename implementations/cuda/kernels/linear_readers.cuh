// The warps of TTT-Linear's kernels that are not the recurrence: they load tokens, and read what it hands over.
#pragma once
#include "linear_plan.cuh"

namespace ttt {

// A reader's work apart from what it computes: loading tokens ahead, and taking over and giving back slots.
// `work.load(step, stage, row)` issues the copies of 16 tokens, `work.lr(step, row)` gives the lr of one;
// `work.early(stage)` may start on them before the slot is full, and `work.read(step, slot, stage, i, row)` follows.
template <typename P, typename Work> TTT_INLINE void reader(const P& at, int index, int steps, Work& work) {
    const int group = index / P::TEAM, member = index % P::TEAM;
    const int turns = (steps - group + P::GROUPS - 1) / P::GROUPS;
    auto row = [&](int i) { return 16 * (member + P::TEAM * i); };  // first token of this reader's tile i
    auto stage_of = [&](int turn) { return group * P::STAGES + turn % P::STAGES; };
    auto slot_of = [&](int turn) { return group * P::SLOTS + turn % P::SLOTS; };
    auto load = [&](int turn) {
        if (turn < turns)
            for (int i = 0; i < P::TURN / 16; i++) work.load(turn * P::GROUPS + group, stage_of(turn), row(i));
        copy_async_commit();
    };
    const int lr_row = row(lane_id() / 16) + lane_id() % 16;
    auto load_lr = [&](int turn) {
        return lane_id() < P::TURN && turn < turns ? work.lr(turn * P::GROUPS + group, lr_row) : 0.0f;
    };
    auto hand_over = [&](int turn, float lr) {  // the tokens have come
        if (turn >= turns) return;
        if (lane_id() < P::TURN) at.lr(stage_of(turn))[lr_row] = lr;
        named_arrive(P::come(turn, slot_of(turn)), P::HAND_OVER);
    };
    constexpr int LEAD = P::APART ? 1 : P::SLOTS;  // turns that tokens are handed over before
    for (int turn = 0; turn < P::STAGES - P::SLOTS; turn++) load(turn);
    copy_async_wait<P::STAGES - P::SLOTS - LEAD>();
    for (int turn = 0; turn < LEAD; turn++) hand_over(turn, load_lr(turn));

    float lr = load_lr(LEAD);
    for (int turn = 0; turn < turns; turn++) {
        if (P::APART) {
            copy_async_wait<P::AHEAD>();
            hand_over(turn + LEAD, lr);
            lr = load_lr(turn + LEAD + 1);
        }
        if (P::TEAM == 1) {
            sync_warp();  // every lane's copies have come
            work.early(stage_of(turn));
        }
        named_sync(P::full(slot_of(turn)), P::HAND_OVER);
        load(turn - P::SLOTS + P::STAGES);  // all of the team have left turn - SLOTS
        for (int i = 0; i < P::TURN / 16; i++)
            work.read(turn * P::GROUPS + group, slot_of(turn), stage_of(turn), i, row(i));
        if (P::APART) {
            if (turn + P::SLOTS < turns) named_arrive(P::free(slot_of(turn)), P::HAND_OVER);
        } else {
            copy_async_wait<P::AHEAD>();
            hand_over(turn + LEAD, lr);
            lr = load_lr(turn + LEAD + 1);
        }
    }
}

// z1_bar = xq w1 + b1 - (eta * (tril(xq xk^T) + tril(1))) g_z1 of 16 tokens; not causal, w1 and b1 are the updated ones.
template <typename P> struct ReadOut {
    using T = typename P::T;
    static constexpr int D = P::D;
    const P& at;
    uint32_t xq[D / 16][4];
    float attn[2][4];  // xq xk^T + 1 of 16 tokens and 16 keys

    TTT_INLINE void attend(int stage, int row, int key) {
        product_16(attn, xq, at.xk(stage), key);
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int query = row + row_in_tile() + i / 2 * 8, column = key + 8 * h + column_in_tile() + i % 2;
                attn[h][i] = column <= query ? attn[h][i] + 1.0f : 0.0f;
            }
    }
    TTT_INLINE void early(int stage) {
        load_operand(xq, at.xq(stage), 0);
        if (P::CAUSAL) attend(stage, 0, 0);
    }
    // z becomes x_hat of the read-out's LayerNorm, and rstd its 1 / std, of both rows.
    TTT_INLINE void normalised(int slot, int stage, int row, float (&z)[D / 8][4], float (&rstd)[2]) {
        if (P::TEAM > 1) load_operand(xq, at.xq(stage), row);
#pragma unroll
        for (int j = 0; j < D / 8; j++) {
            const float2 b = *reinterpret_cast<const float2*>(at.b(slot) + 8 * j + column_in_tile());
            z[j][0] = z[j][2] = b.x, z[j][1] = z[j][3] = b.y;
        }
        add_product(z, xq, at.w(slot));
        if (P::CAUSAL)
            for (int key = 0; key <= row; key += 16) {
                if (P::TEAM > 1) attend(stage, row, key);
                const float *eta = at.token_eta() + row + row_in_tile(), *lr = at.lr(stage) + key + column_in_tile();
                uint32_t scores[4];
#pragma unroll
                for (int h = 0; h < 2; h++)
#pragma unroll
                    for (int r = 0; r < 2; r++)
                        scores[2 * h + r] = pack<T>(-eta[8 * r] * lr[8 * h] * attn[h][2 * r],
                                                    -eta[8 * r] * lr[8 * h + 1] * attn[h][2 * r + 1]);
                add_product_16(z, scores, at.g(slot), key);
            }
        // A row is in the four lanes of a quad.
        float mean[2] = {};
        rstd[0] = rstd[1] = 0.0f;
#pragma unroll
        for (int j = 0; j < D / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) mean[i / 2] += z[j][i];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            mean[r] += shuffle_xor(mean[r], 1);
            mean[r] = (mean[r] + shuffle_xor(mean[r], 2)) / D;
        }
#pragma unroll
        for (int j = 0; j < D / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                z[j][i] -= mean[i / 2];
                rstd[i / 2] += z[j][i] * z[j][i];
            }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            rstd[r] += shuffle_xor(rstd[r], 1);
            rstd[r] = rsqrt((rstd[r] + shuffle_xor(rstd[r], 2)) / D + *at.eps());
        }
#pragma unroll
        for (int j = 0; j < D / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) z[j][i] *= rstd[i / 2];
    }
};

}  // namespace ttt
