#include "emulator.h"

#ifndef __x86_64__
#include <ucontext.h>
#endif

#include <bit>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <unordered_map>
#include <utility>
#include <vector>

#ifdef __x86_64__
// Saves the registers that a call keeps and its stack in *from, and goes on with those of `to`:
// what swapcontext does, without its two system calls, which would take nine tenths of a test's
// time.
extern "C" void icecache_switch_fibre(void** from, void* to);
asm(R"(
  .text
  .globl icecache_switch_fibre
  .type icecache_switch_fibre, @function
icecache_switch_fibre:
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
  .size icecache_switch_fibre, . - icecache_switch_fibre
)");
#endif

namespace emulator {

constinit thread_local dim3 thread_index, block_index, block_size, grid_size;
std::size_t device_room = std::size_t{1} << 40;
int multiprocessors = 8;

namespace {

constexpr std::size_t kStack = 64 << 10;
constexpr std::size_t kStagger = 320;
constexpr int kWarp = 32;

// Where a thread of execution stands while it does not run.
struct Context {
#ifdef __x86_64__
  void* stack_pointer = nullptr;

  void start(char* stack, void (*entry)()) {
    auto** top = reinterpret_cast<void**>(stack + kStack);  // aligned to 16 bytes
    top[-1] = nullptr;                                      // entry() never returns
    top[-2] = reinterpret_cast<void*>(entry);
    for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
    stack_pointer = top - 8;
  }
  static void change(Context& from, Context& to) {
    icecache_switch_fibre(&from.stack_pointer, to.stack_pointer);
  }
#else
  ucontext_t context;

  void start(char* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  static void change(Context& from, Context& to) {
    swapcontext(&from.context, &to.context);
  }
#endif
};

struct Warp {
  std::uint64_t values[2][kWarp] = {};
  int arrived = 0, number = 0;
  // A bit for each lane: it can go on; it waits for the block's barrier.
  std::uint32_t ready = ~std::uint32_t{0}, at_barrier = 0;
};

// The block that this host thread runs. Each of its threads is a fibre. The address sanitizer is not told
// when fibres change, which would take a fifth of a test's time: it needs that for exceptions, which no
// kernel throws, and still watches what is on their stacks.
struct Block {
  std::vector<Context> fibres;
  std::vector<Warp> warps;
  std::unique_ptr<char[]> stacks;
  Context scheduler;
  const std::function<void()>* kernel = nullptr;
  int running = 0, live = 0;
  int arrived = 0, barrier = 0, count = 0, counts[2] = {};

  Warp& warp() { return warps[running / kWarp]; }  // that of the running fibre
  std::uint32_t lane() const { return std::uint32_t{1} << running % kWarp; }  // its bit
};
constinit thread_local Block* block = nullptr;
constexpr int kScheduler = -1;

// Stacks begin at different places of a page: at the same one the parts of them that are in use
// would share a few sets of the processor's caches, and changing fibres take most of a test's time.
char* stack(int fibre) {
  return block->stacks.get() + fibre * (kStack + kStagger);
}

// Leaves `from`, and returns when it is gone on with.
void change(Context& from, int to) {
  block->running = to;
  thread_index = dim3(static_cast<unsigned>(to));
  Context::change(from, to == kScheduler ? block->scheduler : block->fibres[to]);
}

// A fibre that can go on: of the warp that runs, so that few stacks are in use, else of the next
// warps. The scheduler if there is none.
int next_fibre() {
  const int warp = block->running / kWarp, next_lane = block->running % kWarp + 1;
  if (const std::uint32_t ready = block->warps[warp].ready; ready != 0) {
    return warp * kWarp + (next_lane + std::countr_zero(std::rotr(ready, next_lane))) % kWarp;
  }
  const int warps = static_cast<int>(block_size.x) / kWarp;
  for (int i = 1; i < warps; ++i) {
    const int other = (warp + i) % warps;
    const std::uint32_t ready = block->warps[other].ready;
    if (ready != 0) return other * kWarp + std::countr_zero(ready);
  }
  return kScheduler;
}

// Until what the running fibre waits for makes it ready; for ever once it has ended.
void wait() {
  block->warp().ready &= ~block->lane();
  change(block->fibres[block->running], next_fibre());
}

void release_barrier() {
  if (block->live == 0 || block->arrived < block->live) return;
  block->counts[block->barrier % 2] = block->count;
  ++block->barrier;
  block->arrived = block->count = 0;
  for (Warp& warp : block->warps) warp.ready |= std::exchange(warp.at_barrier, 0);
}

void entry() {
  (*block->kernel)();
  --block->live;
  release_barrier();  // threads that have ended are not waited for
  wait();
}

void run_block(int threads) {
  block->live = threads;
  block->arrived = block->count = 0;
  for (Warp& warp : block->warps) warp = {};
  for (int i = 0; i < threads; ++i) block->fibres[i].start(stack(i), entry);
  change(block->scheduler, 0);
  if (block->live > 0) {
    throw std::logic_error("the threads of a block wait for each other for ever");
  }
}

std::mutex memory_mutex;
std::unordered_map<void*, std::size_t> memory_sizes;

}  // namespace

int barrier(bool predicate) {
  const int number = block->barrier;
  ++block->arrived;
  block->count += predicate ? 1 : 0;
  release_barrier();
  if (block->barrier == number) {
    block->warp().at_barrier |= block->lane();
    wait();
  }
  return block->counts[number % 2];
}

const std::uint64_t* exchange(std::uint64_t value) {
  Warp& warp = block->warp();
  const int number = warp.number;
  warp.values[number % 2][block->running % kWarp] = value;
  if (++warp.arrived == kWarp) {
    warp.arrived = 0;
    ++warp.number;
    warp.ready = ~std::uint32_t{0};
  } else {
    wait();
  }
  return warp.values[number % 2];
}

uint4 load_transposed(const uint4* row) {
  const std::uint64_t* rows = exchange(reinterpret_cast<std::uint64_t>(row));
  const int lane = block->running % kWarp, first = lane % 4 * 2, column = lane / 4;
  unsigned result[4];
  for (int matrix = 0; matrix < 4; ++matrix) {
    const auto element = [&](int at) -> unsigned {
      return reinterpret_cast<const std::uint16_t*>(rows[matrix * 8 + at])[column];
    };
    result[matrix] = element(first) | element(first + 1) << 16;
  }
  __syncwarp();  // no lane writes what another has yet to read
  return make_uint4(result[0], result[1], result[2], result[3]);
}

void multiply_add(float (&sums)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t b) {
  const int lane = block->running % kWarp, row = lane / 4, first = lane % 4 * 2;
  std::uint64_t left[4];
  std::copy_n(exchange(std::uint64_t{a1} << 32 | a0) + row * 4, 4, left);
  const std::uint64_t* right = exchange(b);
  // Of the lane that has k, and k + 1 above it.
  const auto value = [](std::uint64_t bits, int k) {
    return __uint_as_float(static_cast<unsigned>(bits >> (k % 2 * 16) & 0xffffu) << 16);
  };
  for (int k = 0; k < 8; ++k) {
    for (int i = 0; i < 4; ++i) {
      const std::uint64_t a = left[k / 2] >> (i / 2 * 32);
      sums[i] += value(a, k) * value(right[(first + i % 2) * 4 + k / 2], k);
    }
  }
}

void run(dim3 grid, int threads, const std::function<void()>& kernel) {
  static thread_local Block own;
  block = &own;
  grid_size = grid;
  block_size = dim3(static_cast<unsigned>(threads));
  if (threads % kWarp != 0) throw std::logic_error("blocks are whole warps");
  if (static_cast<int>(block->fibres.size()) < threads) {
    block->fibres.resize(static_cast<std::size_t>(threads));
    block->stacks = std::make_unique_for_overwrite<char[]>(threads * (kStack + kStagger));
  }
  block->warps.resize(static_cast<std::size_t>(threads) / kWarp);
  block->kernel = &kernel;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        block_index = dim3(x, y, z);
        run_block(threads);
      }
    }
  }
}

cudaError_t allocate(void** memory, std::size_t bytes) {
  const std::lock_guard lock(memory_mutex);
  if (bytes > device_room) return cudaErrorMemoryAllocation;
  *memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  if (*memory == nullptr) return cudaErrorMemoryAllocation;
  std::memset(*memory, 0xff, bytes);
  device_room -= bytes;
  memory_sizes[*memory] = bytes;
  return cudaSuccess;
}

void release(void* memory) {
  const std::lock_guard lock(memory_mutex);
  device_room += memory_sizes[memory];
  memory_sizes.erase(memory);
  std::free(memory);
}

}  // namespace emulator
