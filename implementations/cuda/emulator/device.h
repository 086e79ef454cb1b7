// CUDA on a CPU, for tests: the kernels of ../kernels compiled by g++, every CUDA thread a fiber with its own stack.
//
// The fibers of a block (of all blocks of a cluster) take turns on one CPU thread, and one runs until it has to wait: at
// a barrier, or for the other lanes of its warp, of which the last to come computes for all of them. It is strict where
// a GPU is silent: shared memory starts as NaN, what an asynchronous copy or store will overwrite is NaN from its issue
// to its wait, and a barrier that some threads never reach, bytes at an mbarrier that nobody expects or waits for,
// lanes at different primitives, bad alignment and writes past the end of shared memory are errors. It does not see
// races, but `order` 1 runs threads in the opposite order.
#pragma once

#include <sys/mman.h>

#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <vector>
#if !defined(__x86_64__) || defined(TTT_UCONTEXT)
#define TTT_UCONTEXT  // no switch of our own here
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) alignas(bytes)
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define TTT_INLINE inline
#define TTT_SHARED(name) unsigned char* const name = ::ttt::emulator::current->block->shared

struct uint3 { unsigned x, y, z; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
template <typename T> T min(T a, T b) { return b < a ? b : a; }
template <typename T> T max(T a, T b) { return a < b ? b : a; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __uint_as_float(uint32_t x) { float y; std::memcpy(&y, &x, 4); return y; }
inline uint32_t __float_as_uint(float x) { uint32_t y; std::memcpy(&y, &x, 4); return y; }
template <typename T> T __ldg(const T* p) { return *p; }

namespace ttt {
namespace emulator {

constexpr size_t STACK = 256 << 10, GUARD = 256;  // bytes
constexpr int BARRIERS = 16;
constexpr unsigned char POISON = 0xff;  // a NaN in fp32, bf16 and fp16

struct Block;
struct Thread;

struct Warp {
    const char* primitive = nullptr;
    int arrived = 0;
    void* lane[32];
    Thread* thread[32];
};

struct Barrier {
    int expected = 0, arrived = 0;
    std::vector<Thread*> waiting;
};

struct Store { unsigned char* to; float value; };

// What `Mbarrier` in shared memory stands for.
struct Transactions {
    int arrivals = 0, parity = 0;
    long bytes = 0;  // to come; fewer than 0 while none has said how many
    std::vector<Store> stores, landed;
    std::vector<Thread*> waiting;
};

struct Copy { void* to; const void* from; size_t bytes; int group; };

struct Thread {
    uint3 index;
    Block* block;
    Warp* warp;
    const char* waits_at = nullptr;
    int group = 0;  // the group that asynchronous copies are issued to
    std::vector<Copy> copies;
    char* stack;
#ifndef TTT_UCONTEXT
    void* context;  // its stack pointer while another one runs
#else
    ucontext_t context;
#endif
};

struct Block {
    uint3 index;
    int rank;
    unsigned char* shared;
    Barrier barrier[BARRIERS];
    std::map<const void*, Transactions> transactions;
};

// One launch at a time: the caller holds a lock.
inline Thread* current;
inline Thread host;  // the caller of `run`, which the fibers return to
inline uint3 block_size, grid_size;
inline std::vector<Thread*> ready;  // a ring: those that may run
inline size_t first_ready, ready_count;
inline std::vector<Block>* blocks;  // of the cluster that runs
inline Barrier cluster_barrier;
inline size_t shared_bytes;
inline int order, finished;
inline char error[512];
inline void (*body)(const void*);
inline const void* arguments;

#ifndef TTT_UCONTEXT
extern "C" void ttt_emulator_switch(void** save, void* to) __attribute__((visibility("hidden")));
// What a function must leave as it found it goes on the stack; the rest the caller has saved.
asm(R"(
.text
.type ttt_emulator_switch, @function
ttt_emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
inline void switch_to(Thread* next) {
    Thread* me = current;
    current = next;
    ttt_emulator_switch(&me->context, next->context);
}
inline void prepare(Thread& thread, void (*start)()) {
    // As `switch_to` leaves a stack: six registers, the return address; then a function finds its stack 8 off 16.
    void** top = reinterpret_cast<void**>(thread.stack + STACK) - 8;
    top[6] = reinterpret_cast<void*>(start);
    thread.context = top;
}
#else
inline void switch_to(Thread* next) {
    Thread* me = current;
    current = next;
    swapcontext(&me->context, &next->context);
}
inline void prepare(Thread& thread, void (*start)()) {
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack;
    thread.context.uc_stack.ss_size = STACK;
    makecontext(&thread.context, start, 0);
}
#endif

// Ends the launch: the first fault counts.
[[noreturn]] inline void fail(const char* format, ...) {
    std::va_list values;
    va_start(values, format);
    int length = std::snprintf(error, sizeof error, "block %u, thread %u: ", current->block->index.x, current->index.x);
    std::vsnprintf(error + length, sizeof error - length, format, values);
    va_end(values);
    switch_to(&host);
    __builtin_unreachable();
}

inline void wake(Thread* thread) {
    ready[(first_ready + ready_count++) % ready.size()] = thread;
}

inline void run_another() {
    Thread* next = &host;
    if (ready_count) {
        next = ready[first_ready];
        first_ready = (first_ready + 1) % ready.size();
        ready_count--;
    }
    switch_to(next);
}

inline void wait_at(const char* place) {
    current->waits_at = place;
    run_another();
    current->waits_at = nullptr;
}

inline void wake_all(Thread** threads, int count) {
    for (int i = 0; i < count; i++) wake(threads[order ? count - 1 - i : i]);
}

inline void arrive(Barrier& barrier, int expected, bool wait, const char* name) {
    if (barrier.arrived && barrier.expected != expected)
        fail("%s of %d threads, where others wait for %d", name, expected, barrier.expected);
    barrier.expected = expected;
    if (++barrier.arrived == expected) {
        barrier.arrived = 0;
        std::vector<Thread*> woken;
        woken.swap(barrier.waiting);
        wake_all(woken.data(), int(woken.size()));
    } else if (wait) {
        barrier.waiting.push_back(current);
        wait_at(name);
    }
}

// All lanes of a warp bring their `mine`; the last one runs compute(Mine* of lane 0, ...).
template <typename Mine, typename Compute> void together(const char* name, Mine& mine, Compute compute) {
    Warp& warp = *current->warp;
    if (warp.arrived && std::strcmp(warp.primitive, name))
        fail("%s, where other lanes of the warp are at %s", name, warp.primitive);
    warp.primitive = name;
    warp.lane[current->index.x % 32] = &mine;
    if (++warp.arrived < 32) return wait_at(name);
    warp.arrived = 0;
    Mine* lanes[32];
    for (int i = 0; i < 32; i++) lanes[i] = static_cast<Mine*>(warp.lane[i]);
    compute(lanes);
    for (int i = 0; i < 32; i++) {
        Thread* thread = warp.thread[order ? 31 - i : i];
        if (thread != current) wake(thread);
    }
}

inline void check_shared(const void* pointer, size_t bytes, const char* name) {
    auto p = static_cast<const unsigned char*>(pointer);
    if (reinterpret_cast<uintptr_t>(p) % bytes)
        fail("%s: an address in shared memory is no multiple of %zu", name, bytes);
    const Block& block = *current->block;
    if (p < block.shared || p + bytes > block.shared + shared_bytes)
        fail("%s: byte %td is not within the %zu bytes of shared memory", name, p - block.shared, shared_bytes);
}

inline void start() {
    body(arguments);
    finished++;
    run_another();
    __builtin_unreachable();
}

inline void explain_deadlock(const std::vector<Thread>& threads) {
    for (const Thread& thread : threads)
        if (thread.waits_at) {
            int same = 0;
            for (const Thread& other : threads) same += other.waits_at && !std::strcmp(other.waits_at, thread.waits_at);
            std::snprintf(error, sizeof error, "block %u, thread %u waits forever at %s, as do %d of %zu threads; %d have "
                          "finished", thread.block->index.x, thread.index.x, thread.waits_at, same, threads.size(),
                          finished);
            return;
        }
}

// The kernel's `grid` blocks, `cluster` at a time; false and `error` if something is wrong.
inline bool run(int grid, int cluster, int threads_of_block, size_t shared) {
    if (threads_of_block % 32 || grid % cluster) {
        std::snprintf(error, sizeof error, "expected whole warps and whole clusters, got %d threads, %d blocks",
                      threads_of_block, grid);
        return false;
    }
    error[0] = 0;
    shared_bytes = shared;
    grid_size = {unsigned(grid), 1, 1};
    block_size = {unsigned(threads_of_block), 1, 1};
    const int count = threads_of_block * cluster;
    const size_t stacks = STACK * count;
    char* memory = static_cast<char*>(mmap(nullptr, stacks, PROT_READ | PROT_WRITE,
                                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (memory == MAP_FAILED) {
        std::snprintf(error, sizeof error, "no memory for %zu bytes of stacks", stacks);
        return false;
    }
    std::vector<unsigned char> storage(cluster * (shared + GUARD) + 128 * (cluster + 1));
    std::vector<Warp> warps(count / 32);
    std::vector<Thread> threads(count);
    for (int first = 0; first < grid && !error[0]; first += cluster) {
        std::vector<Block> together(cluster);
        unsigned char* place = storage.data();
        std::memset(place, POISON, storage.size());
        for (int rank = 0; rank < cluster; rank++) {
            place += (128 - reinterpret_cast<uintptr_t>(place) % 128) % 128;
            together[rank].index = {unsigned(first + rank), 0, 0};
            together[rank].rank = rank;
            together[rank].shared = place;
            place += shared + GUARD;
        }
        blocks = &together;
        cluster_barrier = Barrier();
        ready.assign(count, nullptr);
        first_ready = ready_count = 0;
        finished = 0;
        for (int i = 0; i < count; i++) {
            Thread& thread = threads[i];
            thread.index = {unsigned(i % threads_of_block), 0, 0};
            thread.block = &together[i / threads_of_block];
            thread.warp = &warps[i / 32];
            thread.warp->thread[i % 32] = &thread;
            thread.waits_at = nullptr;
            thread.copies.clear();
            thread.group = 0;
            thread.stack = memory + STACK * i;
            thread.warp->arrived = 0;
            prepare(thread, start);
        }
        for (int i = 0; i < count; i++) wake(&threads[order ? count - 1 - i : i]);
        current = &host;
        run_another();
        if (!error[0] && finished < count) explain_deadlock(threads);
        for (const Block& block : together)
            for (const auto& [place, t] : block.transactions)
                if (!error[0] && !(t.stores.empty() && t.landed.empty()))
                    std::snprintf(error, sizeof error, "block %u: ended before it had waited for what others stored",
                                  block.index.x);
        for (const Block& block : together)
            for (size_t i = 0; i < GUARD && !error[0]; i++)
                if (block.shared[shared + i] != POISON)
                    std::snprintf(error, sizeof error, "block %u: wrote byte %zu past the %zu bytes of shared memory",
                                  block.index.x, i, shared);
    }
    munmap(memory, stacks);
    return !error[0];
}

template <typename Arguments> void call(void (*kernel)(Arguments), const void* given) {
    kernel(*static_cast<const Arguments*>(given));
}

}  // namespace emulator

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

// --- Conversions ---

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
inline float to_float(fp16 x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = uint32_t(x.bits & 0x7fff) << 13;
    if (rest > 0x0f800000) return __uint_as_float(0x7fffffff);  // NaN
    if (rest == 0x0f800000) return __uint_as_float(sign | 0x7f800000);
    return __uint_as_float(sign | __float_as_uint(__uint_as_float(rest) * 0x1p112f));  // scaled: subnormals too
}

template <typename T> T from_float(float x);
template <> inline float from_float<float>(float x) { return x; }
template <> inline bf16 from_float<bf16>(float x) {
    const uint32_t u = __float_as_uint(x);
    if (x != x) return {0x7fff};
    return {uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
template <> inline fp16 from_float<fp16>(float x) {
    const uint32_t u = __float_as_uint(x), sign = u >> 16 & 0x8000, rest = u & 0x7fffffff;
    if (x != x) return {0x7fff};
    if (rest >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // 65520 and more
    if (rest < 0x38800000)  // below 2^-14: 0.5 has the unit of a subnormal, so the addition rounds
        return {uint16_t(sign | (__float_as_uint(__uint_as_float(rest) + 0.5f) - 0x3f000000))};
    return {uint16_t(sign | ((rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13))};
}

template <typename T> uint32_t pack(float lo, float hi) {
    return from_float<T>(lo).bits | uint32_t(from_float<T>(hi).bits) << 16;
}
template <typename T> float2 unpack(uint32_t x) {
    return {to_float(T{uint16_t(x)}), to_float(T{uint16_t(x >> 16)})};
}

// --- Tensor cores ---

namespace emulator {

struct Product { float* d; const uint32_t* a; uint32_t b[2]; };

template <int K> void multiply(Product** lanes, const float (&a)[16][K], const float (&b)[K][8]) {
    float d[16][8];
    for (int i = 0; i < 32; i++)
        for (int j = 0; j < 4; j++) d[i / 4 + j / 2 * 8][i % 4 * 2 + j % 2] = lanes[i]->d[j];
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < K; k++)
            for (int j = 0; j < 8; j++) d[i][j] += a[i][k] * b[k][j];
    for (int i = 0; i < 32; i++)
        for (int j = 0; j < 4; j++) lanes[i]->d[j] = d[i / 4 + j / 2 * 8][i % 4 * 2 + j % 2];
}

struct Rows { uint32_t* r; const void* row; };

template <int COUNT, bool TRANS> void ldmatrix(const char* name, uint32_t* r, const void* row) {
    if (current->index.x % 32 < 8 * COUNT) check_shared(row, 16, name);
    Rows mine{r, row};
    together(name, mine, [](Rows** lanes) {
        for (int m = 0; m < COUNT; m++)
            for (int i = 0; i < 32; i++) {
                auto number = [&](int row, int column) -> uint32_t {
                    return static_cast<const uint16_t*>(lanes[8 * m + row]->row)[column];
                };
                const int g = i / 4, t = i % 4 * 2;
                lanes[i]->r[m] = TRANS ? number(t, g) | number(t + 1, g) << 16 : number(g, t) | number(g, t + 1) << 16;
            }
    });
}

template <typename T> struct Exchange { T value, result; int other; };

template <typename T> T exchange(const char* name, T x, int other) {
    Exchange<T> mine{x, x, other & 31};
    together(name, mine, [](Exchange<T>** lanes) {
        for (int i = 0; i < 32; i++) lanes[i]->result = lanes[lanes[i]->other]->value;
    });
    return mine.result;
}

}  // namespace emulator

template <typename T> void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulator::Product mine{d, a, {b0, b1}};
    emulator::together("mma", mine, [](emulator::Product** lanes) {
        float a[16][16], b[16][8];
        for (int i = 0; i < 32; i++) {
            const int g = i / 4, t = i % 4 * 2;
            for (int j = 0; j < 4; j++) {
                const float2 pair = unpack<T>(lanes[i]->a[j]);
                a[g + j % 2 * 8][t + j / 2 * 8] = pair.x;
                a[g + j % 2 * 8][t + j / 2 * 8 + 1] = pair.y;
            }
            for (int j = 0; j < 2; j++) {
                const float2 pair = unpack<T>(lanes[i]->b[j]);
                b[t + 8 * j][g] = pair.x;
                b[t + 8 * j + 1][g] = pair.y;
            }
        }
        emulator::multiply(lanes, a, b);
    });
}

inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulator::Product mine{d, a, {b0, b1}};
    emulator::together("mma_tf32", mine, [](emulator::Product** lanes) {
        float a[16][8], b[8][8];
        for (int i = 0; i < 32; i++) {
            for (int j = 0; j < 4; j++)
                a[i / 4 + j % 2 * 8][i % 4 + j / 2 * 4] = __uint_as_float(lanes[i]->a[j] & ~0x1fffu);
            for (int j = 0; j < 2; j++) b[i % 4 + 4 * j][i / 4] = __uint_as_float(lanes[i]->b[j] & ~0x1fffu);
        }
        emulator::multiply(lanes, a, b);
    });
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { emulator::ldmatrix<4, false>("ldmatrix_x4", r, row); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
    emulator::ldmatrix<4, true>("ldmatrix_x4_trans", r, row);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row) { emulator::ldmatrix<2, false>("ldmatrix_x2", r, row); }
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
    emulator::ldmatrix<2, true>("ldmatrix_x2_trans", r, row);
}

inline uint32_t movmatrix(uint32_t x) {
    uint32_t mine = x;
    emulator::together("movmatrix", mine, [](uint32_t** lanes) {
        uint16_t matrix[8][8];
        for (int i = 0; i < 32; i++) std::memcpy(&matrix[i / 4][i % 4 * 2], lanes[i], 4);
        for (int i = 0; i < 32; i++)
            *lanes[i] = matrix[i % 4 * 2][i / 4] | uint32_t(matrix[i % 4 * 2 + 1][i / 4]) << 16;
    });
    return mine;
}

// --- Copies ---

namespace emulator {

inline void copy_async(void* shared, const void* global, size_t bytes, const char* name) {
    check_shared(shared, bytes, name);
    if (reinterpret_cast<uintptr_t>(global) % bytes)
        fail("%s: an address in global memory is no multiple of %zu", name, bytes);
    std::memset(shared, POISON, bytes);
    current->copies.push_back({shared, global, bytes, current->group});
}

}  // namespace emulator

inline void copy_async_16(void* shared, const void* global) {
    emulator::copy_async(shared, global, 16, "copy_async_16");
}
inline void copy_async_4(void* shared, const void* global) { emulator::copy_async(shared, global, 4, "copy_async_4"); }
inline void copy_async_commit() { emulator::current->group++; }
template <int N> void copy_async_wait() {
    auto& copies = emulator::current->copies;
    size_t done = 0;
    while (done < copies.size() && copies[done].group < emulator::current->group - N) {
        std::memcpy(copies[done].to, copies[done].from, copies[done].bytes);
        done++;
    }
    copies.erase(copies.begin(), copies.begin() + done);
}

// --- Within a warp, a block, a cluster ---

inline float shuffle_xor(float x, int mask) {
    return emulator::exchange("shuffle_xor", x, emulator::current->index.x % 32 ^ mask);
}
inline uint32_t shuffle_xor(uint32_t x, int mask) {
    return emulator::exchange("shuffle_xor", x, emulator::current->index.x % 32 ^ mask);
}
inline float shuffle(float x, int lane) { return emulator::exchange("shuffle", x, lane); }
inline uint32_t shuffle(uint32_t x, int lane) { return emulator::exchange("shuffle", x, lane); }
inline void sync_warp() {
    int mine = 0;
    emulator::together("sync_warp", mine, [](int**) {});
}

inline void sync() {
    emulator::arrive(emulator::current->block->barrier[0], int(emulator::block_size.x), true, "sync");
}
inline void named(int id, int threads, bool wait, const char* name) {
    if (id < 1 || id >= emulator::BARRIERS || threads < 32 || threads % 32 || threads > int(emulator::block_size.x))
        emulator::fail("%s: no barrier %d of %d threads in a block of %u", name, id, threads, emulator::block_size.x);
    emulator::arrive(emulator::current->block->barrier[id], threads, wait, name);
}
inline void named_init(int, int) {}
inline void named_sync(int id, int threads) { named(id, threads, true, "named_sync"); }
inline void named_arrive(int id, int threads) { named(id, threads, false, "named_arrive"); }

inline void cluster_sync() {
    const int all = int(emulator::block_size.x * emulator::blocks->size());
    emulator::arrive(emulator::cluster_barrier, all, true, "cluster_sync");
}
inline int cluster_rank() { return emulator::current->block->rank; }

struct alignas(8) Mbarrier { unsigned long long state; };

namespace emulator {

// The same place in the shared memory of block `rank`.
inline unsigned char* cluster_address(const void* shared, int rank) {
    return (*blocks)[rank].shared + (static_cast<const unsigned char*>(shared) - current->block->shared);
}
inline Transactions& transactions_of(Block& block, const void* barrier, const char* name) {
    auto found = block.transactions.find(barrier);
    if (found == block.transactions.end()) fail("%s: no mbarrier was made there", name);
    return found->second;
}
inline void end_phase(Transactions& t) {
    if (!t.arrivals || t.bytes > 0) return;
    if (t.bytes < 0) fail("mbarrier: %ld bytes more than expected", -t.bytes);
    t.arrivals = 0, t.parity ^= 1;
    t.landed.insert(t.landed.end(), t.stores.begin(), t.stores.end());
    t.stores.clear();
    std::vector<Thread*> woken;
    woken.swap(t.waiting);
    wake_all(woken.data(), int(woken.size()));
}

}  // namespace emulator

inline void mbarrier_init(Mbarrier* barrier) {
    emulator::check_shared(barrier, sizeof *barrier, "mbarrier_init");
    emulator::current->block->transactions[barrier] = {};
}
inline void mbarrier_expect(Mbarrier* barrier, int bytes) {
    auto& t = emulator::transactions_of(*emulator::current->block, barrier, "mbarrier_expect");
    if (t.arrivals) emulator::fail("mbarrier_expect: the phase before is not over");
    t.arrivals = 1, t.bytes += bytes;
    emulator::end_phase(t);
}
inline void mbarrier_wait(Mbarrier* barrier, int parity) {
    auto& t = emulator::transactions_of(*emulator::current->block, barrier, "mbarrier_wait");
    while (t.parity == parity) {
        t.waiting.push_back(emulator::current);
        emulator::wait_at("mbarrier_wait");
    }
    for (const emulator::Store& store : t.landed) std::memcpy(store.to, &store.value, sizeof store.value);
    t.landed.clear();
}
template <int N> void store_async(float* to, const float (&x)[N], Mbarrier* barrier, int rank) {
    emulator::check_shared(to, N % 4 == 0 ? 16 : N % 2 == 0 ? 8 : 4, "store_async");
    unsigned char* const there = emulator::cluster_address(to, rank);
    emulator::Block& block = (*emulator::blocks)[rank];
    auto& t = emulator::transactions_of(block, emulator::cluster_address(barrier, rank), "store_async");
    std::memset(there, emulator::POISON, sizeof x);
    for (int i = 0; i < N; i++) t.stores.push_back({there + 4 * i, x[i]});
    t.bytes -= sizeof x;
    emulator::end_phase(t);
}

// --- Functions of the hardware, exactly ---

inline float rsqrt(float x) { return 1.0f / std::sqrt(x); }
inline float exp2(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1.0f / x; }

}  // namespace ttt

inline void __syncthreads() { ttt::sync(); }
inline void __syncwarp() { ttt::sync_warp(); }

// After the standard headers, in which these are names of other things.
#define threadIdx (::ttt::emulator::current->index)
#define blockIdx (::ttt::emulator::current->block->index)
#define blockDim (::ttt::emulator::block_size)
#define gridDim (::ttt::emulator::grid_size)
