// Runs the kernels on the host, for tests without a GPU: a thread is a fiber, so barriers and shuffles are exact and every
// run is deterministic. Blocks and threads run forwards or backwards; what depends on their order differs between the two.

#include <csetjmp>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <ucontext.h>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define DYNAMIC_SHARED(name) uint4* name = (uint4*)emulator::dynamic_shared

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct dim3 {
    unsigned x, y, z;
};
static dim3 threadIdx, blockIdx, blockDim, gridDim;

inline float __uint_as_float(unsigned x) {
    float y;
    memcpy(&y, &x, 4);
    return y;
}
inline unsigned __float_as_uint(float x) {
    unsigned y;
    memcpy(&y, &x, 4);
    return y;
}

namespace emulator {
struct Barrier {
    unsigned expected = 0, arrived = 0, generation = 0;
};
struct Fiber {
    ucontext_t start;
    jmp_buf at;
    bool started = false, done = false;
};
static std::vector<Fiber> fibers;
static std::vector<Barrier> warps;
static std::vector<unsigned long long> slots;
static Barrier block;
static jmp_buf scheduler;
static unsigned current;
static bool progress;
static char* dynamic_shared;
static std::function<void()> body;
static const size_t STACK = 64 << 10;
static std::vector<std::unique_ptr<char[]>> stacks; // never cleared: most of each is never touched

inline void yield() {
    if (_setjmp(fibers[current].at) == 0) _longjmp(scheduler, 1);
}

inline void wait(Barrier& barrier) {
    const unsigned generation = barrier.generation;
    if (++barrier.arrived == barrier.expected) {
        barrier.arrived = 0;
        barrier.generation++;
        progress = true;
    } else {
        while (barrier.generation == generation) yield();
        progress = true;
    }
}

static void entry() {
    body();
    fibers[current].done = progress = true;
    _longjmp(scheduler, 1);
}

static void resume(unsigned index) {
    current = index;
    threadIdx.x = index;
    Fiber& fiber = fibers[index];
    if (_setjmp(scheduler) == 0) {
        if (fiber.started) _longjmp(fiber.at, 1);
        fiber.started = true;
        setcontext(&fiber.start);
    }
}

// Runs one block, each warp as far ahead as it gets: what lacks a barrier reads too early or too late. False when threads
// wait for others that will not come.
static bool run_block(unsigned threads, bool reverse) {
    block = Barrier();
    block.expected = threads;
    warps.assign((threads + 31) / 32, Barrier());
    for (auto& warp : warps) warp.expected = 32;
    for (unsigned i = 0; i < threads; i++) {
        Fiber& fiber = fibers[i];
        fiber.started = fiber.done = false;
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = stacks[i].get();
        fiber.start.uc_stack.ss_size = STACK;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, entry, 0);
    }
    for (;;) {
        bool open = false, moved = false;
        for (unsigned i = 0; i < threads; i += 32) {
            do {
                progress = false;
                for (unsigned j = i; j < i + 32; j++) {
                    const unsigned index = reverse ? threads - 1 - j : j;
                    if (fibers[index].done) continue;
                    resume(index);
                    open = true;
                }
                moved |= progress;
            } while (progress);
        }
        if (!open) return true;
        if (!moved) return false;
    }
}

template <typename V> V shuffle(V value, unsigned source) {
    Barrier& warp = warps[current / 32];
    const unsigned first = current / 32 * 32;
    memcpy(&slots[current], &value, sizeof value);
    wait(warp);
    memcpy(&value, &slots[first + source % 32], sizeof value);
    wait(warp);
    return value;
}

// One letter for each parameter: f, i, or for a pointer what it points to.
template <typename A> char letter(A*);
template <> inline char letter(float**) { return 'F'; }
template <> inline char letter(const float**) { return 'F'; }
template <> inline char letter(double**) { return 'D'; }
template <> inline char letter(const double**) { return 'D'; }
template <> inline char letter(const long long**) { return 'L'; }
template <> inline char letter(unsigned char**) { return 'U'; }
template <> inline char letter(void**) { return '*'; }
template <> inline char letter(long long*) { return 'i'; }
template <> inline char letter(float*) { return 'f'; }

struct Kernel {
    std::string name, letters;
    std::function<void(void**)> call;
};
static std::vector<Kernel> kernels;

template <typename... A, size_t... I> void unpack(void (*kernel)(A...), void** cells, std::index_sequence<I...>) {
    kernel(*(A*)cells[I]...);
}

template <typename... A> int add(const char* name, void (*kernel)(A...)) {
    kernels.push_back({name, {letter((A*)nullptr)...}, [kernel](void** cells) {
                           unpack(kernel, cells, std::index_sequence_for<A...>());
                       }});
    return 0;
}

static bool fits(const std::string& have, const std::string& got) {
    if (have.size() != got.size()) return false;
    for (size_t i = 0; i < have.size(); i++) {
        const bool pointer = have[i] == '*' || (have[i] >= 'A' && have[i] <= 'Z');
        const bool any = pointer && (got[i] == '0' || (have[i] == '*' && got[i] >= 'A' && got[i] <= 'Z'));
        if (have[i] != got[i] && !any) return false;
    }
    return true;
}

static std::string launch(const char* name, const char* letters, unsigned blocks, unsigned threads, size_t shared,
                          void** cells, bool reverse) {
    const Kernel* kernel = nullptr;
    for (auto& candidate : kernels)
        if (candidate.name == name) kernel = &candidate;
    if (!kernel) return "no such kernel";
    if (!fits(kernel->letters, letters)) return "takes " + kernel->letters + ", got " + letters;
    if (blocks == 0 || threads == 0 || threads > 1024 || threads % 32) return "a grid that no GPU takes";
    const size_t guard = 64;
    std::vector<char> memory(shared + 2 * guard + 16, (char)0xff);
    while (stacks.size() < threads) stacks.emplace_back(new char[STACK]);
    dynamic_shared = (char*)(((size_t)memory.data() + guard + 15) & ~(size_t)15);
    fibers.resize(threads);
    slots.resize(threads);
    gridDim = {blocks, 1, 1};
    blockDim = {threads, 1, 1};
    body = [&] { kernel->call(cells); };
    for (unsigned i = 0; i < blocks; i++) {
        blockIdx = {reverse ? blocks - 1 - i : i, 0, 0};
        memset(dynamic_shared, 0xff, shared);
        if (!run_block(threads, reverse)) return "threads wait at a barrier that others never reach";
    }
    for (char* at = memory.data(); at < memory.data() + memory.size(); at++)
        if ((at < dynamic_shared || at >= dynamic_shared + shared) && *at != (char)0xff) return "shared memory overrun";
    return "";
}
} // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::block); }
template <typename V> V __shfl_xor_sync(unsigned, V value, int mask) {
    return emulator::shuffle(value, threadIdx.x % 32 ^ mask);
}

// Empty on success, else what is wrong.
extern "C" void emulator_launch(const char* name, const char* letters, unsigned blocks, unsigned threads, size_t shared,
                                void** cells, int reverse, char* error, size_t error_bytes) {
    snprintf(error, error_bytes, "%s",
             emulator::launch(name, letters, blocks, threads, shared, cells, reverse).c_str());
}
